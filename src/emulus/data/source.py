"""Any data set on the disk -> items: where each picture or clip lies, its captions, its split.

Two layouts are read, and a table of captions means the same in both: Parquet that holds the media itself (as
Hugging Face data sets are written), and media files beside a table that names them (``captions.jsonl``,
``captions.csv`` or ``captions.parquet``).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, TypeVar, get_args, overload

import pyarrow as pa
import pyarrow.parquet as pq

from emulus.errors import EmulusError, did_you_mean
from emulus.media import is_video

T = TypeVar("T")
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MEDIA_COLUMNS = ("media", "image", "video", "file_name", "file", "path")
CAPTION_COLUMNS = ("captions", "caption", "text")
TABLES = tuple(f"{stem}.{suffix}" for stem in ("captions", "metadata") for suffix in ("jsonl", "csv", "parquet"))
"""The names a table of captions goes by in a folder of media files, the first that exists."""

_SPLIT_NAMES: dict[str, Split] = {
    **{split: split for split in SPLITS},
    "val": "validation",
    "valid": "validation",
}
_ALWAYS_VIDEO = frozenset({".mp4", ".m4v", ".webm", ".mkv", ".avi", ".mov"})
_NEVER_VIDEO = frozenset({".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True, kw_only=True)
class ParquetCell:
    """One medium inside a Parquet file."""

    path: Path
    column: str
    group: int
    """Number of the row group."""
    row: int
    """Number of the row inside the group."""

    def read(self) -> bytes | Path:
        """Read the bytes; for a row that only names a file, the path of that file.

        Raises:
            EmulusError: The Parquet file is damaged or gone, or the row has no media.
        """
        with _parquet_errors(self.path):
            status = self.path.stat()
            column = _read_group(self.path, status.st_mtime_ns, status.st_size, self.group, self.column)
            value = column[self.row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content:
            return bytes(content)
        where = f"{self.path} row {self.row + 1} of group {self.group + 1}"
        return _inside(self.path.parent, value.get("path") if isinstance(value, dict) else None, where)


@lru_cache(maxsize=2)
def _read_group(path: Path, changed: int, size: int, group: int, column: str) -> pa.ChunkedArray:
    """The media of one row group. Items are mostly read in order, so the last groups are the ones to keep.

    ``changed`` and ``size`` only tell versions of the file apart. The file is opened anew each time: an open
    one could not be shared with worker processes.
    """
    return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(column)


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, IndexError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise EmulusError(f"{path} is no whole Parquet file ({reason}); restore it from its source") from error


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture or clip with its words. Its media is read when asked for, and not kept."""

    id: str
    kind: Kind
    captions: tuple[str, ...]
    """At least one; the first is the one to show."""
    split: Split
    stored: bytes | Path | ParquetCell
    """Where the media is."""
    fps: float | None = None
    """Frames per second where the table says so; else the clip's own time stamps count."""

    @property
    def media(self) -> bytes | Path:
        """The encoded media, or the path of its file: what :func:`emulus.media.read_image` takes.

        Raises:
            EmulusError: The Parquet file that holds it is damaged or gone.
        """
        return self.stored.read() if isinstance(self.stored, ParquetCell) else self.stored


class Source(Sequence[Item]):
    """The items of a data set, in the order of its tables."""

    def __init__(self, path: Path, items: Sequence[Item]) -> None:
        self.path = path
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Source: ...
    def __getitem__(self, index: int | slice) -> Item | Source:
        """One item, or a part of the data set."""
        return Source(self.path, self._items[index]) if isinstance(index, slice) else self._items[index]

    def select(self, *, split: Split | None = None, kind: Kind | None = None) -> Source:
        """The items of one split, of one kind, or both."""
        chosen = [item for item in self if split in (None, item.split) and kind in (None, item.kind)]
        return Source(self.path, chosen)

    def counts(self) -> dict[str, int]:
        """Number of items by split and kind, such as ``{"train image": 6408}``."""
        return dict(sorted(Counter(f"{item.split} {item.kind}" for item in self).items()))


