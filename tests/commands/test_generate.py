"""Drawing, describing and asking from the command line: schedules, words, odd files, the progress bar."""

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
from emulus.commands.shipped import MODEL, shipped
from emulus.errors import EmulusError
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


def test_a_question_is_answered_as_in_python(
    model: str, tiny: Emulus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "a.png", tmp_path / "b.webp"
    for path, colour in ((first, (200, 30, 30)), (second, (30, 30, 200))):
        Image.new("RGB", (16, 16), colour).save(path, lossless=True)
    for files in ([first], [first, second]):
        assert main(["ask", *map(str, files), "which one?", "--model", model, "--max-new-tokens", "5"]) == 0
        assert capsys.readouterr().out == tiny.answer(files, "which one?", max_new_tokens=5) + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ask"], "needs a file and a question"),
        (["ask", "--seed", "1"], "needs a file and a question"),
        (["ask", "a.png"], "the question is missing after a.png"),
        (["ask", "a.png", " "], "the question is empty"),
        (["ask", "what is it?", "a.png"], "the question is missing after a.png"),
        (["ask", "what is it?"], "there is no file what is it?"),
        (["ask", "a.png", "what", "is", "it?"], "there is no file what; first the files, then the question in quotes"),
        (["ask", ".", "what is it?"], ". is a folder"),
        (["describe", "--seed", "1"], "needs a file"),
        (["describe", "a.png", "b.png"], "'b.png' does not exist"),
        (["continue", "b.webp"], "'b.webp' does not exist"),
        (["generate", "a cat", "--out", "cat.mp4"], "would be a clip; pictures are .png"),
        (["animate", "a cat", "--out", "cat.jpg"], "would be a picture; clips are"),
        (["animate", "a cat", "--out", "cat"], "no suffix"),
    ],
)
def test_what_is_wrong_with_the_words_is_said_before_a_model_is_read(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    assert main([*words, "--model", "there/is/none"] if len(words) > 1 else words) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_odd_pictures(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever a picture file can be is brought to the model's size; the first frame of an animation is described."""
    odd = {
        "one-pixel.png": Image.new("RGB", (1, 1), (9, 200, 30)),
        "strip.png": Image.new("RGB", (90, 20), (9, 200, 30)),
        "large.webp": Image.new("RGB", (2500, 1200), (9, 200, 30)),
        "clear.png": Image.new("RGBA", (40, 30), (9, 200, 30, 40)),
        "palette.gif": Image.new("P", (20, 20), 3),
        "ink.jpg": Image.new("CMYK", (30, 20), (90, 10, 0, 20)),
        "deep.png": Image.new("I;16", (24, 24), 40_000),
        "bits.tiff": Image.new("1", (24, 24), 1),
    }
    for name, picture in odd.items():
        picture.save(tmp_path / name)
    files = [str(tmp_path / name) for name in odd]
    assert main(["describe", *files, "--model", model, "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.count("\n") == len(odd)
    assert main(["ask", *files[:3], "which one is green?", "--model", model, "--max-new-tokens", "2"]) == 0


def test_another_size_than_it_learnt_is_said(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(model, tmp_path / "a.png")
    assert "learnt" not in capsys.readouterr().err
    draw(model, tmp_path / "a.png", "--height", "8")
    assert "the model learnt 16x16 pixels and does worse at 16x8" in capsys.readouterr().err


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


def test_what_is_shipped_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped(MODEL, "--model") == Path(__file__).parents[2] / MODEL
    MODEL.mkdir(parents=True)
    assert shipped(MODEL, "--model") == MODEL
    with pytest.raises(EmulusError, match=r"data/none comes with Emulus and lies in its repository.*give --data"):
        shipped(Path("data/none"), "--data")
