"""Command lines that cannot be understood cost one line, whatever the terminal is like."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from emulus.errors import UsageError
from emulus.flags import parse_flags


@dataclass(frozen=True)
class Inner:
    """Inner.

    Attributes:
        steps: How many.
    """

    steps: int = 3


@dataclass(frozen=True)
class Options:
    """Do something.

    Attributes:
        src: From where.
        out: Whereto, a long explanation that takes more than one line of any terminal and is not what a message needs.
        kind: Which.
        rate: How fast.
        check: Whether.
        inner: More.
    """

    src: Annotated[str, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    kind: Literal["a", "b"] = "a"
    rate: float = 1.0
    check: bool = True
    inner: Inner = field(default_factory=Inner)


def test_flags_become_options() -> None:
    found = parse_flags(Options, ["x", "y", "--inner.steps", "4", "--no-check"], program="emulus it")
    assert found == Options("x", Path("y"), inner=Inner(4), check=False)
    assert parse_flags(Inner, [], program="emulus it", default=Inner(7)) == Inner(7)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["x", "y", "--inner.step", "4"], "there is no flag --inner.step; did you mean --inner.steps? see emulus it"),
        (["x", "y", "--knd", "a"], "did you mean --kind?"),
        (["x", "y", "--no-chek"], "did you mean --no-check?"),
        (["x", "y", "--zzzzzzzz"], "there is no flag --zzzzzzzz; see emulus it --help"),
        (["x", "y", "z"], "emulus it RECIPE has no use for 'z'"),
        (["x"], "emulus it RECIPE needs OUT; see emulus it --help"),
        ([], "emulus it RECIPE needs SRC, OUT; see"),
        (["x", "y", "--rate", "fast"], "--rate: not a number: 'fast'"),
        (["x", "y", "--inner.steps", "9" * 5000], "Error parsing --inner.steps"),
        (["x", "y", "--inner.steps"], "Missing value for argument '--inner.steps'"),
        (["x", "y", "--kind", "c"], "invalid choice 'c' for argument '--kind'. Expected one of ('a', 'b')"),
        (["x", "y", "--kind", "c\n\x1b[2J" * 1000], "invalid choice"),
    ],
)
def test_a_wrong_flag_is_one_line(
    words: list[str], said: str, encoding: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # tyro draws its boxes by what the terminal can show.
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
    with pytest.raises(UsageError) as caught:
        parse_flags(Options, words, program="emulus it RECIPE")
    message = str(caught.value)
    assert said in message
    assert len(message.splitlines()) == 1
    assert len(message) <= 1000
    sys.stdout.flush()
    assert printed.getvalue() == b""
    assert capsys.readouterr().err == ""


def test_help_is_tyros_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_flags(Options, ["--help"], program="emulus it", description="What it does.")
    assert end.value.code == 0
    assert "What it does." in capsys.readouterr().out
