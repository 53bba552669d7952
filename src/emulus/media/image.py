"""Pictures: files to RGB to pixels, and back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from emulus.errors import EmulusError, did_you_mean
from emulus.files import write_file
from emulus.media.colour import MAX_PROFILE
from emulus.media.display import WHITE, Colour, display, look_of
from emulus.media.limits import LIMITS, Limits
from emulus.media.signatures import HEAD, image_format
from emulus.media.source import ImageSource, decoding, encoding, given_image, name_of, opened

Choice = TypeVar("Choice")

# Lossy formats at a quality whose loss is hard to see; 4:4:4 since small art has one-pixel edges of colour.
WRITABLE: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"quality": 95, "method": 4}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
}


def read_image(source: ImageSource, *, background: Colour = WHITE, limits: Limits = LIMITS) -> Image.Image:
    """Read an image as a viewer shows it: upright, in sRGB, as plain 8-bit RGB.

    Formats are told by the file's content (see :func:`emulus.media.media_type`), never by its suffix. Any pixel
    format becomes 8-bit RGB: palettes, grey, 1-bit, CMYK, Lab; 16-bit grey is scaled to 8 bits. Colours are
    converted to sRGB by the embedded ICC profile (or a PNG's gamma and primaries); images that are sRGB keep their
    values exactly, and a broken profile is ignored. Transparency is composited on ``background``. The EXIF
    orientation is applied. Of an animation, the first frame is read.

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
        image = open_picture(file, name, limits)
        if image is None:
            raise EmulusError(f"{name} is not an image of a known format; convert it to PNG, JPEG or WebP")
        return finish(image, name, background, limits)


def open_picture(file: BinaryIO, name: str, limits: Limits = LIMITS) -> ImageFile.ImageFile | None:
    """Read a picture's header; its pixels are not decoded yet.

    This is ``PIL.Image.open`` for the formats of :func:`emulus.media.signatures.image_format`, without its size
    check, which prints a warning: the caller checks the size by :class:`Limits`. Icons only are decoded at once.

    Args:
        file: An open file, which must stay open while the picture is decoded.
        name: What to call it in a message.
        limits: The sizes of the images in an icon are checked against these.

    Returns:
        The image, or None when the file has the signature of no image format.

    Raises:
        EmulusError: It has the signature and a broken header, or Pillow was built without the format.
    """
    kind = image_format(file.read(HEAD))
    file.seek(0)
    if kind is None:
        return None
    if kind not in Image.OPEN:
        Image.init()
    if kind == "HEIF" and kind not in Image.OPEN:
        _add_heif()
    # A build of Pillow may lack a format, or know its signature only (and then says so in words).
    open_kind, accepts = Image.OPEN.get(kind, (None, None))
    if open_kind is None or (accepts is not None and isinstance(accepts(file.read(16)), str)):
        remedy = "install pillow-heif" if kind == "HEIF" else "install a newer Pillow"
        raise EmulusError(f"{name} is {kind}, which Pillow cannot read here; {remedy}, or convert it to PNG")
    if kind == "ICO":
        for width, height in _icon_sizes(file):
            limits.check_size(name, width, height)
    profile = _jp2_profile(file) if kind == "JPEG2000" else None
    file.seek(0)
    with decoding(name):
        image = open_kind(file, "")
    if profile:
        image.info["icc_profile"] = profile
    return image


def _add_heif() -> None:
    """Have Pillow read HEIC where the package for it is installed. FFmpeg neither turns nor crops such images."""
    try:
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return
    pillow_heif.register_heif_opener()


def as_rgb(image: Image.Image) -> Image.Image:
    """Give a plain RGB image itself, and any other as :func:`read_image` shows it, on white."""
    plain = image.mode == "RGB" and image.info.keys() <= {"emulus"}
    return image if plain else display(image, look_of(image))


def write_image(image: Image.Image, path: str | Path) -> None:
    """Write a picture atomically, as PNG (exact), WebP or JPEG (lossy, high quality) by its suffix.

    How a drawn picture was made (its ``info["emulus"]``) goes into a PNG.

    Args:
        image: Any mode; what is not plain RGB is converted as by :func:`read_image`, on white.
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

    What is not plain RGB is converted as by :func:`read_image`, on white.

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
        return display(image, look_of(image, background), name=name, limits=limits)


def _jp2_profile(file: BinaryIO) -> bytes | None:
    """The ICC profile of a JPEG 2000 file, which Pillow leaves out: in the box "colr" of the box "jp2h"."""
    file.seek(0)
    for _ in range(100):
        size, kind = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        if kind == b"jp2h":
            # Into it.
            continue
        if kind == b"colr" and 11 < size <= MAX_PROFILE:
            colour = file.read(size - 8)
            # Method 2 is a profile; 1 names a colour space.
            return colour[3:] if colour[:1] == b"\2" else None
        if size < 8 or kind == b"jp2c":
            return None
        file.seek(size - 8, 1)
    return None


def _icon_sizes(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """The true sizes of the images in an icon, whose directory may state others."""
    file.seek(4)
    (count,) = struct.unpack("<H", file.read(2))
    directory = file.read(16 * count)
    for (start,) in struct.iter_unpack("<12xI", directory[: len(directory) // 16 * 16]):
        file.seek(start)
        head = file.read(24)
        if len(head) < 24:
            continue
        if head.startswith(b"\x89PNG"):
            yield struct.unpack(">2I", head[16:])
        else:
            width, height = struct.unpack("<2i", head[4:12])
            # A bitmap in an icon counts its mask as further rows.
            yield abs(width), abs(height) // 2
