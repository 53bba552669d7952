"""How well WebP and JPEG do with as many bits as the vision tokenizer's codes."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import PIL.Image

from emulus.media import image_to_pixels, read_image, resize
from emulus.tokenizer.vision.metrics import psnr, ssim

Codec = Literal["WebP", "JPEG"]

SHRINKS = (1, 2, 4, 8)
"""The picture may be stored at a part of its size and scaled up again: at few bits that is better."""

_OPTIONS: dict[Codec, tuple[dict[str, Any], ...]] = {
    "WebP": ({"method": 6},),
    "JPEG": ({"optimize": True, "subsampling": "4:2:0"}, {"optimize": True, "subsampling": "4:4:4"}),
}
_QUALITIES: dict[Codec, tuple[int, int]] = {"WebP": (0, 100), "JPEG": (1, 95)}


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A picture through a codec.

    Attributes:
        size: Of the file in bytes.
        fits: Whether that is within the budget.
        psnr: In dB.
        ssim: At most 1.
        image: What the file shows, at the picture's own size.
    """

    size: int
    fits: bool
    psnr: float
    ssim: float
    image: PIL.Image.Image


def best_within(image: PIL.Image.Image, codec: Codec, max_bytes: float) -> Coded:
    """Find the file of the highest PSNR within a budget.

    Args:
        image: An RGB picture.
        codec: Which.
        max_bytes: The budget: whole files count, headers and all.

    Returns:
        The best file that fits; where headers alone are too large, the smallest file that there is.
    """
    fitting: list[bytes] = []
    others: list[bytes] = []
    for shrink in SHRINKS:
        height, width = (max(side // shrink, 1) for side in (image.height, image.width))
        for options in _OPTIONS[codec]:
            file = _largest_within(resize(image, height, width), codec, max_bytes, options)
            (fitting if len(file) <= max_bytes else others).append(file)
    files = fitting or [min(others, key=len)]
    return max((_coded(image, file, max_bytes) for file in files), key=lambda coded: coded.psnr)


def _largest_within(image: PIL.Image.Image, codec: Codec, max_bytes: float, options: dict[str, Any]) -> bytes:
    """The file of the highest quality that fits, by bisection; of the lowest quality if none does."""
    low, high = _QUALITIES[codec]
    best = _encode(image, codec, low, options)
    while low < high:
        middle = (low + high + 1) // 2
        file = _encode(image, codec, middle, options)
        if len(file) <= max_bytes:
            low, best = middle, file
        else:
            high = middle - 1
    return best


def _encode(image: PIL.Image.Image, codec: Codec, quality: int, options: dict[str, Any]) -> bytes:
    buffer = BytesIO()
    image.save(buffer, codec, quality=quality, **options)
    return buffer.getvalue()


def _coded(image: PIL.Image.Image, file: bytes, max_bytes: float) -> Coded:
    shown = resize(read_image(file), image.height, image.width)
    pixels, other = (image_to_pixels(picture)[None] for picture in (image, shown))
    return Coded(
        size=len(file),
        fits=len(file) <= max_bytes,
        psnr=float(psnr(other, pixels)),
        ssim=float(ssim(other, pixels)),
        image=shown,
    )
