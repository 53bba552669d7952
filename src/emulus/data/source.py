"""Any data set on the disk -> items: where each picture, clip or text lies, its words, its split.

Pictures and clips come in Parquet that holds them (as Hugging Face data sets are written), in files beside a table that
names them (``captions.jsonl``, ``captions.csv`` or ``captions.parquet``), or in WebDataset tars; a table of captions
means the same in all. Texts come in tables with a column of text, or in files of their own.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, overload

from emulus.data.item import KINDS, SPLITS, Item, Kind, Missing, ParquetCell, Question, Split, split_of_key
from emulus.data.sources.account import Account, LeftOut
from emulus.data.sources.choice import TABLES, parts_of
from emulus.data.sources.rows import Reading
from emulus.data.sources.walk import files_in, files_matching
from emulus.data.stored import plain_name
from emulus.data.tables import CAPTION_COLUMNS, MEDIA_COLUMNS, TEXT_COLUMNS
from emulus.errors import EmulusError
from emulus.log import logger

__all__ = [
    "CAPTION_COLUMNS",
    "KINDS",
    "MEDIA_COLUMNS",
    "SPLITS",
    "TABLES",
    "TEXT_COLUMNS",
    "Account",
    "Item",
    "Kind",
    "LeftOut",
    "ParquetCell",
    "Question",
    "Source",
    "Split",
    "even",
    "open_source",
    "split_of_key",
]

T = TypeVar("T")
_USED_TWICE = "an id that was used before"


class Source(Sequence[Item]):
    """The items of a data set, in the order of its tables.

    Attributes:
        path: What was opened.
        account: What of it is left out, and why; of the whole data set also where this is a part of its items.
    """

    def __init__(self, path: Path, items: Sequence[Item], account: Account | None = None) -> None:
        self.path = path
        self.account = account or Account()
        self._items = tuple(items)

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Source: ...
    def __getitem__(self, index: int | slice) -> Item | Source:
        """One item, or a part of the data set."""
        return Source(self.path, self._items[index], self.account) if isinstance(index, slice) else self._items[index]

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Files, rows and samples of the data set that are not used, by reason, the most frequent first."""
        return self.account.left_out

    def select(self, *, split: Split | None = None, kind: Kind | None = None) -> Source:
        """The items of one split, of one kind, or both."""
        chosen = [item for item in self if split in (None, item.split) and kind in (None, item.kind)]
        return Source(self.path, chosen, self.account)

    def counts(self) -> dict[str, int]:
        """Number of items by split and kind, such as ``{"train image": 6408}``, without rows that are left out."""
        whole = (item for item in self if not isinstance(item.stored, Missing))
        return dict(sorted(Counter(f"{item.split} {item.kind}" for item in whole).items()))


def open_source(path: Path | str) -> Source:
    """Open a data set. Words are read and every row is checked now; media and texts are read item by item later.

    Every file and row is used, or left out with a reason and counted (:attr:`Source.left_out`, and the log): hidden
    files, README and what Emulus wrote are passed over; a row that cannot be used costs no other; media go before
    texts, so captions of media never become texts.

    Args:
        path: One of these, or a pattern such as ``data/*.tar`` that names several of them:

            - a Parquet file, or a folder of them;
            - a folder of media files with a table of captions in it (one of :data:`TABLES`);
            - a WebDataset tar, or a folder of them: ``000.jpg`` with ``000.txt`` or ``000.json``; or a folder with such
              files;
            - a ``.jsonl``, ``.json``, ``.csv`` or ``.tsv`` table, or a folder of them;
            - a folder of ``.txt`` or ``.md`` files.

            A table has a column of media (such as :data:`MEDIA_COLUMNS`: bytes, a struct of ``bytes`` and ``path``, or
            a file name relative to the table's folder) and one of captions (:data:`CAPTION_COLUMNS`: text or a list of
            texts) or conversations; or no media and a column of text (:data:`TEXT_COLUMNS`). It may have ``id``,
            ``split``, ``kind``, ``fps``, ``score``, ``source`` and ``questions`` (a list of ``question`` and
            ``answer``). Rows that name the same file are one item with several captions. The split is that of the
            column, else that which the data set's card or the names of files and folders say, else it comes from the id
            by :func:`split_of_key`.

    Returns:
        The items. Those whose row or sample cannot be used say so when they are read.

    Raises:
        EmulusError: Something is missing or damaged, or nothing can be used; one line names the file and the row.
    """
    path = Path(path)
    account = Account()
    files, reading, is_folder = _find(path, account)
    items: dict[str, Item] = {}
    for _, found in parts_of(files, reading, folder=is_folder, what=path):
        for item in found:
            _add(items, item, account)
    if not items:
        why = account.summary()
        raise EmulusError(f"{path} has no rows; {why or 'add some'}")
    if all(isinstance(item.stored, Missing) for item in items.values()):
        first = next(iter(items.values())).stored
        assert isinstance(first, Missing)
        raise EmulusError(f"nothing in {path} can be used; {first.reason}")
    if reading.rest is not None:
        rest = [id for id in reading.undecided if id in items]
        items |= {id: replace(items[id], split=reading.rest) for id in rest}
        if rest:
            account.note(f"{len(rest):,} items whose split no name says go to {reading.rest}")
    _report(path, account)
    return Source(path, list(items.values()), account)


def _add(items: dict[str, Item], item: Item, account: Account) -> None:
    earlier = items.get(item.id)
    if earlier is None:
        items[item.id] = item
    elif item.kind != "text" and isinstance(item.stored, Path) and earlier.stored == item.stored:
        if item.split != earlier.split:
            account.leave_out(f"the file is in the split {earlier.split} already", item.id, "row")
            return
        items[item.id] = replace(
            earlier,
            captions=tuple(dict.fromkeys(earlier.captions + item.captions)),
            questions=tuple(dict.fromkeys(earlier.questions + item.questions)),
        )
    elif not isinstance(item.stored, Missing):  # which is counted already
        account.leave_out(_USED_TWICE, item.id, "row")


def _report(path: Path, account: Account) -> None:
    for line in account.notes:
        logger.info(f"{path}: {line}")
    for entry in account.left_out:
        logger.warning(f"{path}: left out {entry}")


def _find(path: Path, account: Account) -> tuple[Sequence[Path], Reading, bool]:
    """The files of a data set, what it is called, and whether a whole folder was named."""
    try:
        if path.is_dir():
            name = plain_name(path.resolve().name)
            return files_in(path, account), Reading(root=path, source=name, account=account), True
        if path.is_file():
            return [path], Reading(root=path.parent, source=plain_name(path.stem), account=account), False
        if path.exists():
            raise EmulusError(f"{path} is a device, pipe or socket, not a data set; name a folder or a file")
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror}); check the path") from None
    if not glob.has_magic(str(path)):
        raise EmulusError(f"{path} does not exist; name a data set: a folder, a file or a pattern (see docs/data.md)")
    files = files_matching(path, account)
    if not files:
        raise EmulusError(f"{path} matches no file; {account.summary() or 'check the pattern'}")
    root = _common(files)
    return files, Reading(root=root, source=plain_name(root.name), account=account), False


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
