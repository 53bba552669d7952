"""Colour profiles -> sRGB, as littleCMS converts them (perceptual intent)."""

from __future__ import annotations

import struct
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Float64
from PIL import Image, ImageCms

MAX_PROFILE = 2**24
"""Longer profiles are ignored; printers' profiles, the largest in use, have some megabytes."""

SRGB_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
"""x and y of white, red, green and blue."""

# Conversions that change no value by more than this are rounding: the profile is one of the many of sRGB.
_NEAR = 2

_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK", "LAB": "LAB"}

_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image's colours to sRGB.

    Images that are sRGB already, by whichever profile, come back as they are. So do those whose profile is broken,
    or is of another colour model than their pixels (except RGB profiles of grey images).

    Args:
        image: Mode L, LA, RGB, RGBA, CMYK or LAB, 8 bits. Transparency is kept.
        profile: An ICC profile; None for sRGB, and for LAB, which needs none.

    Returns:
        The same image, or a new one of mode RGB or RGBA.
    """
    if image.mode == "LAB":
        profile = _lab_profile()
    if not profile or len(profile) > MAX_PROFILE:
        return image
    alpha = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image if alpha is None else image.convert(image.mode.removesuffix("A"))
    transform = _transform(profile, colours.mode)
    if transform is None and colours.mode == "L":
        colours = colours.convert("RGB")
        transform = _transform(profile, "RGB")
    if transform is None:
        return image
    converted = ImageCms.applyTransform(colours, transform)
    assert converted is not None  # only in place there is no result
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def profile_of(info: dict[Any, Any]) -> bytes | None:
    """Find the profile of an opened image; None when it has none or says that it is sRGB.

    Without an ICC profile, the gamma and the primaries that PNG files may state (``gAMA``, ``cHRM``) count, as in
    browsers. A gamma within 5 % of 1/2.2 stands for sRGB's own curve, as in libpng: many programs write it with
    sRGB pixels.
    """
    profile = info.get("icc_profile")
    if isinstance(profile, bytes) and profile:
        return profile
    if "srgb" in info or not {"gamma", "chromaticity"} & info.keys():
        return None
    gamma, primaries = info.get("gamma"), info.get("chromaticity", SRGB_PRIMARIES)
    if gamma is not None and (not 0.1 <= gamma <= 10 or abs(gamma * 2.2 - 1) < 0.05):
        gamma = None
    if gamma is None and np.allclose(primaries, SRGB_PRIMARIES, atol=0.002):
        return None
    return rgb_profile(tuple(primaries), gamma)


@lru_cache(maxsize=64)
def rgb_profile(primaries: tuple[float, ...], gamma: float | None = None) -> bytes | None:
    """Make an ICC profile of an RGB space.

    Args:
        primaries: x and y of white, red, green and blue.
        gamma: The exponent that turns light into values, like 1/2.2; None for sRGB's curve.

    Returns:
        The profile, or None when no colours could have such primaries.
    """
    if len(primaries) != 8 or not all(0 < value < 1 for value in primaries):
        return None
    white, *colours = (
        np.array([x / y, 1, (1 - x - y) / y]) for x, y in zip(primaries[::2], primaries[1::2], strict=True)
    )
    try:
        columns = np.stack(colours, 1)
        columns = columns * np.linalg.solve(columns, white)
        cone = np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white))
        columns = np.linalg.inv(_BRADFORD) @ cone @ _BRADFORD @ columns
    except np.linalg.LinAlgError:
        return None
    if not np.isfinite(columns).all() or np.abs(columns).max() > 10:
        return None
    curve = _curve((1 / gamma,)) if gamma else _curve((2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
    tags = [
        (b"wtpt", _xyz(_D50)),
        *((f"{name}XYZ".encode(), _xyz(column)) for name, column in zip("rgb", columns.T, strict=True)),
    ]
    tags += [(f"{name}TRC".encode(), curve) for name in "rgb"]
    return _packed(tags)


def _xyz(values: Float64[np.ndarray, "3"]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _curve(parameters: tuple[float, ...]) -> bytes:
    """A parametric curve of ICC: a power, or a power with a straight piece at the dark end."""
    kind = 0 if len(parameters) == 1 else 3
    return b"para\0\0\0\0" + struct.pack(">HH", kind, 0) + _fixed(*parameters)


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))


def _packed(tags: list[tuple[bytes, bytes]]) -> bytes:
    """A display profile of version 4 with these tags."""
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags:
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = struct.pack(">I", start + len(body))
    header = size + bytes(4) + struct.pack(">I", 0x04200000) + b"mntrRGB XYZ " + bytes(12) + b"acsp"
    header = (header.ljust(68, b"\0") + _fixed(*_D50)).ljust(128, b"\0")
    return header + struct.pack(">I", len(tags)) + table + body


@lru_cache(maxsize=1)
def _lab_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What converts pixels of a mode to sRGB; None when nothing has to be, or can be, converted."""
    # On a broken profile littleCMS fails with several kinds of exception. The image is good all the same.
    try:
        opened = ImageCms.ImageCmsProfile(BytesIO(profile))
        if opened.profile.xcolor_space.strip().upper() != _SPACES.get(mode):
            return None
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
        return None if _is_identity(transform, mode) else transform
    except Exception:
        return None


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    if mode not in ("L", "RGB"):
        return False
    steps = np.arange(256) if mode == "L" else np.stack(np.meshgrid(*[np.linspace(0, 255, 18)] * 3), -1).reshape(-1, 3)
    before = Image.fromarray(steps[None].astype(np.uint8))
    after = ImageCms.applyTransform(before, transform)
    assert after is not None
    difference = np.asarray(after).astype(int) - np.asarray(before.convert("RGB"))
    return bool(np.abs(difference).max() <= _NEAR)
