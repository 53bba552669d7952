"""Media and texts inside Parquet and Arrow files, read one by one in bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emulus.data.sources.account import LeftOutError
from emulus.data.stored import LFS_REASON, MAX_MEMBER, content_of, crc_of, head_of, inside, is_lfs_pointer
from emulus.errors import EmulusError, shown
from emulus.lazy import later

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
else:
    pa = later("pyarrow")
    pq = later("pyarrow.parquet")

BUFFER = 2**20
"""Bytes of a column that are read from the disk at a time."""
_FEW_ROWS, _MOST_ROWS, _BATCH_BYTES = 4, 1024, 2**25
"""Values that are unpacked at a time: few, unless all of a column together could be unpacked so often."""
_LARGE = 2**18
"""Bytes of values that are unpacked one at a time."""
_WINDOW_ROWS, _WINDOW_BYTES = 8, 2**25
"""What is kept of the values that were passed, as readers in several threads ask out of order."""
_OPEN_COLUMNS = 2
_MOST_UNPACKED, _MOST_TIMES = 2**28, 100
"""Bytes that a row group may unpack to, and how many times the size of its file."""


def parquet_errors(path: Path) -> AbstractContextManager[None]:
    """Turn what pyarrow raises about a broken file into one line that names it.

    Raises:
        EmulusError: Within: the file is gone, damaged, a Git LFS pointer or no Parquet file.
    """
    return _pyarrow_errors(path, "Parquet", "restore it from its source")


def arrow_errors(path: Path) -> AbstractContextManager[None]:
    """Like :func:`parquet_errors`, for an Arrow file."""
    return _pyarrow_errors(path, "Arrow", "restore it, or export the data set with to_parquet()")


@contextmanager
def _pyarrow_errors(path: Path, kind: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except EmulusError:
        raise
    except (pa.ArrowException, OSError, IndexError, KeyError, ValueError, NotImplementedError) as error:
        if is_lfs_pointer(head_of(path)):
            raise EmulusError(f"{path}: {LFS_REASON}") from None
        reason = shown(error, quote=False)
        raise EmulusError(f"{path} is no whole {kind} file ({reason}); {remedy}") from error


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
        # Threads that want the same group wait for the first of them to read it.
        with parquet_errors(self.path), _reading:
            value = _columns.of(self.path, self.group, self.column).value(self.row)
        return _content(value, self.path.parent, self.where)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrowCell:
    """One medium or text inside an Arrow file, as ``datasets.save_to_disk`` writes them."""

    path: Path
    column: str
    batch: int
    row: int

    @property
    def where(self) -> str:
        """Its name in a message."""
        return f"{self.path} row {self.row + 1} of batch {self.batch + 1}"

    @property
    def mark(self) -> object:
        """Tells its content from another: the file's size and time, and the place (raises OSError)."""
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns, self.batch, self.row

    def read(self) -> bytes | str | Path:
        """Read the bytes or the text; for a row that only names a file, the path of that file.

        Raises:
            EmulusError: The file is damaged or gone, or the row has no content.
        """
        with arrow_errors(self.path):
            status = self.path.stat()
            with _reading:
                batches = _arrow_batches(self.path, status.st_mtime_ns, status.st_size)
            value = _plain(batches[self.batch].column(self.column)[self.row], self.where)
        return _content(value, self.path.parent, self.where)


def _content(value: Any, folder: Path, where: str) -> bytes | str | Path:
    try:
        value = content_of(value)
    except LeftOutError as error:
        raise LeftOutError(error.reason, f"{where} {error}") from None
    if isinstance(value, str):
        return value
    content = value.get("bytes") if isinstance(value, dict) else value
    if content:
        return bytes(content)
    return inside(folder, value.get("path") if isinstance(value, dict) else None, where)


