"""The three stages of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from emulus.config import from_flags
from emulus.data.tokens import tokenize as run_tokenize
from emulus.errors import EmulusError
from emulus.recipes import RECIPES, Recipe, recipe
from emulus.train.pretrain import pretrain as run_pretrain
from emulus.train.tokenizer import train_tokenizer

Config = TypeVar("Config")


def tokenizer_train(arguments: Sequence[str]) -> None:
    """``emulus tokenizer-train RECIPE [--config FILE] [flags]``."""
    chosen, rest = take_recipe(arguments, "tokenizer-train")
    config = from_flags(chosen.tokenizer, rest, program="emulus tokenizer-train RECIPE")
    print(train_tokenizer(config))


def tokenize(arguments: Sequence[str]) -> None:
    """``emulus tokenize RECIPE [--config FILE] [flags]``."""
    chosen, rest = take_recipe(arguments, "tokenize")
    config = from_flags(chosen.tokens, rest, program="emulus tokenize RECIPE")
    print(run_tokenize(config))


def pretrain(arguments: Sequence[str]) -> None:
    """``emulus pretrain RECIPE [--config FILE] [flags]``."""
    chosen, rest = take_recipe(arguments, "pretrain")
    config = from_flags(chosen.decoder, rest, program="emulus pretrain RECIPE")
    print(run_pretrain(config))


def take_recipe(arguments: Sequence[str], verb: str) -> tuple[Recipe, list[str]]:
    """The recipe named by the first word, and the words after it.

    Raises:
        EmulusError: No recipe is named, or there is none of that name.
    """
    words = list(arguments)
    if words and words[0] in ("-h", "--help"):
        return recipe(next(iter(RECIPES))), words
    if not words or words[0].startswith("-"):
        raise EmulusError(f"name a recipe: emulus {verb} RECIPE; there are {', '.join(RECIPES)}")
    return recipe(words[0]), words[1:]
