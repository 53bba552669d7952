"""A command line -> a dataclass, by tyro; what it cannot understand is one line that names the nearest flag."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import typing
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from emulus.errors import UsageError, shown
from emulus.lazy import later

if TYPE_CHECKING:
    import tyro
else:
    tyro = later("tyro")

Options = TypeVar("Options")

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_RULE = re.compile("[\u2500-]{4,}")
_UNKNOWN = "Unrecognized options:"
_IS_WORD = re.compile("[a-z-]+")
_NUMBER = re.compile(r"invalid literal for int\(\) with base 10|could not convert string to float")


def parse_flags(
    kind: type[Options],
    arguments: Sequence[str],
    *,
    program: str,
    default: Options | None = None,
    description: str = "",
) -> Options:
    """Read a command line.

    Args:
        kind: The dataclass; its docstring explains the flags.
        arguments: The words.
        program: Shown in the help and in errors.
        default: What holds where nothing is said.
        description: Shown in the help; by default what the docstring says.

    Raises:
        UsageError: A flag is unknown, a value is missing or not of its type.
    """
    printed = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    if description:
        given["description"] = description
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=list(arguments), prog=program, **given)
    except SystemExit as end:
        if not end.code:
            raise  # --help
        raise UsageError(_in_one_line(printed.getvalue(), kind, default, program)) from None


def _in_one_line(box: str, kind: type, default: Any, program: str) -> str:
    """What tyro's box says in its first part; the rest are the flag's help and others like it."""
    lines = [_COLOURS.sub("", line).strip("\u2502\u256d\u256e\u2570\u256f+|").rstrip() for line in box.splitlines()]
    # Below the title, which where the terminal has no such letters is underlined.
    said = list(itertools.dropwhile(_RULE.search, lines[1:]))
    said = list(itertools.takewhile(lambda line: not _RULE.search(line), said))
    text = " ".join(line.strip() for line in said)
    # "emulus pretrain RECIPE" is not to be typed as it stands.
    helped = f"see {' '.join(itertools.takewhile(_IS_WORD.fullmatch, program.split()))} --help"
    if text.startswith(_UNKNOWN):
        words = [word.strip() for word in text.removeprefix(_UNKNOWN).split(",")]
        flag = next((word for word in words if word.startswith("-")), None)
        if flag is None:
            return f"{program} has no use for {shown(words[0])}: quote what is one argument, or {helped}"
        flags = list(_flags(kind if default is None else type(default), default))
        flags = [name for name in flags if flag.startswith("--no-") or not name.startswith("--no-")]
        close = difflib.get_close_matches(flag[:100], flags, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"there is no flag {shown(flag, quote=False)}; {hint}{helped}"
    if text.startswith("Missing from"):
        missing = [line.strip() for line in said if re.match(r" {4,7}\S", line)]
        named = [each for each in missing if each.startswith("-")]
        # tyro calls these by their types. Words fill them in order, so the last are missing.
        positional = _positional(kind)[len(named) - len(missing) :] if len(named) < len(missing) else []
        return f"{program} needs {', '.join([*positional, *named])}; {helped}"
    if _NUMBER.search(text):
        text = _NUMBER.sub("not a number", text)
    return f"{text.rstrip('.') or 'the flags are not understood'}; {helped}"


def _positional(kind: Any) -> list[str]:
    """What the words without a flag are that must be there, in order."""
    kinds = typing.get_type_hints(kind, include_extras=True)
    required = (field for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING)
    return [field.name.upper() for field in required if _is_positional(kinds[field.name])]


def _is_positional(kind: Any) -> bool:
    return tyro.conf.Positional in getattr(kind, "__metadata__", ())


def _flags(kind: Any, default: Any, prefix: str = "") -> Iterator[str]:
    """The flags of a dataclass, those of the dataclasses in it with their names before them."""
    kinds = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = f"{prefix}{field.name.replace('_', '-')}"
        value = getattr(default, field.name, None)
        inner = type(value) if dataclasses.is_dataclass(value) else kinds[field.name]
        if dataclasses.is_dataclass(inner):
            yield from _flags(inner, value, f"{name}.")
        else:
            yield f"--{name}"
            if isinstance(value, bool) or kinds[field.name] is bool:
                yield f"--{prefix}no-{field.name.replace('_', '-')}"
