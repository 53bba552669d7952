"""Configs as text: YAML in and out, and flags. The order is recipe < ``--config`` file < flags."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from emulus.codec import MAX_YAML_BYTES, as_mapping, decode, parse_yaml
from emulus.errors import EmulusError, did_you_mean, shown
from emulus.files import check_path, read_bytes, write_text

Config = TypeVar("Config")


def to_dict(config: Any) -> Any:
    """A config as plain values for YAML: dataclasses to mappings, paths to strings, tuples to lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def merge(base: Config, values: Any, where: str) -> Config:
    """A config with some values replaced.

    Args:
        base: What holds where ``values`` say nothing.
        values: A mapping of field names, nested like the config.
        where: Named in errors.

    Raises:
        EmulusError: An unknown field, or a value that the field cannot hold.
    """
    kinds = typing.get_type_hints(type(base))
    changes = {}
    for name, value in as_mapping(values, where).items():
        if name not in kinds:
            raise EmulusError(f"{where}: unknown field {shown(name)}{did_you_mean(name, kinds)}")
        old = getattr(base, name)
        if dataclasses.is_dataclass(old):
            changes[name] = merge(old, value, f"{where}, {name}")
        else:
            changes[name] = decode(kinds[name], value, f"{where}, {name}")
    try:
        return dataclasses.replace(base, **changes)  # type: ignore[type-var]
    except EmulusError as error:
        raise EmulusError(f"{where}: {error}") from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        EmulusError: It is missing or is not YAML.
    """
    content = read_bytes(path, most=MAX_YAML_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise EmulusError(f"{path} is not UTF-8 text; save the file as UTF-8") from None
    return parse_yaml(text, str(path))


def write_yaml(path: Path, config: Any) -> None:
    """Write a config such that ``--config`` takes it back."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


def from_flags(default: Config, arguments: Sequence[str], *, program: str, description: str = "") -> Config:
    """A config from a command line: ``--config FILE`` over ``default``, flags over both.

    Exits with a usage message (naming the nearest flag) when a flag is unknown or malformed.

    Args:
        default: Usually a recipe's.
        arguments: The command line after the verb and the recipe.
        program: Shown in the help, e.g. ``emulus pretrain``.
        description: Shown in the help.
    """
    rest = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    while "--config" in rest:
        place = rest.index("--config")
        if place + 1 == len(rest):
            raise EmulusError("--config needs a file")
        path = Path(rest[place + 1])
        default = merge(default, read_yaml(path), str(path))
        del rest[place : place + 2]
    text = f"{description} Further: --config FILE, a YAML file of these fields, which flags win over.".strip()
    for word in rest:
        check_path(word, "the command line")
    return tyro.cli(type(default), default=default, args=rest, prog=program, description=text)
