"""One picture, clip or text as ids <-> bytes, and many of them in a shard that is read in any order.

A shard is two files of one stem. ``{split}-{kind}-{number}.arrayrecord`` holds a record per row: a header, and the ids
as they are. ``….lengths.safetensors`` holds what packing needs, so that rows are planned without reading records.
``manifest.jsonl`` beside them has a line for each finished shard; a shard without one does not exist.

Records are grouped by one and compressed by zstd at its fastest. On one core of the machine this was chosen on, 4,000
records of 1,100 to 4,300 random ids of 184,622 were read at 60,000 a second in random order; without compression at
105,000, from files 40 % larger. Reads one by one cost half the CPU time of array_record's own parallel batches.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from emulus.codec import decode_fields, parse_json
from emulus.data.origin import Origin
from emulus.errors import EmulusError, at_least, shown
from emulus.files import disk_errors, fsync, write_file
from emulus.lazy import later

array_record = later("array_record.python.array_record_module")

Kind = Literal["text", "image", "video"]
Role = Literal["text", "caption", "question", "answer", "media"]
Ids32 = npt.NDArray[np.uint32]

RECORD_KINDS: tuple[Kind, ...] = get_args(Kind)
MANIFEST = "manifest.jsonl"
SUFFIX = ".arrayrecord"
LENGTHS_SUFFIX = ".lengths.safetensors"
LETTERS: dict[Role, int] = {"text": ord("t"), "caption": ord("c"), "question": ord("q"), "answer": ord("a")}
"""How roles are written in the lengths file; ``media`` is ``m``, and stands in records only."""
REMEDY = "delete it and run the same tokenize command again"
_AGAIN = "tokenize again, to another folder"

_CODES: dict[Role, int] = {**LETTERS, "media": ord("m")}
_ROLES: dict[int, Role] = {code: role for role, code in _CODES.items()}
_ORDER = {"text": re.compile(rb"t"), "image": re.compile(rb"c*(qa)*m"), "video": re.compile(rb"c*(qa)*m")}
_DIMENSIONS = {"text": 0, "image": 2, "video": 3}
_MAGIC, _VERSION = b"EmuR", 1
# Magic, version, kind, dimensions; ids, spans, bytes of the id and of the source; shape; frames per second, score.
_HEADER = struct.Struct("<4sBBBxIHHHxx3Idd")
_WRITER = "group_size:1,zstd:1"
# Nothing is read ahead: the next record is somewhere else.
_READER = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER = 1 << 15
_NAME = re.compile(rf"(train|validation|test)-(text|image|video)-[0-9]{{5,12}}{re.escape(SUFFIX)}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_LINE = 2**27
"""Bytes of a line of the manifest: thousands of items that were left out, each with a reason, have some megabytes."""
_TAIL = 1 << 16
"""Bytes at the manifest's end that are looked at at once for the end of its last whole line."""
_LENGTHS = {"media": np.uint32, "offsets": np.uint64, "lengths": np.uint32, "roles": np.uint8}


class Span(NamedTuple):
    """A stretch of a record's ids: ``ids[start:stop]``."""

    role: Role
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """A text, or a picture or clip and the words about it, as ids.

    Attributes:
        id: The item's, as its source names it.
        kind: ``text``, ``image`` or ``video``.
        ids: All spans end to end.
        spans: A text is one ``text``. Others are captions, then questions each with its answer, then ``media`` from
            BOI to EOI.
        shape: ``()`` of a text, ``(h, w)`` of a picture, ``(t, h, w)`` of a clip, in cells.
        fps: Frames of pixels per second of a clip; else 0.
        score: Whatever quality the source gave it.
        source: Which source it is from.
    """

    id: str
    kind: Kind
    ids: Ids32
    spans: tuple[Span, ...]
    shape: tuple[int, ...] = ()
    fps: float = 0.0
    score: float = 0.0
    source: str = ""

    def of(self, role: Role) -> list[Ids32]:
        """The ids of every span of a role, in order."""
        return [self.ids[span.start : span.stop] for span in self.spans if span.role == role]


