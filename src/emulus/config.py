"""Configs as text: YAML in and out, and flags. The order is recipe < ``--config`` file < flags."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from emulus.errors import EmulusError, did_you_mean
from emulus.files import write_text

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
    if not isinstance(values, Mapping):
        raise EmulusError(f"{where}: expected fields with values, got {values!r}")
    kinds = typing.get_type_hints(type(base))
    changes = {}
    for name, value in values.items():
        if name not in kinds:
            raise EmulusError(f"{where}: unknown field {name!r}{did_you_mean(str(name), kinds)}")
        old = getattr(base, name)
        if dataclasses.is_dataclass(old):
            changes[name] = merge(old, value, f"{where}, {name}")
        else:
            changes[name] = _convert(value, kinds[name], f"{where}, {name}")
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def _convert(value: Any, kind: Any, where: str) -> Any:
    """A YAML value as the type of a field."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, next(o for o in options if o is not type(None)), where)
    if origin is typing.Literal:
        if value not in options:
            raise EmulusError(f"{where}: {value!r} is not one of {', '.join(map(str, options))}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(element, options[0], where) for element in value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    # YAML reads 1e-3 as a string, since it has no dot.
    if kind is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)
        except ValueError:
            pass
    elif isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise EmulusError(f"{where}: {value!r} is not {getattr(kind, '__name__', kind)}")


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        EmulusError: It is missing or is not YAML.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EmulusError(f"there is no config file {path}") from None
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise EmulusError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


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
    return tyro.cli(type(default), default=default, args=rest, prog=program, description=text)
