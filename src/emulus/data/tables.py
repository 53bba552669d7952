"""Tables of captions or texts -> items: JSON lines, CSV, Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from emulus.data.item import (
    KINDS,
    MAX_TEXT,
    SPLITS,
    Item,
    JsonLine,
    Kind,
    ParquetCell,
    Question,
    Split,
    Stored,
    TarMember,
    checked_fps,
    checked_text,
    decoded,
    inside,
    number_of,
    parquet_errors,
    shown,
    split_of_key,
)
from emulus.errors import EmulusError, did_you_mean
from emulus.media import is_video

MEDIA_COLUMNS = ("media", "image", "video", "file_name", "file", "path")
CAPTION_COLUMNS = ("captions", "caption", "text")
TEXT_COLUMNS = ("text", "content")
"""Hold the text itself in a table that has no column of media."""
ALWAYS_VIDEO = frozenset({".mp4", ".m4v", ".webm", ".mkv", ".avi", ".mov"})
NEVER_VIDEO = frozenset({".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})

_SPLIT_NAMES: dict[str, Split] = {
    **{split: split for split in SPLITS},
    "val": "validation",
    "valid": "validation",
}
_MORE_COLUMNS = frozenset({"id", "split", "kind", "fps", "score", "source", "questions"})
MAX_WORDS = 2**24
"""Bytes of the words of one sample."""
_ROWS = 1024
"""Rows of a Parquet file that are read at a time."""
_MOST_WORDS, _MOST_TIMES = 2**28, 100
"""Bytes of words that any Parquet file may unpack to, and how many times its own size."""
# Of a picture's file, what says whether it moves (the chunk VP8X of an animated WebP).
_WEBP_HEAD = 21


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table, with what names it in a message.

    Attributes:
        values: By column.
        where: Table and line.
        number: From 0, over the whole table.
        stored: The medium or text, when the table itself holds it.
    """

    values: Mapping[str, Any]
    where: str
    number: int
    stored: Stored | None = None


def read_table(path: Path, root: Path, source: str) -> Iterator[Item]:
    """The items of a table.

    Args:
        path: A ``.jsonl``, ``.csv`` or ``.parquet`` file.
        root: The data set's folder: ids begin with the table's place in it, as tables in several folders may have the
            same name.
        source: Name of the data set.

    Raises:
        EmulusError: The table is damaged, or a row lacks something; one line names the file and the row.
    """
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows, ".jsonl": _jsonl_rows}
    texts: bool | None = None
    for row in readers[path.suffix.lower()](path):
        # The first row says which table this is, so that a picture's row that lacks its file is not taken for a text.
        texts = holds_text(row.values) if texts is None else texts
        is_text = texts or row.values.get("kind") == "text"
        yield _text_item(row, path, root, source) if is_text else _media_item(row, path, root, source)


def holds_text(columns: Collection[str]) -> bool:
    """Whether a table of these columns is one of texts: it has a column of text and none of media."""
    return not any(name in columns for name in MEDIA_COLUMNS) and any(name in columns for name in TEXT_COLUMNS)


def _media_item(row: Row, table: Path, root: Path, source: str) -> Item:
    media_column = column_of(row.values, MEDIA_COLUMNS, row.where)
    captions = captions_of(row, column_of(row.values, CAPTION_COLUMNS, row.where))
    stored = row.stored or _file(row, media_column, table.parent)
    kind = kind_of(row, media_column, stored)
    if isinstance(stored, Path):
        identity = plain_name(stored.relative_to(root).as_posix())
    else:
        identity = _numbered(row, table, root)
    return item_of(row, identity, source, kind=kind, captions=captions, stored=stored)


def _numbered(row: Row, table: Path, root: Path) -> str:
    return f"{plain_name(table.relative_to(root).with_suffix('').as_posix())}/{row.number}"


def _text_item(row: Row, table: Path, root: Path, source: str) -> Item:
    stored = row.stored
    if stored is None:
        column = column_of(row.values, TEXT_COLUMNS, row.where)
        stored = row.values[column]
        if not isinstance(stored, str):
            raise EmulusError(f"{row.where}: '{column}' is not a text; mend that row")
    return item_of(row, _numbered(row, table, root), source, kind="text", captions=(), stored=stored)


def item_of(row: Row, identity: str, source: str, *, kind: Kind, captions: tuple[str, ...], stored: Stored) -> Item:
    """An item with everything that a row may say beside media and captions.

    Args:
        row: The row.
        identity: Its id, where the row gives none.
        source: Name of the data set, likewise.
        kind: Of the item.
        captions: Of the item.
        stored: Where its content is.

    Raises:
        EmulusError: A value is none.
    """
    if row.values.get("id") not in (None, ""):
        identity = str(row.values["id"])
    if len(identity) > 4096:
        raise EmulusError(f"{row.where}: an id of {len(identity):,} letters; give it a shorter one")
    split, said = row.values.get("split"), row.values.get("source")
    return Item(
        id=checked_text(identity, row.where),
        kind=kind,
        captions=captions,
        split=split_of_key(identity) if split in (None, "") else _split(split, row.where),
        stored=stored,
        fps=_fps(row),
        score=_score(row),
        source=source if said in (None, "") else checked_text(str(said), row.where)[:1024],
        questions=_questions(row) if kind != "text" else (),
    )


