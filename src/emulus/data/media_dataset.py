"""items -> pixels of one size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from emulus.codec import decode
from emulus.data.item import Item, checked_fps
from emulus.data.origin import files_digest
from emulus.errors import EmulusError
from emulus.log import logger
from emulus.media import LIMITS, Clip, fit, read_image, read_video, resample, resize, smart_resize


class MediaDataset:
    """Items as uint8 frames ``(T, 3, size, size)``, one for a picture; decoded once and kept while there is room.

    An item that cannot be read is reported once, and the next one that can takes its place.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        size: int,
        fps: float | None = None,
        max_frames: int | None = None,
        cache_bytes: int = 2 * 2**30,
    ) -> None:
        if not items:
            raise EmulusError("there is nothing to read: the data set has no item of this kind in this split")
        self.items, self.size, self.fps, self.max_frames = items, size, fps, max_frames
        self._room = cache_bytes
        self._cache: dict[int, Tensor] = {}
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> UInt8[Tensor, "t 3 size size"]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for candidate in range(index, index + len(self)):
            frames = self._frames(candidate % len(self))
            if frames is not None:
                return frames
        raise EmulusError(f"none of the {len(self)} items can be read; the first: {next(iter(self.bad.values()))}")

    def _frames(self, index: int) -> Tensor | None:
        if index in self._cache or index in self.bad:
            return self._cache.get(index)
        try:
            frames, _ = decode_item(self.items[index], size=self.size, fps=self.fps, max_frames=self.max_frames)
        except EmulusError as error:
            self.bad[index] = str(error)
            logger.warning(f"skipped {self.items[index].id}: {error}")
            return None
        if frames.numel() <= self._room:
            self._room -= frames.numel()
            self._cache[index] = frames
        return frames


def media_state(*datasets: MediaDataset | None) -> str:
    """SHA-256 of the sizes and times of the files that hold the media."""
    items = [item for data in datasets if data is not None for item in data.items]
    return files_digest(items, linked=False)


def warn_of_other_media(state: Mapping[str, Any], now: str) -> None:
    """Say that a run goes on with other files than it began with, if so.

    Args:
        state: What a checkpoint says, with :func:`media_state` as ``files``; older ones say nothing.
        now: What it is now.
    """
    before = decode(str, state.get("files", now), "files")
    if before != now:
        logger.warning(
            "the media were changed, touched or copied since this run began; it goes on with them as they are now"
        )


def decode_item(
    item: Item,
    *,
    size: int,
    area: int = 0,
    factor: int = 1,
    fps: float | None = None,
    max_frames: int | None = None,
) -> tuple[UInt8[Tensor, "t 3 h w"], float]:
    """Decode an item and scale it: cropped to a square, or whole with about so many pixels.

    Args:
        item: A picture or a clip.
        size: Side in pixels of the square.
        area: Pixels of a picture or frame that keeps its aspect; 0 crops to the square.
        factor: What its sides are then multiples of (see :func:`emulus.media.smart_resize`).
        fps: Frame rate to bring clips to; ``None`` keeps theirs.
        max_frames: Longest clip; the rest is cut.

    Returns:
        Frames (one for a picture), and the frame rate (0 for a picture).

    Raises:
        EmulusError: The media cannot be read, or its frame rate is none.
    """
    pictures: tuple[PIL.Image.Image, ...]
    if item.kind == "image":
        pictures, rate = (read_image(item.media),), 0.0
    elif item.fps is None:
        clip = read_video(item.media, fps=fps, max_frames=max_frames)
        pictures, rate = clip.frames, clip.fps
    else:
        clip = _timed_by_table(item, checked_fps(item.fps, item.id), fps, max_frames)
        pictures, rate = clip.frames, clip.fps
    if area:
        sides = smart_resize(pictures[0].height, pictures[0].width, factor=factor, min_pixels=area, max_pixels=area)
        arrays = [np.asarray(resize(picture, *sides)) for picture in pictures]
    else:
        arrays = [np.asarray(fit(picture, size, size)) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), rate


def _timed_by_table(item: Item, own: float, fps: float | None, max_frames: int | None) -> Clip:
    """A clip of a data set that knows its frame rate better than the file's time stamps."""
    target = fps or own
    enough = None
    if max_frames is not None:
        # As many as last for that long, and one more against rounding; no clip has more than the limit.
        enough = math.ceil(min(max_frames * own / target, LIMITS.max_frames)) + 1
    clip = Clip(read_video(item.media, max_frames=enough).frames, own)
    try:
        return resample(clip, target, max_frames=max_frames)
    except EmulusError as error:
        raise EmulusError(f"{item.id}: {error}") from None


def shifted(frames: UInt8[Tensor, "t 3 h w"], draw: np.random.Generator, shift: int) -> UInt8[Tensor, "t 3 h w"]:
    """Move all frames by the same few pixels, repeating the border.

    Args:
        frames: Frames.
        draw: Source of the two distances.
        shift: Largest distance along each axis; 0 moves nothing.
    """
    distances = [int(distance) - shift for distance in draw.integers(2 * shift + 1, size=2)]
    if not shift:
        return frames
    rows, columns = (
        (torch.arange(side) + distance).clamp(0, side - 1)
        for side, distance in zip(frames.shape[-2:], distances, strict=True)
    )
    return frames[..., rows, :][..., columns]


def whole_codes(frames: UInt8[Tensor, "t 3 h w"], factor: int) -> UInt8[Tensor, "s 3 h w"]:
    """A clip brought to a multiple of ``factor`` frames: its last frame is held. A picture is left as it is."""
    missing = -len(frames) % factor if len(frames) > 1 else 0
    return torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)]) if missing else frames


def to_pixels(frames: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Bytes to float pixels in [-1, 1]."""
    return frames.float() / 127.5 - 1
