"""Clips: frames and their rate, to pixels and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from emulus.errors import EmulusError
from emulus.media.image import as_rgb, bytes_to_pixels, pixels_to_bytes
from emulus.media.limits import LIMITS, Limits


@dataclass(frozen=True)
class Clip:
    """Frames shown one after the other, each for 1 / ``fps`` seconds.

    Attributes:
        frames: At least one RGB picture; all of one size. A picture shown for long stands in several places.
        fps: Frames per second.

    Raises:
        EmulusError: No frames, several sizes, or a rate that is not a positive number.
    """

    frames: tuple[Image.Image, ...]
    fps: float

    def __post_init__(self) -> None:
        if not self.frames:
            raise EmulusError("a clip of no frames; give at least one")
        sizes = sorted({frame.size for frame in self.frames})
        if len(sizes) > 1:
            raise EmulusError(f"the frames of a clip have several sizes ({sizes[0]}, {sizes[1]}); resize them to one")
        check_fps(self.fps)

    @property
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last."""
        return len(self.frames) / self.fps


def resample(clip: Clip, fps: float, *, max_frames: int | None = None, limits: Limits = LIMITS) -> Clip:
    """A clip at another frame rate: at each new moment the frame that is on show.

    Args:
        clip: What to bring to the rate; assumed to be evenly timed.
        fps: Frames per second.
        max_frames: Keep at most this many frames, from the start.
        limits: A slow clip at a high rate is many frames.

    Raises:
        EmulusError: The rate is out of range, or there would be too many frames.
    """
    check_fps(fps)
    if fps == clip.fps:
        return clip if max_frames is None else Clip(clip.frames[:max_frames], fps)
    count = max(round(clip.duration * fps), 1)
    count = count if max_frames is None else min(count, max_frames)
    limits.check_frames(f"a clip of {len(clip.frames)} frames at {clip.fps:g} per second, brought to {fps:g},", count)
    # The slack keeps rounding from showing the frame before.
    places = (min(int(place * clip.fps / fps + 1e-6), len(clip.frames) - 1) for place in range(count))
    return Clip(tuple(clip.frames[place] for place in places), fps)


def clip_to_pixels(clip: Clip) -> Float[Tensor, "frames 3 height width"]:
    """Turn a clip into float32 pixels in [-1, 1]; :func:`pixels_to_clip` gives it back exactly."""
    return bytes_to_pixels(torch.from_numpy(np.stack([np.asarray(as_rgb(frame)) for frame in clip.frames])))


def pixels_to_clip(pixels: Float[Tensor, "frames 3 height width"], fps: float) -> Clip:
    """Turn pixels in [-1, 1], on any device, into a clip; what lies outside is clipped."""
    return Clip(tuple(Image.fromarray(frame) for frame in pixels_to_bytes(pixels).numpy()), fps)


def check_fps(fps: float) -> None:
    """Refuse what is no usable number of frames per second (raises EmulusError)."""
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise EmulusError(f"a rate of {fps} frames per second; give a number above 0, at most 1000")
