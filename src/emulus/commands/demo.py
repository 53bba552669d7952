"""The main job: show the committed model, and that a model learns from nothing."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from emulus.commands.generate import MODEL
from emulus.data.source import open_source
from emulus.data.tokenize import tokenize
from emulus.errors import EmulusError
from emulus.evaluate import EvaluateConfig, GalleryCounts, Section, evaluate, galleries, held_out_examples
from emulus.evaluate.evaluate import REPORT_FILE
from emulus.log import logger
from emulus.pipeline import load
from emulus.recipes.demo import demo_tiny
from emulus.recipes.emoji import DATA
from emulus.train.config import TrainConfig
from emulus.train.loop import Interrupted
from emulus.train.pretrain import pretrain
from emulus.train.tokenizer import train_tokenizer

TINY_SHOWN = GalleryCounts(reconstructions=6, reconstructed_clips=2, pictures=6, clips=2, continuations=0, captions=0)


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Show a model and train a tiny one; ends with the path of a report page.

    Attributes:
        model: The model to show.
        data: The data set it was trained on.
        out: Where everything goes.
        steps_share: Share of the tiny recipe's steps; 0 trains nothing.
        pictures: Held-out pictures to measure.
        clips: Held-out clips to measure.
        training_items: Training items that the counting models see.
        choice_groups: Groups of 16 pictures to choose among.
        seed: Of everything drawn.
    """

    model: Path = MODEL
    data: Path = DATA
    out: Path = Path("runs/demo")
    steps_share: float = 1.0
    pictures: int = 96
    clips: int = 16
    training_items: int = 1500
    choice_groups: int = 2
    seed: int = 0


def demo(arguments: Sequence[str]) -> None:
    """``emulus demo``."""
    options = tyro.cli(DemoOptions, args=list(arguments), prog="emulus demo")
    show = EvaluateConfig(
        model=options.model,
        data=options.data,
        out=options.out,
        pictures=options.pictures,
        clips=options.clips,
        training_items=options.training_items,
        choice_groups=options.choice_groups,
        seed=options.seed,
    )
    runs: tuple[Path, ...] = ()
    more: tuple[Section, ...] = ()
    if options.steps_share > 0:
        try:
            runs, more = _train_tiny(options)
        except Interrupted:
            raise EmulusError("the demo was stopped; it starts over when it is run again") from None
    logger.info(f"measuring and showing {options.model}")
    evaluate(dataclasses.replace(show, runs=(options.model / "vision", *runs)), more=more)
    print(f"the report: {(options.out / REPORT_FILE).resolve()}")


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
    config = EvaluateConfig(model=recipe.decoder.out, data=options.data, out=options.out, pictures=16, clips=4)
    model = load(recipe.decoder.out)
    examples = held_out_examples(model, open_source(options.data), config)
    sections = galleries(model, examples, TINY_SHOWN, seed=options.seed)
    titled = [
        dataclasses.replace(part, title=f"Trained from nothing just now: {part.title.lower()}") for part in sections
    ]
    return (recipe.tokenizer.out, recipe.decoder.out), tuple(titled)


def _shortened(config: TrainConfig, options: DemoOptions) -> TrainConfig:
    return dataclasses.replace(config, steps=max(int(config.steps * options.steps_share), 1))
