"""A model and held-out data -> figures.json and report.html."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from emulus.data.source import Item, Source, even, open_source
from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.data.tokens import TokenizedItem, Tokens, vision_digest
from emulus.dual import DualEncoder
from emulus.errors import EmulusError, at_least
from emulus.evaluate.answers import answers
from emulus.evaluate.bars import bars
from emulus.evaluate.bounds import bounds
from emulus.evaluate.choice import Choice, choose, make_groups
from emulus.evaluate.clips import ClipConfig, clip_figures
from emulus.evaluate.continuation import ContinuationConfig
from emulus.evaluate.curves import curves_of
from emulus.evaluate.drawing import DrawingConfig, drawing_figures
from emulus.evaluate.galleries import GalleryCounts, galleries
from emulus.evaluate.held_out import Example, encode_examples
from emulus.evaluate.likelihood import likelihood
from emulus.evaluate.peers import nearest
from emulus.evaluate.reconstruction import reconstruct
from emulus.evaluate.report import Report, Section, Text, write_report
from emulus.evaluate.summary import Measurements, bars_section, figures_section
from emulus.evaluate.sweeps import SweepConfig, sweeps, sweeps_section
from emulus.files import write_json
from emulus.loading import load
from emulus.log import logger
from emulus.pipeline import Emulus
from emulus.sequence import Image, Video
from emulus.tokenizer.vision.weights import load_vision_tokenizer
from emulus.weights import find_model

FIGURES_FILE = "figures.json"
REPORT_FILE = "report.html"
DUAL = "dual"
"""Folder of the dual encoder beside a model."""

PartName = Literal["tokenizer", "drawing", "clips", "answers", "choice", "bits", "sweeps"]
MIXED, SAME = "mixed styles", "same style"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a model on data that it was not trained on.

    Attributes:
        model: A whole model's folder, or a run's.
        data: A data set (see docs/data.md).
        out: Where ``figures.json`` and ``report.html`` go.
        title: Heading of the report; names the model by default.
        tokens: The tokens folder that the model was trained on, for all that is compared with the training data;
            without one training items are encoded first.
        dual: The dual encoder that judges drawings; by default ``MODEL/dual`` if it is there.
        split: What to measure on: ``validation``, ``test`` or ``both``.
        parts: What to measure.
        quick: Take a few of everything, for a look in under a minute.
        pictures: Most pictures, evenly spread; 0 takes all.
        clips: Most clips, likewise.
        files: Pictures of which WebP and JPEG files of equal bits are made, and an eighth as many clips.
        documents: Most items whose ids are scored; 0 takes all.
        training_items: Without ``tokens``, training items to compare with, evenly spread; 0 takes all, which are
            encoded to ``out`` once. With fewer, counting models, neighbours and the search for copies are weaker.
        drawings: Held-out captions that are drawn.
        various: Captions that are drawn four times each, to see how much drawings differ.
        continuations: Clips that are continued.
        animations: Clips that are drawn from captions.
        answers: Items that are described and asked about.
        choice_groups: Groups of pictures of one style to choose among, both ways; half as many of mixed styles.
        choice_size: Pictures in a group.
        rank_groups: Groups to choose captions among, of one style and of mixed styles each.
        rank_size: Pictures in such a group.
        sweeps: Captions that are drawn at each of some fifteen settings.
        show: How much the report shows.
        runs: Training runs whose curves the report shows; the model's own is found by itself.
        device: ``auto``, ``cpu``, ``cuda`` ...
        seed: Of everything drawn, and of the groups.
    """

    model: Path
    data: Path
    out: Path
    title: str = ""
    tokens: Path | None = None
    dual: Path | None = None
    split: Literal["validation", "test", "both"] = "validation"
    parts: tuple[PartName, ...] = get_args(PartName)
    quick: bool = False
    pictures: int = 0
    clips: int = 0
    files: int = 64
    documents: int = 160
    training_items: int = 1000
    drawings: int = 96
    various: int = 6
    continuations: int = 16
    animations: int = 8
    answers: int = 256
    choice_groups: int = 3
    choice_size: int = 16
    rank_groups: int = 1
    rank_size: int = 100
    sweeps: int = 24
    show: GalleryCounts = field(default_factory=GalleryCounts)
    runs: tuple[Path, ...] = ()
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(0, pictures=self.pictures, clips=self.clips, documents=self.documents, seed=self.seed)
        at_least(0, training_items=self.training_items, choice_groups=self.choice_groups, files=self.files)
        at_least(0, drawings=self.drawings, various=self.various, continuations=self.continuations)
        at_least(0, animations=self.animations, answers=self.answers, rank_groups=self.rank_groups, sweeps=self.sweeps)
        at_least(2, choice_size=self.choice_size, rank_size=self.rank_size)
        if unknown := set(self.parts) - set(get_args(PartName)):
            raise EmulusError(f"unknown parts {', '.join(sorted(unknown))}; there are {', '.join(get_args(PartName))}")


