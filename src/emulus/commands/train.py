"""The three stages of a recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from emulus.config import from_flags
from emulus.data.tokenize import tokenize as run_tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.errors import EmulusError, did_you_mean, shown
from emulus.recipes import RECIPES, Recipe, recipe
from emulus.train.plan import describe_plan
from emulus.train.pretrain import pretrain as run_pretrain
from emulus.train.tokenizer import train_tokenizer

Config = TypeVar("Config")

MOST_PROCESSES = 10**6


def tokenizer_train(arguments: Sequence[str]) -> None:
    """``emulus tokenizer-train RECIPE [--config FILE] [flags]``."""
    chosen, rest = take_recipe(arguments, "tokenizer-train")
    if chosen.tokenizer is None:
        name = arguments[0]
        raise EmulusError(f"{name} takes a vision tokenizer that is there already; go on with emulus tokenize {name}")
    config = from_flags(chosen.tokenizer, rest, program="emulus tokenizer-train RECIPE")
    print(train_tokenizer(config))


def tokenize(arguments: Sequence[str]) -> None:
    """``emulus tokenize RECIPE [--config FILE] [flags]``, or ``emulus tokenize SOURCES... --vision DIR --out DIR``."""
    words = list(arguments)
    leading = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    if words and words[0] in RECIPES:
        default, words = recipe(words[0]).tokens, words[1:]
        program = "emulus tokenize RECIPE"
    else:
        default, words = _of_sources(words[:leading], words[leading:]), words[leading:]
        program = "emulus tokenize SOURCES... --out DIR"
    print(run_tokenize(from_flags(default, words, program=program, description=_TOKENIZE)))


_TOKENIZE = (
    "Encode pictures, clips and texts as ids. With a RECIPE as the first word ("
    + ", ".join(RECIPES)
    + ") everything has the recipe's values; else all words before the first flag are data sets (folders, Parquet, "
    "tars, tables or texts; see docs/data.md), and --vision or --vocabulary says with what. Running the same command "
    "again goes on where it stopped."
)


def _of_sources(sources: Sequence[str], flags: Sequence[str]) -> TokenizeConfig:
    """The plain config for some data sets; where they go must be said.

    Raises:
        EmulusError: There are none, or the only one is rather a misspelt recipe.
    """
    if not sources and not {"-h", "--help"} & set(flags):
        raise EmulusError(
            "name a recipe or data sets: emulus tokenize RECIPE, or emulus tokenize SOURCES... --vision DIR --out DIR; "
            f"recipes are {', '.join(RECIPES)}"
        )
    first = sources[0] if sources else ""
    if sources and not Path(first).exists() and not any(letter in first for letter in "*?[/\\"):
        raise EmulusError(
            f"{shown(first)} is neither a recipe nor a data set that is here{did_you_mean(first, RECIPES)}"
        )
    required: Any = tyro.MISSING
    return TokenizeConfig(sources=tuple(map(Path, sources)) or (Path("SOURCES"),), out=required)


def pretrain(arguments: Sequence[str]) -> None:
    """``emulus pretrain RECIPE [--dry-run [PROCESSES]] [--config FILE] [flags]``."""
    chosen, rest = take_recipe(arguments, "pretrain")
    processes, rest = _dry_run(rest)
    about = "--dry-run [PROCESSES] says what the run would be, and starts nothing."
    config = from_flags(chosen.decoder, rest, program="emulus pretrain RECIPE", description=about)
    if processes is not None:
        print(describe_plan(config, processes or 1))
    else:
        model = run_pretrain(config)
        if os.environ.get("RANK", "0") == "0":
            print(model)


def _dry_run(words: list[str]) -> tuple[int | None, list[str]]:
    """The number after ``--dry-run`` (0 if there is none; None without the flag), and the other words.

    Raises:
        EmulusError: What follows is neither a number of processes nor a flag: it would become a value of the flag
            before.
    """
    found = next((place for place, word in enumerate(words) if word.split("=")[0] == "--dry-run"), None)
    if found is None:
        return None, words
    _, equals, value = words[found].partition("=")
    following = words[found + 1 : found + 2]
    takes = not equals and bool(following) and not following[0].startswith("--")
    value = following[0] if takes else value
    if (takes or equals) and not (value.isascii() and value.isdigit() and 0 < int(value[:9]) <= MOST_PROCESSES):
        raise EmulusError(
            f"--dry-run takes a number of processes from 1 to {MOST_PROCESSES:,}, or no value, got {shown(value)}"
        )
    return int(value or 0), words[:found] + words[found + (2 if takes else 1) :]


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
