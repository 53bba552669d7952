"""Which published sequence format: what a picture or clip looks like between its size text and its end."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from emulus.sequence.document import MediaSize

Ids = npt.NDArray[np.int64]

CELL = -1
"""Stands in a block where a visual id goes."""


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """The choices in which published sequence formats differ. The defaults are Emu3's.

    Attributes:
        image_meta: Size text of a picture, in cells (see :class:`~emulus.sequence.meta.MetaTemplate`).
        video_meta: Size text of a clip. Emu3's own was not published; it holds size, frame rate and duration.
        row_end: Whether EOL ends a row.
        last_row_end: Whether it also ends the last row of a frame.
        frame_end: Whether EOF ends a frame.
        temporal_factor: Frames of pixels in one frame of a clip's cells.
    """

    image_meta: str = "{h}*{w}"
    video_meta: str = "{t}*{h}*{w} {fps}fps {seconds}s"
    row_end: bool = True
    last_row_end: bool = True
    frame_end: bool = True
    temporal_factor: int = 4

    @classmethod
    def emu3_5(cls) -> SequenceLayout:
        """Emu3.5's: no EOL after the last row and no EOF.

        Source: baaivision/Emu3.5, src/utils/input_utils.py.
        """
        return cls(last_row_end=False, frame_end=False)

    def block(self, size: MediaSize, *, eol: int, eof: int, eoi: int) -> Ids:
        """All ids of a picture or clip after its size text, with :data:`CELL` wherever a visual id goes.

        Everything else is known as soon as the size is: building fills the cells, parsing compares, and
        decoding feeds what is not a cell without asking the model.

        Args:
            size: How many cells.
            eol: The id that ends a row.
            eof: The id that ends a frame.
            eoi: The id that ends the medium.

        Returns:
            A read-only array that all media of one size share.
        """
        return _block(self, size.frames, size.h, size.w, eol, eof, eoi)


@lru_cache(maxsize=16)
def _block(layout: SequenceLayout, frames: int, h: int, w: int, eol: int, eof: int, eoi: int) -> Ids:
    row = [CELL] * w + [eol] * layout.row_end
    frame = np.tile(np.array(row, dtype=np.int64), h)
    if layout.row_end and not layout.last_row_end:
        frame = frame[:-1]
    if layout.frame_end:
        frame = np.append(frame, eof)
    block = np.append(np.tile(frame, frames), eoi)
    block.setflags(write=False)
    return block
