"""Named, complete configs as functions: ``emulus tokenizer-train emoji-64``, ``tokenize``, ``pretrain``."""

from __future__ import annotations

from collections.abc import Callable

from emulus.errors import EmulusError, did_you_mean
from emulus.recipes.demo import demo_tiny
from emulus.recipes.emoji import emoji, emoji_64
from emulus.recipes.emu3 import emu3_8b_stage1, emu3_8b_stage2
from emulus.recipes.ladder import emoji_3m, emoji_10m, emoji_25m, emoji_60m
from emulus.recipes.recipe import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    "demo-tiny": demo_tiny,
    "emoji": emoji,
    "emoji-64": emoji_64,
    "emoji-3m": emoji_3m,
    "emoji-10m": emoji_10m,
    "emoji-25m": emoji_25m,
    "emoji-60m": emoji_60m,
    "emu3-8b-stage1": emu3_8b_stage1,
    "emu3-8b-stage2": emu3_8b_stage2,
}


def recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        EmulusError: There is none; names the nearest.
    """
    if name not in RECIPES:
        raise EmulusError(f"there is no recipe {name!r}{did_you_mean(name, RECIPES)}")
    return RECIPES[name]()


__all__ = ["RECIPES", "Recipe", "recipe"]
