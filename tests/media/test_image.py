"""Pictures of every kind become RGB; broken ones become one line."""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, features

from emulus.errors import EmulusError
from emulus.media import Limits, image_to_pixels, pixels_to_image, read_image, write_image

RGB_ARRAYS = arrays.arrays(
    np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3)), elements=st.integers(0, 255)
)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def gradient(height: int = 24, width: int = 32) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    values = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) * 2], -1)
    return Image.fromarray(values.astype(np.uint8))


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data do not have."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@contextmanager
def one_line_or_nothing() -> Iterator[None]:
    """What is inside succeeds or says in one line why not."""
    message = ""
    try:
        yield
    except EmulusError as error:
        message = str(error)
    assert "\n" not in message


def message_of(source: str | Path | bytes, limits: Limits = Limits()) -> str:  # noqa: B008 (frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(EmulusError) as caught:
            read_image(source, limits=limits)
    message = str(caught.value)
    assert "\n" not in message
    assert (f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)) in message
    return message


@given(RGB_ARRAYS)
def test_pixels_give_back_every_byte(values: np.ndarray) -> None:
    pixels = image_to_pixels(Image.fromarray(values))
    assert pixels.shape == (3, *values.shape[:2])
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert pixels.abs().max() <= 1
    np.testing.assert_array_equal(np.asarray(pixels_to_image(pixels)), values)


def test_all_bytes_survive_and_the_ends_are_exact() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    pixels = image_to_pixels(Image.fromarray(ramp))
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)
    np.testing.assert_array_equal(np.asarray(pixels_to_image(pixels)), ramp)


def test_pixels_outside_are_clipped_rounded_and_nan_is_grey() -> None:
    pixels = torch.tensor([-7.0, 9.0, float("nan"), 0.001]).reshape(1, 2, 2).repeat(3, 1, 1)
    assert np.asarray(pixels_to_image(pixels))[..., 0].ravel().tolist() == [0, 255, 128, 128]
    assert pixels_to_image(pixels.bfloat16().requires_grad_()).size == (2, 2)


@given(values=RGB_ARRAYS)
@settings(max_examples=25)
def test_png_is_exact(values: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("png") / "picture.png"
    write_image(Image.fromarray(values), path)
    np.testing.assert_array_equal(np.asarray(read_image(path)), values)
    np.testing.assert_array_equal(np.asarray(read_image(path.read_bytes())), values)
    assert os.listdir(path.parent) == ["picture.png"]


@pytest.mark.parametrize("name", ["a.webp", "a.jpg", "a.JPEG", "new/folder/a.jpg"])
def test_lossy_formats_come_close(name: str, tmp_path: Path) -> None:
    write_image(gradient(), tmp_path / name)
    difference = np.asarray(read_image(str(tmp_path / name))).astype(int) - np.asarray(gradient())
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    image = read_image(Image.new("L", (5, 4), 255).convert(mode) if mode != "I;16" else Image.new(mode, (5, 4)))
    assert (image.mode, image.size) == ("RGB", (5, 4))


def test_sixteen_bits_are_scaled() -> None:
    values = np.array([[0, 257 * 100, 65_535]], np.uint16)
    assert np.asarray(read_image(encoded(Image.fromarray(values))))[0, :, 0].tolist() == [0, 100, 255]
    big_endian = Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
    assert np.asarray(read_image(big_endian))[0, :, 2].tolist() == [0, 100, 255]


def test_one_bit_and_cmyk_files() -> None:
    assert read_image(encoded(Image.new("1", (3, 3), 1))).getpixel((1, 1)) == (255, 255, 255)
    red = read_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)).getpixel((4, 4))
    assert np.abs(np.array(red) - (255, 0, 0)).max() < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB with one clear colour", "P with one clear colour"])
def test_transparency_shows_the_background(mode: str) -> None:
    if mode == "LA":
        image = Image.new("LA", (2, 1), (0, 255))
        image.putpixel((1, 0), (0, 0))
    elif mode.endswith("clear colour"):
        image = Image.new("RGB", (2, 1))
        image.putpixel((1, 0), (9, 8, 7))
        image = image.quantize(2) if mode.startswith("P") else image
    else:
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
        image.putpixel((1, 0), (9, 8, 7, 0))
        image = image.quantize(4) if mode == "P" else image
    options: dict[str, object] = {}
    if mode.endswith("clear colour"):
        options["transparency"] = image.getpixel((1, 0))
    source = encoded(image, **options)
    assert [read_image(source, background=(10, 200, 30)).getpixel((x, 0)) for x in (0, 1)] == [
        (0, 0, 0),
        (10, 200, 30),
    ]
    assert read_image(source).getpixel((1, 0)) == (255, 255, 255)