def split_of_key(key: str) -> Split:
    """Put a key into a split, about 90 / 5 / 5: a pure function of the key."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    if place < 0.9:
        return "train"
    return "validation" if place < 0.95 else "test"


def open_source(path: Path | str) -> Source:
    """Open a data set. Words are read and every row is checked now; media are read item by item later.

    Args:
        path: A Parquet file; a folder of them; or a folder of media files with a table of captions in it (one
            of :data:`TABLES`). A table has a column of media (one of :data:`MEDIA_COLUMNS`: bytes, a struct
            of ``bytes`` and ``path``, or a file name relative to the folder) and one of captions
            (:data:`CAPTION_COLUMNS`: text or a list of texts). It may have ``id``, ``split``, ``kind`` and
            ``fps``. Rows that name the same file are one item with several captions. Without a split column,
            the split comes from the id by :func:`split_of_key`.

    Returns:
        The items.

    Raises:
        EmulusError: Something is missing, damaged or not as described; one line names the file and the row.
    """
    path = Path(path)
    items: dict[str, Item] = {}
    for table in _tables(path):
        for item in _read_table(table):
            earlier = items.get(item.id)
            if earlier is None:
                items[item.id] = item
            elif isinstance(item.stored, Path) and earlier.stored == item.stored:
                merged = tuple(dict.fromkeys(earlier.captions + item.captions))
                items[item.id] = replace(earlier, captions=merged)
            else:
                raise EmulusError(
                    f"{table} has the id '{item.id}' of an earlier item; give every item an id of its own"
                )
    if not items:
        raise EmulusError(f"{path} has no rows; add some")
    return Source(path, list(items.values()))


def _tables(path: Path) -> list[Path]:
    """The tables that a data set consists of."""
    if path.is_file():
        if path.suffix in (".parquet", ".jsonl", ".csv"):
            return [path]
        raise EmulusError(f"{path} is no data set; name a .parquet file or a folder of media with captions.jsonl")
    if not path.is_dir():
        raise EmulusError(f"{path} does not exist; name a .parquet file or a folder of media with captions.jsonl")
    named = [path / name for name in TABLES if (path / name).is_file()]
    if named:
        return named[:1]
    parquet = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith("."))
    if parquet:
        return parquet
    raise EmulusError(f"{path} has no table of captions; add captions.jsonl, captions.csv or captions.parquet")


@dataclass(frozen=True)
class _Row:
    """One row of a table, with what names it in a message."""

    values: Mapping[str, Any]
    where: str
    number: int
    """From 0, over the whole table."""
    cell: ParquetCell | None = None
    """The media, when the table itself holds it."""


def _read_table(path: Path) -> Iterator[Item]:
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows}
    for row in readers[path.suffix](path):
        yield _item(row, path)


def _item(row: _Row, table: Path) -> Item:
    media_column = _column(row.values, MEDIA_COLUMNS, row.where)
    captions = _captions(row, _column(row.values, CAPTION_COLUMNS, row.where))
    stored = row.cell or _file(row, media_column, table.parent)
    if row.values.get("id") is not None:
        identity = str(row.values["id"])
    elif isinstance(stored, Path):
        identity = stored.relative_to(table.parent).as_posix()
    else:
        identity = f"{table.stem}/{row.number}"
    split = row.values.get("split")
    return Item(
        id=identity,
        kind=_kind(row, media_column, stored),
        captions=captions,
        split=split_of_key(identity) if split in (None, "") else _split(split, row.where),
        stored=stored,
        fps=_fps(row),
    )


def _column(present: Collection[str], names: Sequence[str], where: str) -> str:
    """The first of the names that is present."""
    for name in names:
        if name in present:
            return name
    raise EmulusError(
        f"{where} has no column {' or '.join(names)}; it has {', '.join(map(str, present)) or 'none'}"
        f"{_closest(names, present)}"
    )


def _closest(names: Sequence[str], present: Collection[str]) -> str:
    """A hint when a column that is there looks like one that is sought."""
    for column in present:
        hint = did_you_mean(str(column), names)
        if "did you mean" in hint:
            return f"{hint.removesuffix('?')} for '{column}'?"
    return "; rename the one that is meant"


def _captions(row: _Row, column: str) -> tuple[str, ...]:
    value = row.values[column]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise EmulusError(f"{row.where}: '{column}' is neither a text nor a list of texts; mend that row")
    captions = tuple(text.strip() for text in texts if text.strip())
    if not captions:
        raise EmulusError(f"{row.where}: '{column}' is empty; write a caption or remove that row")
    return captions


def _file(row: _Row, column: str, folder: Path) -> Path:
    """The file that a row names."""
    name = row.values[column]
    return _inside(folder, name.get("path") if isinstance(name, Mapping) else name, row.where)


def _inside(folder: Path, name: Any, where: str) -> Path:
    """The path of a file by its name in a folder: it exists, and lies nowhere else."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise EmulusError(f"{where} has no media and names no file; mend that row")
    windows = PureWindowsPath(name)
    if PurePosixPath(name).is_absolute() or windows.anchor or ".." in windows.parts:
        raise EmulusError(f"{where}: '{name}' is outside {folder}; name files relative to that folder, without '..'")
    path = folder / name
    if not path.is_file():
        raise EmulusError(f"{where}: '{name}' is not in {folder}; restore that file or remove the row")
    return path


