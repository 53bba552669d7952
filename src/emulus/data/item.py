"""One picture, clip or text of a data set."""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from emulus.data.parquet import ArrowCell, ParquetCell
from emulus.data.sources.account import LeftOutError
from emulus.data.stored import (
    MAX_MEMBER,
    MAX_TEXT,
    CsvRow,
    JsonLine,
    Missing,
    TarMember,
    checked_text,
    crc_of,
    decoded,
    read_slice,
)
from emulus.errors import EmulusError, shown

__all__ = [
    "KINDS",
    "MAX_MEMBER",
    "MAX_TEXT",
    "SPLITS",
    "ArrowCell",
    "CsvRow",
    "Item",
    "JsonLine",
    "Kind",
    "Missing",
    "ParquetCell",
    "Question",
    "Split",
    "Stored",
    "TarMember",
    "checked_fps",
    "number_of",
    "split_of_key",
]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Kind = Literal["image", "video", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)

LEAST_FPS, MOST_FPS = 0.001, 999.999
"""Frame rates that can be written into a sequence (see :mod:`emulus.sequence.meta`)."""

Stored = bytes | str | Path | ParquetCell | ArrowCell | TarMember | JsonLine | CsvRow | Missing


class Question(NamedTuple):
    """A question about a picture or clip, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture or clip with its words, or a text. Its content is read when asked for, and not kept."""

    id: str
    kind: Kind
    captions: tuple[str, ...]
    """Of a picture or clip; the first is the one to show. None where there are questions alone, and of a text."""
    split: Split
    stored: Stored
    """Where the media or the text is."""
    fps: float | None = None
    """Frames per second where the table says so; else the clip's own time stamps count."""
    score: float = 0.0
    """Whatever quality the data set gives it."""
    source: str = ""
    """Of which collection it is; by default the data set's name."""
    questions: tuple[Question, ...] = ()

    @property
    def caption(self) -> str:
        """The caption to show: the first; of an item that has questions alone, the first answer."""
        answers = (pair.answer for pair in self.questions)
        return next(iter((*self.captions, *answers)), "")

    @property
    def media(self) -> bytes | Path:
        """The encoded media, or the path of its file: what :func:`emulus.media.read_image` takes.

        Raises:
            EmulusError: What holds it is damaged or gone, or this is a text.
        """
        if self.kind == "text":
            raise EmulusError(f"{self.id} is a text, not a picture or clip")
        content = self._content()
        if isinstance(content, str):
            raise EmulusError(f"{self.id} is a text, not a picture or clip")
        return content

    @property
    def text(self) -> str:
        """The text of an item of the kind ``text``.

        Raises:
            EmulusError: What holds it is damaged or gone, it is empty or not UTF-8, or this is a picture or clip.
        """
        if self.kind != "text":
            raise EmulusError(f"{self.id} is a picture or clip, not a text")
        content = self._content()
        text = content if isinstance(content, str) else decoded(_bytes(content), self.id)
        if not text.strip():
            raise EmulusError(f"{self.id} is an empty text")
        return checked_text(text, self.id)

    @property
    def mark(self) -> object:
        """Tells the content from another without unpacking it; None for what cannot be read.

        All its bytes are read once: cheap for a text, not for films.
        """
        try:
            if isinstance(self.stored, str):
                return zlib.crc32(self.stored.encode("utf-8", "surrogatepass"))
            if isinstance(self.stored, bytes):
                return zlib.crc32(self.stored)
            if isinstance(self.stored, Path):
                return crc_of(self.stored, 0, self.stored.stat().st_size)
            return self.stored.mark
        except (EmulusError, OSError):
            return None

    @property
    def container(self) -> Path | None:
        """The file that holds the content; of a file by itself, its folder. None for what is in memory."""
        if isinstance(self.stored, bytes | str):
            return None
        return self.stored.parent if isinstance(self.stored, Path) else self.stored.path

    def _content(self) -> bytes | str | Path:
        return self.stored if isinstance(self.stored, bytes | str | Path) else self.stored.read()


def split_of_key(key: str) -> Split:
    """Put a key into a split, about 90 / 5 / 5: a pure function of the key."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    if place < 0.9:
        return "train"
    return "validation" if place < 0.95 else "test"


def number_of(value: object) -> float:
    """A number, or NaN for what is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


_FRACTION = re.compile(r"\s*(\d{1,12})\s*/\s*(\d{1,12})\s*")


def checked_fps(value: object, where: str) -> float:
    """A number of frames per second; also a fraction such as ``30000/1001``, as ffprobe writes it.

    Raises:
        LeftOutError: It is not a number, or too small or large to be written into a sequence.
    """
    fraction = _FRACTION.fullmatch(value) if isinstance(value, str) else None
    if fraction:
        above, below = map(int, fraction.groups())
        fps = above / below if below else math.nan
    else:
        fps = math.nan if isinstance(value, bool) else number_of(value)
    if not LEAST_FPS <= fps <= MOST_FPS:
        raise LeftOutError(
            "its fps is not a frame rate",
            f"{where}: fps {shown(value)} is not a number from {LEAST_FPS} to {MOST_FPS}; fix that row",
        )
    return fps


def _bytes(content: bytes | Path) -> bytes:
    if isinstance(content, bytes):
        return content
    try:
        size = content.stat().st_size
    except OSError as error:
        raise EmulusError(f"{content} cannot be read ({error.strerror}); restore it") from None
    return read_slice(content, 0, size, str(content), most=MAX_TEXT)
