"""Files that belong together by their names -> items: WebDataset tars, and folders that such a tar would unpack to.

``000.jpg`` and ``000.txt`` are one sample; ``000.json`` may say more. Tars are read in place, by an index of where
each file lies. A sample that lacks something, or says what cannot be, is an item that cannot be read: it is counted
and named like a broken picture, and does not keep a large collection from being used.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from emulus.data.item import MAX_TEXT, Item, JsonLine, Missing, Stored, TarMember, decoded, read_slice, split_of_key
from emulus.data.tables import (
    ALWAYS_VIDEO,
    CAPTION_COLUMNS,
    MAX_WORDS,
    NEVER_VIDEO,
    TEXT_COLUMNS,
    Row,
    captions_of,
    column_of,
    item_of,
    kind_of,
    plain_name,
)
from emulus.errors import EmulusError

MEDIA_SUFFIXES = ALWAYS_VIDEO | NEVER_VIDEO | {".png", ".webp", ".gif", ".avif"}
WORD_SUFFIXES = frozenset({".txt", ".json"})
TEXT_SUFFIXES = frozenset({".txt", ".md"})

_MAX_HEADER = 2**20
"""Bytes of a long file name or of extended attributes in a tar: what a header claims is not taken on trust."""

_Place = Path | TarMember
_Parts = Mapping[str, Path] | Mapping[str, TarMember]
P = TypeVar("P", Path, TarMember)


def tar_items(path: Path, name: str, source: str) -> Iterator[Item]:
    """The samples of a WebDataset tar: texts where they say so, or where it holds nothing but words.

    Args:
        path: The tar, not compressed.
        name: Begins the ids of its samples.
        source: Name of the data set.

    Raises:
        EmulusError: The tar is damaged, cut off or compressed.
    """
    files: dict[str, TarMember] = {}
    for member in _members(path):
        if member.name in files:
            raise EmulusError(f"{path} has {member.name!r} twice; make the tar anew")
        files[member.name] = member
    # The key of a sample ends at the first dot of the file's name (WebDataset's rule).
    samples = _samples(files, lambda file: file.index(".") if "." in file else len(file))
    texts = all(parts.keys() <= WORD_SUFFIXES for parts in samples.values())
    for key, parts in samples.items():
        yield _item(parts, f"{plain_name(name)}/{plain_name(key)}", path, source, texts=texts)


def loose_items(folder: Path, files: Mapping[str, Path], source: str) -> Iterator[Item]:
    """Pictures and clips in a folder, each with its words in a file of the same name.

    Args:
        folder: The folder.
        files: By their names inside it.
        source: Name of the data set.

    Raises:
        EmulusError: Not one of them has words.
    """
    samples = _samples(files, lambda file: len(PurePosixPath(file).stem))
    if not any(parts.keys() & MEDIA_SUFFIXES and parts.keys() & WORD_SUFFIXES for parts in samples.values()):
        raise EmulusError(
            f"{folder} has no table of captions; add captions.jsonl, captions.csv or captions.parquet, "
            "or beside every picture.png a picture.txt"
        )
    for key, parts in samples.items():
        if parts.keys() & MEDIA_SUFFIXES:
            yield _item(parts, plain_name(key), folder, source, texts=False)


def text_items(root: Path, files: Mapping[str, Path], source: str) -> Iterator[Item]:
    """Texts, each in a file of its own.

    Args:
        root: What is read.
        files: By their names inside it.
        source: Name of the data set.
    """
    for name, path in files.items():
        row = Row(values={}, where=str(root), number=0)
        yield item_of(row, plain_name(name), source, kind="text", captions=(), stored=path)


def _samples(files: Mapping[str, P], end: Callable[[str], int]) -> dict[str, dict[str, P]]:
    """Files by the sample's key, then by what follows it in their names, in the order of the first of each."""
    samples: dict[str, dict[str, P]] = {}
    for name, place in files.items():
        path = PurePosixPath(name)
        if not path.name.startswith((".", "__")):
            stop = end(path.name)
            key = (path.parent / path.name[:stop]).as_posix()
            parts, suffix = samples.setdefault(key, {}), path.name[stop:].lower()
            # A second one, as of a.jpg and a.JPG, is kept apart, to be found by whoever chooses.
            parts[suffix.upper() if suffix in parts else suffix] = place
    return {key: parts for key, parts in samples.items() if parts.keys() & (MEDIA_SUFFIXES | WORD_SUFFIXES)}


