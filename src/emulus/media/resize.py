"""To which size a picture is brought before it becomes codes, and of which size one is drawn."""

from __future__ import annotations

import math
import re

from PIL import Image, ImageOps

from emulus.errors import EmulusError

MAX_ASPECT = 5
"""The longer side may be this many times the shorter one."""


def smart_resize(
    height: int,
    width: int,
    *,
    factor: int = 8,
    min_pixels: int = 512 * 512,
    max_pixels: int = 1024 * 1024,
) -> tuple[int, int]:
    """Choose the size nearest to a picture's own that the tokenizer can take, the aspect kept.

    Both sides are rounded to multiples of ``factor``; then the area is brought down to at most ``max_pixels``
    or up to at least ``min_pixels``.

    Args:
        height: Pixels.
        width: Pixels.
        factor: The tokenizer's spatial factor: pixels per code along a side.
        min_pixels: Least area, in pixels.
        max_pixels: Greatest area, in pixels.

    Returns:
        (height, width) in pixels, each a multiple of ``factor``.

    Raises:
        EmulusError: A side is shorter than ``factor``, or one is more than five times the other.

    Source: Emu3's released image processor (``smart_resize``); unlike it, a side is never floored to 0.
    """
    if height < factor or width < factor:
        raise EmulusError(
            f"a picture of {width}×{height} pixels (width×height) is too small: each side must be at least "
            f"{factor}; use a larger one"
        )
    _check_aspect(height, width)
    rows, columns = round(height / factor), round(width / factor)
    area = rows * columns * factor**2
    if area > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def generation_size(ratio: str, area: int, *, factor: int = 8) -> tuple[int, int]:
    """Choose the grid of codes for a picture to be drawn.

    Args:
        ratio: ``"width:height"``, e.g. ``"16:9"`` for a wide picture.
        area: Pixels of the picture (height × width), about.
        factor: The tokenizer's spatial factor: pixels per code along a side.

    Returns:
        (rows, columns) of codes.

    Raises:
        EmulusError: The ratio is not of two positive numbers, or the area is too small for one code each way.

    Source: Emu3's released ``calculate_generate_size``; 16:9 at 720² gives (68, 120).
    """
    match = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*:\s*(\d{1,6}(?:\.\d{1,6})?)\s*", ratio)
    across, down = (float(side) for side in match.groups()) if match else (0.0, 0.0)
    if across == 0 or down == 0:
        raise EmulusError(f"ratio {ratio!r} is not width:height; write it like 16:9")
    unit = math.sqrt(max(area, 0) / (across * down))
    rows, columns = round(down * unit / factor), round(across * unit / factor)
    if rows < 1 or columns < 1:
        raise EmulusError(
            f"a picture of ratio {ratio} and {area} pixels has a side under {factor} pixels; ask for a larger area"
        )
    return rows, columns


def resize(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale a picture to (height, width) pixels, bicubic; its aspect may change."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale a picture to cover (height, width) pixels and cut its centre out: for data sets of one size.

    Raises:
        EmulusError: One side is more than five times the other: little of the picture would be left.
    """
    if image.size == (width, height):
        return image
    _check_aspect(image.height, image.width)
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def _check_aspect(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise EmulusError(
            f"a picture of {width}×{height} pixels (width×height) is too long: one side may be at most "
            f"{MAX_ASPECT} times the other; crop or pad it"
        )
