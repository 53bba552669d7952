"""Parquet and Arrow files -> rows: their words are read now, media and texts stay where they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emulus.data.item import ArrowCell, ParquetCell
from emulus.data.parquet import BUFFER, arrow_batches, arrow_errors, parquet_errors
from emulus.data.sources.account import LeftOutError, UnfitError
from emulus.data.sources.columns import (
    CAPTION_COLUMNS,
    MEDIA_COLUMNS,
    MORE_CAPTION_COLUMNS,
    MORE_COLUMNS,
    MORE_MEDIA_COLUMNS,
    TEXT_COLUMNS,
    Columns,
    columns_of,
    plain_columns,
)
from emulus.data.sources.rows import Row
from emulus.errors import EmulusError, shown
from emulus.lazy import later

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
else:
    pa = later("pyarrow")
    pc = later("pyarrow.compute")
    pq = later("pyarrow.parquet")

MAX_WORDS = 2**24
"""Bytes of the words of one row."""
_LEAST_ROWS, _MOST_ROWS = 16, 1024
"""Rows of a Parquet file that are read at a time."""
_BATCH_BYTES = 2**22
_MOST_WORDS, _MOST_TIMES = 2**28, 100
"""Bytes of words that any Parquet file may unpack to, and how many times its own size."""
_SAMPLE = 8
_TOO_LONG = "words that are too long"


def parquet_columns(path: Path) -> Columns:
    """Which columns of a Parquet file hold what.

    Raises:
        EmulusError: It is damaged, or neither a table of media with words nor one of texts.
    """
    with parquet_errors(path):
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        if file.metadata.num_rows > path.stat().st_size:
            raise EmulusError(f"{path} claims {file.metadata.num_rows:,} rows, more than its bytes; restore it")
        sample = list(itertools.islice(_sampled(path, file), _SAMPLE))
        cells: dict[str, Any] = {}
        for field in schema if sample else ():
            if holds_bytes(field.type) and not _is_known(field.name):
                cells[field.name] = _first(ParquetCell(path=path, column=field.name, group=0, row=0))
        return _columns(schema, sample, cells, path)


def parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of a Parquet file.

    Args:
        path: The file.
        columns: What its columns hold.

    Raises:
        EmulusError: It is damaged, or unpacks to far more than it has bytes.
    """
    with parquet_errors(path):
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        stored, wanted = _wanted(schema, columns)
        words, number = _Words(path, wanted), 0
        plain = plain_columns(schema.names)
        for group in range(file.num_row_groups):
            read = words.of(group) if wanted else [{}] * file.metadata.row_group(group).num_rows
            for place, values in enumerate(read):
                cell = ParquetCell(path=path, column=stored, group=group, row=place) if stored else None
                yield _row(values, plain, cell, path, number)
                number += 1


def arrow_columns(path: Path) -> Columns:
    """Which columns of an Arrow file hold what (raises like :func:`parquet_columns`)."""
    batches = arrow_batches(path)
    with arrow_errors(path):
        if not batches:
            return Columns()
        schema, cells = batches[0].schema, {}
        sample = batches[0].select(_telling(schema)).slice(0, _SAMPLE).to_pylist()
        for field in schema if sample else ():
            if holds_bytes(field.type) and not _is_known(field.name):
                cells[field.name] = _first(ArrowCell(path=path, column=field.name, batch=0, row=0))
        return _columns(schema, sample, cells, path)