_QUICK: Mapping[str, int] = {
    "pictures": 32,
    "clips": 4,
    "files": 8,
    "documents": 12,
    "training_items": 100,
    "drawings": 8,
    "various": 2,
    "continuations": 2,
    "animations": 1,
    "answers": 12,
    "choice_groups": 1,
    "choice_size": 8,
    "rank_groups": 0,
    "sweeps": 0,
}
_QUICK_SHOWN = GalleryCounts(reconstructions=6, reconstructed_clips=2, pictures=4, clips=1, continuations=1, captions=4)


def quickly(config: EvaluateConfig) -> EvaluateConfig:
    """The same with a few of everything, or as many as were asked for where those are fewer."""
    # 0 takes all of these.
    endless = {"pictures", "clips", "documents", "training_items"}
    asked = {
        name: most if name in endless and not getattr(config, name) else min(getattr(config, name), most)
        for name, most in _QUICK.items()
    }
    shown = {name: min(value, getattr(_QUICK_SHOWN, name)) for name, value in dataclasses.asdict(config.show).items()}
    return dataclasses.replace(config, **asked, show=GalleryCounts(**shown))  # type: ignore[arg-type]


def evaluate(config: EvaluateConfig, *, more: Sequence[Section] = ()) -> dict[str, Any]:
    """Measure a model, let it draw, animate, continue and describe, and write all of that.

    Args:
        config: What, on what.
        more: Further sections of the report, put at its end.

    Returns:
        What ``figures.json`` holds.

    Raises:
        EmulusError: The model is not whole, the data hold nothing to measure, the tokens are of another tokenizer, or
            there is no dual encoder where one is said to be.
    """
    started = time.monotonic()
    config = quickly(config) if config.quick else config
    model = load(config.model, device=config.device)
    source = open_source(config.data)
    examples = held_out_examples(model, source, config)
    measured, sections = measure(model, examples, source, config)
    found = bars(
        size=model.defaults.height,
        reconstruction=measured.reconstruction,
        same_style=measured.choice.get(SAME),
        answers=measured.answers,
        clips=measured.clips,
        drawing=measured.drawing,
    )
    begun = time.process_time()
    shown = galleries(model, examples, config.show, seed=config.seed)
    seconds = {**measured.seconds, "pictures shown": time.process_time() - begun}
    measured = dataclasses.replace(measured, seconds=seconds)
    figures = {
        "model": str(config.model),
        "data": str(config.data),
        "split": config.split,
        "seed": config.seed,
        "quick": config.quick,
        "bars": [dataclasses.asdict(bar) for bar in found],
        **dataclasses.asdict(measured),
    }
    write_json(config.out / FIGURES_FILE, figures)
    report = Report(
        title=config.title or f"Emulus: {config.model.resolve().name}",
        text="Everything here is from items that the model was not trained on. What is shown is what the model "
        f"gives first; nothing was picked by hand. Made in {time.monotonic() - started:,.0f} seconds.",
        sections=(
            bars_section(found, _about_bars(config, measured)),
            figures_section(measured, _about_figures(config, measured)),
            *sections,
            *shown,
            *_curve_sections(config),
            *more,
        ),
    )
    write_report(report, config.out / REPORT_FILE)
    return figures


