"""``emulus convert`` as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulus.cli import main
from emulus.commands.convert import parse_bytes
from emulus.errors import EmulusError
from emulus.layouts import inspect_folder
from emulus.pipeline import Emulus


@pytest.fixture
def folder(tiny: Emulus, tmp_path: Path) -> Path:
    tiny.save(tmp_path / "model")
    return tmp_path / "model"


def test_one_line_says_what_was_done(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "half"
    words = ["convert", str(folder), str(out), "--to", "emulus", "--dtype", "bfloat16", "--shard-size", "1MB"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert printed.out.startswith(f"{out}: emulus, ")
    assert printed.out.endswith("every one equal to its source\n")
    assert (out / "model.safetensors.index.json").exists()
    assert inspect_folder(out).vocabulary == inspect_folder(folder).vocabulary


def test_what_is_wrong_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "released"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "other special tokens than Emu3's" in printed.err


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2GiB", 2 * 2**30), ("700", 700), ("1K", 1000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 parsecs", "-1GB", "I"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(EmulusError, match="write it like 5GB"):
        parse_bytes(text)
