"""Images and clips come as paths, bytes, files, arrays and tensors; anything else is one short line."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emulus.errors import EmulusError
from emulus.media import Clip, MediaSource, image_to_pixels, is_video, read_image, read_media, read_video

VALUES = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def png() -> bytes:
    content = io.BytesIO()
    Image.fromarray(VALUES).save(content, "PNG")
    return content.getvalue()


def animation() -> bytes:
    content = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (value,) * 3) for value in (0, 200)]
    frames[0].save(content, "PNG", save_all=True, append_images=frames[1:], duration=100)
    return content.getvalue()


class Stream(io.RawIOBase):
    """Bytes that arrive in small pieces, without seeking, as over a network."""

    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        piece = self._content.read(min(len(buffer), 10))
        buffer[: len(piece)] = piece
        return len(piece)


class OnlyReads:
    def __init__(self, content: bytes) -> None:
        self._content = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self._content.read(size)


def files(content: bytes, folder: Path) -> dict[str, MediaSource]:
    path = folder / "a"
    path.write_bytes(content)
    packed = folder / "a.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", content)
    moved = io.BytesIO(content)
    moved.seek(5)
    return {
        "path": path,
        "string": str(path),
        "bytes": content,
        "bytearray": bytearray(content),
        "memoryview": memoryview(content),
        "BytesIO": io.BytesIO(content),
        "BytesIO read before": moved,
        "open file": path.open("rb"),
        "unbuffered file": path.open("rb", buffering=0),
        "member of an archive": zipfile.ZipFile(packed).open("a"),
        "stream": Stream(content),
        "buffered stream": io.BufferedReader(Stream(content)),
        "object with read": OnlyReads(content),
    }


def test_files_in_every_guise(tmp_path: Path) -> None:
    for name, source in files(png(), tmp_path).items():
        assert isinstance(source, MediaSource), name
        np.testing.assert_array_equal(np.asarray(read_image(source)), VALUES, name)
    for name, source in files(png(), tmp_path).items():
        assert isinstance(read_media(source), Image.Image), name
    for name, source in files(animation(), tmp_path).items():
        assert isinstance(read_media(source), Clip), name
    for name, source in files(animation(), tmp_path).items():
        assert len(read_video(source).frames) == 2, name


def test_a_given_file_stays_open_and_can_be_read_again() -> None:
    file = io.BytesIO(png())
    for _ in range(2):
        np.testing.assert_array_equal(np.asarray(read_image(file)), VALUES)
    assert not file.closed
    assert not is_video(file)


@pytest.mark.parametrize("moved", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_arrays_and_tensors(kind: str, moved: bool) -> None:
    values = np.moveaxis(VALUES, -1, 0) if moved else VALUES
    source = torch.from_numpy(values.copy()) if kind == "tensor" else values
    assert isinstance(source, MediaSource)
    np.testing.assert_array_equal(np.asarray(read_image(source)), VALUES)
    image = read_media(source)
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(np.asarray(image), VALUES)
    assert not is_video(source)


def test_small_images_have_channels_where_their_library_has_them() -> None:
    values = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    np.testing.assert_array_equal(np.asarray(read_image(values)), values)
    np.testing.assert_array_equal(np.asarray(read_image(torch.from_numpy(values))), values.transpose(1, 2, 0))


def test_grey_and_transparent_arrays() -> None:
    grey = VALUES[..., 0]
    for source in (grey, grey[..., None], torch.from_numpy(grey.copy()), torch.from_numpy(grey.copy())[None]):
        np.testing.assert_array_equal(np.asarray(read_image(source)), grey[..., None].repeat(3, -1))
    clear = np.dstack([VALUES, np.zeros_like(grey)])
    assert read_image(clear, background=(1, 2, 3)).getpixel((4, 4)) == (1, 2, 3)
    assert read_image(clear[::-1, ::2]).size == (5, 6)


def test_clips_are_taken_as_they_are() -> None:
    clip = Clip(tuple(Image.new("RGB", (4, 4), (value,) * 3) for value in range(8)), 8)
    assert read_media(clip) == clip
    assert is_video(clip)
    assert read_media(clip, fps=4, max_frames=2) == Clip((clip.frames[0], clip.frames[2]), 4)


def closed() -> io.BytesIO:
    file = io.BytesIO(png())
    file.close()
    return file


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "give a path, bytes"),
        (3, "cannot read an int"),
        ([b"a"], "cannot read a list"),
        (object(), "give a path"),
        (io.StringIO("text"), "mode 'rb'"),
        (closed(), "open it again"),
        (io.BytesIO(), "is empty"),
        (OnlyReads(b""), "is empty"),
        (io.BytesIO(b"x"), "the given file"),
        (np.zeros((4, 4, 3), np.float32), r"array \(4×4×3, float32\).*uint8"),
        (np.zeros((4, 4, 3), np.int64), "convert it to uint8"),
        (torch.zeros(3, 4, 4), "pixels_to_image"),
        (torch.zeros(3, 4, 4, dtype=torch.bfloat16), "bfloat16"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"is not an image.*\(H, W, 3\)"),
        (np.zeros((5, 5, 2), np.uint8), "is not an image"),
        (np.zeros(4, np.uint8), "is not an image"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.array(3, np.uint8), "is not an image"),
    ],
)
def test_what_is_none(source: object, says: str) -> None:
    for read in (read_image, read_media):
        with pytest.raises(EmulusError, match=says) as caught:
            read(source)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300


def test_still_images_are_no_clips() -> None:
    for source in (VALUES, Image.fromarray(VALUES), torch.from_numpy(VALUES)):
        with pytest.raises(EmulusError, match="still image, not a clip"):
            read_video(source)


def test_pixels_of_the_model_are_not_mistaken() -> None:
    """The message's remedies work."""
    image = Image.fromarray(VALUES)
    pixels = image_to_pixels(image)
    with pytest.raises(EmulusError, match="pixels_to_image"):
        read_image(pixels)
    np.testing.assert_array_equal(np.asarray(read_image(((pixels + 1) / 2 * 255).round().byte())), VALUES)
