"""Stills, animations and videos are shown the right way up, with square pixels, on the background, at 8 bits."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emulus.errors import EmulusError
from emulus.media import Limits, image_to_pixels, read_image, read_media, read_video, write_image
from emulus.media.display import Look, display, square_size, turn_of_matrix

# How to store a picture so that it is upright again after each EXIF orientation.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

# a, b, c, d of the display matrix for the same.
MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def corners(width: int = 64, height: int = 32) -> Image.Image:
    """White, red, green and blue quarters: no turn and no mirroring leaves it as it is."""
    image = Image.new("RGB", (width, height), "white")
    image.paste("red", (width // 2, 0, width, height // 2))
    image.paste("lime", (0, height // 2, width // 2, height))
    image.paste("blue", (width // 2, height // 2, width, height))
    return image


def stored(image: Image.Image, orientation: int) -> Image.Image:
    turn = STORED[orientation]
    return image if turn is None else image.transpose(turn)


def is_upright(image: Image.Image, size: tuple[int, int] = (64, 32)) -> bool:
    middles = [(image.width * x // 4, image.height * y // 4) for y in (1, 3) for x in (1, 3)]
    found = np.array([image.getpixel(place) for place in middles]).astype(int)
    expected = [(255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    return image.size == size and bool(np.abs(found - expected).max() < 40)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def film(
    frames: Sequence[np.ndarray],
    container: str,
    codec: str,
    layout: str,
    *,
    given: str = "rgb24",
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    tags: dict[str, int] | None = None,
) -> bytes:
    content = BytesIO()
    with av.open(content, "w", format=container) as output:
        stream = output.add_stream(codec, rate=10, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = layout
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for index, values in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(values, given)
            frame.pts, frame.time_base = index, Fraction(1, 10)
            for name, value in (tags or {}).items():
                setattr(frame, name, value)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return content.getvalue()


def with_matrix(source: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """An MP4 with another display matrix in its header."""
    fixed = struct.pack(">9i", *(0x10000 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 0x4000)))
    a, b, c, d = matrix
    turned = struct.pack(">9i", *(0x10000 * value for value in (a, b, 0, c, d, 0, 0, 0, 0x4000)))
    place = source.index(fixed, source.index(b"tkhd"))
    return source[:place] + turned + source[place + 36 :]


# Orientation


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_animations_are_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    frames = [stored(corners(), orientation), stored(Image.new("RGB", (64, 32)), orientation)] * 2
    options = {"lossless": True} if kind == "WEBP" else {}
    source = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, exif=exif, **options)
    clip = read_video(source)
    assert len(clip.frames) == 4
    assert is_upright(clip.frames[0])
    assert is_upright(clip.frames[2])
    assert clip.frames[1].size == (64, 32)
    assert is_upright(read_image(source))


@pytest.mark.parametrize("orientation", MATRICES)
def test_videos_are_turned_and_mirrored(orientation: int) -> None:
    source = film([np.asarray(stored(corners(), orientation))] * 2, "mp4", "libx264", "yuv444p")
    for frame in read_video(with_matrix(source, MATRICES[orientation])).frames:
        assert is_upright(frame)


def test_a_turned_film_of_tiff_frames() -> None:
    """PyAV does not list the side data of such frames."""
    source = film([np.asarray(stored(corners(), 6))] * 2, "mov", "tiff", "rgb24")
    assert is_upright(read_video(with_matrix(source, MATRICES[6])).frames[0])


@pytest.mark.parametrize("orientation", MATRICES)
def test_wide_pixels_and_turns(orientation: int) -> None:
    """Stored pixels are made square before the frame is turned."""
    upright = corners(128, 32)
    narrow = stored(upright, orientation)
    narrow = narrow.resize((narrow.width // 2, narrow.height))
    source = film([np.asarray(narrow)] * 2, "mp4", "libx264", "yuv444p", aspect=Fraction(2))
    assert is_upright(read_video(with_matrix(source, MATRICES[orientation])).frames[1], (128, 32))


def test_turns_by_other_angles_are_ignored() -> None:
    assert turn_of_matrix((46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30)) is None
    assert turn_of_matrix((0,) * 9) is None
    assert turn_of_matrix((1, 1, 0, 1, 1, 0, 0, 0, 1 << 30)) is None
    # Rounded, and scaled.
    assert turn_of_matrix((3, 131072, 0, -131072, -2, 0, 0, 0, 1 << 30)) == Image.Transpose.ROTATE_270


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=9, max_size=9))
def test_any_matrix_has_an_answer(matrix: list[int]) -> None:
    assert turn_of_matrix(tuple(matrix)) in (None, *Image.Transpose)


@pytest.mark.parametrize("matrix", [(1, 2, 3, 4), (0, 0, 0, 0), (0, 0, 0, 1)])
def test_broken_matrices_turn_nothing(matrix: tuple[int, int, int, int]) -> None:
    source = film([np.asarray(corners())] * 2, "mp4", "libx264", "yuv444p")
    frame = read_video(with_matrix(source, matrix)).frames[0]
    assert is_upright(frame, frame.size)


def test_an_image_is_turned_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source = encoded(stored(corners(), 6), "PNG", exif=exif)
    once = read_image(source)
    assert is_upright(once)
    assert is_upright(read_image(once))
    opened = Image.open(BytesIO(source))
    assert image_to_pixels(opened).shape == (3, 32, 64)


def test_what_is_written_is_what_is_seen(tmp_path: object) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    opened = Image.open(BytesIO(encoded(stored(corners(), 8), "JPEG", exif=exif, quality=95, subsampling=0)))
    write_image(opened, f"{tmp_path}/a.png")
    assert is_upright(Image.open(f"{tmp_path}/a.png"))


# Pixels that are not square


@pytest.mark.parametrize(
    ("aspect", "size"),
    [
        (Fraction(2), (128, 32)),
        (Fraction(1, 2), (64, 64)),
        (Fraction(64, 45), (91, 32)),
        (Fraction(8, 9), (64, 36)),
        (Fraction(1), (64, 32)),
        (Fraction(1001, 1000), (64, 32)),
        (Fraction(100), (64, 32)),
        (Fraction(1, 9), (64, 32)),
    ],
)
@pytest.mark.parametrize("container", ["mp4", "matroska", "mov"])
def test_sample_aspect(aspect: Fraction, size: tuple[int, int], container: str) -> None:
    source = film([np.asarray(corners())] * 2, container, "libx264", "yuv444p", aspect=aspect)
    assert is_upright(read_video(source).frames[0], size)


def test_sample_aspect_of_a_broadcast() -> None:
    """In MPEG-2, which DVDs and broadcasts use, it is the shape of the whole that is stored."""
    source = film([np.asarray(corners(720, 576))] * 2, "mpegts", "mpeg2video", "yuv420p", aspect=Fraction(64, 45))
    assert read_video(source, max_frames=1).frames[0].size == (1024, 576)


@pytest.mark.parametrize("aspect", [0, -1, float("nan"), float("inf"), 1e9, 1e-9])
def test_broken_aspects_are_ignored(aspect: float) -> None:
    assert square_size(40, 20, aspect) == (40, 20)


def test_the_shown_size_is_limited() -> None:
    source = film([np.asarray(corners())] * 2, "mp4", "libx264", "yuv444p", aspect=Fraction(2))
    with pytest.raises(EmulusError, match="128×32, more than the 4,095 pixels"):
        read_video(source, limits=Limits(max_pixels=4095))
    assert read_video(source, limits=Limits(max_pixels=4096)).frames[0].size == (128, 32)


# Transparency

CODECS = [
    ("mov", "qtrle", "argb", {}),
    ("mov", "png", "rgba", {}),
    ("mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
    ("mov", "rawvideo", "argb", {}),
    ("mov", "cfhd", "gbrap12le", {}),
    ("webm", "libvpx-vp9", "yuva420p", {}),
    ("webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
    ("matroska", "libvpx-vp9", "yuva420p", {}),
    ("matroska", "ffv1", "bgra", {}),
    ("matroska", "ffv1", "yuva420p", {}),
    ("matroska", "ffv1", "yuva444p16le", {}),
    ("mov", "png", "ya8", {}),
    ("nut", "ffv1", "gbrap16le", {}),
    ("nut", "rawvideo", "yuva420p", {}),
    ("avi", "huffyuv", "bgra", {}),
    ("avi", "ffvhuff", "bgra", {}),
    ("avi", "utvideo", "gbrap", {}),
    ("avi", "png", "rgba", {}),
]


@pytest.mark.parametrize(("container", "codec", "layout", "options"), CODECS)
def test_films_with_alpha(container: str, codec: str, layout: str, options: dict[str, str]) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"no encoder {codec}")
    values = np.full((64, 64, 4), 200, np.uint8)
    values[:32, :, 3] = 255
    values[32:, :32, 3] = 0
    values[32:, 32:, 3] = 128
    source = film([values] * 3, container, codec, layout, given="rgba", options=options)
    for frame in read_video(source, background=(0, 100, 255)).frames:
        shown = [frame.getpixel(place) for place in ((16, 16), (48, 16), (16, 48), (48, 48))]
        expected = [(200, 200, 200)] * 2 + [(0, 100, 255), (100, 150, 227)]
        assert np.abs(np.array(shown).astype(int) - expected).max() <= 5
    assert len(read_video(source).frames) == 3
    assert min(read_video(source).frames[2].getpixel((16, 48))) >= 253


def test_the_unused_byte_of_uncompressed_avi_is_not_alpha() -> None:
    values = np.full((16, 16, 4), 90, np.uint8)
    values[..., 3] = 0
    source = film([values] * 2, "avi", "rawvideo", "bgra", given="rgba")
    assert read_video(source).frames[0].getpixel((3, 3)) == (90, 90, 90)


def test_premultiplied_pillow_modes() -> None:
    clear = Image.new("RGBA", (2, 2), (200, 100, 50, 128)).convert("RGBa")
    assert np.abs(np.array(read_image(clear, background=(0, 0, 0)).getpixel((0, 0))) - (100, 50, 25)).max() <= 1
    assert read_image(Image.new("LA", (2, 2), (9, 0)).convert("La")).getpixel((0, 0)) == (255, 255, 255)


# Depths


def png(values: np.ndarray, *, clear: bytes = b"") -> bytes:
    """A PNG of 16 bits for each channel."""
    height, width, channels = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    chunks += [(b"tRNS", clear)] if clear else []
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_sixteen_bits(channels: int) -> None:
    ramp = np.linspace(0, 65_535, 64).round().astype(np.uint16).reshape(8, 8, 1)
    values = ramp.repeat(channels, -1)
    if channels in (2, 4):
        values[..., -1] = 65_535
    shown = np.asarray(read_image(png(values))).astype(int)
    assert np.abs(shown - (ramp.astype(float) / 257)).max() <= 1
    if channels in (2, 4):
        values[..., -1] = 0
        assert read_image(png(values), background=(1, 2, 3)).getpixel((4, 4)) == (1, 2, 3)


def test_clear_colours_of_sixteen_bits() -> None:
    grey = np.array([[[1000], [40_000]]], np.uint16)
    shown = read_image(png(grey, clear=struct.pack(">H", 40_000)), background=(1, 2, 3))
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(4, 4, 4), (1, 2, 3)]
    colour = np.array([[[1000, 2000, 3000], [40_000, 50_000, 60_000]]], np.uint16)
    shown = read_image(png(colour, clear=struct.pack(">3H", 40_000, 50_000, 60_000)), background=(1, 2, 3))
    assert [shown.getpixel((x, 0)) for x in (0, 1)] == [(3, 7, 11), (1, 2, 3)]


def tiff(values: np.ndarray, *, bits: int, white_is_zero: bool = False, signed: bool = False) -> bytes:
    """A grey TIFF of one row, with more than 8 bits."""
    if bits == 12:
        digits = "".join(f"{value:012b}" for value in values)
        body = bytes(int(digits[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(digits), 8))
    else:
        body = values.astype(f"<u{bits // 8}").tobytes()
    fields = {
        256: len(values),
        257: 1,
        258: bits,
        259: 1,
        262: 0 if white_is_zero else 1,
        273: 200,
        277: 1,
        278: 1,
        279: len(body),
        339: 2 if signed else 1,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4)
    return head.ljust(200, b"\0") + body


def test_tiff_of_many_bits() -> None:
    def shown(source: bytes) -> list[int]:
        return np.asarray(read_image(source))[0, :, 0].tolist()

    values = np.array([0, 257 * 100, 65_535])
    assert shown(tiff(values, bits=16)) == [0, 100, 255]
    assert shown(tiff(values, bits=16, white_is_zero=True)) == [255, 155, 0]
    assert shown(tiff(np.array([0, 1606, 4095, 0]), bits=12)) == [0, 100, 255, 0]
    with pytest.raises(EmulusError, match="values outside 0 to 65,535"):
        read_image(tiff(np.array([0, 70_000, 2**31 - 1]), bits=32, signed=True))


def test_values_of_no_known_range() -> None:
    with pytest.raises(EmulusError, match="floating-point"):
        read_image(Image.new("F", (2, 2)))
    with pytest.raises(EmulusError, match="the given image has values outside"):
        read_image(Image.new("I", (2, 2), -5))


@pytest.mark.parametrize(
    ("layout", "given", "scale"),
    [
        ("gray16le", "gray16le", 257),
        ("gray10le", "gray10le", 1023 / 255),
        ("gray12le", "gray12le", 4095 / 255),
        ("rgb48le", "rgb48le", 257),
        ("gbrp10le", "rgb48le", 257),
        ("gbrp12le", "rgb48le", 257),
        ("yuv444p10le", "rgb48le", 257),
        ("yuv420p12le", "rgb48le", 257),
        ("yuv444p16le", "rgb48le", 257),
    ],
)
def test_films_of_many_bits(layout: str, given: str, scale: float) -> None:
    ramp = np.linspace(0, 255, 16).repeat(2)[None].repeat(16, 0)
    values = (ramp * scale).round().astype(np.uint16)
    values = values[..., None].repeat(3, -1) if given == "rgb48le" else values
    frame = read_video(film([values] * 2, "nut", "ffv1", layout, given=given)).frames[0]
    assert np.abs(np.asarray(frame)[..., 1] - ramp).max() <= 2


def test_display_leaves_the_frame_as_it_is() -> None:
    image = corners()
    image.info["icc_profile"] = b"broken"
    shown = display(image, Look())
    shown.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert shown.info == {}


# Colours of videos


@pytest.mark.parametrize(("size", "matrix"), [((64, 32), 6), ((1280, 32), 1), ((64, 580), 1)])
def test_untagged_films_are_taken_for_what_players_take_them(size: tuple[int, int], matrix: int) -> None:
    values = np.zeros((size[1], size[0], 3), np.uint8)
    values[:] = (200, 40, 90)
    tagged = read_video(film([values] * 2, "nut", "ffv1", "yuv444p", tags={"colorspace": matrix, "color_range": 1}))
    frame = av.VideoFrame.from_ndarray(values, "rgb24")
    frame = frame.reformat(format="yuv444p", dst_colorspace={6: "itu601", 1: "itu709"}[matrix])
    frame.colorspace = 2
    content = BytesIO()
    with av.open(content, "w", format="nut") as output:
        stream = output.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv444p"
        for index in range(2):
            frame.pts, frame.time_base = index, Fraction(1, 10)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    untagged = read_video(content.getvalue())
    for clip in (tagged, untagged):
        assert np.abs(np.asarray(clip.frames[0]).astype(int) - (200, 40, 90)).max() <= 3


def test_wide_gamut_films() -> None:
    values = np.full((32, 64, 3), (200, 100, 50), np.uint8)
    source = film([values] * 2, "mov", "prores_ks", "yuv444p10le", tags={"color_primaries": 12, "color_trc": 1})
    shown = np.array(read_media(source).frames[0].getpixel((9, 9))).astype(int)
    assert np.abs(shown - (215, 93, 31)).max() <= 4


@pytest.mark.parametrize("curve", [16, 18], ids=["PQ", "HLG"])
def test_films_of_high_dynamic_range_are_bright(curve: int) -> None:
    """Grey of a screen's usual white, which is about half of the range of both curves, is nearly white."""
    values = np.full((32, 64, 3), 0.58 * 65535 if curve == 16 else 0.75 * 65535, np.uint16)
    tags = {"color_primaries": 9, "color_trc": curve, "colorspace": 9, "color_range": 1}
    source = film([values] * 2, "matroska", "ffv1", "yuv444p10le", given="rgb48le", tags=tags)
    assert min(read_media(source).frames[0].getpixel((9, 9))) > 225
