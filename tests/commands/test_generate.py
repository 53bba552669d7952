"""Drawing and describing from the command line: schedules, words as they come, the progress bar."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest
from PIL import Image

from emulus.cli import main
from emulus.pipeline import Emulus


@pytest.fixture(scope="module")
def model(tiny: Emulus, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return str(folder)


def draw(model: str, out: Path, *options: str) -> Image.Image:
    assert main(["generate", "a red apple", "--model", model, "--out", str(out), *options]) == 0
    return Image.open(out)


def test_schedules(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = draw(model, tmp_path / "a.png", "--schedule", "sequential")
    ahead = draw(model, tmp_path / "b.png", "--schedule", "jacobi", "--window", "3")
    assert "lossy" not in capsys.readouterr().err
    rows = draw(model, tmp_path / "c.png", "--schedule", "zipar", "--window", "1")
    assert capsys.readouterr().err.count("lossy") == 1
    assert plain.tobytes() == ahead.tobytes()
    made = [json.loads(picture.info["emulus"])["schedule"] for picture in (plain, ahead, rows)]
    assert made == ["Sequential()", "Jacobi(window=3)", "Zipar(window=1)"]


def test_a_window_needs_its_schedule(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", "--model", model, "--window", "3"]) == 1
    assert "of jacobi or zipar" in capsys.readouterr().err


def test_one_caption_is_that_of_several(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One is printed as it comes, several when they are there."""
    file = str(tmp_path / "a.png")
    draw(model, Path(file))
    capsys.readouterr()
    for arguments in ([file], [file, file]):
        assert main(["describe", *arguments, "--model", model]) == 0
    text = capsys.readouterr().out
    assert text == text[: len(text) // 3] * 3
    assert main(["describe", file, "--question", "what is it?", "--model", model]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_a_terminal_is_shown_rate_and_time_left(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        draw(model, tmp_path / "a.png", "--num-images", "3")
        shown = os.read(reader, 1 << 16).decode()
    os.close(reader)
    # 16 cells, 4 row ends, and the ends of frame, picture and document.
    assert "0/69" in shown
    assert "ids/s]" in shown


def test_the_shipped_model_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a red apple", "--out", "apple.png"]) == 1
    error = capsys.readouterr().err.strip()
    assert "lies in its repository, at checkpoints/emoji: give --model here" in error
    assert "\n" not in error
