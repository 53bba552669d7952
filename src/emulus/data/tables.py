"""Tables of captions, conversations or texts -> items: JSON, CSV, Parquet, Arrow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from emulus.data.item import Item, Kind, Split
from emulus.data.sources.account import LeftOutError
from emulus.data.sources.columns import (
    CAPTION_COLUMNS,
    MEDIA_COLUMNS,
    TEXT_COLUMNS,
    Columns,
    columns_of,
)
from emulus.data.sources.csvrows import csv_rows
from emulus.data.sources.jsonrows import json_rows, jsonl_rows
from emulus.data.sources.kinds import kind_of
from emulus.data.sources.parquetrows import arrow_columns, arrow_rows, parquet_columns, parquet_rows
from emulus.data.sources.rows import Reading, Row, item_of, media_of, missing_item, words_of
from emulus.data.stored import plain_name
from emulus.errors import EmulusError, shown

__all__ = ["CAPTION_COLUMNS", "MEDIA_COLUMNS", "TEXT_COLUMNS", "Table", "open_table", "plain_name", "table_type"]

_TYPES = {
    **{"parquet": "parquet", "pq": "parquet", "arrow": "arrow", "csv": "csv", "tsv": "csv"},
    **{"jsonl": "jsonl", "ndjson": "jsonl", "json": "json"},
}
_SAMPLE_ROWS, _SAMPLE_BYTES = 32, 2**20


def table_type(path: Path) -> str:
    """What kind of table a file is by its name: ``parquet``, ``arrow``, ``jsonl``, ``json``, ``csv``, or nothing."""
    if path.name.lower() == "captions.txt":
        return "csv"  # where its first line says so, as in Flickr8k
    stem, _, suffix = path.name.lower().rpartition(".")
    if suffix == "gz":
        kind = _TYPES.get(stem.rpartition(".")[2], "")
        return kind if kind in ("jsonl", "csv") else ""
    return _TYPES.get(suffix, "") if stem else ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table whose columns are understood.

    Attributes:
        path: Of its file.
        columns: What they hold.
        rows: Begins to read it.
    """

    path: Path
    columns: Columns
    rows: Callable[[], Iterator[Row]]

    @property
    def holds_media(self) -> bool:
        """Whether the table itself holds its media, or its texts, and needs no other files."""
        return table_type(self.path) in ("parquet", "arrow")

    def items(self, reading: Reading) -> Iterator[Item]:
        """The items of the table. A row that cannot be used is an item whose content is missing, and is counted.

        Args:
            reading: The data set.

        Raises:
            EmulusError: The table is damaged, or none of its rows can be used; one line names the file and the row.
        """
        count = usable = 0
        first: LeftOutError | None = None
        prefix = plain_name(stem_of(self.path.relative_to(reading.root)).as_posix())
        # That names of files are relative to: the table's own folder, else the data set's.
        folders = list(dict.fromkeys((self.path.parent, reading.root)))
        split = reading.split_of(self.path)
        for row in self.rows():
            count += 1
            identity = f"{prefix}/{row.number}"
            is_text = self.columns.is_texts or row.values.get("kind") == "text"
            try:
                if row.fault is not None:
                    raise row.fault
                if is_text:
                    item = _text_item(row, identity, reading, split)
                else:
                    item = self._media_item(row, identity, reading, split, folders)
                usable += 1
            except LeftOutError as error:
                first = first or error
                kind: Kind = "text" if is_text else "image"
                name = row.where.removeprefix(f"{reading.root}/")
                item = missing_item(error, identity, name, self.path, reading, kind=kind, split=split, unit="row")
            yield item
        if first is not None and not usable:
            raise EmulusError(f"none of the {count:,} rows of {self.path} can be used; the first: {first}")

    def _media_item(
        self, row: Row, identity: str, reading: Reading, split: Split | None, folders: Sequence[Path]
    ) -> Item:
        captions, questions, named = words_of(row, self.columns)
        column, stored = media_of(row, self.columns, reading, folders, named)
        if isinstance(stored, Path):
            inner = stored.relative_to(reading.root).as_posix()
            identity = plain_name(inner)
            split = split or reading.split_inside(inner)
            reading.used.add(stored)
        kind = kind_of(row, column, stored)
        return item_of(
            row, identity, reading, kind=kind, captions=captions, questions=questions, stored=stored, split=split
        )


def _text_item(row: Row, identity: str, reading: Reading, split: Split | None) -> Item:
    stored = row.stored
    if stored is None:
        names = [name for name in TEXT_COLUMNS if name in row.values]
        found = [name for name in names if row.values[name] is not None]
        if not names:
            raise LeftOutError(
                "no text", f"{row.where} has no column {' or '.join(TEXT_COLUMNS)}; add a text or remove that row"
            )
        if not found:
            raise LeftOutError("no text", f"{row.where}: {shown(names[0])} is empty; add a text or remove that row")
        text = row.values[found[0]]
        if not isinstance(text, str):
            raise LeftOutError(
                "values that are not text", f"{row.where}: {shown(found[0])} is not a text; fix that row"
            )
        stored = text if row.text_at is None else row.text_at(found[0])
    return item_of(row, identity, reading, kind="text", captions=(), stored=stored, split=split)


def stem_of(path: Path) -> Path:
    """A table's path without its suffix, and without ``.gz``."""
    return path.with_suffix("").with_suffix("") if path.suffix.lower() == ".gz" else path.with_suffix("")


def open_table(path: Path) -> Table:
    """Look at the columns and the first rows of a table.

    Args:
        path: Of a file of a type that :func:`table_type` knows.

    Raises:
        EmulusError: It is damaged, or neither a table of media with words nor one of texts.
    """
    kind = table_type(path)
    if kind == "parquet":
        columns = parquet_columns(path)
        return Table(path=path, columns=columns, rows=lambda: parquet_rows(path, columns))
    if kind == "arrow":
        columns = arrow_columns(path)
        return Table(path=path, columns=columns, rows=lambda: arrow_rows(path, columns))
    reader = {"csv": csv_rows, "json": json_rows, "jsonl": jsonl_rows}[kind]
    names, sample = _first_rows(reader(path))
    if not sample:
        # Of a CSV without rows the first line is there all the same.
        return Table(path=path, columns=Columns(), rows=lambda: iter(()))
    return Table(path=path, columns=columns_of(names, sample, str(path)), rows=lambda: reader(path))


def _first_rows(rows: Iterator[Row]) -> tuple[list[str], list[dict[str, object]]]:
    """The columns and values of the first rows that can be read."""
    names: dict[str, None] = {}
    sample: list[dict[str, object]] = []
    size = 0
    first: LeftOutError | None = None
    for row in itertools.islice(rows, _SAMPLE_ROWS):
        if row.fault is not None:
            first = first or row.fault
            continue
        names.update(dict.fromkeys(map(str, row.values)))
        sample.append(dict(row.values))
        size += sum(len(value) for value in row.values.values() if isinstance(value, str | list | dict))
        if size > _SAMPLE_BYTES:
            break
    if first is not None and not sample:
        raise first
    return list(names), sample