@dataclass(frozen=True, kw_only=True)
class ShardFigures:
    """What a written shard holds.

    Attributes:
        rows: Records.
        tokens: Ids, of all spans.
        bytes: Of both files.
        sha256: Of the records' file and then the lengths' file, as if they were one.
    """

    rows: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Skipped:
    """An item that could not be read or written, and why."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardLine:
    """A line of the manifest: a finished shard.

    Attributes:
        name: Of the records' file.
        sha256: See :class:`ShardFigures`.
        bytes: Likewise.
        rows: Likewise.
        tokens: Likewise.
        skipped: What was left out.
        origin: What it was made from; None where an older version of Emulus made it, which did not note that.
    """

    name: str
    sha256: str
    bytes: int
    rows: int
    tokens: int
    skipped: tuple[Skipped, ...] = ()
    origin: Origin | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise EmulusError(f"{shown(self.name)} is not the name of a shard")
        if not _SHA256.fullmatch(self.sha256):
            raise EmulusError(f"{shown(self.sha256)} is not a SHA-256")
        at_least(0, bytes=self.bytes, rows=self.rows, tokens=self.tokens)

    @property
    def split(self) -> str:
        """``train``, ``validation`` or ``test``."""
        return self.name.split("-")[0]

    @property
    def kind(self) -> Kind:
        """Of all its records."""
        return cast(Kind, self.name.split("-")[1])

    @property
    def number(self) -> int:
        """Its place among those of its split and kind."""
        return int(self.name.removesuffix(SUFFIX).split("-")[2])


def shard_name(split: str, kind: Kind, number: int) -> str:
    """The name of a shard's records' file."""
    return f"{split}-{kind}-{number:05d}{SUFFIX}"


def lengths_path(path: Path) -> Path:
    """The lengths' file that belongs to a records' file."""
    return path.with_name(path.name.removesuffix(SUFFIX) + LENGTHS_SUFFIX)


def pack_record(record: Record) -> bytes:
    """Write a record as bytes.

    Args:
        record: What to write.

    Returns:
        A header, the lengths and roles of the spans, the names, and the ids as 32-bit numbers, all little-endian.

    Raises:
        EmulusError: Its spans are not end to end or not in order, or its shape is not one of its kind.
    """
    starts = [0, *(span.stop for span in record.spans)]
    lengths = [span.stop - start for span, start in zip(record.spans, starts, strict=False)]
    if (
        [span.start for span in record.spans] != starts[:-1]
        or starts[-1] != len(record.ids)
        or min(lengths, default=0) < 0
    ):
        raise EmulusError(f"{record.id}: its spans do not cover its {len(record.ids)} ids end to end; write them so")
    if record.ids.dtype != np.uint32 or record.ids.ndim != 1:
        raise EmulusError(f"{record.id}: ids are a row of uint32, not {record.ids.dtype} of {record.ids.shape}")
    roles = bytes(_CODES[span.role] for span in record.spans)
    _check(record.kind, roles, record.shape, record.fps, record.score, record.id)
    id, source = record.id.encode(), record.source.encode()
    if max(len(id), len(source), len(roles)) > 0xFFFF:
        raise EmulusError(
            f"{record.id[:80]}: its name, its source or its number of captions is above 65,535; shorten it"
        )
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        RECORD_KINDS.index(record.kind),
        len(record.shape),
        len(record.ids),
        len(roles),
        len(id),
        len(source),
        *record.shape,
        *[0] * (3 - len(record.shape)),
        record.fps,
        record.score,
    )
    words = roles + id + source
    parts = (
        header,
        np.array(lengths, "<u4").tobytes(),
        words,
        bytes(-len(words) % 4),
        record.ids.astype("<u4").tobytes(),
    )
    return b"".join(parts)


def unpack_record(data: bytes, where: str) -> Record:
    """Read a record back.

    Args:
        data: What :func:`pack_record` wrote.
        where: Names it in a message.

    Returns:
        The record; its ids lie in ``data`` and cannot be written to.

    Raises:
        EmulusError: It is cut off, damaged or something else.
    """
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise EmulusError(f"{where} is no record of ids, or a damaged one; {REMEDY}")
    _, version, kind_number, dimensions, count, spans, id_size, source_size, *rest = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise EmulusError(f"{where} is a record of version {version}, this program reads {_VERSION}; tokenize again")
    roles_at = _HEADER.size + 4 * spans
    id_at = roles_at + spans
    source_at = id_at + id_size
    words = spans + id_size + source_size
    ids_at = roles_at + words + -words % 4
    if len(data) != ids_at + 4 * count or kind_number >= len(RECORD_KINDS) or dimensions > 3:
        raise EmulusError(
            f"{where} is damaged: it has {len(data)} bytes where its header says {ids_at + 4 * count}; {REMEDY}"
        )
    lengths = struct.unpack_from(f"<{spans}I", data, _HEADER.size)
    if sum(lengths) != count:
        raise EmulusError(f"{where} is damaged: spans of {sum(lengths)} ids, but {count} ids; {REMEDY}")
    roles = data[roles_at:id_at]
    kind = RECORD_KINDS[kind_number]
    shape, (fps, score) = tuple(rest[:dimensions]), rest[3:]
    _check(kind, roles, shape, fps, score, where)
    try:
        id, source = data[id_at:source_at].decode(), data[source_at : roles_at + words].decode()
    except UnicodeDecodeError:
        raise EmulusError(f"{where} is damaged: its name is not UTF-8; {REMEDY}") from None
    return Record(
        id=id,
        kind=kind,
        ids=np.frombuffer(data, "<u4", count, ids_at),
        spans=tuple(_spans(roles, lengths)),
        shape=shape,
        fps=fps,
        score=score,
        source=source,
    )


def _spans(roles: bytes, lengths: Sequence[int]) -> Iterator[Span]:
    start = 0
    for role, length in zip(roles, lengths, strict=True):
        yield Span(_ROLES[role], start, start + length)
        start += length


def _check(kind: str, roles: bytes, shape: tuple[int, ...], fps: float, score: float, where: str) -> None:
    """Refuse what no record is."""
    if not _ORDER[kind].fullmatch(roles):
        raise EmulusError(f"{where}: spans {roles!r} are not those of a record of kind {kind}; {REMEDY}")
    if len(shape) != _DIMENSIONS[kind] or not all(shape) or (fps > 0) != (kind == "video"):
        raise EmulusError(f"{where}: no {kind} has the shape {shape} at {fps} frames per second; {REMEDY}")
    if not (math.isfinite(fps) and math.isfinite(score)):
        raise EmulusError(f"{where}: {fps} frames per second or the score {score} is no number; {REMEDY}")


def write_shard(path: Path, records: Iterable[Record], skipped: list[Skipped] | None = None) -> ShardFigures:
    """Write both files of a shard. Each appears when it is whole; the same records give the same bytes.

    Args:
        path: Of the records' file, named by :func:`shard_name`.
        records: What it shall hold; asked for one by one.
        skipped: Takes what is no record; without it, that is an error.

    Returns:
        What goes into the manifest.

    Raises:
        EmulusError: A record is none, the disk is full, or the folder may not be written to.
    """
    media: list[int] = []
    counts: list[int] = []
    lengths: list[int] = []
    roles = bytearray()

    def write(temporary: Path) -> None:
        with _package_errors():
            writer = array_record.ArrayRecordWriter(str(temporary), _WRITER)
        for record in records:
            try:
                data = pack_record(record)
            except EmulusError as error:
                if skipped is None:
                    raise
                skipped.append(Skipped(record.id, str(error)))
                continue
            with _package_errors():
                writer.write(data)
            words = [span for span in record.spans if span.role != "media"]
            media.append(sum(span.stop - span.start for span in record.spans if span.role == "media"))
            counts.append(len(words))
            lengths.extend(span.stop - span.start for span in words)
            roles.extend(_CODES[span.role] for span in words)
        with _package_errors():
            writer.close()

    write_file(path, write)
    tensors: dict[str, npt.NDArray] = {
        "media": np.array(media, np.uint32),
        "offsets": np.concatenate([[0], np.cumsum(counts, dtype=np.uint64)]).astype(np.uint64),
        "lengths": np.array(lengths, np.uint32),
        "roles": np.frombuffer(bytes(roles), np.uint8),
    }
    write_file(lengths_path(path), lambda temporary: save_file(tensors, temporary))
    return ShardFigures(
        rows=len(media),
        tokens=sum(media) + sum(lengths),
        bytes=path.stat().st_size + lengths_path(path).stat().st_size,
        sha256=shard_digest(path),
    )


@contextmanager
def _package_errors() -> Iterator[None]:
    """array_record says everything with one kind of error; tell what the file system said."""
    try:
        yield
    except RuntimeError as error:
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number)) from error
        raise OSError(None, str(error)) from error


def shard_digest(path: Path) -> str:
    """SHA-256 of both files of a shard, one after the other.

    Raises:
        EmulusError: One of them is missing.
    """
    digest = hashlib.sha256()
    for file in (path, lengths_path(path)):
        try:
            with file.open("rb") as stream:
                for block in iter(lambda: stream.read(1 << 20), b""):
                    digest.update(block)
        except OSError as error:
            raise EmulusError(
                f"{file} cannot be read ({error.strerror}); run the same tokenize command again"
            ) from None
    return digest.hexdigest()


def add_to_manifest(folder: Path, line: ShardLine) -> None:
    """Make a shard exist: append its line and flush it to the disk. One process at a time may do so (:func:`only_run`).

    Raises:
        EmulusError: The disk is full, or the folder may not be written to.
    """
    path = folder / MANIFEST
    values = asdict(line)
    if line.origin is None:
        del values["origin"]
    with disk_errors(path), path.open("a+b") as file:
        # What a crash tore would swallow this line.
        file.truncate(end_of_lines(file))
        file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        fsync(folder)


def end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line of a file ends; nothing before that line is read."""
    stop = file.seek(0, os.SEEK_END)
    while stop:
        start = max(stop - _TAIL, 0)
        file.seek(start)
        found = file.read(stop - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        stop = start
    return 0


def read_manifest(folder: Path) -> list[ShardLine]:
    """The finished shards in order; of two lines for one shard the later holds.

    A last line without its end was torn by a crash and does not count. A folder without a manifest has no shards.

    Raises:
        EmulusError: The manifest cannot be read, or a line is not one of ours.
    """
    path = folder / MANIFEST
    if path.exists() and not path.is_file():
        raise EmulusError(f"{path} is not a file; {_AGAIN}")
    found = {}
    try:
        with path.open("rb") as file:
            number = 0
            while text := file.readline(_MOST_LINE):
                number += 1
                if len(text) == _MOST_LINE:
                    raise EmulusError(f"{path} line {number} is damaged: it has no end; {_AGAIN}")
                if text.endswith(b"\n"):
                    line = _parse_line(text, f"{path} line {number}")
                    found[line.name] = line
    except FileNotFoundError:
        return []
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror}); restore it") from None
    return sorted(found.values(), key=lambda line: (line.split, line.kind, line.number))


