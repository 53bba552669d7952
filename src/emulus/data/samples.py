"""Files that belong together by their names -> items: WebDataset tars, and folders that such a tar would unpack to.

``000.jpg`` and ``000.txt`` are one sample; ``000.json`` may say more. Tars are read in place, by an index of where
each file lies. A sample that lacks something, or says what cannot be, is an item that cannot be read: it is counted
and named like a broken picture, and does not keep a large collection from being used.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

from emulus.data.item import Item, Missing, TarMember, decoded, read_slice, split_of_key
from emulus.data.tables import (
    ALWAYS_VIDEO,
    CAPTION_COLUMNS,
    NEVER_VIDEO,
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
_MAX_WORDS = 2**24
"""Bytes of the words of one sample."""

_Place = Path | TarMember
P = TypeVar("P", Path, TarMember)


def tar_items(path: Path, name: str, source: str) -> Iterator[Item]:
    """The samples of a WebDataset tar.

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
    for key, parts in _samples(files, lambda file: file.index(".") if "." in file else len(file)).items():
        yield _item(parts, f"{plain_name(name)}/{plain_name(key)}", path, source)


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
            yield _item(parts, plain_name(key), folder, source)


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
            samples.setdefault(key, {})[path.name[stop:].lower()] = place
    return {key: parts for key, parts in samples.items() if parts.keys() & (MEDIA_SUFFIXES | WORD_SUFFIXES)}


def _item(parts: Mapping[str, Path] | Mapping[str, TarMember], identity: str, path: Path, source: str) -> Item:
    where = f"{path}: {identity}"
    try:
        values: dict[str, Any] = _values(parts[".json"]) if ".json" in parts else {}
        row = Row(values=values, where=where, number=0)
        captions = _captions(parts, row)
        # Of a clip and its preview, the clip is meant.
        suffix = next((each for each in sorted(parts, key=lambda each: each not in ALWAYS_VIDEO)
                       if each in MEDIA_SUFFIXES), None)  # fmt: skip
        if suffix is None:
            raise EmulusError(f"{where} has words but no picture or clip")
        kind = kind_of(row, "", parts[suffix])
        return item_of(row, identity, source, kind=kind, captions=captions, stored=parts[suffix])
    except EmulusError as error:
        return Item(
            id=identity,
            kind="video" if parts.keys() & ALWAYS_VIDEO else "image",
            captions=("",),
            split=split_of_key(identity),
            stored=Missing(path=path, reason=str(error)),
            source=source,
        )


def _captions(parts: Mapping[str, Path] | Mapping[str, TarMember], row: Row) -> tuple[str, ...]:
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
        return read_slice(place.path, place.offset, place.size, place.where, most=_MAX_WORDS)
    try:
        return read_slice(place, 0, place.stat().st_size, str(place), most=_MAX_WORDS)
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