def held_out_examples(model: Emulus, source: Source, config: EvaluateConfig) -> list[Example]:
    """The held-out pictures, then the clips, as codes.

    Raises:
        EmulusError: There are none.
    """
    items = [
        item for item in source if item.split == config.split or (config.split == "both" and item.split != "train")
    ]
    chosen = []
    for kind, most in (("image", config.pictures), ("video", config.clips)):
        of_kind = [item for item in items if item.kind == kind]
        chosen += even(of_kind, most or len(of_kind))
    logger.info(f"encoding {len(chosen)} held-out items")
    examples = encode_examples(model, chosen, what="encoding held-out items")
    if not examples:
        raise EmulusError(f"{config.data} has no readable item in the split {config.split!r}: nothing to measure")
    return examples


class Outcome(NamedTuple):
    """What a part found out: fields of :class:`Measurements`, and sections of the report."""

    figures: Mapping[str, Any]
    sections: tuple[Section, ...] = ()


class Given:
    """What the parts are given to measure.

    Attributes:
        model: A whole model.
        examples: Held-out items.
        source: The data set.
        config: How much.
    """

    def __init__(self, model: Emulus, examples: Sequence[Example], source: Source, config: EvaluateConfig) -> None:
        self.model = model
        self.examples = examples
        self.source = source
        self.config = config

    @cached_property
    def training(self) -> list[TokenizedItem]:
        """Training items as codes."""
        return training_items(self.model, self.source, self.config)

    @cached_property
    def known(self) -> list[Item]:
        """All training pictures and clips."""
        return [item for item in self.source if item.split == "train" and item.kind != "text"]

    @cached_property
    def dual(self) -> DualEncoder | None:
        """The dual encoder, if there is one."""
        own = find_model(self.config.model) / DUAL
        folder = self.config.dual or (own if own.is_dir() else None)
        return None if folder is None else DualEncoder.load(folder)

    def some(self, count: int, kind: type[Image | Video] | None = None) -> list[Example]:
        """So many examples, evenly spread."""
        return even([each for each in self.examples if kind is None or isinstance(each.media, kind)], count)


def measure(
    model: Emulus, examples: Sequence[Example], source: Source, config: EvaluateConfig
) -> tuple[Measurements, list[Section]]:
    """All figures, and what the report says of them beside the table of figures.

    A part that cannot be measured here is left out, and it is said why.

    Raises:
        EmulusError: The tokens or the dual encoder that were named are not right.
    """
    given = Given(model, examples, source, config)
    figures: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    left_out: dict[str, str] = {}
    sections: list[Section] = []
    needed = [name for name in config.parts if _asked(config, name)]
    begun = time.process_time()
    if {"drawing", "answers", "choice", "bits"} & set(needed):
        _ = given.training  # what was named wrongly is better found before the first part than after it
    _ = given.dual
    seconds["training items"] = time.process_time() - begun
    for place, name in enumerate(needed, start=1):
        logger.info(f"part {place} of {len(needed)}: {name}")
        begun = time.process_time()
        try:
            outcome = PARTS[name](given)
        except EmulusError as error:
            left_out[name] = str(error)
            logger.warning(f"{name} is left out: {error}")
        else:
            figures |= outcome.figures
            sections += outcome.sections
        seconds[name] = time.process_time() - begun
    return Measurements(**figures, seconds=seconds, left_out=left_out), sections


def _asked(config: EvaluateConfig, part: PartName) -> bool:
    """Whether there is anything to do for a part."""
    counts = {
        "drawing": config.drawings,
        "clips": config.continuations + config.animations,
        "answers": config.answers,
        "choice": config.choice_groups + config.rank_groups,
        "sweeps": config.sweeps,
    }
    return bool(counts.get(part, 1))


