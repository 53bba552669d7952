"""Pictures: files to RGB to pixels, and back."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from emulus.errors import EmulusError, did_you_mean
from emulus.files import write_file
from emulus.media.limits import LIMITS, Limits
from emulus.media.signatures import HEAD, image_format
from emulus.media.source import ImageSource, decoding, encoding, given_image, name_of, opened

Colour = tuple[int, int, int]
"""Red, green, blue, each 0 to 255."""

WHITE: Colour = (255, 255, 255)

Choice = TypeVar("Choice")

# Lossy formats at a quality whose loss is hard to see; 4:4:4 since small art has one-pixel edges of colour.
WRITABLE: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"quality": 95, "method": 4}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
}

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


def read_image(source: ImageSource, *, background: Colour = WHITE, limits: Limits = LIMITS) -> Image.Image:
    """Read a picture as plain RGB, the right way up.

    Any pixel format becomes 8-bit RGB: palettes, grey, 1-bit, CMYK; 16-bit grey is scaled to 8 bits.
    Transparency is composited on ``background``. The camera's orientation tag is applied. Of an animation,
    the first frame is read.

    Args:
        source: A path, a file's content, an open binary file, a Pillow image (left as it is), or a uint8 array or
            tensor (see :func:`emulus.media.source.given_image`).
        background: What shows through, red, green, blue in 0 to 255.
        limits: The size is checked against these before anything is decoded.

    Returns:
        A new picture of mode ``RGB``.

    Raises:
        EmulusError: The file is missing, empty, no picture, corrupt, truncated or too large.
    """
    name = name_of(source)
    image = given_image(source)
    if image is not None:
        return finish(image, name, background, limits)
    with opened(source) as file:
        image = open_picture(file, name)
        if image is None:
            raise EmulusError(f"{name} is not an image of a known format; convert it to PNG, JPEG or WebP")
        return finish(image, name, background, limits)


def open_picture(file: BinaryIO, name: str) -> ImageFile.ImageFile | None:
    """Read a picture's header; its pixels are not decoded yet.

    This is ``PIL.Image.open`` for the formats of :func:`emulus.media.signatures.image_format`, without its size
    check, which prints a warning: the caller checks the size by :class:`Limits`.

    Args:
        file: An open file, which must stay open while the picture is decoded.
        name: What to call it in a message.

    Returns:
        The picture, or None when the file has the signature of no readable format.

    Raises:
        EmulusError: It has the signature, and a broken header.
    """
    kind = image_format(file.read(HEAD))
    file.seek(0)
    if kind is None:
        return None
    if kind not in Image.OPEN:
        Image.init()
    # A build of Pillow may lack a format, or know its signature only (and then says so in words).
    open_kind, accepts = Image.OPEN.get(kind, (None, None))
    if open_kind is None or (accepts is not None and isinstance(accepts(file.read(16)), str)):
        return None
    file.seek(0)
    with decoding(name):
        return open_kind(file, "")


def to_rgb(image: Image.Image, background: Colour = WHITE) -> Image.Image:
    """Convert a decoded picture of any mode to a new 8-bit RGB one; transparency shows ``background``."""
    if image.mode.startswith("I"):
        image = _sixteen_to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, background)
        canvas.paste(image, mask=image)
        return canvas
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def as_rgb(image: Image.Image) -> Image.Image:
    """Give an RGB picture itself, and what is not RGB converted by :func:`to_rgb`, on white."""
    return image if image.mode == "RGB" else to_rgb(image)


def write_image(image: Image.Image, path: str | Path) -> None:
    """Write a picture atomically, as PNG (exact), WebP or JPEG (lossy, high quality) by its suffix.

    How a drawn picture was made (its ``info["emulus"]``) goes into a PNG.

    Args:
        image: Any mode; what is not RGB is converted by :func:`to_rgb`, on white.
        path: Ends in ``.png``, ``.webp``, ``.jpg`` or ``.jpeg``.

    Raises:
        EmulusError: Another suffix, a size that the format cannot hold, or the disk refuses.
    """
    path = Path(path)
    kind, options = by_suffix(path, WRITABLE)
    content = BytesIO()
    if kind == "PNG" and "emulus" in image.info:
        record = PngInfo()
        record.add_itxt("emulus", str(image.info["emulus"]))
        options = {**options, "pnginfo": record}
    with encoding(path):
        as_rgb(image).save(content, kind, **options)
    write_content(path, content)


def by_suffix(path: Path, choices: dict[str, Choice]) -> Choice:
    """Look up a path's suffix in any case; raises EmulusError naming the nearest one that is known."""
    suffix = path.suffix.lower()
    if suffix not in choices:
        said = f"suffix {path.suffix!r}" if suffix else "no suffix"
        raise EmulusError(f"cannot write {path}: {said}{did_you_mean(suffix, choices)}")
    return choices[suffix]


def write_content(path: Path, content: BytesIO) -> None:
    """Write encoded media atomically.

    Encoders write to memory first, since they hide why a disk refused (full, not allowed).
    """
    write_file(path, lambda temporary: temporary.write_bytes(content.getbuffer()))


def image_to_pixels(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """Turn a picture into float32 pixels in [-1, 1]; :func:`pixels_to_image` gives it back exactly.

    What is not RGB is converted by :func:`to_rgb`, on white.

    Source: Emu3's released image processor (scale by 1/255, mean 0.5, standard deviation 0.5).
    """
    return bytes_to_pixels(torch.from_numpy(np.array(as_rgb(image))))


def pixels_to_image(pixels: Float[Tensor, "3 height width"]) -> Image.Image:
    """Turn pixels in [-1, 1], on any device, into an RGB picture; what lies outside is clipped."""
    return Image.fromarray(pixels_to_bytes(pixels).numpy())


def bytes_to_pixels(values: UInt8[Tensor, "*batch height width 3"]) -> Float[Tensor, "*batch 3 height width"]:
    """Turn 0 to 255, colour last, into contiguous float32 pixels in [-1, 1], colour first."""
    # Moved as bytes, a quarter of what would be moved as floats.
    return values.movedim(-1, -3).contiguous().float().div_(127.5).sub_(1)


def pixels_to_bytes(pixels: Float[Tensor, "*batch 3 height width"]) -> UInt8[Tensor, "*batch height width 3"]:
    """Turn pixels in [-1, 1] into 0 to 255 on the CPU, colour last: rounded, clipped, NaN as grey."""
    values = pixels.detach().float().nan_to_num(0.0).add(1).mul_(127.5).round_().clamp_(0, 255)
    return values.to(torch.uint8).movedim(-3, -1).contiguous().cpu()


def finish(image: Image.Image, name: str, background: Colour, limits: Limits) -> Image.Image:
    """Decode an opened image and show it as RGB, upright, within the limits (see :func:`read_image`)."""
    limits.check_size(name, image.width, image.height)
    with decoding(name):
        image.load()
        if image.mode == "F":
            raise EmulusError(f"{name} has floating-point pixels of no known range; save it as 8 or 16 bit")
        rgb = to_rgb(image, background)
        turn = _UPRIGHT.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)


def _orientation(image: Image.Image) -> int:
    # Cameras and editors write broken EXIF often enough; the picture is good all the same.
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    # Pillow would clip at 255 and so turn nearly everything white.
    values = np.asarray(image).astype(np.int64).clip(0, 65_535)
    return Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8))