def _parse_line(text: bytes, where: str) -> ShardLine:
    try:
        return decode_fields(ShardLine, parse_json(text, "it", remedy="restore it"), "it")
    except EmulusError as error:
        raise EmulusError(f"{where} is damaged ({error}); delete that line and tokenize again") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class Lengths:
    """The lengths' file of a shard: how long every span of every record is.

    Attributes:
        media: Ids of each record's medium; 0 of a text.
        offsets: Where each record's other spans begin in the next two, and at last their number.
        lengths: Ids of all other spans, record by record.
        roles: Their roles, as :data:`LETTERS` writes them.
    """

    media: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.uint64]
    lengths: npt.NDArray[np.uint32]
    roles: npt.NDArray[np.uint8]


def read_lengths(path: Path) -> Lengths:
    """Read the lengths' file that belongs to a records' file.

    Raises:
        EmulusError: It is missing, damaged or none of ours.
    """
    path = lengths_path(path)
    try:
        values = load_file(path)
    except FileNotFoundError:
        raise EmulusError(f"{path} is missing; run the same tokenize command again") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise EmulusError(f"{path} is damaged ({error}); {REMEDY}") from None
    found = {name: (array.dtype.type, array.ndim) for name, array in values.items()}
    if found != {name: (dtype, 1) for name, dtype in _LENGTHS.items()}:
        raise EmulusError(f"{path} is no file of lengths; {REMEDY}")
    lengths = Lengths(**values)
    bounds = lengths.offsets.astype(np.int64)
    whole = len(bounds) == len(lengths.media) + 1 and bounds[0] == 0 and bool((np.diff(bounds) >= 0).all())
    if not whole or not bounds[-1] == len(lengths.lengths) == len(lengths.roles):
        raise EmulusError(f"{path} is damaged: its parts do not fit together; {REMEDY}")
    return lengths


class Shard:
    """An open shard, to be read in any order and from any thread, but not across a fork.

    Args:
        path: Of the records' file.

    Raises:
        EmulusError: The file is missing, cut off, damaged or none of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise EmulusError(f"{path} is missing; run the same tokenize command again")
        self._reader = array_record.ArrayRecordReader(str(path), _READER, file_reader_buffer_size=_READER_BUFFER)
        if not self._reader.ok():
            raise EmulusError(f"{path} is cut off, damaged or no ArrayRecord file; {REMEDY}")

    def __len__(self) -> int:
        return int(self._reader.num_records())

    def read(self, indices: Iterable[int]) -> list[Record]:
        """Some records, in the order asked for.

        Args:
            indices: From 0 on.

        Raises:
            EmulusError: One is damaged or is not there.
        """
        return [unpack_record(self._bytes(index), f"{self.path} record {index}") for index in indices]

    def _bytes(self, index: int) -> bytes:
        try:
            data: bytes = self._reader.read([index])[0]
        except (RuntimeError, IndexError) as error:
            raise EmulusError(f"{self.path} record {index} is damaged or missing ({error}); {REMEDY}") from None
        return data
