"""Options: what counts as a number or a text, and that everything else is one short line with the option's name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from emulus.checks import choice, flag, number, several, shown, text, whole
from emulus.errors import EmulusError


class Odd:
    def __repr__(self) -> str:
        raise ValueError("no")


def kind(value: object) -> str:
    return type(value).__name__


NOTHING_OF_THE_KIND = [
    None,
    "3",
    b"3",
    [],
    {},
    Odd(),
    object,
    1j,
    np.array([1, 2]),
    torch.ones(1),
    torch.ones((), device="meta"),
]


@pytest.mark.parametrize(
    "value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int8)]
)
def test_whole_numbers(value: Any) -> None:
    assert whole("n", value, least=1, most=3) == 3
    assert type(whole("n", value)) is int
    assert number("n", value) == 3.0


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5), torch.tensor(0.5).bfloat16()]
)
def test_numbers(value: Any) -> None:
    assert number("n", value, least=0.5, most=0.5, above=0) == 0.5
    assert type(number("n", value)) is float
    with pytest.raises(EmulusError, match=r"n is 0.5 but must be a whole number"):
        whole("n", value)


@pytest.mark.parametrize("check", [whole, number])
@pytest.mark.parametrize(
    "value",
    [*NOTHING_OF_THE_KIND, True, np.bool_(True), torch.tensor(True), math.nan, math.inf, -1, 10**400, -(10**5000)],
    ids=kind,
)
def test_what_is_no_number(check: Callable[..., Any], value: Any) -> None:
    with pytest.raises(EmulusError, match=r"^steps is .* but must be a (whole )?number") as raised:
        check("steps", value, least=0, most=1e9 if check is number else 10**9)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("value", [*NOTHING_OF_THE_KIND[2:], None, 3])
def test_what_is_no_text(value: Any) -> None:
    with pytest.raises(EmulusError, match=r"^prompt is .* but must be text"):
        text("prompt", value)
    with pytest.raises(EmulusError, match=r"^kind is .* but must be one of a, b"):
        choice("kind", value, ["a", "b"])


def test_choices_and_flags() -> None:
    assert choice("kind", "a", ["a", "b"]) == "a"
    with pytest.raises(EmulusError, match="there is no kind 'alph'; did you mean 'alpha'"):
        choice("kind", "alph", ["alpha", "beta"])
    assert flag("on", np.bool_(True))
    assert not flag("on", False)
    for value in (1, "yes", None, np.array([True, False])):
        with pytest.raises(EmulusError, match=r"on is .* but must be True or False"):
            flag("on", value)


def test_lists() -> None:
    assert several("prompts", ("a", "b"), str) == ("a", "b")
    for value in ("a", {"a": 1}, {"a"}, iter("a"), None, np.array(["a"])):
        with pytest.raises(EmulusError, match=r"prompts is .* but must be a list"):
            several("prompts", value, str)


@pytest.mark.parametrize(
    "value", [*NOTHING_OF_THE_KIND, "x" * 10**6, b"x" * 10**6, 10**5000, torch.zeros(1000)], ids=kind
)
def test_whatever_it_is_it_is_shown_shortly(value: Any) -> None:
    assert 0 < len(shown(value)) < 120
