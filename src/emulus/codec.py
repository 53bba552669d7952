"""text -> checked values: the one strict reader of JSON, YAML and the plain values they hold.

Files come from strangers. What they hold is bounded (size, nesting, number of values) and typed here, so that the code
behind never meets a list where it expects a number. Every error is one line that names the file and the field.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from emulus.errors import EmulusError, did_you_mean, shown

T = TypeVar("T")

MAX_DEPTH = 64
"""Nesting of lists and mappings. Configs have 3 levels, tokenizer.json about 8."""
MAX_YAML_BYTES = 2**18
"""A config has a few kilobytes, and PyYAML reads about 100 kB per second."""
MAX_YAML_VALUES = 100_000
"""YAML aliases let a kilobyte stand for billions of values."""
MAX_INTEGER = 2**63
MAX_NUMBER = 64
"""Characters of a number in YAML."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HTML = re.compile(rb"[\xef\xbb\xbf\s]*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)


def parse_json(data: bytes | str, where: str, *, remedy: str = "restore it from its source") -> Any:
    """Parse JSON.

    Args:
        data: UTF-8, with or without a byte order mark.
        where: Names the file or line in errors.
        remedy: Ends the message.

    Raises:
        EmulusError: Not UTF-8, not JSON, nested deeper than :data:`MAX_DEPTH`, or a number of thousands of digits.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data.removeprefix("\ufeff")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        raise EmulusError(f"{where} is not UTF-8 text (byte {error.start:,}); {remedy}") from None
    except RecursionError:
        raise EmulusError(f"{where} is nested deeper than {MAX_DEPTH} levels; {remedy}") from None
    except ValueError as error:
        # Beside JSONDecodeError: "Exceeds the limit (4300 digits) for integer string conversion".
        reason = "it is empty" if not text.strip("\0 \t\r\n") else shown(error, quote=False)
        if _HTML.match(text[:200].encode(errors="replace")):
            raise EmulusError(f"{where} is not JSON but a web page, saved in its place; {remedy}") from None
        raise EmulusError(f"{where} is not valid JSON ({reason}); it may be truncated: {remedy}") from None
    _check_nesting(value, where, remedy=remedy)
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that also reads 1e-3 as a number, as YAML 1.2 and JSON do, and bounds merge keys."""

    merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Copy in what ``<<`` names: a few lines of merges of merges stand for billions of fields."""
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                continue
            for each in value.value if isinstance(value, yaml.SequenceNode) else (value,):
                if isinstance(each, yaml.MappingNode):
                    self.flatten_mapping(each)
                    self.merged += len(each.value) + 1
            if self.merged > MAX_YAML_VALUES:
                raise yaml.YAMLError(f"its merge keys (<<) copy more than {MAX_YAML_VALUES:,} values")
        super().flatten_mapping(node)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Numbers as long as numbers are: 1:1:1 is one to the base of 60, and takes time by its length squared."""
        if len(node.value) > MAX_NUMBER:
            raise yaml.YAMLError(f"a number of {len(node.value):,} characters; put texts in quotes")
        is_whole = node.tag == "tag:yaml.org,2002:int"
        value: int | float = self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
