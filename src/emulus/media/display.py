"""One decoded frame and how it is to be shown -> upright sRGB.

Still images, animations and videos all come through :func:`display`, so that each looks as in a viewer: 8 bits, in
sRGB, on a background where it is transparent, with square pixels, the right way up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

from emulus.errors import EmulusError
from emulus.media.colour import profile_of, to_srgb
from emulus.media.limits import LIMITS, Limits
from emulus.media.resize import resize

Colour = tuple[int, int, int]
"""Red, green, blue, each 0 to 255."""

WHITE: Colour = (255, 255, 255)

# What undoes each value of the EXIF orientation tag.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Signs of the display matrix (a, b, c, d), which moves a point (x, y) to (a x + c y, b x + d y).
_TURNS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}

# Pixels wider or higher than this are a broken header. Films for wide screens squeezed them by 2 at most.
_MAX_PIXEL_ASPECT = 8


@dataclass(frozen=True, kw_only=True)
class Look:
    """How the frames of a file are to be shown.

    Attributes:
        background: What shows through transparent pixels.
        profile: ICC profile of the pixels; None for sRGB.
        pixel_aspect: Width of a stored pixel divided by its height.
        turn: What brings the frames upright, after the pixels were made square.
    """

    background: Colour = WHITE
    profile: bytes | None = None
    pixel_aspect: float = 1.0
    turn: Image.Transpose | None = None


def look_of(image: Image.Image, background: Colour = WHITE) -> Look:
    """Find out how an opened (and loaded) Pillow image is to be shown: its profile and its EXIF orientation.

    The density of its pixels is about printing and is ignored, as in browsers, also where it differs by direction.
    """
    return Look(background=background, profile=profile_of(image.info), turn=_UPRIGHT.get(_orientation(image)))


def display(image: Image.Image, look: Look, *, name: str = "the image", limits: Limits = LIMITS) -> Image.Image:
    """Show a decoded frame.

    Args:
        image: A decoded frame of any mode, left as it is.
        look: How it is to be shown.
        name: What to call it in messages.
        limits: The shown size is checked against these.

    Returns:
        A new image of mode RGB, without the metadata that would have it changed again.

    Raises:
        EmulusError: Its values have no known range, or it is shown too large.
    """
    width, height = square_size(image.width, image.height, look.pixel_aspect)
    limits.check_size(name, width, height)
    shown = _on_background(to_srgb(_eight_bits(image, name), look.profile), look.background)
    shown = resize(shown, height, width)
    shown = shown.copy() if shown is image else shown
    shown = shown if look.turn is None else shown.transpose(look.turn)
    shown.info = {key: value for key, value in image.info.items() if key == "emulus"}
    return shown


def square_size(width: int, height: int, pixel_aspect: float) -> tuple[int, int]:
    """The size of a frame once its pixels are square; no side becomes shorter, so no detail is lost.

    Aspects that no real file has (below 1:8, above 8:1, no numbers) are taken for broken and count as 1.
    """
    if not 1 / _MAX_PIXEL_ASPECT <= pixel_aspect <= _MAX_PIXEL_ASPECT:
        return width, height
    if pixel_aspect >= 1:
        return round(width * pixel_aspect), height
    return width, round(height / pixel_aspect)


def turn_of_matrix(matrix: tuple[int, ...]) -> Image.Transpose | None:
    """What a video's display matrix asks for: a turn by right angles, a mirroring, both, or nothing.

    Args:
        matrix: Nine numbers, by rows, as in MP4 files: a, b, u, c, d, v, x, y, w.

    Returns:
        None where nothing has to be done, and for turns by other angles, which players do not show either.
    """
    a, b, _, c, d = matrix[:5]
    largest = max(abs(a), abs(b), abs(c), abs(d))
    if not largest:
        return None
    # Within a degree or so: writers round.
    a, b, c, d = (round(value / largest) if abs(abs(value) / largest - 0.5) > 0.48 else 9 for value in (a, b, c, d))
    return _TURNS.get((a, b, c, d))


def _orientation(image: Image.Image) -> int:
    # Cameras and editors write broken EXIF often enough; the image is good all the same.
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Bring an image of any mode to L, LA, RGB, RGBA, CMYK or LAB, keeping its transparency."""
    if image.mode == "F":
        raise EmulusError(f"{name} has floating-point pixels of no known range; save it as 8 or 16 bit")
    if image.mode.startswith("I"):
        return _scaled(image, name)
    if image.mode in ("CMYK", "LAB"):
        return image
    if image.has_transparency_data:
        return _with_alpha(image)
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _with_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "RGBA"):
        return image
    transparency = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255:
        # The clear colour of 16 bits; Pillow keeps the upper 8 of each pixel.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    return image.convert("LA" if image.mode == "La" else "RGBA")


def _scaled(image: Image.Image, name: str) -> Image.Image:
    """Scale grey of up to 16 bits to 8. Pillow would clip at 255 and so turn nearly everything white."""
    values = np.asarray(image).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 65_535:
        raise EmulusError(f"{name} has values outside 0 to 65,535, of no known range; save it as 8 or 16 bit")
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(258, (16,))[0]
    white = 2**bits - 1 if 8 < bits < 16 else 65_535
    grey = ((values.clip(0, white) * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(262) == 0:
        grey = 255 - grey
    shown = Image.fromarray(grey)
    transparency = image.info.get("transparency")
    if isinstance(transparency, int):
        shown.putalpha(Image.fromarray(np.where(values == transparency, 0, 255).astype(np.uint8)))
    return shown


def _on_background(image: Image.Image, background: Colour) -> Image.Image:
    if image.mode not in ("LA", "RGBA"):
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(image, mask=image)
    return canvas
