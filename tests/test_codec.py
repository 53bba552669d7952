"""The strict reader: whatever a file holds, it gives checked values or one line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulus.codec import MAX_DEPTH, check_not_lfs, check_not_placeholder, decode, decode_fields, parse_json, parse_yaml
from emulus.errors import EmulusError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@dataclass(frozen=True)
class Inner:
    rate: float
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner | None = None
    kind: Literal["a", "b"] = "a"
    pair: tuple[int, str] = (1, "x")
    table: Mapping[str, int] | None = None
    path: Path | None = None
    flag: bool = False

    def __post_init__(self) -> None:
        if self.count > 100:
            raise EmulusError("count must be at most 100")


def test_a_web_page_in_place_of_json_is_named() -> None:
    for page in (b"<!DOCTYPE html><html>", "\n<html lang='x'>", "\ufeff<HTML>", '<?xml version="1.0"?>'):
        with pytest.raises(EmulusError, match="f is not JSON but a web page, saved in its place; restore"):
            parse_json(page, "f")


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"", "it is empty"),
        (bytes(200), "begins with zeros"),
        (b"\n<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_what_stands_in_the_place_of_a_binary_file(head: bytes, says: str) -> None:
    with pytest.raises(EmulusError, match=says):
        check_not_placeholder(head, Path("it.bin"))
    check_not_placeholder(b"\x10" + bytes(7) + b"{}", Path("it.bin"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0\0",
        "{",
        "[" * 2000,
        "[" * 200_000,
        "9" * 5000,
        '{"a":}',
        b"\xff",
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    ],
)
def test_bad_json_is_one_line(text: str | bytes) -> None:
    with pytest.raises(EmulusError, match=r"^f\.json .*restore it") as caught:
        parse_json(text, "f.json")
    assert "\n" not in str(caught.value)


def test_json_may_begin_with_a_byte_order_mark() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": 1}', "f.json") == {"a": 1}


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_text_is_json_or_refused(text: str | bytes) -> None:
    try:
        parse_json(text, "f")
    except EmulusError:
        with pytest.raises((ValueError, RecursionError)):
            json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)


MERGES = "a: &a {k0: 1, k1: 1, k2: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [{', '.join([f'*{before}'] * 9)}], {after}0: 1}}\n"
    for before, after in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "out: 2001-01-01T99:99:99Z", "out: 2001-01-01", "!!bool x", "!!int ''", "!!int x", "!!float x", "!!timestamp x",
        "!!binary x", "!!set {a}", "!!python/object:os.system x", "[" * 3000, "a: " + "9" * 5000, "? [a]\n: b", "1: 2",
        "&a [*a]", "a: [", "\x00", "%YAML 9.9\n---\na", "!!omap x", "!!merge x", "<<: 3", ALIASES, "- " * 200,
        "a" * 2**19, "a: 0x" + "f" * 10_000, "a: " + "1:" * 50_000 + "1.5", "a: " + "1:" * 100_000 + "1",
    ],
)  # fmt: skip
def test_bad_yaml_is_one_line(text: str) -> None:
    with pytest.raises(EmulusError, match=r"^f\.yaml") as caught:
        parse_yaml(text, "f.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_yaml_that_merges_merges_is_bounded() -> None:
    """Older versions of PyYAML copy every field of every alias, 9 ** 10 here; newer ones copy each once."""
    with contextlib.suppress(EmulusError):
        assert all(len(fields) < 20 for fields in parse_yaml(MERGES, "f.yaml").values())


def test_yaml_merges_what_is_small() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [*a, {z: 4}]}"
    expected = {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2, "z": 4}}
    assert parse_yaml(text, "f") == expected


def test_yaml_reads_numbers_as_json_does() -> None:
    text = "{a: 1e-3, b: -2E5, c: 1.5e+3, d: 7, e: 1e3x, f: .5}"
    assert parse_yaml(text, "f") == {"a": 1e-3, "b": -2e5, "c": 1500.0, "d": 7, "e": "1e3x", "f": 0.5}


@given(st.text(max_size=40))
def test_any_text_is_yaml_or_refused(text: str) -> None:
    with contextlib.suppress(EmulusError):
        parse_yaml(text, "f")


def test_values_become_what_they_are_declared_as() -> None:
    values = {"count": 3, "inner": {"rate": 1, "names": ["x"]}, "pair": [2, "y"], "table": {"k": 4}, "path": "a/b"}
    found = decode(Outer, values, "f")
    assert found == Outer(3, Inner(1.0, ("x",)), "a", (2, "y"), {"k": 4}, Path("a/b"))
    assert type(found.inner.rate) is float


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (5, "f holds the number"),
        ([], "f holds a list"),
        ({}, "f lacks count"),
        ({"count": 1, "cuont": 2}, "unknown key 'cuont'; did you mean 'count'"),
        ({"count": True}, "f: count must be a whole number, got the boolean True"),
        ({"count": 1.0}, "f: count must be a whole number"),
        ({"count": "1"}, "f: count must be a whole number, got the text '1'"),
        ({"count": 10**5000}, "f: count must be a whole number"),
        ({"count": None}, "f: count must be a whole number, got nothing"),
        ({"count": 101}, "f: count must be at most 100"),
        ({"count": 1, "flag": 1}, "flag must be true or false"),
        ({"count": 1, "kind": "c"}, "kind: 'c' is not one of a, b"),
        ({"count": 1, "inner": {"rate": float("nan")}}, "inner: rate must be a number"),
        ({"count": 1, "inner": {"rate": 10**400}}, "inner: rate must be a number"),
        ({"count": 1, "inner": {"rate": 1, "names": [3]}}, r"names\[0\] must be a text"),
        ({"count": 1, "inner": {"rate": 1, "names": "x"}}, "names must be a list"),
        ({"count": 1, "pair": [1]}, "pair must hold 2 values, got 1"),
        ({"count": 1, "path": "a\0b"}, "path must be a path"),
        ({"count": 1, "path": "\ud800"}, "path must be a path"),
        ({"count": 1, "table": {"k" * 5000: "x"}}, "table, k"),
    ],
)
def test_wrong_values_are_one_line(values: Any, said: str) -> None:
    with pytest.raises(EmulusError, match=said) as caught:
        decode(Outer, values, "f")
    assert len(str(caught.value)) < 300


@given(PLAIN | st.dictionaries(st.sampled_from(["count", "inner", "kind", "pair", "table", "path", "flag"]), PLAIN))
def test_any_values_are_built_or_refused(values: Any) -> None:
    with contextlib.suppress(EmulusError):
        assert isinstance(decode(Outer, values, "f"), Outer)


def test_keys_of_others_can_be_ignored() -> None:
    assert decode_fields(Inner, {"rate": 1.0, "x": 2}, "f", ignore={"x"}) == Inner(1.0)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match="git lfs pull"):
        check_not_lfs(b"version https://git-lfs.github.com/spec/v1\noid sha256:0", tmp_path)
