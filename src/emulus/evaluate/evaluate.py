"""A model and held-out data -> figures.json and report.html."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from emulus.data.source import Source, even, open_source
from emulus.data.tokenize import TokenizeConfig, tokenize
from emulus.data.tokens import TokenizedItem, Tokens, vision_digest
from emulus.errors import EmulusError, at_least
from emulus.evaluate.choice import Choice, choose, make_groups
from emulus.evaluate.curves import curves_of
from emulus.evaluate.galleries import GalleryCounts, galleries
from emulus.evaluate.held_out import Example, encode_examples
from emulus.evaluate.likelihood import likelihood
from emulus.evaluate.reconstruction import reconstruct
from emulus.evaluate.report import Report, Section, Text, write_report
from emulus.evaluate.summary import Measurements, figures_section
from emulus.files import write_json
from emulus.log import logger
from emulus.pipeline import Emulus, load
from emulus.tokenizer.vision.weights import load_vision_tokenizer
from emulus.weights import find_model

FIGURES_FILE = "figures.json"
REPORT_FILE = "report.html"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a model on data that it was not trained on.

    Attributes:
        model: A whole model's folder, or a run's.
        data: A data set (see docs/data.md).
        out: Where ``figures.json`` and ``report.html`` go.
        title: Heading of the report; names the model by default.
        tokens: The tokens folder that the model was trained on, for the counting models that its likelihood is compared
            with; without one the training split is encoded first, to ``out/tokens``.
        split: What to measure on: ``validation``, ``test`` or ``both``.
        pictures: Most pictures, evenly spread; 0 takes all.
        clips: Most clips, likewise.
        documents: Most items whose ids are scored; 0 takes all.
        training_items: For a quick look, encode only so many training items for the counting models (they come out
            weaker for it); 0 takes all.
        choice_groups: Groups of pictures to choose among, of mixed and of the same style each; 0 for none.
        choice_size: Pictures in a group.
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
    split: Literal["validation", "test", "both"] = "validation"
    pictures: int = 0
    clips: int = 0
    documents: int = 0
    training_items: int = 0
    choice_groups: int = 4
    choice_size: int = 16
    show: GalleryCounts = field(default_factory=GalleryCounts)
    runs: tuple[Path, ...] = ()
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(0, pictures=self.pictures, clips=self.clips, documents=self.documents, seed=self.seed)
        at_least(0, training_items=self.training_items, choice_groups=self.choice_groups)
        at_least(2, choice_size=self.choice_size)


def evaluate(config: EvaluateConfig, *, more: Sequence[Section] = ()) -> dict[str, Any]:
    """Measure a model, let it draw, animate, continue and describe, and write all of that.

    Args:
        config: What, on what.
        more: Further sections of the report, put at its end.

    Returns:
        What ``figures.json`` holds.

    Raises:
        EmulusError: The model is not whole, the data hold nothing to measure, or the tokens are of another tokenizer.
    """
    started = time.monotonic()
    model = load(config.model, device=config.device)
    source = open_source(config.data)
    examples = held_out_examples(model, source, config)
    measured = measure(model, examples, source, config)
    figures = {
        "model": str(config.model),
        "data": str(config.data),
        "split": config.split,
        "seed": config.seed,
        **dataclasses.asdict(measured),
    }
    write_json(config.out / FIGURES_FILE, figures)
    sections = [
        figures_section(measured, _about_figures(config, measured)),
        *galleries(model, examples, config.show, seed=config.seed),
        *_curve_sections(config),
        *more,
    ]
    report = Report(
        title=config.title or f"Emulus: {config.model.resolve().name}",
        text="Everything here is from items that the model was not trained on. What is shown is the first and only "
        f"try; nothing was picked by hand. Made in {time.monotonic() - started:,.0f} seconds.",
        sections=tuple(sections),
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


def measure(model: Emulus, examples: Sequence[Example], source: Source, config: EvaluateConfig) -> Measurements:
    """All figures of a model.

    Args:
        model: A whole model.
        examples: Held-out items.
        source: The data set with the training items.
        config: How much of everything.

    Raises:
        EmulusError: The tokens are of another vision tokenizer.
    """
    logger.info(f"reconstructing {len(examples)} held-out items, and looking for WebP and JPEG files of equal bits")
    reconstruction = reconstruct(model.vision, examples)
    items = [example.tokenized for example in examples]
    scored = even(items, config.documents or len(items))
    training = training_items(model, source, config)
    logger.info(f"scoring {len(scored)} held-out items, beside counts of {len(training)} training items")
    bits = likelihood(model.decoder, model.grammar, scored, training)
    return Measurements(reconstruction=reconstruction, likelihood=bits, choice=_choices(model, items, config))


def training_items(model: Emulus, source: Source, config: EvaluateConfig) -> list[TokenizedItem]:
    """What the model was trained on, as codes.

    Raises:
        EmulusError: The tokens folder is not whole, or of another vision tokenizer.
    """
    if config.training_items:
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
    return tokens.items("train")


def _choices(model: Emulus, items: Sequence[TokenizedItem], config: EvaluateConfig) -> dict[str, Choice]:
    """Choice among pictures of all styles and of one; without groups where there are too few pictures."""
    found = {}
    for kind, same_style in {"mixed styles": False, "same style": True}.items():
        groups = make_groups(
            items, size=config.choice_size, count=config.choice_groups, same_style=same_style, seed=config.seed
        )
        logger.info(f"choosing among {config.choice_size} pictures, {kind}, {len(groups)} groups")
        choice = choose(model.decoder, model.grammar, groups)
        if choice is not None:
            found[kind] = choice
    return found


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
    if config.training_items:
        words.append(
            f"Only {config.training_items:,} training items were counted, so these two are weaker than they could be."
        )
    if not measured.choice and config.choice_groups:
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