def _tokenizer(given: Given) -> Outcome:
    """Reconstructions of all, and files of equal bits of some."""
    files = given.config.files
    logger.info(f"reconstructing {len(given.examples)} held-out items, and looking for files of equal bits for {files}")
    found = reconstruct(given.model.vision, given.examples, codecs=False)
    some = [*given.some(files, Image), *given.some(files // 8, Video)]
    if some:
        beside = reconstruct(given.model.vision, some)
        found = dataclasses.replace(found, codecs=beside.codecs, clip_codecs=beside.clip_codecs)
    return Outcome({"reconstruction": found})


def _drawing(given: Given) -> Outcome:
    config = given.config
    counts = DrawingConfig(pictures=config.drawings, various=config.various)
    pictures = [item for item in given.known if item.kind == "image"]
    known = {item.id for item in given.training}
    # Copies are looked for among the same training pictures in all ways.
    same = [item for item in pictures if item.id in known]
    found = drawing_figures(
        given.model, given.examples, given.training, same or pictures, given.dual, counts, seed=config.seed
    )
    if found is None:
        raise EmulusError("there are too few held-out or training pictures to compare drawings with")
    return Outcome({"drawing": found[0]}, (found[1],))


def _clips(given: Given) -> Outcome:
    config = given.config
    factor = given.model.vision.config.temporal_factor
    half = max(given.model.defaults.num_frames // factor // 2, 1) * factor
    counts = ClipConfig(
        continuation=ContinuationConfig(clips=config.continuations, given=half), drawn=config.animations
    )
    found = clip_figures(given.model, given.examples, counts, seed=config.seed)
    if found is None:
        raise EmulusError("there are no held-out clips")
    return Outcome({"clips": found[0]}, (found[1],))


def _answers(given: Given) -> Outcome:
    asked = given.some(given.config.answers)
    logger.info(f"describing {len(asked)} held-out items and asking about them")
    return Outcome({"answers": answers(given.model, asked, given.known, given.training)})


def _choice(given: Given) -> Outcome:
    """Choice among pictures of all styles and of one; without groups where there are too few pictures."""
    config, model = given.config, given.model
    items = [example.tokenized for example in given.examples]
    found: dict[str, Choice] = {}
    for kind, size, count, pictures in (
        (SAME, config.choice_size, config.choice_groups, True),
        (MIXED, config.choice_size, (config.choice_groups + 1) // 2, True),
        (f"{SAME}, more", config.rank_size, config.rank_groups, False),
        (f"{MIXED}, more", config.rank_size, config.rank_groups, False),
    ):
        if not count:
            continue
        groups = make_groups(items, size=size, count=count, same_style=kind.startswith(SAME), seed=config.seed)
        logger.info(
            f"choosing among {size} {'pictures and captions' if pictures else 'captions'}, {len(groups)} groups"
        )
        shown = [item for group in groups for item in group]
        peers = nearest(model.vision, shown, given.training)
        words = {item.id: peer.captions[0] for item, peer in zip(shown, peers, strict=True) if peer and peer.captions}
        choice = choose(model.decoder, model.grammar, groups, pictures=pictures, neighbours=words)
        if choice is not None:
            found[kind] = choice
    return Outcome({"choice": found})


def _bits(given: Given) -> Outcome:
    scored = given.some(given.config.documents or len(given.examples))
    logger.info(f"scoring {len(scored)} held-out items, beside counts of {len(given.training)} training items")
    model = given.model
    found = likelihood(model.decoder, model.grammar, [example.tokenized for example in scored], given.training)
    beside = bounds(model.vision, scored, given.training, found, files=max(given.config.files, 1))
    return Outcome({"likelihood": found, "bounds": beside})


def _sweeps(given: Given) -> Outcome:
    config = SweepConfig(drawings=max(given.config.sweeps, 2))
    found = sweeps(given.model, given.examples, given.dual, config, seed=given.config.seed)
    if found is None:
        raise EmulusError("there are too few held-out pictures")
    return Outcome({"sweeps": found}, (sweeps_section(found, given.model.vision.config.codebook_size),))


PARTS: Mapping[PartName, Callable[[Given], Outcome]] = {
    "tokenizer": _tokenizer,
    "drawing": _drawing,
    "clips": _clips,
    "answers": _answers,
    "choice": _choice,
    "bits": _bits,
    "sweeps": _sweeps,
}


def training_items(model: Emulus, source: Source, config: EvaluateConfig) -> list[TokenizedItem]:
    """What the model was trained on, as codes.

    Raises:
        EmulusError: The tokens folder is not whole, or of another vision tokenizer.
    """
    if config.training_items and config.tokens is None:
        chosen = even([item for item in source if item.split == "train"], config.training_items)
        logger.info(f"encoding {len(chosen)} training items for the counting models")
        return [example.tokenized for example in encode_examples(model, chosen, what="encoding training items")]
    folder = config.tokens
    if folder is None:
        logger.info("encoding the training split for the counting models, once")
        folder = tokenize(
            TokenizeConfig(
                sources=(config.data,),
                vision=find_model(config.model) / "vision",
                out=config.out / f"tokens-{vision_digest(model.vision)[:12]}",
                splits=("train",),
                size=model.defaults.height,
                fps=model.defaults.fps,
                max_frames=model.defaults.num_frames,
                views=1,
                text_size=model.text.size,
                device=config.device,
            )
        )
    tokens = Tokens.open(folder)
    if vision_digest(load_vision_tokenizer(folder / "vision")) != vision_digest(model.vision):
        raise EmulusError(
            f"{folder} was made by another vision tokenizer than {config.model}'s: give the right --tokens"
        )
    items = tokens.items("train")
    return even(items, config.training_items) if config.quick else items


def _about_bars(config: EvaluateConfig, measured: Measurements) -> str:
    words = ["What a model of emoji that fits into a repository should reach on code points that it never saw."]
    if config.quick:
        words.append("Measured on very few items, for a quick look: the figures say little.")
    words += [f"{name.capitalize()} was left out: {reason}." for name, reason in measured.left_out.items()]
    return " ".join(words)


def _about_figures(config: EvaluateConfig, measured: Measurements) -> str:
    """What the figures were measured on, and what to bear in mind."""
    split = {"both": "validation and test splits"}.get(config.split, f"{config.split} split")
    words = [
        f"On the {split} of {config.data.name}. WebP and JPEG get as many bits as the codes of a picture; data that "
        "are stored as WebP themselves, as the emoji are, favour WebP a little."
    ]
    if (bits := measured.likelihood) is not None:
        words.append(
            f"The unigram and bigram models counted {bits.training_ids:,} training ids and are smoothed as suits "
            "the held-out ids best, which favours them; they are told which ids are visual and which are words, the "
            "decoder is not. Row ends and the size text, which the grammar knows, count for nobody."
        )
    if config.training_items and (config.quick or config.tokens is None):
        words.append(
            f"Only {config.training_items:,} training items were counted, and only among these nearest ones were "
            "looked for, so what the model is compared with is weaker than it could be."
        )
    if not measured.choice and "choice" in config.parts and config.choice_groups:
        words.append(f"There are too few pictures for groups of {config.choice_size} to choose among.")
    return " ".join(words)


def _curve_sections(config: EvaluateConfig) -> list[Section]:
    own = (config.model,) if config.model not in config.runs else ()
    sections = []
    for run in (*own, *config.runs):
        curves = curves_of(run)
        if curves is not None:
            sections.append(
                Section(
                    title=f"Training of {run.resolve().name}",
                    text="Lines are training batches, averaged over neighbouring steps; points are held-out data.",
                    blocks=(curves,),
                )
            )
        elif run in config.runs:
            sections.append(Section(title=f"Training of {run.name}", blocks=(Text(text="No figures were found."),)))
    return sections