def _item(parts: _Parts, identity: str, path: Path, source: str, *, texts: bool) -> Item:
    where = f"{path}: {identity}"
    is_text = texts
    try:
        values: dict[str, Any] = _values(parts[".json"]) if ".json" in parts else {}
        row = Row(values=values, where=where, number=0)
        is_text = texts or values.get("kind") == "text"
        if is_text:
            return item_of(row, identity, source, kind="text", captions=(), stored=_text(parts, row))
        captions = _captions(parts, row)
        medium = _medium(parts, row)
        return item_of(row, identity, source, kind=kind_of(row, "", medium), captions=captions, stored=medium)
    except EmulusError as error:
        return Item(
            id=identity,
            kind="text" if is_text else "video" if parts.keys() & ALWAYS_VIDEO else "image",
            captions=() if is_text else ("",),
            split=split_of_key(identity),
            stored=Missing(path=path, reason=str(error)),
            source=source,
        )


def _medium(parts: _Parts, row: Row) -> _Place:
    """The picture or clip of a sample. Of a clip and its preview, the clip is meant."""
    found = {suffix: place for suffix, place in parts.items() if suffix.lower() in MEDIA_SUFFIXES}
    if not found:
        raise EmulusError(f"{row.where} has words but no picture or clip")
    if len(found) > 1:
        clips = [suffix for suffix in found if suffix.lower() in ALWAYS_VIDEO]
        clips = clips or [suffix for suffix, place in found.items() if kind_of(row, "", place) == "video"]
        if len(clips) != 1:
            raise EmulusError(f"{row.where} has several media ({', '.join(found)}); give each its own name and words")
        return found[clips[0]]
    return next(iter(found.values()))


def _text(parts: _Parts, row: Row) -> Stored:
    """Where the text of a sample of words alone lies."""
    if ".txt" in parts:
        place = parts[".txt"]
        if isinstance(place, TarMember) and place.size > MAX_TEXT:
            raise EmulusError(f"{row.where} has {place.size:,} bytes, more than the {MAX_TEXT:,} allowed; split it")
        return place
    column, place = column_of(row.values, TEXT_COLUMNS, row.where), parts[".json"]
    if not isinstance(row.values[column], str):
        raise EmulusError(f"{row.where}: '{column}' is not a text; mend it")
    content, offset = _words(place), place.offset if isinstance(place, TarMember) else 0
    path = place.path if isinstance(place, TarMember) else place
    return JsonLine(path=path, column=column, offset=offset, size=len(content), checksum=zlib.crc32(content))


def _captions(parts: _Parts, row: Row) -> tuple[str, ...]:
    captions: tuple[str, ...] = ()
    if ".txt" in parts:
        text = decoded(_words(parts[".txt"]), row.where)
        captions = captions_of(Row(values={"text": text}, where=row.where, number=0), "text")
    if not captions or any(name in row.values for name in CAPTION_COLUMNS):
        captions += captions_of(row, column_of(row.values, CAPTION_COLUMNS, row.where))
    return tuple(dict.fromkeys(captions))


def _values(place: _Place) -> dict[str, Any]:
    where = str(place) if isinstance(place, Path) else place.where
    try:
        values = json.loads(decoded(_words(place), where))
    except (ValueError, RecursionError) as error:
        raise EmulusError(f"{where} is not JSON ({error}); mend it") from None
    if not isinstance(values, dict):
        raise EmulusError(f'{where} is not an object such as {{"caption": "..."}}; mend it')
    return values


def _words(place: _Place) -> bytes:
    if isinstance(place, TarMember):
        return read_slice(place.path, place.offset, place.size, place.where, most=MAX_WORDS)
    try:
        return read_slice(place, 0, place.stat().st_size, str(place), most=MAX_WORDS)
    except OSError as error:
        raise EmulusError(f"{place} cannot be read ({error.strerror}); restore it") from None


class _Headers(RawIOBase):
    """A tar as its headers are read: nothing large can be asked for at once."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise EmulusError(f"{self._name} has a header of {size:,} bytes; it is damaged: restore it")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _members(path: Path) -> Iterator[TarMember]:
    """Every plain file in a tar, from its headers alone."""
    damaged = f"{path} is damaged or cut off; restore it from its source"
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            # tarfile.open would take a size as a reason to guess at compression; this reads headers and nothing else.
            tar = tarfile.TarFile(fileobj=_Headers(file, str(path)), mode="r")
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every one of them
                if member.size < 0 or member.offset_data + member.size > size:
                    raise EmulusError(damaged)
                if member.isreg() and not member.issparse():
                    yield TarMember(path=path, name=member.name, offset=member.offset_data, size=member.size)
            # tarfile takes whatever is no header for the end.
            file.seek(tar.offset)
            if file.read(512).strip(b"\0"):
                raise EmulusError(damaged)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise EmulusError(f"{path} is no plain tar ({reason}); restore it, or decompress it first") from None
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror or error}); restore it") from None