def column_of(present: Collection[str], names: Sequence[str], where: str) -> str:
    """The first of the names that is present.

    Raises:
        EmulusError: None is; a name that looks like one is pointed out.
    """
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


def captions_of(row: Row, column: str) -> tuple[str, ...]:
    """The captions in a column.

    Raises:
        EmulusError: There are none.
    """
    value = row.values[column]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise EmulusError(f"{row.where}: '{column}' is neither a text nor a list of texts; mend that row")
    captions = tuple(checked_text(text.strip(), row.where) for text in texts if text.strip())
    if not captions:
        raise EmulusError(f"{row.where}: '{column}' is empty; write a caption or remove that row")
    return captions


def kind_of(row: Row, column: str, stored: Stored) -> Kind:
    """What the table says; else what the column, the file's suffix or at last the content says."""
    said = row.values.get("kind")
    if said not in (None, ""):
        if said not in KINDS:
            raise EmulusError(f"{row.where}: the kind '{said}' is unknown{did_you_mean(str(said), KINDS)}")
        return "video" if said == "video" else "image"
    if column == "video":
        return "video"
    name = stored.name if isinstance(stored, Path | TarMember) else ""
    suffix = Path(name).suffix.lower()
    if suffix in ALWAYS_VIDEO:
        return "video"
    if column == "image" or suffix in NEVER_VIDEO:
        return "image"
    try:
        return "video" if _moves(stored, suffix) else "image"
    except EmulusError:
        # A broken file is reported by whoever reads it, and does not keep the others from being read.
        return "image"


def _moves(stored: Stored, suffix: str) -> bool:
    if isinstance(stored, TarMember):
        # A tar of a million pictures is not read whole to find the few that move.
        if suffix == ".png":
            return False
        head = stored.head(_WEBP_HEAD)
        if suffix == ".webp" and not (head[12:16] == b"VP8X" and head[-1] & 2):
            return False
    content = stored if isinstance(stored, bytes | str | Path) else stored.read()
    return not isinstance(content, str) and is_video(content)


def plain_name(name: str) -> str:
    """A file's name without letters that cannot be encoded, which other systems' archives may have."""
    return name.encode("utf-8", "replace").decode()


def _file(row: Row, column: str, folder: Path) -> Path:
    """The file that a row names."""
    name = row.values[column]
    return inside(folder, name.get("path") if isinstance(name, Mapping) else name, row.where)


def _split(value: Any, where: str) -> Split:
    split = _SPLIT_NAMES.get(str(value).lower())
    if split is None:
        raise EmulusError(f"{where}: the split '{value}' is unknown{did_you_mean(str(value), SPLITS)}")
    return split


def _fps(row: Row) -> float | None:
    value = row.values.get("fps")
    if value in (None, ""):
        return None
    return checked_fps(value, row.where)


def _score(row: Row) -> float:
    value = row.values.get("score")
    score = 0.0 if value in (None, "") else number_of(value)
    if not math.isfinite(score):
        raise EmulusError(f"{row.where}: score {shown(value)} is not a number; mend that row")
    return score


