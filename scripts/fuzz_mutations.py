"""Ways to damage a file: bytes of any file, and values of those that hold JSON, YAML or lines of JSON."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

TEXTUAL = (".json", ".jsonl", ".yaml", ".csv", ".txt", ".tiktoken", ".md")

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 1.5, -0.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan")),
    *(2**31, 2**63, 10**30, 10**400),
    *("", " ", "x", "\n", "a\nb", "\x1b[2J", "\0", "../x", "/etc/passwd", "x" * 5000, "é" * 300, "\ud800", "1", "nan"),
    *([], {}, [None], [[]], [0] * 5000, {"a": {}}, ["x", 1], "train", "float32"),
)
"""Values that stand where others are expected."""

RAW: tuple[bytes, ...] = (
    *(b"[" * 3000, b"{" * 3000, b"9" * 5000, b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\x1b[2J", b"&a [*a]\n"),
    *(b"!!bool x\n", b"!!int ''\n", b"out: 2001-01-01T99:99:99Z\n", b"? [a]\n", b'"', b"'", b",", b":", b"}", b"]"),
    *(b"NaN", b"1e999", b"-", b"\\ud800", b"<html>", b"version https://git-lfs.github.com/spec/v1\n"),
)
"""Pieces of text that parsers stumble over."""


def damaged(content: bytes, name: str, luck: Random, others: Sequence[bytes] = ()) -> bytes:
    """A damaged version of a file.

    Args:
        content: The file's.
        name: Says by its suffix what the file holds.
        luck: Chooses.
        others: Content of other files, of which pieces may be put in.
    """
    if name.endswith(TEXTUAL) and luck.random() < 0.7:
        found = _damaged_values(content, luck)
        if found is not None:
            return found
    for _ in range(luck.choice((1, 1, 1, 2, 5, 20))):
        content = luck.choice(_BYTES)(content, luck, others)
    return content


def _damaged_values(content: bytes, luck: Random) -> bytes | None:
    """JSON, or a line of it, with another value, key or order somewhere; None for what is no JSON."""
    lines = content.split(b"\n") if b"\n{" in content else [content]
    place = luck.randrange(len(lines))
    try:
        value = json.loads(lines[place])
    except (ValueError, RecursionError):
        return None
    for _ in range(luck.choice((1, 1, 2, 4))):
        value = _with_damage(value, luck)
    try:
        lines[place] = json.dumps(value, ensure_ascii=luck.random() < 0.5).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return None
    return b"\n".join(lines)


def _with_damage(value: Any, luck: Random) -> Any:
    """The value with one of its parts replaced, renamed, removed, doubled or nested."""
    if isinstance(value, dict) and value and luck.random() < 0.9:
        name = luck.choice(list(value))
        way = luck.random()
        if way < 0.08:
            return {key: each for key, each in value.items() if key != name}
        if way < 0.16:
            return {
                (luck.choice(("", "x" * 3000, "\x1b[2J", f"{name} ")) if key == name else key): each
                for key, each in value.items()
            }
        return {key: _with_damage(each, luck) if key == name else each for key, each in value.items()}
    if isinstance(value, list) and value and luck.random() < 0.8:
        place, way = luck.randrange(len(value)), luck.random()
        if way < 0.1:
            return value[:place] + value[place + 1 :]
        if way < 0.2:
            return value[: place + 1] * luck.choice((2, 100))
        return [_with_damage(each, luck) if index == place else each for index, each in enumerate(value)]
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and luck.random() < 0.4:
        return luck.choice(
            (value + 1, value - 1, -value, value * 2, value * 10**6, float(value), str(value), [value], value / 2)
        )
    if luck.random() < 0.05:
        for _ in range(luck.choice((3, 70, 500))):
            value = [value]
        return value
    return luck.choice(HOSTILE)


def _flip(content: bytes, luck: Random, others: Sequence[bytes]) -> bytes:
    if not content:
        return b"x"
    changed = bytearray(content)
    for _ in range(luck.choice((1, 1, 3, 10))):
        changed[luck.randrange(len(changed))] ^= 1 << luck.randrange(8)
    return bytes(changed)


def _overwrite(content: bytes, luck: Random, others: Sequence[bytes]) -> bytes:
    place, size = luck.randrange(len(content) + 1), luck.choice((1, 2, 4, 8, 64, 1024))
    piece = luck.randbytes(size) if luck.random() < 0.5 else bytes([luck.choice((0, 255, 127, 32))]) * size
    return content[:place] + piece + content[place + size :]


def _number(content: bytes, luck: Random, others: Sequence[bytes]) -> bytes:
    """A count, size or offset somewhere becomes another."""
    kind = luck.choice("<>") + luck.choice("HIQ")
    most = 2 ** (8 * struct.calcsize(kind))
    place = luck.randrange(len(content) + 1)
    value = luck.choice((0, 1, most - 1, most // 2, most // 2 - 1, luck.randrange(most), luck.randrange(1000))) % most
    return content[:place] + struct.pack(kind, value) + content[place + struct.calcsize(kind) :]


def _cut(content: bytes, luck: Random, others: Sequence[bytes]) -> bytes:
    return content[: luck.randrange(len(content) + 1)]


def _remove(content: bytes, luck: Random, others: Sequence[bytes]) -> bytes:
    place = luck.randrange(len(content) + 1)
    return content[:place] + content[place + luck.choice((1, 2, 16, 512)) :]


def _repeat(content: bytes, luck: Random, others: Sequence[bytes]) -> bytes:
    place, size = luck.randrange(len(content) + 1), luck.choice((1, 8, 128, 4096))
    return content[:place] + content[place : place + size] * luck.choice((2, 2, 50)) + content[place + size :]


def _insert(content: bytes, luck: Random, others: Sequence[bytes]) -> bytes:
    place = luck.randrange(len(content) + 1)
    return content[:place] + luck.choice(RAW) + content[place:]


def _splice(content: bytes, luck: Random, others: Sequence[bytes]) -> bytes:
    other = luck.choice(others) if others else content
    return content[: luck.randrange(len(content) + 1)] + other[luck.randrange(len(other) + 1) :]


def _replace_all(content: bytes, luck: Random, others: Sequence[bytes]) -> bytes:
    return luck.choice((b"", b"\n", *RAW, luck.randbytes(100)))


_BYTES: tuple[Callable[[bytes, Random, Sequence[bytes]], bytes], ...] = (
    *(_flip, _flip, _flip, _overwrite, _overwrite, _number, _number),
    *(_cut, _remove, _repeat, _insert, _splice, _replace_all),
)