class _Column:
    """One column of one row group. It is read forward, and the values that were passed last are kept.

    A row group may hold more than memory, and a few bytes may unpack to gigabytes, as dictionaries hold once what many
    rows have. So only a few values are unpacked at a time.
    """

    def __init__(self, path: Path, group: int, column: str) -> None:
        self._path, self._group, self._column = path, group, column
        # Of all columns together: what the group says of each is not looked at, as pyarrow aborts where it is damaged.
        chunks, size = pq.read_metadata(path).row_group(group), path.stat().st_size
        unpacked = chunks.total_byte_size
        if unpacked > max(_MOST_UNPACKED, _MOST_TIMES * size):
            raise EmulusError(f"{path}: a row group unpacks to {unpacked:,} bytes, from {size:,}; restore it")
        few = 1 if unpacked > _LARGE * chunks.num_rows else _FEW_ROWS
        self._rows = min(max(_BATCH_BYTES // max(unpacked, 1), few), _MOST_ROWS)
        self._rewind()

    def _rewind(self) -> None:
        file = pq.ParquetFile(self._path, buffer_size=BUFFER, pre_buffer=False)
        self._batches = file.iter_batches(self._rows, row_groups=[self._group], columns=[self._column])
        self._window: deque[tuple[int, pa.Array]] = deque()
        self._kept, self._next = 0, 0

    def value(self, row: int) -> Any:
        """The value of a row (raises IndexError where there is none)."""
        if row < self._next and (not self._window or row < self._window[0][0]):
            self._rewind()
        while row >= self._next:
            self._advance()
        start, array = next((start, array) for start, array in reversed(self._window) if start <= row)
        return _plain(array[row - start], f"{self._path} row {row + 1} of group {self._group + 1}")

    def _advance(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            raise IndexError("a row is missing")
        array = batch.column(0)
        self._window.append((self._next, array))
        self._next += len(array)
        self._kept += array.nbytes
        while self._kept > _WINDOW_BYTES and self._next - self._window[0][0] - len(self._window[0][1]) >= _WINDOW_ROWS:
            self._kept -= self._window.popleft()[1].nbytes


class _Columns:
    """The columns that were read last. Items are mostly read in order, so the last groups are the ones to keep."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[Path, int, int, int, str], _Column] = OrderedDict()

    def of(self, path: Path, group: int, column: str) -> _Column:
        status = path.stat()
        # Time and size tell versions of the file apart.
        key = (path, status.st_mtime_ns, status.st_size, group, column)
        if key not in self._open:
            while len(self._open) >= _OPEN_COLUMNS:
                self._open.popitem(last=False)
            self._open[key] = _Column(path, group, column)
        self._open.move_to_end(key)
        return self._open[key]

    def close(self) -> None:
        self._open.clear()


_reading = threading.Lock()
_columns = _Columns()


def close_files() -> None:
    """Let go of the columns that were read last, and of their memory."""
    with _reading:
        _columns.close()


def _plain(scalar: pa.Scalar, where: str) -> Any:
    """A value as Python has it, once it is known to be of a size to be held.

    Raises:
        LeftOutError: It is too large.
    """
    if isinstance(scalar, pa.DictionaryScalar):
        return _plain(scalar.value, where)
    if scalar is None or not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StructScalar):
        return {name: _plain(scalar[name], where) for name in ("bytes", "path") if name in scalar}
    if isinstance(scalar, pa.ListScalar):
        return [_plain(each, where) for each in scalar.values]
    buffer = getattr(scalar, "as_buffer", None)
    if buffer is not None and (size := buffer().size) > MAX_MEMBER:
        raise LeftOutError("too large", f"{where} has {size:,} bytes, more than the {MAX_MEMBER:,} allowed")
    return scalar.as_py()


@lru_cache(maxsize=2)
def _group_crc(path: Path, changed: int, size: int, group: int, column: str) -> int:
    """CRC-32 of the bytes that one column of one row group has in the file."""
    file = pq.ParquetFile(path, buffer_size=BUFFER)
    # Reads what the group says of the column; where that is damaged, reading raises, and looking at it would abort.
    next(file.iter_batches(1, row_groups=[group], columns=[column]), None)
    chunks, crc = file.metadata.row_group(group), 0
    for number in range(len(file.schema)):
        if file.schema.column(number).path.split(".")[0] == column:
            chunk = chunks.column(number)
            first = chunk.dictionary_page_offset or chunk.data_page_offset
            crc = crc_of(path, min(first, chunk.data_page_offset), chunk.total_compressed_size, crc)
    return crc


def arrow_batches(path: Path) -> tuple[pa.RecordBatch, ...]:
    """The batches of an Arrow file, which stay on the disk until they are looked at.

    Raises:
        EmulusError: It is gone, damaged, compressed or no Arrow file.
    """
    with arrow_errors(path):
        status = path.stat()
        return _arrow_batches(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _arrow_batches(path: Path, changed: int, size: int) -> tuple[pa.RecordBatch, ...]:
    source = pa.memory_map(str(path))
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    before, batches = pa.total_allocated_bytes(), []
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    found = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else iter(reader)
    for batch in found:
        # Of damaged offsets pyarrow reads whatever lies there.
        batch.validate(full=True)
        batches.append(batch)
        # What is not compressed takes no memory.
        if pa.total_allocated_bytes() - before > _MOST_UNPACKED:
            raise EmulusError(f"{path} is a compressed Arrow file; export the data set with to_parquet()")
    return tuple(batches)
