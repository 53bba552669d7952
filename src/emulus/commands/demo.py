"""The main job: show within a minute what the committed model can do, then that a model learns from nothing."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emulus.commands.out import check_out
from emulus.commands.shipped import MODEL, shipped
from emulus.data.source import Source, even, open_source
from emulus.data.tokenize import tokenize
from emulus.errors import EmulusError
from emulus.evaluate import (
    EvaluateConfig,
    Example,
    Gallery,
    GalleryCounts,
    Report,
    Section,
    Shot,
    Tile,
    evaluate,
    galleries,
    held_out_examples,
    write_report,
)
from emulus.evaluate.asking import Shown
from emulus.evaluate.evaluate import REPORT_FILE
from emulus.flags import parse_flags
from emulus.loading import load
from emulus.log import logger
from emulus.pipeline import Emulus
from emulus.recipes.demo import demo_tiny
from emulus.recipes.emoji import DATA
from emulus.train.config import TrainConfig
from emulus.train.loop import Interrupted
from emulus.train.pretrain import pretrain
from emulus.train.tokenizer import train_tokenizer

SHOWN = GalleryCounts(reconstructions=6, reconstructed_clips=2, pictures=8, clips=3, continuations=3, captions=8)
ASKED = 8
TINY_SHOWN = GalleryCounts(reconstructions=6, reconstructed_clips=2, pictures=6, clips=2, continuations=0, captions=0)
NOTHING = GalleryCounts(reconstructions=0, reconstructed_clips=0, pictures=0, clips=0, continuations=0, captions=0)


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Show a model at all five tasks, then train a tiny one and measure the first; writes a page twice and says where.

    Attributes:
        model: The model to show.
        data: The data set it was trained on.
        out: Where everything goes.
        steps_share: Share of the tiny recipe's steps; 0 trains nothing.
        seed: Of everything drawn.
    """

    model: Path = MODEL
    data: Path = DATA
    out: Path = Path("runs/demo")
    steps_share: float = 1.0
    seed: int = 0


def demo(arguments: Sequence[str]) -> None:
    """``emulus demo``."""
    options = parse_flags(DemoOptions, arguments, program="emulus demo")
    if options.model == MODEL:
        options = dataclasses.replace(options, model=shipped(MODEL, "--model"))
    if options.data == DATA:
        options = dataclasses.replace(options, data=shipped(DATA, "--data"))
    page = (options.out / REPORT_FILE).resolve()
    check_out(page, "file")
    started = time.monotonic()
    shown = show(options, page)
    logger.info(f"done in {time.monotonic() - started:.0f} s; open the page while the rest is made:")
    print(page, flush=True)
    runs: tuple[Path, ...] = ()
    tiny: tuple[Section, ...] = ()
    if options.steps_share > 0:
        try:
            runs, tiny = _train_tiny(options)
        except Interrupted:
            raise EmulusError("the demo was stopped; it starts over when it is run again") from None
    logger.info(f"measuring {options.model} on a few held-out items; emulus evaluate takes more")
    config = EvaluateConfig(
        model=options.model,
        data=options.data,
        out=options.out,
        quick=True,
        show=NOTHING,
        runs=(options.model / "vision", *runs),
        seed=options.seed,
    )
    evaluate(config, more=(*shown, *tiny))
    print(f"the report: {page}")


def show(options: DemoOptions, page: Path) -> tuple[Section, ...]:
    """Let the model do its five tasks on a few held-out items, and write the first page.

    Args:
        options: Which model and which items.
        page: The file to write.

    Returns:
        The page's sections.

    Raises:
        EmulusError: The model is not whole, or the data hold nothing that was held out.
    """
    source = open_source(options.data)
    model = load(options.model)
    logger.info(f"{options.model} draws, animates, continues, describes and answers, all about things it never saw")
    examples = _examples(model, source, options)
    reconstructed, *tasks = galleries(model, examples, SHOWN, seed=options.seed)
    sections = (*tasks, answers(model, even(examples, ASKED)), reconstructed)
    text = (
        "Everything here is from items that the model was not trained on. What is shown is what the commands give "
        "first; nothing was picked by hand. Figures and learning curves follow when they are there: load this page "
        "again."
    )
    write_report(Report(title=f"Emulus: {options.model.resolve().name}", text=text, sections=sections), page)
    return sections


def answers(model: Emulus, examples: Sequence[Example]) -> Section:
    """Every question that the data set has about an item, or if it has none two that suit anything."""
    logger.info(f"answering questions about {len(examples)} pictures and clips")
    tiles = []
    for example in examples:
        asked = dict(example.item.questions) or {"what is it?": "", "which style?": ""}
        given = Shown(model, example.media, list(asked)).write()
        words = " · ".join(f"{question} {answer or '(nothing)'}" for question, answer in given.items())
        true = "; ".join(answer for answer in asked.values() if answer) or example.caption
        tiles.append(Tile(shots=(Shot(media=example.original),), text=words, note=f"true: {true}"))
    return Section(
        title="Questions answered",
        text="Held-out pictures and clips, questions about them, and the model's likeliest words.",
        blocks=(Gallery(tiles=tuple(tiles)),),
    )


def _train_tiny(options: DemoOptions) -> tuple[tuple[Path, ...], tuple[Section, ...]]:
    """Train the tiny recipe from nothing; its runs, and what the result draws."""
    folder = options.out / "tiny"
    # From nothing each time: an earlier demo's model would make this one's curves a lie.
    if folder.exists() and not (folder / "tokenizer").is_dir():
        raise EmulusError(f"{folder} is there already and not an earlier demo's; choose another --out")
    shutil.rmtree(folder, ignore_errors=True)
    recipe = demo_tiny(data=options.data, runs=folder)
    assert recipe.tokenizer is not None, "this recipe trains one"
    logger.info("training a tiny vision tokenizer from nothing")
    train_tokenizer(dataclasses.replace(recipe.tokenizer, train=_shortened(recipe.tokenizer.train, options)))
    tokenize(recipe.tokens)
    logger.info("training a tiny decoder from nothing")
    pretrain(dataclasses.replace(recipe.decoder, train=_shortened(recipe.decoder.train, options)))
    model = load(recipe.decoder.out)
    examples = _examples(model, open_source(options.data), options)
    sections = galleries(model, examples, TINY_SHOWN, seed=options.seed)
    titled = [
        dataclasses.replace(part, title=f"Trained from nothing just now: {part.title.lower()}") for part in sections
    ]
    return (recipe.tokenizer.out, recipe.decoder.out), tuple(titled)


def _examples(model: Emulus, source: Source, options: DemoOptions) -> list[Example]:
    """Enough to show: an even spread over the held-out pictures and clips."""
    config = EvaluateConfig(model=options.model, data=options.data, out=options.out, pictures=16, clips=4)
    return held_out_examples(model, source, config)


def _shortened(config: TrainConfig, options: DemoOptions) -> TrainConfig:
    return dataclasses.replace(config, steps=max(int(config.steps * options.steps_share), 1))