def _kind(row: _Row, column: str, stored: Path | ParquetCell) -> Kind:
    """What the table says; else what the column, the file's suffix or at last the content says."""
    said = row.values.get("kind")
    if said not in (None, ""):
        if said not in KINDS:
            raise EmulusError(f"{row.where}: the kind '{said}' is unknown{did_you_mean(str(said), KINDS)}")
        return "video" if said == "video" else "image"
    if column == "video":
        return "video"
    suffix = stored.suffix.lower() if isinstance(stored, Path) else ""
    if suffix in _ALWAYS_VIDEO:
        return "video"
    if column == "image" or suffix in _NEVER_VIDEO:
        return "image"
    try:
        return "video" if is_video(stored.read() if isinstance(stored, ParquetCell) else stored) else "image"
    except EmulusError:
        # A broken file is reported by whoever reads it, and does not keep the others from being read.
        return "image"


def _split(value: Any, where: str) -> Split:
    split = _SPLIT_NAMES.get(str(value).lower())
    if split is None:
        raise EmulusError(f"{where}: the split '{value}' is unknown{did_you_mean(str(value), SPLITS)}")
    return split


def _fps(row: _Row) -> float | None:
    value = row.values.get("fps")
    if value in (None, ""):
        return None
    try:
        fps = float(value)
    except (TypeError, ValueError):
        fps = 0.0
    if not 0 < fps < 1000:
        raise EmulusError(f"{row.where}: fps '{value}' is not a number of frames per second; mend that row")
    return fps


def _text(path: Path) -> str:
    """The content of a table of text."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise EmulusError(f"{path} line {line} is not UTF-8; save the file as UTF-8") from None


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    # Only a line feed ends a line of JSON: a caption may hold other characters that Python takes for one.
    for number, line in enumerate(_text(path).split("\n")):
        where = f"{path} line {number + 1}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise EmulusError(f"{where} is not JSON ({error}); mend that line") from None
        if not isinstance(values, dict):
            raise EmulusError(f'{where} is not an object such as {{"file": "a.png", "caption": "..."}}; mend that line')
        yield _Row(values, where, number)


def _csv_rows(path: Path) -> Iterator[_Row]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for names in (MEDIA_COLUMNS, CAPTION_COLUMNS):
            _column(reader.fieldnames or (), names, str(path))
        for number, values in enumerate(reader):
            where = f"{path} line {reader.line_num}"
            if None in values or None in values.values():
                raise EmulusError(
                    f"{where} has not as many fields as the first line; put texts with commas into quotes"
                )
            yield _Row(values, where, number)
    except csv.Error as error:
        raise EmulusError(f"{path} line {reader.reader.line_num} is not CSV ({error}); mend that line") from None


def _parquet_rows(path: Path) -> Iterator[_Row]:
    with _parquet_errors(path):
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        media = _column(schema.names, MEDIA_COLUMNS, str(path))
        captions = _column(schema.names, CAPTION_COLUMNS, str(path))
        holds_bytes = _is_bytes(schema.field(media).type)
        # Bytes stay where they are; only words are read.
        wanted = {captions, "id", "split", "kind", "fps"} | (set() if holds_bytes else {media})
        columns = [name for name in schema.names if name in wanted]
        number = 0
        for group in range(file.num_row_groups):
            for place, values in enumerate(file.read_row_group(group, columns=columns).to_pylist()):
                cell = ParquetCell(path=path, column=media, group=group, row=place) if holds_bytes else None
                yield _Row({media: None, **values}, f"{path} row {number + 1}", number, cell)
                number += 1


def _is_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds media: bytes, or Hugging Face's struct of ``bytes`` and ``path``."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def even(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly spread, so that every kind and style has its share."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]
