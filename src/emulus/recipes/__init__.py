"""Named, complete configs as functions: ``emulus tokenizer-train emoji-64``, ``tokenize``, ``pretrain``."""

from __future__ import annotations

from emulus.errors import EmulusError, did_you_mean
from emulus.recipes.demo import demo_tiny
from emulus.recipes.emoji import emoji_64
from emulus.recipes.recipe import Recipe

RECIPES = {"demo-tiny": demo_tiny, "emoji-64": emoji_64}


def recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        EmulusError: There is none; names the nearest.
    """
    if name not in RECIPES:
        raise EmulusError(f"there is no recipe {name!r}{did_you_mean(name, RECIPES)}")
    return RECIPES[name]()


__all__ = ["RECIPES", "Recipe", "recipe"]
