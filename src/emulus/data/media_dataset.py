"""items -> pixels of one size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from emulus.data.source import Item
from emulus.errors import EmulusError
from emulus.log import logger
from emulus.media import fit, read_image, read_video


class MediaDataset(Sequence[Tensor]):
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

    def __getitem__(self, index: int) -> UInt8[Tensor, "t 3 size size"]:  # type: ignore[override]
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


def decode_item(
    item: Item, *, size: int, fps: float | None = None, max_frames: int | None = None
) -> tuple[UInt8[Tensor, "t 3 size size"], float]:
    """Decode an item and scale and crop it to a square.

    Args:
        item: A picture or a clip.
        size: Side in pixels.
        fps: Frame rate to bring clips to; ``None`` keeps theirs.
        max_frames: Longest clip; the rest is cut.

    Returns:
        Frames (one for a picture), and the frame rate (0 for a picture).

    Raises:
        EmulusError: The media cannot be read.
    """
    if item.kind == "video":
        clip = read_video(item.media, fps=fps, max_frames=max_frames)
        pictures, rate = clip.frames, clip.fps
    else:
        pictures, rate = (read_image(item.media),), 0.0
    arrays = [np.asarray(fit(picture, size, size)) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), rate


def shifted(frames: UInt8[Tensor, "t 3 h w"], draw: np.random.Generator, shift: int) -> UInt8[Tensor, "t 3 h w"]:
    """Move all frames by the same few pixels, repeating the border.

    Args:
        frames: Frames.
        draw: Source of the two distances.
        shift: Largest distance along each axis; 0 moves nothing.
    """
    down, right = (int(distance) for distance in draw.integers(2 * shift + 1, size=2))
    if not shift:
        return frames
    height, width = frames.shape[-2:]
    padded = F.pad(frames.float(), (shift,) * 4, mode="replicate").to(frames.dtype)
    return padded[..., down : down + height, right : right + width]


def to_pixels(frames: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Bytes to float pixels in [-1, 1]."""
    return frames.float() / 127.5 - 1
