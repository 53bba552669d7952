"""Embedded colour profiles lead to the colours that littleCMS gives; sRGB by any profile stays as it is."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from emulus.media import read_image, read_video
from emulus.media.colour import MAX_PROFILE, SRGB_PRIMARIES, rgb_profile, to_srgb

ADOBE = rgb_profile((0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), 1 / 2.19921875)
DISPLAY_P3 = rgb_profile((0.3127, 0.3290, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def packed(space: bytes, tags: dict[bytes, bytes], connection: bytes = b"XYZ ") -> bytes:
    """An ICC profile of version 2."""
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"", 0x02400000, b"prtr", space, connection)
    header = header.ljust(36, b"\0") + b"acsp"
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def grey_profile(gamma: float) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    return packed(b"GRAY", {b"wtpt": white, b"kTRC": curve})


def cmyk_profile() -> bytes:
    """Inks that are weaker than a naive conversion takes them for: a table of 2 points for each ink, to Lab."""
    ramp = bytes(range(256))
    nodes = b""
    for node in range(16):
        cyan, magenta, yellow, black = (node >> shift & 1 for shift in (3, 2, 1, 0))
        light = round(255 * (1 - 0.8 * black) * (1 - 0.2 * (cyan + magenta + yellow)))
        nodes += bytes((light, 128 + 50 * magenta - 40 * cyan, 128 + 60 * yellow - 40 * cyan))
    unit = struct.pack(">9i", *(65536 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + unit + ramp * 4 + nodes + ramp * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    return packed(b"CMYK", {b"wtpt": white, b"A2B0": table}, b"Lab ")


def by_little_cms(image: Image.Image, profile: bytes) -> np.ndarray:
    target = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(BytesIO(profile)), target, outputMode="RGB")
    return np.asarray(converted).astype(int)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def colours(mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (16, 16, channels), np.uint8)
    values = values.repeat(4, 0).repeat(4, 1)
    return Image.merge(mode, [Image.fromarray(values[..., channel]) for channel in range(channels)])


def difference(first: object, second: object) -> int:
    return int(np.abs(np.asarray(first).astype(int) - np.asarray(second).astype(int)).max())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("profile", [ADOBE, DISPLAY_P3], ids=["Adobe RGB", "Display P3"])
def test_profiles_of_every_format(kind: str, profile: bytes) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95}}.get(kind, {})
    source = encoded(Image.new("RGB", (16, 16), (90, 180, 120)), kind, icc_profile=profile, **options)
    plain = encoded(Image.new("RGB", (16, 16), (90, 180, 120)), kind, **options)
    expected = by_little_cms(read_image(plain), profile)
    assert difference(read_image(source), expected) <= 1
    assert difference(read_image(source), read_image(plain)) > 20


def test_profiles_of_jpeg_2000() -> None:
    image = Image.new("RGB", (16, 16), (90, 180, 120))
    source = encoded(image, "JPEG2000")
    place = source.index(b"colr") - 4
    (size,) = struct.unpack(">I", source[place : place + 4])
    box = struct.pack(">I", 11 + len(ADOBE)) + b"colr\2\0\0" + ADOBE
    start = source.index(b"jp2h") - 4
    (outer,) = struct.unpack(">I", source[start : start + 4])
    header = struct.pack(">I", outer + len(box) - size) + source[start + 4 : place] + box
    tagged = source[:start] + header + source[place + size :]
    assert difference(read_image(source), image) == 0
    assert difference(read_image(tagged), by_little_cms(image, ADOBE)) <= 1
    assert difference(read_image(encoded(image, "JPEG2000", no_jp2=True)), image) == 0


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_profiles_of_animations(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((90, 200, 90), (200, 90, 90))]
    options = {"lossless": True} if kind == "WEBP" else {}
    source = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], duration=100, icc_profile=ADOBE, **options
    )
    for frame, stored in zip(read_video(source).frames, frames, strict=True):
        assert difference(frame, by_little_cms(stored, ADOBE)) <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
@pytest.mark.parametrize("profile", [SRGB, rgb_profile(SRGB_PRIMARIES)], ids=["littleCMS", "own"])
def test_srgb_stays_as_it_is(mode: str, profile: bytes) -> None:
    image = colours("RGBA" if mode == "RGBA" else "LA" if mode == "LA" else "RGB").convert(mode)
    tagged, plain = encoded(image, icc_profile=profile), encoded(image)
    np.testing.assert_array_equal(np.asarray(read_image(tagged)), np.asarray(read_image(plain)))


@pytest.mark.parametrize("gamma", [1.8, 3.0])
def test_grey_profiles(gamma: float) -> None:
    image = colours("L")
    expected = by_little_cms(image, grey_profile(gamma))
    assert difference(read_image(encoded(image, icc_profile=grey_profile(gamma))), expected) <= 1
    assert difference(expected, image.convert("RGB")) > 10


def test_an_rgb_profile_of_a_grey_image() -> None:
    image = colours("L")
    expected = by_little_cms(image.convert("RGB"), ADOBE)
    assert difference(read_image(encoded(image, icc_profile=ADOBE)), expected) <= 1


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str) -> None:
    image = colours("CMYK")
    options = {"quality": 100} if kind == "JPEG" else {}
    plain = encoded(image, kind, **options)
    expected = by_little_cms(Image.open(BytesIO(plain)), cmyk_profile())
    assert difference(read_image(encoded(image, kind, icc_profile=cmyk_profile(), **options)), expected) <= 1
    assert difference(read_image(plain), expected) > 40
    white = encoded(Image.new("CMYK", (8, 8)), kind, icc_profile=cmyk_profile())
    assert min(read_image(white).getpixel((3, 3))) >= 250


def test_lab() -> None:
    def shown(light: float, green_red: int, blue_yellow: int) -> np.ndarray:
        bands = (round(light * 2.55), green_red % 256, blue_yellow % 256)
        image = Image.frombytes("LAB", (1, 1), bytes(bands))
        return np.array(read_image(encoded(image, "TIFF")).getpixel((0, 0)))

    assert difference(shown(100, 0, 0), (255, 255, 255)) <= 2
    assert difference(shown(53.6, 0, 0), (128, 128, 128)) <= 2
    assert difference(shown(54.3, 81, 70), (255, 0, 0)) <= 6
    assert difference(shown(29.6, 68, -112), (0, 0, 255)) <= 25


def test_transparency_is_not_converted() -> None:
    image = colours("RGB")
    alpha = colours("L")
    image.putalpha(alpha)
    converted = to_srgb(image, ADOBE)
    np.testing.assert_array_equal(np.asarray(converted.getchannel("A")), np.asarray(alpha))
    opaque = Image.new("RGBA", (4, 4), (90, 200, 90, 0))
    source = encoded(opaque, icc_profile=ADOBE)
    assert read_image(source, background=(1, 200, 3)).getpixel((1, 1)) == (1, 200, 3)


def test_palettes_are_converted() -> None:
    image = colours("RGB").quantize(16)
    expected = by_little_cms(image.convert("RGB"), ADOBE)
    assert difference(read_image(encoded(image, icc_profile=ADOBE)), expected) <= 1


@pytest.mark.parametrize(
    "profile",
    [
        b"no profile",
        ADOBE[:200],
        ADOBE[:128] + bytes(len(ADOBE) - 128),
        b"\xff" * 500,
        cmyk_profile(),
        grey_profile(1.8),
        cmyk_profile()[:-900],
    ],
    ids=["text", "cut", "no tags", "ones", "of CMYK", "of grey", "cut table"],
)
def test_profiles_that_do_not_fit_are_ignored(profile: bytes) -> None:
    image = colours("RGB")
    np.testing.assert_array_equal(np.asarray(read_image(encoded(image, icc_profile=profile))), np.asarray(image))


def test_huge_profiles_are_ignored() -> None:
    image = colours("RGB")
    assert to_srgb(image, ADOBE.ljust(MAX_PROFILE + 1, b"\0")) is image
    assert to_srgb(image, ADOBE.ljust(MAX_PROFILE, b"\0")) is not image


def test_a_given_image_is_converted_once() -> None:
    source = encoded(Image.new("RGB", (4, 4), (90, 200, 90)), icc_profile=ADOBE)
    once = read_image(Image.open(BytesIO(source)))
    assert difference(once.getpixel((0, 0)), (0, 201, 80)) <= 1
    np.testing.assert_array_equal(np.asarray(read_image(once)), np.asarray(once))


# What PNG files may state without a profile


def png(*chunks: tuple[bytes, bytes], colour: tuple[int, int, int] = (90, 200, 90)) -> bytes:
    whole = encoded(Image.new("RGB", (4, 4), colour))
    header, rest = whole[:33], whole[33:]
    for name, body in chunks:
        header += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return header + rest


def gamma_chunk(value: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(value * 100_000))


def primaries_chunk(*values: float) -> tuple[bytes, bytes]:
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in values))


def test_gamma_and_primaries_of_png() -> None:
    def shown(*chunks: tuple[bytes, bytes]) -> tuple[int, int, int]:
        return read_image(png(*chunks)).getpixel((0, 0))

    adobe = primaries_chunk(0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
    assert difference(shown(gamma_chunk(1 / 2.2), adobe), (0, 201, 80)) <= 5
    # Linear light: 90 / 255 is what sRGB writes as 160.
    assert difference(shown(gamma_chunk(1.0)), (160, 229, 160)) <= 2
    # What many programs write beside sRGB pixels.
    assert shown(gamma_chunk(0.45455)) == (90, 200, 90)
    assert shown(gamma_chunk(0.45455), primaries_chunk(*SRGB_PRIMARIES)) == (90, 200, 90)
    # sRGB and profiles come first.
    assert shown((b"sRGB", b"\0"), gamma_chunk(1.0), adobe) == (90, 200, 90)
    profile = (b"iCCP", b"x\0\0" + zlib.compress(SRGB))
    assert shown(profile, gamma_chunk(1.0)) == (90, 200, 90)


@pytest.mark.parametrize("values", [(0,) * 8, (0.3127, 0.329, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5), (0.3, 0.3) * 4, (9,) * 8])
def test_impossible_primaries_are_ignored(values: tuple[float, ...]) -> None:
    assert read_image(png(primaries_chunk(*values))).getpixel((0, 0)) == (90, 200, 90)


@pytest.mark.parametrize("value", [0, 0.00001, 40000])
def test_impossible_gammas_are_ignored(value: float) -> None:
    assert read_image(png(gamma_chunk(value))).getpixel((0, 0)) == (90, 200, 90)
