"""Emoji artwork -> small opaque pictures and clips: rasterising, compositing, scaling, encoding."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image

from emulus.errors import EmulusError

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light gray": (216, 216, 216),
    "pale blue": (198, 222, 245),
    "pale green": (203, 236, 205),
    "pale yellow": (252, 244, 196),
    "pink": (250, 206, 218),
    "lavender": (222, 209, 244),
    "dark gray": (72, 72, 76),
}
"""The plain backgrounds by the name that captions use; colours are RGB, 0..255."""

FPS = 8
MAX_FRAMES = 24
MIN_FRAMES = 8
FRAME_STEP = 4
"""A clip's number of frames is a multiple of this, as a vision tokenizer that folds four frames needs."""

_MAX_SIDE = 2048
_NEAR = 40.0  # an RGB distance at which two colours are hard to tell apart


def open_art(content: bytes, name: str) -> Image.Image:
    """Open an encoded picture or animation; nothing is decoded yet.

    Raises:
        EmulusError: It cannot be read, or is larger than emoji artwork is.
    """
    try:
        image = Image.open(io.BytesIO(content))
    except (OSError, SyntaxError, ValueError) as error:
        raise EmulusError(f"{name} is no picture ({error}); fetch its package again") from error
    if max(image.size) > _MAX_SIDE:
        raise EmulusError(f"{name} is {image.width}x{image.height}, more than {_MAX_SIDE}; fetch its package again")
    return image


def rasterise(icon: dict[str, Any], width: float, height: float, size: int) -> Image.Image:
    """Draw an Iconify icon.

    Args:
        icon: ``body`` (SVG without its outermost element) and, for mirrored aliases, ``hFlip``.
        width: Width of the drawing in its own units.
        height: Likewise.
        size: Side of the square picture in pixels; the drawing is centred in it.

    Returns:
        RGBA picture, drawn at twice the size for smooth edges.

    Raises:
        EmulusError: ``resvg_py`` is not installed.
    """
    try:
        import resvg_py
    except ImportError:
        raise EmulusError("drawing SVG needs resvg_py; install it with: pip install 'emulus[emoji]'") from None
    body = icon["body"]
    if icon.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    box = html.escape(f"0 0 {width} {height}")
    sides = f'width="{2 * size}" height="{2 * size}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {sides} viewBox="{box}">{body}</svg>'
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")


def visible_backgrounds(art: Image.Image, preferred: int) -> list[str]:
    """Name the backgrounds on which the art can be seen.

    Args:
        art: RGBA picture.
        preferred: Any number; the palette's colours are tried from this one on.

    Returns:
        The colours that are not close to most of the art's opaque pixels, in that order; if all are, the preferred one.
    """
    pixels = np.asarray(art).reshape(-1, 4)
    opaque = pixels[pixels[:, 3] > 127, :3].astype(np.float32)
    names = list(BACKGROUNDS)
    order = [names[(preferred + step) % len(names)] for step in range(len(names))]
    return [name for name in order if not _hides(name, opaque)] or order[:1]


def _hides(background: str, opaque: Float32[np.ndarray, "pixels 3"]) -> bool:
    distance = np.linalg.norm(opaque - np.asarray(BACKGROUNDS[background], np.float32), axis=1)
    return bool(len(opaque)) and bool((distance < _NEAR).mean() >= 0.4)


def placed(art: Image.Image, *, scale: float, across: float, down: float, mirrored: bool) -> Image.Image:
    """Lay art into a larger transparent square.

    Args:
        art: RGBA picture.
        scale: Its side by the side of the result, above 0 and at most 1.
        across: Where it lies: 0 is at the left edge, 1 at the right.
        down: Likewise from the top.
        mirrored: Whether left and right are exchanged.

    Returns:
        RGBA picture.
    """
    if mirrored:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width, height = (round(side / scale) for side in art.size)
    if (width, height) == art.size:
        return art
    square = Image.new("RGBA", (width, height))
    square.paste(art, (round((width - art.width) * across), round((height - art.height) * down)))
    return square


def composite(art: Image.Image, background: str, size: int) -> Image.Image:
    """Lay RGBA art on a plain background and scale it to ``size`` x ``size`` RGB."""
    canvas = Image.new("RGBA", art.size, (*BACKGROUNDS[background], 255))
    canvas.alpha_composite(art)
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def read_frames(animation: Image.Image) -> list[Image.Image]:
    """Decode a looping animation and resample it to :data:`FPS`.

    The clip lasts as long as the animation, rounded to :data:`FRAME_STEP` frames: at least :data:`MIN_FRAMES`
    (a shorter animation goes on looping) and at most :data:`MAX_FRAMES` (a longer one is cut).

    Returns:
        RGBA frames.
    """
    frames, ends, end = [], [], 0.0
    for index in range(getattr(animation, "n_frames", 1)):
        animation.seek(index)
        frames.append(animation.convert("RGBA"))
        end += max(int(animation.info.get("duration", 42)), 1) / 1000
        ends.append(end)
    count = FRAME_STEP * round(end * FPS / FRAME_STEP)
    count = min(max(count, MIN_FRAMES), MAX_FRAMES)
    places = np.searchsorted(ends, [index / FPS % end for index in range(count)], side="right")
    return [frames[min(int(place), len(frames) - 1)] for place in places]


def encode_picture(picture: Image.Image, quality: int) -> bytes:
    """Encode as lossy WebP."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def encode_clip(frames: Sequence[Image.Image], quality: int) -> bytes:
    """Encode as a looping animated lossy WebP of :data:`FPS` frames per second.

    Every frame is stored whole. The encoder's own animation mode would merge frames that look alike into one
    longer frame, and a reader could no longer tell how many there were; at this size it would save only 5 %.
    """
    stored = [encode_picture(frame, quality)[_RIFF_HEADER:] for frame in frames]
    canvas = b"".join((side - 1).to_bytes(3, "little") for side in frames[0].size)
    # Frame header: offset (0, 0), size, duration in ms, and 2 = "replace what was there" (no blending).
    header = bytes(6) + canvas + (1000 // FPS).to_bytes(3, "little") + b"\2"
    chunks = [_chunk(b"VP8X", b"\2" + bytes(3) + canvas), _chunk(b"ANIM", bytes(6))]
    chunks += [_chunk(b"ANMF", header + frame) for frame in stored]
    return _chunk(b"RIFF", b"WEBP" + b"".join(chunks))


_RIFF_HEADER = 12  # "RIFF", size, "WEBP": what comes before the chunks of a still picture


def _chunk(name: bytes, content: bytes) -> bytes:
    """A RIFF chunk: name, size, content, padded to an even size."""
    return name + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)