def _questions(row: Row) -> tuple[Question, ...]:
    """A list of ``{question, answer}``; in a CSV it is JSON."""
    value = row.values.get("questions")
    if value in (None, ""):
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            value = None
    pairs = []
    for pair in value if isinstance(value, list | tuple) else [None]:
        texts = [pair.get("question"), pair.get("answer")] if isinstance(pair, Mapping) else [None]
        plain = [checked_text(text.strip(), row.where) for text in texts if isinstance(text, str) and text.strip()]
        if len(plain) < 2:
            raise EmulusError(f'{row.where}: questions are a list of {{"question": "...", "answer": "..."}}; mend it')
        pairs.append(Question(*plain))
    return tuple(pairs)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    offset = 0
    try:
        with path.open("rb") as file:
            # Only a line feed ends a line of JSON: a caption may hold other characters that Python takes for one.
            for number, line in enumerate(iter(lambda: file.readline(MAX_TEXT + 1), b"")):
                where = f"{path} line {number + 1}"
                if len(line) > MAX_TEXT:
                    raise EmulusError(f"{where} has more than the {MAX_TEXT:,} bytes allowed; split it")
                if line.strip():
                    values = _object(line, where)
                    stored = _text_in(path, values, offset, line)
                    yield Row(values=values, where=where, number=number, stored=stored)
                offset += len(line)
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror})") from None


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise EmulusError(f"{where} is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise EmulusError(f"{where} is not JSON ({error}); mend that line") from None
    if not isinstance(values, dict):
        raise EmulusError(f'{where} is not an object such as {{"file": "a.png", "caption": "..."}}; mend that line')
    return values


def _text_in(path: Path, values: dict[str, Any], offset: int, line: bytes) -> JsonLine | None:
    """Where a line's text can be read again, so that it need not be kept."""
    if not (holds_text(values) or values.get("kind") == "text"):
        return None
    column = next((name for name in TEXT_COLUMNS if isinstance(values.get(name), str)), None)
    if column is None:
        return None
    return JsonLine(path=path, column=column, offset=offset, size=len(line), checksum=zlib.crc32(line))


def _csv_rows(path: Path) -> Iterator[Row]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror})") from None
    # Else no more than 131,072 letters, of any table that this process reads.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_TEXT))
    reader = csv.DictReader(io.StringIO(decoded(content, str(path)), newline=""), strict=True)
    try:
        names = reader.fieldnames or ()
        for wanted in () if holds_text(names) else (MEDIA_COLUMNS, CAPTION_COLUMNS):
            column_of(names, wanted, str(path))
        for number, values in enumerate(reader):
            where = f"{path} line {reader.line_num}"
            if None in values or None in values.values():
                raise EmulusError(
                    f"{where} has not as many fields as the first line; put texts with commas into quotes"
                )
            yield Row(values=values, where=where, number=number)
    except csv.Error as error:
        raise EmulusError(f"{path} line {reader.reader.line_num} is not CSV ({error}); mend that line") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    with parquet_errors(path):
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
        if holds_text(schema.names):
            stored = column_of(schema.names, TEXT_COLUMNS, str(path))
            needed = set[str]()
            if not _is_text(schema.field(stored).type):
                raise EmulusError(f"{path}: the column '{stored}' holds {schema.field(stored).type}, not texts")
        else:
            stored = column_of(schema.names, MEDIA_COLUMNS, str(path))
            needed = {column_of(schema.names, CAPTION_COLUMNS, str(path))}
        holds_content = not needed or _is_bytes(schema.field(stored).type)
        # Bytes and texts stay where they are; only words are read.
        wanted = needed | _MORE_COLUMNS | (set() if holds_content else {stored})
        columns = [name for name in schema.names if name in wanted]
        if file.metadata.num_rows > path.stat().st_size:
            raise EmulusError(f"{path} claims {file.metadata.num_rows:,} rows, more than its bytes; restore it")
        number = 0
        words = _Words(path, columns)
        for group in range(file.num_row_groups):
            read = words.of(group) if columns else [{}] * file.metadata.row_group(group).num_rows
            for place, values in enumerate(read):
                cell = ParquetCell(path=path, column=stored, group=group, row=place) if holds_content else None
                yield Row(values={stored: None, **values}, where=f"{path} row {number + 1}", number=number, stored=cell)
                number += 1


class _Words:
    """What a Parquet file says about its rows, little by little: a kilobyte can unpack to gigabytes.

    Texts that a file holds once and refers to often stay so until it is known how much they are.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        schema = pq.ParquetFile(path).schema
        leaves = [schema.column(number) for number in range(len(schema))]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        texts = [name for name in texts if name.split(".")[0] in columns]
        self._file = pq.ParquetFile(path, read_dictionary=texts)
        self._path, self._columns = path, columns
        self._room = max(_MOST_WORDS, _MOST_TIMES * path.stat().st_size)

    def of(self, group: int) -> Iterator[dict[str, Any]]:
        """The rows of one group.

        Raises:
            EmulusError: They are too much.
        """
        for batch in self._file.iter_batches(_ROWS, row_groups=[group], columns=self._columns):
            size = sum(_letters(column, self._path) for column in batch.columns)
            self._room -= size
            if self._room < 0:
                raise EmulusError(f"{self._path} unpacks to far more words than it has bytes; restore it")
            # Much faster than from texts by number.
            plain = pa.schema([(field.name, _spelt_out(field.type)) for field in batch.schema])
            yield from batch.cast(plain).to_pylist()


def _letters(values: pa.Array, path: Path) -> int:
    """Bytes of all the texts in a column.

    Raises:
        EmulusError: One is too long.
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        sizes = pc.binary_length(values.dictionary).take(values.indices)
        if (pc.max(sizes).as_py() or 0) > MAX_WORDS:
            raise EmulusError(f"{path} has words of more than the {MAX_WORDS:,} bytes allowed; shorten them")
        return int(pc.sum(sizes.cast(pa.int64())).as_py() or 0)
    if pa.types.is_nested(kind) and not pa.types.is_union(kind) and not pa.types.is_map(kind):
        parts = values.flatten() if pa.types.is_struct(kind) else [values.flatten()]
        return sum(_letters(part, path) for part in parts)
    return int(values.nbytes)


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


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


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
