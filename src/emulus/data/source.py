"""Any data set on the disk -> items: where each picture, clip or text lies, its words, its split.

Pictures and clips come in Parquet that holds them (as Hugging Face data sets are written), in files beside a table that
names them (``captions.jsonl``, ``captions.csv`` or ``captions.parquet``), or in WebDataset tars; a table of captions
means the same in all. Texts come in tables with a column of text, or in files of their own.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, overload

from emulus.data.item import (
    KINDS,
    SPLITS,
    Item,
    Kind,
    ParquetCell,
    Question,
    Split,
    split_of_key,
)
from emulus.data.samples import MEDIA_SUFFIXES, TEXT_SUFFIXES, loose_items, tar_items, text_items
from emulus.data.tables import CAPTION_COLUMNS, MEDIA_COLUMNS, TEXT_COLUMNS, plain_name, read_table
from emulus.errors import EmulusError

__all__ = [
    "CAPTION_COLUMNS",
    "KINDS",
    "MEDIA_COLUMNS",
    "SPLITS",
    "TABLES",
    "TEXT_COLUMNS",
    "Item",
    "Kind",
    "ParquetCell",
    "Question",
    "Source",
    "Split",
    "even",
    "open_source",
    "split_of_key",
]

T = TypeVar("T")

TABLES = tuple(f"{stem}.{suffix}" for stem in ("captions", "metadata") for suffix in ("jsonl", "csv", "parquet"))
"""The names a table of captions goes by in a folder of media files, the first that exists."""
_TABLE_SUFFIXES = (".parquet", ".jsonl", ".csv")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


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


def open_source(path: Path | str) -> Source:
    """Open a data set. Words are read and every row is checked now; media and texts are read item by item later.

    Args:
        path: One of these, or a pattern such as ``data/*.tar`` that names several of them:

            - a Parquet file, or a folder of them;
            - a folder of media files with a table of captions in it (one of :data:`TABLES`);
            - a WebDataset tar, or a folder of them: ``000.jpg`` with ``000.txt`` or ``000.json``; or a folder with such
              files;
            - a ``.jsonl`` or ``.csv`` table, or a folder of them;
            - a folder of ``.txt`` or ``.md`` files.

            A table has a column of media (one of :data:`MEDIA_COLUMNS`: bytes, a struct of ``bytes`` and ``path``, or
            a file name relative to the folder) and one of captions (:data:`CAPTION_COLUMNS`: text or a list of
            texts); or no media and a column of text (:data:`TEXT_COLUMNS`). It may have ``id``, ``split``, ``kind``,
            ``fps``, ``score``, ``source`` and ``questions`` (a list of ``question`` and ``answer``). Rows that name the
            same file are one item with several captions. Without a split column, the split comes from the id by
            :func:`split_of_key`.

    Returns:
        The items.

    Raises:
        EmulusError: Something is missing, damaged or not as described; one line names the file and the row.
    """
    path = Path(path)
    items: dict[str, Item] = {}
    for where, found in _parts(path):
        for item in found:
            earlier = items.get(item.id)
            if earlier is None:
                items[item.id] = item
            elif item.kind != "text" and isinstance(item.stored, Path) and earlier.stored == item.stored:
                items[item.id] = replace(
                    earlier,
                    captions=tuple(dict.fromkeys(earlier.captions + item.captions)),
                    questions=tuple(dict.fromkeys(earlier.questions + item.questions)),
                )
            else:
                raise EmulusError(
                    f"{where} has the id {item.id!r} of an earlier item; give every item an id of its own"
                )
    if not items:
        raise EmulusError(f"{path} has no rows; add some")
    return Source(path, list(items.values()))


def _parts(path: Path) -> Iterator[tuple[Path, Iterable[Item]]]:
    """What a data set consists of: files, each with its items."""
    if path.is_dir():
        yield from _folder(path)
    elif path.is_file():
        yield from _files([path], path.parent, plain_name(path.stem))
    elif any(letter in str(path) for letter in "*?["):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        if not files:
            raise EmulusError(f"{path} matches no file; check the pattern")
        yield from _files(files, _common(files), plain_name(_common(files).name))
    else:
        raise EmulusError(f"{path} does not exist; name a data set: a folder, a file or a pattern (see docs/data.md)")


def _folder(path: Path) -> Iterator[tuple[Path, Iterable[Item]]]:
    source = plain_name(path.resolve().name)
    table = next((path / name for name in TABLES if (path / name).is_file()), None)
    if table is not None:
        return iter([(table, read_table(table, path, source))])
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    for suffixes in ((".parquet",), (".tar",), _TABLE_SUFFIXES):
        chosen = [file for file in files if file.suffix.lower() in suffixes]
        if chosen:
            return _files(chosen, path, source)
    named = {file.relative_to(path).as_posix(): file for file in files}
    if any(file.suffix.lower() in MEDIA_SUFFIXES for file in files):
        return iter([(path, loose_items(path, named, source))])
    chosen = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    if chosen:
        return _files(chosen, path, source)
    raise EmulusError(
        f"{path} holds neither a table of captions (captions.jsonl, captions.csv, captions.parquet) nor tars, Parquet, "
        "texts, or pictures with texts of the same name; see docs/data.md"
    )


def _files(files: Sequence[Path], root: Path, source: str) -> Iterator[tuple[Path, Iterable[Item]]]:
    readers: dict[str, Callable[[Path], Iterable[Item]]] = {
        **dict.fromkeys(_TABLE_SUFFIXES, lambda file: read_table(file, root, source)),
        ".tar": lambda file: tar_items(file, file.relative_to(root).with_suffix("").as_posix(), source),
        **dict.fromkeys(
            TEXT_SUFFIXES, lambda file: text_items(root, {file.relative_to(root).as_posix(): file}, source)
        ),
    }
    for file in files:
        if file.name.endswith(_COMPRESSED):
            raise EmulusError(f"{file} is compressed, so nothing in it can be found without reading all; decompress it")
        if file.suffix.lower() not in readers:
            raise EmulusError(f"{file} is no data set; name a .parquet file or a folder of media with captions.jsonl")
        yield file, readers[file.suffix.lower()](file)


def _common(files: Sequence[Path]) -> Path:
    """The folder that all files are in."""
    # Links are not followed: what they lead to may lie anywhere.
    folder = os.path.commonpath([file.absolute().parent for file in files])
    # As the files are named: relative to where the command runs.
    depth = len(files[0].absolute().parent.relative_to(folder).parts)
    return files[0].parents[depth]


def even(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly spread, so that every kind and style has its share."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]
