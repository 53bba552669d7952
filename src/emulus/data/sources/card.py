"""The card of a Hugging Face data set: which files are of which split, by the ``configs`` in its README.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emulus.codec import as_mapping, parse_yaml
from emulus.data.item import Split
from emulus.data.sources.account import Account
from emulus.data.sources.splits import split_called, split_named
from emulus.data.sources.walk import glob_to_regex
from emulus.errors import EmulusError, shown

CARD = "README.md"
_MOST = 2**20
_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
# Other keys hold dates and whatever else; this one is all that is needed.
_CONFIGS = re.compile(r"^configs:[^\n]*\n(?:[ \t#-][^\n]*\n|\r?\n)*", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says about a data set's files.

    Attributes:
        config: The config that is read.
        files: The files of it, each with its split, or None where the name of its split says nothing.
        others: Files of other configs, each with the name of one.
    """

    config: str
    files: Mapping[str, Split | None]
    others: Mapping[str, str]


def read_card(root: Path, names: Iterable[str], account: Account) -> Card | None:
    """Read the card of a data set, if it has one that says where its files are.

    Args:
        root: The data set's folder.
        names: Of all files in it.
        account: Is told which config is read, or that the card cannot be.

    Raises:
        EmulusError: The card has several configs and says of none that it is the default.
    """
    path = root / CARD
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            text = file.read(_MOST).decode("utf-8", "replace")
    except OSError:
        return None
    front = _FRONT.match(text)
    block = _CONFIGS.search(front[1]) if front else None
    if block is None:
        return None
    try:
        configs = as_mapping(parse_yaml(block[0], f"{path}: configs"), f"{path}: configs").get("configs")
    except EmulusError as error:
        account.note(f"the card is not used: {error}")
        return None
    names = list(names)
    found = {name: files for name, files in _configs(configs, names) if files}
    if not found:
        # A part of the data set, or one whose files lie elsewhere.
        account.note("the card is not used: its configs name no file that is here")
        return None
    chosen = _default(configs, list(found), root)
    if len(found) > 1:
        account.note(
            f"the card's config {shown(chosen)} is read, of {len(found)} (another: name its files by a pattern)"
        )
    others = {name: config for config, files in found.items() for name in files if name not in found[chosen]}
    return Card(config=chosen, files=found[chosen], others=others)


def _default(configs: Any, found: list[str], root: Path) -> str:
    named = [
        str(each.get("config_name")) for each in configs if isinstance(each, Mapping) and each.get("default") is True
    ]
    for name in (*named, "default"):
        if name in found:
            return name
    if len(found) > 1:
        listed = shown(", ".join(found), quote=False)
        raise EmulusError(
            f"{root / CARD} lists {len(found)} configs ({listed}) and none is the default; name the folder of "
            "one, or its files by a pattern such as 'FOLDER/NAME/*.parquet'"
        )
    return found[0]


def _configs(configs: Any, names: list[str]) -> Iterator[tuple[str, dict[str, Split | None]]]:
    for number, config in enumerate(configs if isinstance(configs, list) else []):
        if not isinstance(config, Mapping):
            continue
        prefix = str(config.get("data_dir") or "").strip("./")
        prefix = f"{prefix}/" if prefix else ""
        files: dict[str, Split | None] = {}
        patterns = list(_patterns(config.get("data_files")))
        if not patterns and prefix:
            patterns = [("", "**")]
        for split, pattern in patterns:
            matches = re.compile(glob_to_regex(prefix + pattern.removeprefix("./"))).fullmatch
            for name in names:
                if matches(name):
                    files.setdefault(name, split_called(split) or split_named(split))
        yield str(config.get("config_name") or f"config {number + 1}"), files


def _patterns(data_files: Any) -> Iterator[tuple[str, str]]:
    """Pairs of a split and a pattern, of all forms that cards have."""
    if isinstance(data_files, str):
        yield "train", data_files
    elif isinstance(data_files, list):
        for each in data_files:
            if isinstance(each, str):
                yield "train", each
            elif isinstance(each, Mapping):
                yield from _of_split(each.get("split") or "train", each.get("path"))
    elif isinstance(data_files, Mapping):
        for split, paths in data_files.items():
            yield from _of_split(split, paths)


def _of_split(split: Any, paths: Any) -> Iterator[tuple[str, str]]:
    for path in [paths] if isinstance(paths, str) else paths if isinstance(paths, list) else []:
        if isinstance(path, str):
            yield str(split), path