def test_half_transparent_is_mixed() -> None:
    image = Image.new("RGBA", (1, 1), (0, 0, 0, 51))
    assert read_image(encoded(image), background=(255, 100, 0)).getpixel((0, 0)) == (204, 80, 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_orientation_is_applied(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("white", (0, 0, 16, 8))  # the top left quarter
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # stored turned against the clock, to be shown turned with it
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(encoded(stored, kind, exif=exif))
    assert image.size == (32, 16)
    assert [image.getpixel(at)[0] > 128 for at in ((4, 4), (28, 4), (4, 12), (28, 12))] == [True] + [False] * 3


def test_broken_exif_does_not_cost_the_picture() -> None:
    source = encoded(gradient(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert read_image(source).size == (32, 24)


def test_the_first_frame_of_an_animation_is_read() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        source = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(np.array(read_image(source).getpixel((1, 1))) - (255, 0, 0)).max() < 8


def test_a_given_picture_is_left_as_it_is() -> None:
    image = Image.new("RGB", (4, 4), "red")
    copy = read_image(image)
    copy.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) == (255, 0, 0)


# Bad input


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    os.mkfifo(tmp_path / "pipe.png")
    assert "does not exist" in message_of(tmp_path / "missing.png")
    assert "does not exist" in message_of(str(tmp_path / "text.png" / "below.png"))
    assert "folder" in message_of(tmp_path)
    assert "empty" in message_of(tmp_path / "empty.png")
    assert "not a plain file" in message_of(tmp_path / "pipe.png")
    assert "not an image of a known format; convert it" in message_of(tmp_path / "text.png")
    assert "empty" in message_of(b"")
    assert "not an image" in message_of(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(EmulusError, match="does not exist"):
        read_image("null\0byte.png")
    with pytest.raises(EmulusError, match="does not exist"):
        read_image("n" * 5000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncated_files(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    source = encoded(noise, kind)
    assert "corrupt or truncated" in message_of(source[: len(source) // 2])


@given(data=st.data())
@settings(max_examples=150)
def test_damage_gives_a_picture_or_one_line(data: st.DataObject) -> None:
    kinds = [
        "PNG",
        "JPEG",
        "WEBP",
        "TIFF",
        "BMP",
        "GIF",
        "PPM",
        *(["AVIF"] if features.check("avif") else []),
    ]
    kind = data.draw(st.sampled_from(kinds))
    source = bytearray(encoded(gradient(), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        source[data.draw(st.integers(0, len(source) - 1))] = data.draw(st.integers(0, 255))
    source = source[: data.draw(st.integers(1, len(source)))]
    with one_line_or_nothing():
        image = read_image(bytes(source), limits=Limits(max_pixels=10**6))
        assert image.mode == "RGB"


def test_bombs_are_refused_by_their_header() -> None:
    for size in ((20_000, 5_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)):
        assert "pixels allowed" in message_of(claiming(*size))
    assert "20×10, more than the 100 pixels" in message_of(encoded(Image.new("L", (20, 10))), Limits(max_pixels=100))
    assert read_image(encoded(Image.new("L", (20, 5))), limits=Limits(max_pixels=100)).size == (20, 5)
    with pytest.raises(EmulusError, match="the given image"):
        read_image(Image.new("L", (20, 10)), limits=Limits(max_pixels=100))


def test_floating_point_pictures_are_refused() -> None:
    assert "floating-point" in message_of(encoded(Image.new("F", (2, 2)), "TIFF"))


def test_writing_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match=r"suffix '\.pgn'; did you mean '\.png'\?"):
        write_image(gradient(), tmp_path / "a.pgn")
    with pytest.raises(EmulusError, match=r"no suffix; choose from \.jpeg"):
        write_image(gradient(), tmp_path / "a")
    with pytest.raises(EmulusError, match=r"a\.webp .*; choose another format or size"):
        write_image(Image.new("RGB", (20_000, 1)), tmp_path / "a.webp")
    assert os.listdir(tmp_path) == []


def test_transparent_pictures_are_written_on_white(tmp_path: Path) -> None:
    write_image(Image.new("RGBA", (2, 2)), tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
