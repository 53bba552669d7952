"""One picture, clip or text of a data set, and the places where its content can lie."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal, NamedTuple, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from emulus.errors import EmulusError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Kind = Literal["image", "video", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_MEMBER = 2**30
"""Bytes of a picture or clip inside an archive that are taken into memory."""
MAX_TEXT = 2**26
"""Bytes of one text, or of one line of a table, that are taken into memory."""
LEAST_FPS, MOST_FPS = 0.001, 999.999
"""Frame rates that can be written into a sequence (see :mod:`emulus.sequence.meta`)."""
_SHOWN = 100
"""Letters of what a data set says that a message repeats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParquetCell:
    """One medium or text inside a Parquet file."""

    path: Path
    column: str
    group: int
    """Number of the row group."""
    row: int
    """Number of the row inside the group."""

    @property
    def where(self) -> str:
        """Its name in a message."""
        return f"{self.path} row {self.row + 1} of group {self.group + 1}"

    @property
    def mark(self) -> object:
        """Tells its content from another: the CRC-32 of the group's bytes, which are not unpacked, and the row.

        Raises:
            EmulusError: The Parquet file is damaged or gone.
        """
        with parquet_errors(self.path):
            status = self.path.stat()
            with _reading:
                return _group_crc(self.path, status.st_mtime_ns, status.st_size, self.group, self.column), self.row

    def read(self) -> bytes | str | Path:
        """Read the bytes or the text; for a row that only names a file, the path of that file.

        Raises:
            EmulusError: The Parquet file is damaged or gone, or the row has no content.
        """
        with parquet_errors(self.path):
            status = self.path.stat()
            # Threads that want the same group wait for the first of them to read it.
            with _reading:
                column = _read_group(self.path, status.st_mtime_ns, status.st_size, self.group, self.column)
            value = column[self.row].as_py()
        if isinstance(value, str):
            return value
        content = value.get("bytes") if isinstance(value, dict) else value
        if content:
            return bytes(content)
        return inside(self.path.parent, value.get("path") if isinstance(value, dict) else None, self.where)


_reading = threading.Lock()


@lru_cache(maxsize=2)
def _read_group(path: Path, changed: int, size: int, group: int, column: str) -> pa.ChunkedArray:
    """One column of one row group. Items are mostly read in order, so the last groups are the ones to keep.

    ``changed`` and ``size`` only tell versions of the file apart. The file is opened anew each time: an open
    one could not be shared with worker processes.
    """
    return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(column)


@lru_cache(maxsize=2)
def _group_crc(path: Path, changed: int, size: int, group: int, column: str) -> int:
    """CRC-32 of the bytes that one column of one row group has in the file."""
    chunks = pq.read_metadata(path).row_group(group)
    crc = 0
    for number in range(chunks.num_columns):
        chunk = chunks.column(number)
        if chunk.path_in_schema.split(".")[0] == column:
            first = chunk.dictionary_page_offset or chunk.data_page_offset
            crc = _crc(path, min(first, chunk.data_page_offset), chunk.total_compressed_size, crc)
    return crc