def arrow_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """The rows of an Arrow file (arguments and errors as :func:`parquet_rows`)."""
    number = 0
    with arrow_errors(path):
        for place, batch in enumerate(arrow_batches(path)):
            stored, wanted = _wanted(batch.schema, columns)
            plain = plain_columns(batch.schema.names)
            for start in range(0, batch.num_rows, 64):
                part = batch.select(wanted).slice(start, 64)
                rows = part.to_pylist() if wanted else [{}] * min(64, batch.num_rows - start)
                for row, values in enumerate(rows, start):
                    cell = ArrowCell(path=path, column=stored, batch=place, row=row) if stored else None
                    yield _row(values, plain, cell, path, number)
                    number += 1


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column holds media: bytes, Hugging Face's struct of ``bytes`` and ``path``, or a list of such."""
    if pa.types.is_dictionary(kind):
        return holds_bytes(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return holds_bytes(kind.value_type)
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _columns(schema: pa.Schema, sample: list[dict[str, Any]], cells: dict[str, Any], path: Path) -> Columns:
    plain = plain_columns(schema.names)
    rows = [{plain[name]: value for name, value in row.items()} for row in sample]
    if rows:
        rows[0] |= cells
    found = columns_of(list(plain.values()), rows, str(path))
    if found.is_texts:
        original = {known: name for name, known in plain.items()}
        column = found.texts[0]
        kind = schema.field(original[column]).type if column in original else pa.null()
        if not _is_text(kind):
            raise UnfitError(f"{path}: the column '{column}' holds {shown(kind)}, not texts")
    return found


def _wanted(schema: pa.Schema, columns: Columns) -> tuple[str, list[str]]:
    """The column whose cells hold the content, if any does, and the columns of words to be read."""
    plain = plain_columns(schema.names)
    original = {known: name for name, known in plain.items()}
    if columns.is_texts:
        return original[columns.texts[0]], [original[name] for name in MORE_COLUMNS if name in original]
    holding = [name for name in columns.media if holds_bytes(schema.field(original[name]).type)]
    # Names of files count only where the table itself holds no media.
    names = {*columns.captions, *columns.conversations, *MORE_COLUMNS, *(() if holding else columns.media)}
    wanted = [name for name in schema.names if plain[name] in names and not holds_bytes(schema.field(name).type)]
    return (original[holding[0]] if holding else ""), wanted


def _row(values: Any, plain: dict[str, str], cell: ParquetCell | ArrowCell | None, path: Path, number: int) -> Row:
    where = f"{path} row {number + 1}"
    if isinstance(values, LeftOutError):
        return Row(values={}, where=where, number=number, stored=cell, fault=values)
    named = {plain[name]: value for name, value in values.items()}
    return Row(values=named, where=where, number=number, stored=cell)


def _is_known(name: str) -> bool:
    return name.strip().lower() in (*MEDIA_COLUMNS, *MORE_MEDIA_COLUMNS)


def _first(cell: ParquetCell | ArrowCell) -> Any:
    try:
        content = cell.read()
    except EmulusError:
        return None
    return {"path": content.name} if isinstance(content, Path) else content[:4096]


def _sampled(path: Path, file: pq.ParquetFile) -> Iterator[dict[str, Any]]:
    """The first rows."""
    columns = _telling(file.schema_arrow)
    if not file.num_row_groups:
        return
    rows = _Words(path, columns).of(0, _SAMPLE) if columns else iter([{}] * file.metadata.row_group(0).num_rows)
    yield from (row for row in rows if not isinstance(row, LeftOutError))


def _telling(schema: pa.Schema) -> list[str]:
    """Columns whose values tell what they are: not those of captions and texts, which their names tell."""
    known, maybe = {*CAPTION_COLUMNS, *TEXT_COLUMNS}, {*MORE_CAPTION_COLUMNS}
    return [
        field.name
        for field in schema
        if (name := field.name.strip().lower()) not in known and (name in maybe or _is_words(field.type))
    ]


def _is_words(kind: pa.DataType) -> bool:
    """Whether a column may hold words or names of files, by which a table is understood."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_words(kind.value_type) or (pa.types.is_struct(kind.value_type) and not holds_bytes(kind))
    return _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


class _Words:
    """What a Parquet file says about its rows, little by little: a kilobyte can unpack to gigabytes.

    Texts that a file holds once and refers to often stay so until it is known how much they are.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        schema = pq.ParquetFile(path).schema
        leaves = [schema.column(number) for number in range(len(schema))]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        texts = [name for name in texts if name.split(".")[0] in columns]
        self._file = pq.ParquetFile(path, read_dictionary=texts, buffer_size=BUFFER, pre_buffer=False)
        self._path, self._columns = path, list(columns)
        self._room = max(_MOST_WORDS, _MOST_TIMES * path.stat().st_size)

    def of(self, group: int, most: int = _MOST_ROWS) -> Iterator[dict[str, Any] | LeftOutError]:
        """The rows of one group; an error in place of one whose words are too long.

        Args:
            group: Which.
            most: How many are read at a time, at most.

        Raises:
            EmulusError: They are too much.
        """
        # What the group says of its columns is not looked at: pyarrow aborts the process where that is damaged.
        chunks = self._file.metadata.row_group(group)
        rows = max(_BATCH_BYTES * chunks.num_rows // max(chunks.total_byte_size, 1), _LEAST_ROWS)
        for batch in self._file.iter_batches(min(rows, most), row_groups=[group], columns=self._columns):
            total, longest = _letters(batch)
            self._room -= total
            if self._room < 0:
                raise EmulusError(self._too_much)
            # Much faster than from texts by number.
            plain = pa.schema([(field.name, _spelt_out(field.type)) for field in batch.schema])
            if longest <= MAX_WORDS:
                yield from batch.cast(plain).to_pylist()
                continue
            for row in range(batch.num_rows):
                part = batch.slice(row, 1)
                if _letters(part)[1] > MAX_WORDS:
                    message = f"{self._path} has words of more than the {MAX_WORDS:,} bytes allowed; shorten them"
                    yield LeftOutError(_TOO_LONG, message)
                else:
                    yield from part.cast(plain).to_pylist()

    @property
    def _too_much(self) -> str:
        return f"{self._path} unpacks to far more words than it has bytes; restore it"


def _letters(batch: pa.RecordBatch) -> tuple[int, int]:
    """Bytes of all the texts in a batch, and of the longest."""
    found = [_letters_of(column) for column in batch.columns]
    return sum(total for total, _ in found), max((longest for _, longest in found), default=0)


def _letters_of(values: pa.Array) -> tuple[int, int]:
    kind = values.type
    if pa.types.is_dictionary(kind):
        sizes = pc.binary_length(values.dictionary).take(values.indices)
        return int(pc.sum(sizes.cast(pa.int64())).as_py() or 0), int(pc.max(sizes).as_py() or 0)
    if pa.types.is_nested(kind) and not pa.types.is_union(kind) and not pa.types.is_map(kind):
        parts = values.flatten() if pa.types.is_struct(kind) else [values.flatten()]
        found = [_letters_of(part) for part in parts]
        return sum(total for total, _ in found), max((longest for _, longest in found), default=0)
    return int(values.nbytes), 0


def _spelt_out(kind: pa.DataType) -> pa.DataType:
    """The type of the same values without dictionaries."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _spelt_out(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_spelt_out(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_spelt_out(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_spelt_out(kind.value_type), kind.list_size)
    return kind