_Loader.yaml_implicit_resolvers = {key: list(found) for key, found in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML that holds nothing but mappings with text keys, lists, texts, numbers, booleans and nulls.

    Args:
        text: The content.
        where: Names the file in errors.

    Raises:
        EmulusError: Not YAML, too large, nested too deeply, or a value of another type (such as a date).
    """
    if len(text) > MAX_YAML_BYTES:
        raise EmulusError(f"{where} has {len(text):,} characters, and a config has at most {MAX_YAML_BYTES:,}")
    try:
        value = yaml.load(text, Loader=_Loader)  # derived from the safe loader
    except RecursionError:
        raise EmulusError(f"{where} is nested deeper than {MAX_DEPTH} levels; write fields and values only") from None
    # Beside YAMLError, PyYAML's constructors raise whatever int(), date() and indexing raise.
    except yaml.YAMLError as error:
        raise EmulusError(f"{where} is not valid YAML ({shown(error, quote=False)}); fix that line") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise EmulusError(
            f"{where} is not valid YAML: a tag (!!) or a date has a value that it cannot have "
            f"({shown(error, quote=False)}); write plain values, texts in quotes"
        ) from None
    _check_nesting(value, where, most=MAX_YAML_VALUES, plain=True, remedy="write fields and values only")
    return value


def _check_nesting(value: Any, where: str, *, remedy: str, most: float = math.inf, plain: bool = False) -> None:
    """Refuse what is nested too deeply or holds too many values; with ``plain`` also what JSON could not hold.

    Level by level, not by recursion. An alias counts as often as it is used.
    """
    level, count = [value], 0
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
                if plain and (odd := next((key for key in each if not isinstance(key, str)), None)) is not None:
                    raise EmulusError(f"{where}: the key {shown(odd)} is not text; put it in quotes")
            elif isinstance(each, list):
                below += each
            elif plain and not (each is None or isinstance(each, str | bool | int | float)):
                raise EmulusError(f"{where}: {shown(each)} is read as {type(each).__name__}; put it in quotes")
            if count + len(below) > most:
                raise EmulusError(f"{where} holds more than {most:,.0f} values; {remedy}")
        count += len(below)
        level = [each for each in below if plain or isinstance(each, dict | list)]
        if not level:
            return
    raise EmulusError(f"{where} is nested deeper than {MAX_DEPTH} levels; {remedy}")


def check_not_placeholder(head: bytes, path: Path) -> None:
    """Refuse what is saved in the place of a binary file when a download or clone goes wrong.

    Args:
        head: The first bytes of the file, 200 or all of them.
        path: Names it.

    Raises:
        EmulusError: It is empty, a Git LFS pointer or a web page.
    """
    check_not_lfs(head, path)
    if not head.strip(b"\0 \t\r\n"):
        what = "it begins with zeros, as unfinished downloads do" if head else "it is empty"
        raise EmulusError(f"{path} is damaged or truncated ({what}); fetch it again")
    if _HTML.match(head):
        raise EmulusError(f"{path} is a web page (a download link's answer), not the file itself; fetch it again")


def check_not_lfs(head: bytes, path: Path) -> None:
    """Refuse a Git LFS pointer, which stands for the file in a clone made without git-lfs.

    Args:
        head: The first bytes of the file.
        path: Names it.

    Raises:
        EmulusError: It is one.
    """
    if head.startswith(_LFS_POINTER):
        raise EmulusError(
            f"{path} is a Git LFS pointer, not the file itself; run 'git lfs install && git lfs pull' in its clone"
        )


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    """The value itself, a mapping with text keys.

    Raises:
        EmulusError: It is something else.
    """
    if not isinstance(value, Mapping):
        raise EmulusError(f"{where} holds {_kind_of(value)}, not fields with values")
    if (odd := next((key for key in value if not isinstance(key, str)), None)) is not None:
        raise EmulusError(f"{where}: the key {shown(odd)} is not text")
    return dict(value)


def decode(kind: Any, value: Any, where: str) -> Any:
    """Check a parsed value against a type and build it.

    Understands ``bool``, ``int`` (below 2^63), ``float`` (finite; whole numbers too), ``str``, ``Path``, ``None``,
    ``Any``, ``Literal``, unions, ``tuple[X, ...]``, ``tuple[X, Y]``, ``list[X]``, ``Sequence[X]``, ``dict[str, X]``,
    ``Mapping[str, X]`` and dataclasses. Nothing is converted: ``1.0`` is no ``int``, ``"1"`` is no number.

    Args:
        kind: The type.
        value: What was parsed.
        where: Names the field in errors, such as ``config.json: hidden_size``.

    Returns:
        The value; dataclasses and paths are built.

    Raises:
        EmulusError: The value is of another type or out of bounds, or a field is unknown or missing.
    """
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return _decode_union(options, value, where)
    if origin is typing.Literal:
        # By type as well: True == 1.
        if not any(type(value) is type(option) and value == option for option in options):
            raise EmulusError(f"{where}: {shown(value)} is not one of {', '.join(map(str, options))}")
        return value
    if origin in (tuple, list, Sequence):
        return _decode_list(origin, options, value, where)
    if origin in (dict, Mapping):
        entries = as_mapping(value, where)
        return {
            name: decode(options[1], each, f"{where}, {shown(name, quote=False)}") for name, each in entries.items()
        }
    if dataclasses.is_dataclass(kind):
        return decode_fields(typing.cast(type, kind), value, where)
    return _decode_scalar(kind, value, where)


def decode_fields(kind: type[T], value: Any, where: str, *, ignore: Iterable[str] = ()) -> T:
    """Build a dataclass from a parsed mapping.

    Args:
        kind: The dataclass; its own checks (``__post_init__``) run as well.
        value: What was parsed.
        where: Names it in errors.
        ignore: Keys that may be there and mean nothing here.

    Raises:
        EmulusError: As :func:`decode`.
    """
    values = as_mapping(value, where)
    kinds = _field_types(typing.cast(Hashable, kind))
    passed_over = frozenset(ignore)
    known = {name: each for name, each in values.items() if name in kinds}
    for name in values:
        if name not in kinds and name not in passed_over:
            raise EmulusError(f"{where}: unknown key {shown(name)}{did_you_mean(name, kinds)}")
    missing = [field.name for field in dataclasses.fields(kind) if _is_required(field) and field.name not in known]  # type: ignore[arg-type]
    if missing:
        raise EmulusError(f"{where} lacks {', '.join(missing)}; restore it from its source")
    built = {name: decode(kinds[name], each, f"{where}: {name}") for name, each in known.items()}
    try:
        return kind(**built)
    except EmulusError as error:
        raise EmulusError(f"{where}: {error}") from None


@functools.cache
def _field_types(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.init and field.default is missing and field.default_factory is missing


def _decode_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    for option in rest[:-1]:
        try:
            return decode(option, value, where)
        except EmulusError:
            continue
    return decode(rest[-1], value, where)


def _decode_list(origin: Any, options: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise EmulusError(f"{where} must be a list, got {_kind_of(value)} {shown(value)}")
    if origin is tuple and options[-1] is not Ellipsis:
        if len(value) != len(options):
            raise EmulusError(f"{where} must hold {len(options)} values, got {len(value)}")
        return tuple(
            decode(kind, each, f"{where}[{i}]") for i, (kind, each) in enumerate(zip(options, value, strict=True))
        )
    found = [decode(options[0], each, f"{where}[{i}]") for i, each in enumerate(value)]
    return tuple(found) if origin is tuple else found


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


def _decode_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is type(None) and value is None:
        return None
    plain = isinstance(value, int) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and plain and -MAX_INTEGER <= value < MAX_INTEGER:
        return value
    if kind is float and (isinstance(value, float) or (plain and abs(value) < MAX_INTEGER)) and math.isfinite(value):
        return float(value)
    if kind in (str, Path) and isinstance(value, str) and _is_encodable(value):
        if kind is str:
            return value
        if "\0" not in value:
            return Path(value)
    raise EmulusError(f"{where} must be {_NAMES.get(kind, kind)}, got {_kind_of(value)} {shown(value)}".rstrip())


def _is_encodable(text: str) -> bool:
    # JSON can spell halves of characters (lone surrogates), which nothing can write or print.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind_of(value: Any) -> str:
    if value is None:
        return "nothing"
    kinds = ((bool, "the boolean"), (int | float, "the number"), (str, "the text"), (Mapping, "an object"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "a list")
