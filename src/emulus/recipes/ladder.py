"""The ladder: one data set, four sizes. What ``emulus scaling`` extrapolates from, and a decoder for every patience."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from emulus.model.config import SIZES
from emulus.recipes.emoji import DATA, emoji_64
from emulus.recipes.recipe import Recipe
from emulus.scaling.rate import rate_at_width

RUNS = Path("runs/emoji-64")
"""The vision tokenizer and the tokens are those of the recipe ``emoji-64``."""


def emoji_3m(data: Path = DATA, runs: Path = RUNS) -> Recipe:
    """2.8 M parameters (2.2 M without the input table), 14 M ids: the smallest of the ladder.

    Hardware: CPU cores with bfloat16 instructions. 0.12 CPU-seconds for 1,000 ids on an AMD EPYC (Zen 5), measured over
    two steps beside other work, hence about 26 CPU-minutes in all. Losses are not measured yet.

    Command: ``emulus pretrain emoji-3m``, after ``emulus tokenizer-train emoji-64`` and ``emulus tokenize emoji-64``.
    """
    return _rung("emoji-3m", data, runs)


def emoji_10m(data: Path = DATA, runs: Path = RUNS) -> Recipe:
    """9.5 M parameters (8.5 M without the input table), 14 M ids.

    Hardware: CPU cores with bfloat16 instructions. 0.37 CPU-seconds for 1,000 ids on an AMD EPYC (Zen 5), measured over
    two steps beside other work, hence about 1.4 CPU-hours in all. Losses are not measured yet.

    Command: ``emulus pretrain emoji-10m``, after ``emulus tokenizer-train emoji-64`` and ``emulus tokenize emoji-64``.
    """
    return _rung("emoji-10m", data, runs)


def emoji_25m(data: Path = DATA, runs: Path = RUNS) -> Recipe:
    """25 M parameters (24 M without the input table), 14 M ids.

    Hardware: CPU cores with bfloat16 instructions. 0.79 CPU-seconds for 1,000 ids on an AMD EPYC (Zen 5), measured over
    two steps beside other work, hence about 2.9 CPU-hours in all. Losses are not measured yet.

    Command: ``emulus pretrain emoji-25m``, after ``emulus tokenizer-train emoji-64`` and ``emulus tokenize emoji-64``.
    """
    return _rung("emoji-25m", data, runs)


def emoji_60m(data: Path = DATA, runs: Path = RUNS) -> Recipe:
    """56 M parameters (54 M without the input table), 14 M ids: the largest of the ladder.

    Hardware: CPU cores with bfloat16 instructions. 1.66 CPU-seconds for 1,000 ids on an AMD EPYC (Zen 5), measured over
    two steps beside other work, hence about 6.2 CPU-hours in all. Losses are not measured yet.

    Command: ``emulus pretrain emoji-60m``, after ``emulus tokenizer-train emoji-64`` and ``emulus tokenize emoji-64``.
    """
    return _rung("emoji-60m", data, runs)


def _rung(size: str, data: Path, runs: Path) -> Recipe:
    """``emoji-64`` with another decoder: the same documents in the same order, the learning rate of its width."""
    recipe = emoji_64(data, runs)
    decoder = recipe.decoder
    width, of = (SIZES[name]["hidden_size"] for name in (size, decoder.size))
    train = dataclasses.replace(decoder.train, learning_rate=rate_at_width(decoder.train.learning_rate, width, of=of))
    # Beside the run of emoji-64, whose folder names the stage: runs/emoji-3m/decoder.
    out = runs.parent / size / "decoder"
    return dataclasses.replace(recipe, decoder=dataclasses.replace(decoder, size=size, out=out, train=train))
