"""JSON lines, arrays and objects -> rows, one at a time."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from emulus.codec import parse_json
from emulus.data.item import MAX_TEXT, JsonLine, Stored
from emulus.data.sources.account import LeftOutError
from emulus.data.sources.columns import plain_columns
from emulus.data.sources.rows import Row
from emulus.data.stored import head_of
from emulus.errors import EmulusError

MAX_UNPACKED = 2**28
"""Bytes of the rows of a compressed table, which cannot be read again piece by piece."""
_CHUNK = 2**20
_MAX_OBJECT = 2**27
"""Bytes of a file that has to be read whole."""
_LISTS = ("data", "rows", "items", "samples", "examples")
_NOT_JSON = "lines that are not JSON objects"


def jsonl_rows(path: Path) -> Iterator[Row]:
    """The rows of JSON lines.

    A line that is not an object is left out. The last one without a line feed shows that the file was cut off.

    Raises:
        EmulusError: It cannot be read, is not UTF-8, was cut off, or a line is too long.
    """
    offset, packed = 0, path.suffix == ".gz"
    with opened_table(path) as file:
        # Only a line feed ends a line of JSON: a caption may hold other characters that Python takes for one.
        for number, line in enumerate(iter(lambda: _read_line(file, path), b"")):
            where = f"{path} line {number + 1}"
            if len(line) > MAX_TEXT:
                raise EmulusError(f"{where} has more than the {MAX_TEXT:,} bytes allowed; split it")
            if packed and offset + len(line) > MAX_UNPACKED:
                raise EmulusError(f"{path} unpacks to more than {MAX_UNPACKED:,} bytes; decompress it")
            if line.strip():
                yield _row(path, line, None if packed else offset, where, number, ended=line.endswith(b"\n"))
            offset += len(line)


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a ``.json`` file: of an array of objects, of an object of objects by id or of captions by
    file, or of JSON lines.

    An array may be larger than memory.

    Raises:
        EmulusError: It is something else, damaged or not UTF-8.
    """
    head = head_of(path).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"["):
        yield from _array_rows(path)
    elif _is_lines(head):
        yield from jsonl_rows(path)
    else:
        yield from _object_rows(path)


def opened_table(path: Path) -> BinaryIO:
    """A table's file, decompressed on the way where it is called ``.gz``.

    Raises:
        EmulusError: It cannot be opened.
    """
    try:
        return cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb"))
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror})") from None


def read_block(file: BinaryIO, size: int, path: Path) -> bytes:
    """Some bytes of a table (raises EmulusError where they cannot be had)."""
    try:
        return file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise EmulusError(f"{path} cannot be read ({error}); restore it from its source") from None


