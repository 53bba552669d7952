"""Places that cannot be written to, and formats that cannot hold what is asked for, are found before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from emulus.cli import main
from emulus.commands.generate import ModelOptions
from emulus.commands.out import Kind, check_format, check_out
from emulus.errors import EmulusError
from emulus.media import Clip, write_image, write_video
from emulus.outline import Shape
from emulus.pipeline import Emulus


@pytest.fixture
def places(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.png").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("file/x.png", "image", "file is not a folder"),
        ("file/a/b/x.webp", "clip", "file is not a folder"),
        ("file/page.html", "file", "file is not a folder"),
        ("file/model", "folder", "file is not a folder"),
        ("nowhere/x.png", "image", "is not a folder"),
        ("folder.png", "image", "is a folder; name a file"),
        ("folder", "file", "is a folder; name a file"),
        ("file", "folder", "is not a folder; choose another place"),
        ("pipe.png", "image", "not a plain file"),
        ("x" * 300 + ".png", "image", "too long"),
        ("é" * 130 + ".png", "image", "too long"),
        ("/".join(["a" * 200] * 25) + "/x.png", "image", "too long"),
        ("a\0b.png", "image", "zero byte"),
        ("x.tiff", "image", "suffix"),
        ("x", "image", "suffix"),
        ("x.mp4", "image", "would be a clip"),
        ("x.png", "clip", "would be a picture"),
        ("/proc/x.png", "image", "cannot be written"),
        ("/dev/null", "file", "not a plain file"),
        ("/sys/model", "folder", "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_one_line(name: str, kind: Kind, says: str, places: Path) -> None:
    before = sorted(places.iterdir())
    with pytest.raises(EmulusError, match=says) as raised:
        check_out(places / name, kind)
    assert "\n" not in str(raised.value)
    assert sorted(places.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.png", "image"),
        ("old.png", "image"),
        ("new/folders/x.JPG", "image"),
        ("x.gif", "clip"),
        ("folder", "folder"),
        ("new", "folder"),
        ("page", "file"),
        ("x" * 251 + ".png", "image"),
    ],
)
def test_what_can_be_written_leaves_nothing_there(name: str, kind: Kind, places: Path) -> None:
    before = sorted(places.rglob("*"))
    check_out(places / name, kind)
    assert sorted(places.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EmulusError, match="cannot be written"):
        check_out(tmp_path / "x.png", "image")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("x.webp", Shape(8, 16_392), "16383|cannot write"),
        ("x.jpg", Shape(65_536, 8), "cannot write"),
        ("x.gif", Shape(16, 16, 64, 50.5), "at most 50"),
        ("x.gif", Shape(16, 16, 8, 100.0), "at most 50"),
        ("x.webp", Shape(16_392, 8, 8, 8.0), "cannot write"),
    ],
)
def test_what_a_format_cannot_hold(name: str, shape: Shape, says: str, tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match=says):
        check_format(tmp_path / name, shape, clip=shape.frames > 1)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp"])
def test_an_image_that_a_format_holds(name: str, tmp_path: Path) -> None:
    check_format(tmp_path / name, Shape(24, 40), clip=False)


@pytest.mark.parametrize("name", ["x.mp4", "x.webm", "x.webp", "x.gif"])
def test_a_clip_that_a_format_holds(name: str, tmp_path: Path) -> None:
    check_format(tmp_path / name, Shape(15, 17, 8, 12.5), clip=True)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def model(tiny: Emulus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads weights fails."""

    def load(self: ModelOptions) -> Emulus:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(ModelOptions, "load", load)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "a cat", "--out", "{0}/file/x.png"], "is not a folder"),
        (["generate", "a cat", "--out", "{0}/folder.png"], "is a folder"),
        (["generate", "a cat", "--num-images", "2", "--out", "{0}/two.png"], "is a folder"),
        (["generate", "a cat", "--num-images", "0"], "--num-images"),
        (["generate", "a cat", "--height", "18"], "the nearest is 16"),
        (["generate", "a cat", "--height", "400", "--width", "400"], "longest sequence is 256"),
        (["generate", "a cat", "--ratio", "16x9"], "ratio"),
        (["generate", "a cat", "--best-of", "0"], "best_of"),
        (["generate", "a cat", "--top-p", "2"], "top_p"),
        (["generate", "a cat", "--seed", "-1"], "seed"),
        (["generate", "a cat " * 400], "longest sequence"),
        (["generate", " "], "empty"),
        (["animate", "a cat", "--num-frames", "7"], "the nearest is 8"),
        (["animate", "a cat", "--num-frames", "400"], "longest sequence is 256"),
        (["animate", "a cat", "--fps", "0"], "fps"),
        (["animate", "a cat", "--fps", "nan"], "fps"),
        (["animate", "a cat", "--fps", "60", "--out", "{0}/x.gif"], "at most 50"),
        (["continue", "{0}/old.png"], "corrupt|picture|neither"),
        (["continue", "{0}/clip.mp4", "--num-frames", "4"], "num_frames must be more"),
        (["continue", "{0}/clip.mp4", "--top-k", "-1"], "top_k"),
        (["describe", "{0}/image.png", "{0}/old.png"], "old.png"),
        (["describe", "{0}/image.png", "--max-new-tokens", "0"], "max_new_tokens"),
        (["ask", "{0}/image.png", "{0}/old.png", "what is it?"], "old.png"),
        (["ask", "{0}/image.png", "what is it?", "--temperature", "nan"], "temperature"),
    ],
)
def test_nothing_is_loaded_for_what_cannot_be_done(
    arguments: list[str],
    says: str,
    model: Path,
    places: Path,
    unloaded: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_image(Image.new("RGB", (16, 16)), places / "image.png")
    write_video(Clip((Image.new("RGB", (16, 16)),) * 8, 8.0), places / "clip.mp4")
    (places / "two-2.png").mkdir()
    assert main([word.format(places) for word in arguments] + ["--model", str(model)]) == 1
    error = capsys.readouterr().err.strip()
    assert any(word in error for word in says.split("|")), error
    assert "\n" not in error


def test_what_is_checked_is_what_is_made(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All verbs still do their work, also at sizes and lengths that are not the model's own."""
    at = ["--model", str(model)]
    image, clip, longer = (str(tmp_path / name) for name in ("a.png", "b.gif", "c.webp"))
    assert main(["generate", "a cat", "--height", "8", "--width", "24", "--out", image, *at]) == 0
    assert Image.open(image).size == (24, 8)
    assert main(["animate", "a cat", "--num-frames", "4", "--fps", "8", "--out", clip, *at]) == 0
    assert main(["continue", clip, "--out", longer, *at]) == 0
    assert main(["describe", image, image, *at]) == 0
    assert main(["ask", image, clip, "what is it?", *at]) == 0
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "{0}/folder", "--out", "{0}/folder.png"],
        ["evaluate", "{0}/folder", "--out", "{0}/file"],
        ["demo", "--out", "{0}/file/x"],
        ["convert", "{0}/folder", "{0}/file/x", "--to", "emulus"],
        ["quantize", "{0}/folder", "{0}/file", "--to", "int8"],
        ["data", "emoji", "--out", "{0}/file"],
        ["dual-train", "--out", "{0}/file/x"],
    ],
)
def test_other_commands_look_first_too(arguments: list[str], places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word.format(places) for word in arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert "folder" in error
    assert "\n" not in error
