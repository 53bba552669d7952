"""What a document is before it is ids: segments of text, specials, pictures, clips and actions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from emulus.errors import EmulusError


@dataclass(frozen=True, kw_only=True)
class MediaSize:
    """How many cells a picture or clip has, before there are any.

    Attributes:
        h: Rows of cells.
        w: Cells in a row.
        t: Frames of cells of a clip (each stands for several frames of pixels); None for a picture.
        fps: Frames of pixels per second of a clip; None for a picture.

    Raises:
        EmulusError: A size is not a whole number of at least 1, or only one of ``t`` and ``fps`` is there.
    """

    h: int
    w: int
    t: int | None = None
    fps: float | None = None

    def __post_init__(self) -> None:
        sizes = (self.h, self.w, self.frames)
        if not all(isinstance(size, int) and size >= 1 for size in sizes):
            raise EmulusError(f"a medium has whole numbers of rows, columns and frames, not {self}; give 1 or more")
        if (self.t is None) != (self.fps is None):
            raise EmulusError(f"a clip needs frames and frames per second, a picture neither, not {self}; give both")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise EmulusError(f"a clip cannot have {self.fps} frames per second; give a number above 0")

    @property
    def kind(self) -> str:
        """``"image"`` or ``"video"``."""
        return "image" if self.t is None else "video"

    @property
    def frames(self) -> int:
        """Frames of cells; 1 for a picture."""
        return 1 if self.t is None else self.t

    @property
    def cells(self) -> int:
        """Cells in all."""
        return self.frames * self.h * self.w

    def medium(self, codes: Int64[Tensor, " cells"]) -> Image | Video:
        """The picture or clip of this size with these codes, row by row, frame by frame."""
        if self.t is None or self.fps is None:
            return Image(codes.reshape(self.h, self.w))
        return Video(codes.reshape(self.t, self.h, self.w), fps=self.fps)

    def __str__(self) -> str:
        picture = f"{self.h}*{self.w} cells"
        return picture if self.t is None else f"{self.t} frames of {picture} at {self.fps} fps"


class _Codes:
    """Equality by value for segments that hold codes."""

    codes: Tensor

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        mine, theirs = vars(self).copy(), vars(other).copy()
        return torch.equal(mine.pop("codes"), theirs.pop("codes")) and mine == theirs

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Text:
    """A stretch of text. Neighbouring texts of a document read back as one."""

    text: str


@dataclass(frozen=True)
class Special:
    """One special id to which the grammar gives no role, e.g. a mark around a chain of thought.

    Text never becomes one, so whoever writes a text cannot write marks.

    Attributes:
        name: Its surface string, one of ``Vocabulary.marks``, e.g. ``"<|extra_100|>"``.
    """

    name: str


@dataclass(frozen=True, eq=False)
class Image(_Codes):
    """A picture.

    Attributes:
        codes: Codebook indices; anything that makes an integer tensor is taken and held as int64 on the CPU.

    Raises:
        EmulusError: The codes are not a grid of indices.
    """

    codes: Int64[Tensor, "h w"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", _as_codes(self.codes, 2, "a picture is (h, w)"))

    @property
    def size(self) -> MediaSize:
        """Its grid."""
        h, w = self.codes.shape
        return MediaSize(h=h, w=w)


@dataclass(frozen=True, eq=False)
class Video(_Codes):
    """A clip.

    Attributes:
        codes: Codebook indices, frame by frame of cells; held as int64 on the CPU.
        fps: Frames of pixels per second.

    Raises:
        EmulusError: The codes are not a grid of indices, or ``fps`` is not above 0.
    """

    codes: Int64[Tensor, "t h w"]
    fps: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", _as_codes(self.codes, 3, "a clip is (t, h, w)"))
        object.__setattr__(self, "fps", float(self.fps))
        _ = self.size  # its checks are the clip's

    @property
    def size(self) -> MediaSize:
        """Its grid and frame rate."""
        t, h, w = self.codes.shape
        return MediaSize(h=h, w=w, t=t, fps=self.fps)


@dataclass(frozen=True, eq=False)
class Action(_Codes):
    """A run of action codes, held as int64 on the CPU.

    Raises:
        EmulusError: The codes are not a row of indices.
    """

    codes: Int64[Tensor, " n"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "codes", _as_codes(self.codes, 1, "actions are (n,)"))


Segment = Text | Special | Image | Video | Action


@dataclass(frozen=True)
class Document:
    """Segments in reading order.

    Raises:
        EmulusError: Something in it is not a segment.
    """

    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", tuple(self.segments))
        for segment in self.segments:
            if not isinstance(segment, Segment):
                raise EmulusError(
                    f"a document holds Text, Special, Image, Video, Action, not {type(segment).__name__}; wrap it"
                )


@dataclass(frozen=True, kw_only=True)
class OpenMedia:
    """A picture, clip or run of actions in the middle of which the ids end.

    Attributes:
        kind: ``"image"``, ``"video"`` or ``"action"``; ``"meta"`` while the size text is not whole.
        meta: The size text so far.
        size: What it says, once it is whole.
        offset: How many ids have come after IMG (for actions: after BOA).
        codes: The codes so far, in order.
    """

    kind: str
    meta: str = ""
    size: MediaSize | None = None
    offset: int = 0
    codes: Int64[Tensor, " cells"]

    def whole(self) -> Image | Video | None:
        """What can be shown of it: whole rows of a picture, whole frames of a clip; None before the first."""
        if self.size is None:
            return None
        h, w, fps = self.size.h, self.size.w, self.size.fps
        unit = w if fps is None else h * w
        count = len(self.codes) // unit
        if not count:
            return None
        codes = self.codes[: count * unit]
        return Image(codes.reshape(count, w)) if fps is None else Video(codes.reshape(count, h, w), fps=fps)


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """What ids say.

    Attributes:
        document: The whole segments.
        open: What the ids break off in, if they do so inside a picture, clip or run of actions.
        complete: Whether EOS was there.
    """

    document: Document
    open: OpenMedia | None = None
    complete: bool = False


def _as_codes(codes: Any, dimensions: int, shape: str) -> Tensor:
    try:
        tensor = torch.as_tensor(codes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise EmulusError(f"codes must be a grid of whole numbers, {shape}: {error}") from None
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if not whole or tensor.dim() != dimensions or not tensor.numel() or int(tensor.min()) < 0:
        raise EmulusError(
            f"codes must be whole numbers from 0, {shape}, and not empty; "
            f"these are {tensor.dtype} of shape {tuple(tensor.shape)}: give the vision tokenizer's codes"
        )
    return tensor.detach().to("cpu", torch.int64).contiguous()
