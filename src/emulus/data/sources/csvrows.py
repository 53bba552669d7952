"""CSV and TSV -> rows, one at a time."""

from __future__ import annotations

import codecs
import csv
import io
import re
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from emulus.data.item import MAX_TEXT, CsvRow, Stored
from emulus.data.sources.account import LeftOutError
from emulus.data.sources.columns import known_columns, plain_columns
from emulus.data.sources.jsonrows import MAX_UNPACKED, opened_table
from emulus.data.sources.rows import Row
from emulus.errors import EmulusError

_DELIMITERS = (",", "\t", ";", "|")
_MAX_COLUMNS = 4096


def csv_rows(path: Path) -> Iterator[Row]:
    """The rows of a CSV table: separated by commas, tabs, semicolons or bars, in UTF-8 or UTF-16.

    A row of another number of fields than the first line is left out.

    Raises:
        EmulusError: It cannot be read, is not CSV, or neither UTF-8 nor UTF-16 with a byte order mark.
    """
    # Else no more than 131,072 letters, of any table that this process reads.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_TEXT))
    with opened_table(path) as file:
        lines = _Lines(file, path)
        first = next(lines, "")
        delimiter = _delimiter(first, path)
        reader = csv.reader(_chained(first, lines), delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            if len(names) > _MAX_COLUMNS:
                raise EmulusError(f"{path} has {len(names):,} columns; it is no table of captions or texts")
            plain = list(plain_columns(names).values()) if len(set(names)) == len(names) else names
            start = lines.position
            for number, fields in enumerate(each for each in reader if each):
                yield _row(path, plain, fields, number, lines, start, delimiter)
                start = lines.position
        except csv.Error as error:
            raise EmulusError(f"{path} line {lines.number} is not CSV ({error}); fix that line") from None


def _row(
    path: Path, names: Sequence[str], fields: Sequence[str], number: int, lines: _Lines, start: int, delimiter: str
) -> Row:
    where = f"{path} line {lines.number}"
    if len(fields) != len(names):
        message = f"{where} has not as many fields as the first line; put texts with the delimiter into quotes"
        return Row(
            values={}, where=where, number=number, fault=LeftOutError("lines with too many or too few fields", message)
        )
    values, size = dict(zip(names, fields, strict=True)), lines.position - start

    def text_at(column: str) -> Stored:
        """Where a text can be read again, so that it need not be kept."""
        text = values[column]
        if not lines.seekable:
            return text
        checksum = zlib.crc32(text.encode("utf-8", "surrogatepass"))
        return CsvRow(
            path=path, place=list(names).index(column), delimiter=delimiter, offset=start, size=size, checksum=checksum
        )

    return Row(values=values, where=where, number=number, text_at=text_at)


def _chained(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _delimiter(line: str, path: Path) -> str:
    """What separates the fields: by the names in the first line, else by how many fields there are."""

    def fields(delimiter: str) -> list[str]:
        try:
            return next(csv.reader([line[:_MAX_COLUMNS]], delimiter=delimiter), [])
        except csv.Error:
            return []

    tab_first = ".tsv" in path.suffixes
    order = sorted(_DELIMITERS, key=lambda delimiter: delimiter != "\t") if tab_first else _DELIMITERS
    return max(order, key=lambda delimiter: (known_columns(fields(delimiter)), len(fields(delimiter))))


class _Lines(Iterator[str]):
    """The lines of a table as text, ending in LF, CRLF or CR, with the place in the file behind the last one.

    Attributes:
        position: Bytes up to the end of the last line.
        number: Of the last line, from 1.
        seekable: Whether places in the file can be gone back to.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.position = self.number = 0
        self._waiting: deque[bytes] = deque()
        self._wide: io.TextIOWrapper | None = None
        try:
            head = file.read(3)
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                file.seek(0)
                self._wide = io.TextIOWrapper(file, encoding="utf-16", newline="")
            else:
                self.position = 3 if head == codecs.BOM_UTF8 else 0
                file.seek(self.position)
        except (OSError, EOFError, zlib.error) as error:
            raise EmulusError(f"{path} cannot be read ({error}); restore it from its source") from None
        self.seekable = self._wide is None and path.suffix != ".gz"

    def __next__(self) -> str:
        line = self._line()
        if not line:
            raise StopIteration
        self.position += len(line)
        self.number += 1
        if len(line) > MAX_TEXT:
            raise EmulusError(f"{self._path} line {self.number} has more than the {MAX_TEXT:,} bytes allowed; split it")
        if not self.seekable and self.position > MAX_UNPACKED:
            raise EmulusError(f"{self._path} has more than {MAX_UNPACKED:,} bytes; save it as plain UTF-8")
        try:
            return line if isinstance(line, str) else line.decode()
        except UnicodeDecodeError:
            raise EmulusError(f"{self._path} line {self.number} is not UTF-8; save the file as UTF-8") from None

    def _line(self) -> str | bytes:
        try:
            if self._wide is not None:
                return self._wide.readline(MAX_TEXT + 1)
            if not self._waiting:
                line = self._file.readline(MAX_TEXT + 1)
                self._waiting.extend(part for part in re.split(rb"(?<=\r)(?!\n)", line) if part)
        except UnicodeDecodeError:
            raise EmulusError(f"{self._path} line {self.number + 1} is not UTF-16; save the file as UTF-8") from None
        except (OSError, EOFError, zlib.error) as error:
            raise EmulusError(f"{self._path} cannot be read ({error}); restore it from its source") from None
        return self._waiting.popleft() if self._waiting else b""