def _read_line(file: BinaryIO, path: Path) -> bytes:
    try:
        return file.readline(MAX_TEXT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise EmulusError(f"{path} cannot be read ({error}); restore it from its source") from None


def _row(path: Path, line: bytes, offset: int | None, where: str, number: int, *, ended: bool = True) -> Row:
    try:
        line.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise EmulusError(f"{where} is not UTF-8; save the file as UTF-8") from None
    try:
        values = parse_json(line, where, remedy="fix that line")
    except EmulusError as error:
        if not ended:
            raise
        return Row(values={}, where=where, number=number, fault=LeftOutError(_NOT_JSON, str(error)))
    return _row_of(values, path, line, offset, where, number)


def _row_of(values: Any, path: Path, content: bytes, offset: int | None, where: str, number: int) -> Row:
    if not isinstance(values, dict):
        message = f'{where} is not an object such as {{"file": "a.png", "caption": "..."}}; fix that line'
        return Row(values={}, where=where, number=number, fault=LeftOutError(_NOT_JSON, message))
    names = plain_columns(values)

    def text_at(column: str) -> Stored:
        """Where a text can be read again, so that it need not be kept."""
        if offset is None:
            return str(plain[column])
        original = next(name for name, known in names.items() if known == column)
        return JsonLine(path=path, column=original, offset=offset, size=len(content), checksum=zlib.crc32(content))

    plain = {names[name]: value for name, value in values.items()}
    return Row(values=plain, where=where, number=number, text_at=text_at)


def _array_rows(path: Path) -> Iterator[Row]:
    for number, (offset, content) in enumerate(array_elements(path)):
        where = f"{path} entry {number + 1}"
        yield _row_of(parse_json(content, where), path, content, offset, where, number)


def array_elements(path: Path) -> Iterator[tuple[int, bytes]]:
    """The elements of a JSON array as bytes, each with its offset, without reading the whole.

    Raises:
        EmulusError: It is damaged, cut off or not UTF-8, or an element is too long.
    """
    # Bytes as letters: what JSON is made of is ASCII, and offsets stay what they are.
    decoder = json.JSONDecoder(strict=False)
    damaged = f"{path} is not a whole JSON array; restore it from its source"
    with path.open("rb") as file:
        reader = _Buffer(file, path)
        reader.skip("\xef\xbb\xbf")
        if not reader.skip("["):
            raise EmulusError(damaged)
        count = 0
        while not reader.skip("]"):
            if count and not reader.skip(","):
                raise EmulusError(damaged)
            reader.blanks()
            while True:
                try:
                    _, stop = decoder.raw_decode(reader.text, reader.place)
                    # A number could go on behind what was read.
                    whole = stop < len(reader.text) or reader.ended
                except RecursionError:
                    raise EmulusError(f"{path} is nested too deeply; restore it from its source") from None
                except ValueError as error:
                    if reader.ended or reader.left > MAX_TEXT or "digits" in str(error):
                        raise EmulusError(damaged) from None
                    whole = False
                if whole:
                    break
                reader.more()
            yield reader.take(stop)
            count += 1


class _Buffer:
    """A part of a file, as letters of one byte each."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self.text, self.place, self.ended = "", 0, False
        self._start = 0

    @property
    def left(self) -> int:
        """Letters that were read and not taken."""
        return len(self.text) - self.place

    def more(self) -> None:
        """Read on; as much as there is already, so that a long element costs no more than its length."""
        self.text, self._start, self.place = self.text[self.place :], self._start + self.place, 0
        block = read_block(self._file, max(_CHUNK, len(self.text)), self._path)
        self.text += block.decode("latin-1")
        self.ended = not block

    def blanks(self) -> None:
        """Pass blanks and ends of lines."""
        while True:
            while self.place < len(self.text) and self.text[self.place] in " \t\r\n":
                self.place += 1
            if self.place < len(self.text) or self.ended:
                return
            self.more()

    def skip(self, word: str) -> bool:
        """Pass a word behind blanks, if it is there."""
        self.blanks()
        found = self.text.startswith(word, self.place)
        self.place += len(word) if found else 0
        return found

    def take(self, stop: int) -> tuple[int, bytes]:
        """The bytes up to a place, and where they are in the file."""
        content = self._start + self.place, self.text[self.place : stop].encode("latin-1")
        self.place = stop
        return content


def _is_lines(head: bytes) -> bool:
    """Whether a file begins with a line that is a whole JSON object, and goes on behind it."""
    line, feed, rest = head.partition(b"\n")
    if not feed or not rest.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _object_rows(path: Path) -> Iterator[Row]:
    """The rows of an object that holds a list of objects, or objects by their ids."""
    try:
        size = path.stat().st_size
        if size > _MAX_OBJECT:
            raise EmulusError(f"{path} has {size:,} bytes and no array, which could be read in parts; use JSON lines")
        content = path.read_bytes()
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror})") from None
    values = parse_json(content, str(path))
    if not isinstance(values, Mapping):
        raise EmulusError(f"{path} holds no rows; it should be an array of objects")
    rows = next((values[name] for name in _LISTS if isinstance(values.get(name), list)), None)
    if "images" in values and "annotations" in values:
        rows = _coco(values, path)
    if rows is not None:
        named = [(f"entry {number + 1}", row) for number, row in enumerate(rows)]
    elif values and all(isinstance(row, Mapping) for row in values.values()):
        named = [(f"entry {name!r}", {"id": name, **row}) for name, row in values.items()]
    elif values and all(_is_captions(words) for words in values.values()):
        named = [(f"entry {name!r}", {"file_name": name, "captions": words}) for name, words in values.items()]
    else:
        raise EmulusError(
            f"{path} holds no rows; it should be an array of objects, or an object of captions by the names of files"
        )
    for number, (name, row) in enumerate(named):
        yield _row_of(row, path, b"", None, f"{path} {name}", number)


def _is_captions(words: Any) -> bool:
    """Whether these are the captions of a file: ``{"1.png": "a cat", "2.png": ["a dog", "a brown dog"]}``."""
    return isinstance(words, str) or (isinstance(words, list) and all(isinstance(each, str) for each in words))


def _coco(values: Mapping[str, Any], path: Path) -> list[Any]:
    """COCO's captions: images by id, and annotations that name them."""
    captions: dict[Any, list[str]] = {}
    for each in values["annotations"] if isinstance(values["annotations"], list) else []:
        if isinstance(each, Mapping) and isinstance(each.get("caption"), str):
            captions.setdefault(str(each.get("image_id")), []).append(each["caption"])
    images = values["images"] if isinstance(values["images"], list) else []
    named = [image for image in images if isinstance(image, Mapping) and isinstance(image.get("file_name"), str)]
    if not named or not captions:
        raise EmulusError(f"{path} holds no captions of images")
    return [{"file": image["file_name"], "captions": captions.get(str(image.get("id")), [])} for image in named]