def _crc(path: Path, offset: int, size: int, crc: int = 0) -> int:
    """CRC-32 of some bytes of a file, or of as many of them as there are."""
    with path.open("rb") as file:
        file.seek(max(offset, 0))
        while size > 0 and (block := file.read(min(size, 2**20))):
            crc, size = zlib.crc32(block, crc), size - len(block)
    return crc


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn what pyarrow raises about a broken file into one line that names it.

    Raises:
        EmulusError: The file is gone, damaged or no Parquet file.
    """
    try:
        yield
    except (pa.ArrowException, OSError, IndexError, UnicodeDecodeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:160]
        raise EmulusError(f"{path} is no whole Parquet file ({reason}); restore it from its source") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class TarMember:
    """One file inside a tar, which is read in place."""

    path: Path
    """Of the tar."""
    name: str
    offset: int
    size: int

    @property
    def where(self) -> str:
        """Its name in a message."""
        return f"{self.path}: {self.name}"

    @property
    def mark(self) -> object:
        """Tells its content from another: its CRC-32 (raises OSError where the tar is gone)."""
        return _crc(self.path, self.offset, self.size)

    def read(self) -> bytes:
        """Read the file's bytes.

        Raises:
            EmulusError: It is too large, or the tar is gone or shorter than it was.
        """
        return read_slice(self.path, self.offset, self.size, self.where, most=MAX_MEMBER)

    def head(self, count: int) -> bytes:
        """Read the first bytes, at most ``count`` (raises EmulusError like :meth:`read`)."""
        return read_slice(self.path, self.offset, min(count, self.size), self.where, most=MAX_MEMBER)


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonLine:
    """A text inside a table of JSON lines, which may be larger than memory."""

    path: Path
    column: str
    offset: int
    """Of the line."""
    size: int
    checksum: int
    """CRC-32 of the line, by which a table that changed meanwhile is found out."""

    @property
    def where(self) -> str:
        """Its name in a message."""
        return f"{self.path} at byte {self.offset}"

    @property
    def mark(self) -> object:
        """Tells its content from another."""
        return self.checksum

    def read(self) -> str:
        """Read the text.

        Raises:
            EmulusError: The table is gone or not what it was.
        """
        line = read_slice(self.path, self.offset, self.size, self.where, most=MAX_TEXT)
        if zlib.crc32(line) != self.checksum:
            raise EmulusError(f"{self.where} is not what it was; leave the tables as they are until all is read")
        return str(json.loads(line.decode("utf-8-sig"))[self.column])


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """Stands for what an item of a large collection lacks: reading it says so, and the others can still be read."""

    path: Path
    reason: str

    @property
    def mark(self) -> object:
        """Nothing is there to be told from another."""
        return None

    def read(self) -> bytes:
        """Say what is missing.

        Raises:
            EmulusError: Always.
        """
        raise EmulusError(self.reason)


Stored = bytes | str | Path | ParquetCell | TarMember | JsonLine | Missing


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
    """Of a picture or clip at least one; the first is the one to show. Of a text none."""
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
                return _crc(self.stored, 0, self.stored.stat().st_size)
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


def read_slice(path: Path, offset: int, size: int, where: str, *, most: int) -> bytes:
    """Some bytes of a file, however large it says they are.

    Args:
        path: The file.
        offset: Where they begin.
        size: How many there should be.
        where: Names them in a message.
        most: How many are taken into memory at most.

    Raises:
        EmulusError: There are too many, or the file is gone or too short.
    """
    if size > most:
        raise EmulusError(f"{where} has {size:,} bytes, more than the {most:,} allowed; make it smaller")
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror}); restore it") from None
    if len(content) < size:
        raise EmulusError(f"{path} is shorter than it was; restore it from its source")
    return content


def decoded(content: bytes, where: str) -> str:
    """UTF-8 as text, without a byte order mark.

    Raises:
        EmulusError: It is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise EmulusError(f"{where} line {line} is not UTF-8; save the file as UTF-8") from None


def checked_text(text: str, where: str) -> str:
    """The text itself.

    Raises:
        EmulusError: It has halves of characters, which JSON can spell and nothing can encode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise EmulusError(f"{where} has half a character (a lone surrogate); mend it") from None
    return text


def number_of(value: object) -> float:
    """A number, or NaN for what is none."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def checked_fps(value: object, where: str) -> float:
    """A number of frames per second.

    Raises:
        EmulusError: It is none, or too small or large to be written into a sequence.
    """
    fps = number_of(value)
    if not LEAST_FPS <= fps <= MOST_FPS:
        raise EmulusError(f"{where}: fps {shown(value)} is not a number from {LEAST_FPS} to {MOST_FPS}; mend that row")
    return fps


def shown(value: object) -> str:
    """What a data set says, for a message: quoted, on one line and not too long."""
    text = str(value)
    quoted = repr(text[:_SHOWN])
    return quoted if len(text) <= _SHOWN else f"{quoted}..."


def inside(folder: Path, name: object, where: str) -> Path:
    """The path of a file by its name in a folder: it exists, and lies nowhere else.

    Raises:
        EmulusError: It is no such name, or there is no such file.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise EmulusError(f"{where} has no media and names no file; mend that row")
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.anchor or ".." in windows.parts:
        raise EmulusError(f"{where}: {shown(name)} is outside {folder}; name files relative to that folder, no '..'")
    path = folder / name
    try:
        found = path.is_file()
    except OSError as error:
        raise EmulusError(f"{where}: {shown(name)} cannot be looked for ({error.strerror}); mend that row") from None
    if not found:
        raise EmulusError(f"{where}: {shown(name)} is not in {folder}; restore that file or remove the row")
    return path


def _bytes(content: bytes | Path) -> bytes:
    if isinstance(content, bytes):
        return content
    try:
        size = content.stat().st_size
    except OSError as error:
        raise EmulusError(f"{content} cannot be read ({error.strerror}); restore it") from None
    return read_slice(content, 0, size, str(content), most=MAX_TEXT)
