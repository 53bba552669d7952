"""Rows of tables and sidecar files -> items: which columns hold what, what counts as not given, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from emulus.codec import parse_json
from emulus.data.item import SPLITS, Item, Kind, Question, Split, Stored, checked_fps, number_of, split_of_key
from emulus.data.sources.account import Account, LeftOutError, Unit
from emulus.data.sources.columns import Columns, first_given, given
from emulus.data.sources.conversations import read_conversation
from emulus.data.sources.splits import split_called, split_named, split_of_path
from emulus.data.stored import NOT_THERE, Missing, checked_text, inside
from emulus.errors import EmulusError, did_you_mean, shown

_LONGEST_ID, _LONGEST_SOURCE = 4096, 1024


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table, with what names it in a message.

    Attributes:
        values: By column.
        where: Table and line.
        number: From 0, over the whole table.
        stored: The medium or text, when the table itself holds it.
        text_at: Where the text in a column can be read again, so that it need not be kept.
        fault: Why the row cannot be used at all, if so.
    """

    values: Mapping[str, Any]
    where: str
    number: int
    stored: Stored | None = None
    text_at: Callable[[str], Stored] | None = None
    fault: LeftOutError | None = None


@dataclass(kw_only=True)
class Reading:
    """A data set while it is read.

    Attributes:
        root: Its folder: ids begin with the place in it.
        source: Its name.
        account: Counts what is left out.
        splits: Of files whose split their names or a card say.
        rest: The split of what no name speaks of, where names tell splits apart.
        undecided: Ids of items of which nothing says the split.
        used: Files that rows name.
        media: Pictures and clips in files of their own.
    """

    root: Path
    source: str
    account: Account
    splits: Mapping[Path, Split] = field(default_factory=dict)
    rest: Split | None = None
    undecided: set[str] = field(default_factory=set)
    used: set[Path] = field(default_factory=set)
    media: Sequence[Path] = ()

    def find(self, name: str) -> Path | None:
        """The only medium whose path ends in a name; names often leave out the folder that all images are in."""
        wanted = name.replace("\\", "/").lower()
        found = [path for path in self._by_name.get(wanted.rpartition("/")[2], ()) if _ends_in(path, wanted)]
        return found[0] if len(found) == 1 else None

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in self.media:
            found.setdefault(path.name.lower(), []).append(path)
        return found

    def split_of(self, file: Path) -> Split | None:
        """The split that the data set gives to a file."""
        return self.splits.get(file)

    def split_inside(self, name: str) -> Split | None:
        """The split that the folders in a name speak of: of a member of a tar, or of a file that a table names.

        Once names speak of data that are held out, all that no name speaks of is there to train on.
        """
        split = _split_of_folder(name.rpartition("/")[0])
        if split in ("validation", "test"):
            self.rest = "train"
        return split


def _ends_in(path: Path, name: str) -> bool:
    return f"/{path.as_posix().lower()}".endswith(f"/{name.removeprefix('./')}")


@lru_cache(maxsize=4096)
def _split_of_folder(folder: str) -> Split | None:
    return split_of_path(folder.split("/"))


def item_of(
    row: Row,
    identity: str,
    reading: Reading,
    *,
    kind: Kind,
    captions: tuple[str, ...],
    stored: Stored,
    split: Split | None,
    questions: tuple[Question, ...] = (),
) -> Item:
    """An item with everything that a row may say beside media and words.

    A value that is not given costs nothing. One that cannot be right leaves the row out.

    Args:
        row: The row.
        identity: Its id, where the row gives none.
        reading: The data set.
        kind: Of the item.
        captions: Of the item.
        stored: Where its content is.
        split: That the names of files say, where the row says none.
        questions: Of the item.

    Raises:
        LeftOutError: A value cannot be right.
    """
    said = given(row.values.get("id"))
    if said is not None:
        identity = str(said)
    if len(identity) > _LONGEST_ID:
        raise LeftOutError("an id that is too long", f"{row.where}: an id of {len(identity):,} letters; shorten it")
    identity = checked_text(identity, row.where)
    own = given(row.values.get("split"))
    found = split if own is None else _split(own, row.where)
    if own is None and split is None:
        reading.undecided.add(identity)
    source = given(row.values.get("source"))
    return Item(
        id=identity,
        kind=kind,
        captions=captions,
        split=found or split_of_key(identity),
        stored=stored,
        fps=_fps(row),
        score=_score(row),
        source=reading.source if source is None else checked_text(str(source), row.where)[:_LONGEST_SOURCE],
        questions=questions,
    )


def missing_item(
    error: LeftOutError,
    identity: str,
    name: str,
    path: Path,
    reading: Reading,
    *,
    kind: Kind,
    split: Split | None,
    unit: Unit,
) -> Item:
    """An item that stands for a row or sample that cannot be used; it is counted.

    Args:
        error: Why.
        identity: Its id.
        name: Names it in the account.
        path: What holds it.
        reading: The data set.
        kind: What it would have been.
        split: Likewise, where names say it.
        unit: What is counted.
    """
    reading.account.leave_out(error.reason, name, unit)
    if split is None:
        reading.undecided.add(identity)
    return Item(
        id=identity,
        kind=kind,
        captions=() if kind == "text" else ("",),
        split=split or split_of_key(identity),
        stored=Missing(path=path, reason=str(error)),
        source=reading.source,
    )


def words_of(row: Row, columns: Columns) -> tuple[tuple[str, ...], tuple[Question, ...], list[str]]:
    """The captions and questions of a row, and the media that its conversation names.

    Raises:
        LeftOutError: There are no captions, or one is not valid.
    """
    found = first_given(row.values, columns.captions)
    captions = captions_of(found[1], found[0], row.where) if found else ()
    questions, media = questions_of(row), list[str]()
    talk = first_given(row.values, columns.conversations)
    if talk:
        conversation = read_conversation(talk[1], row.where)
        captions += tuple(conversation.captions)
        questions += tuple(conversation.questions)
        media = conversation.media
    if not captions and not questions:
        name = next(iter(columns.captions or columns.conversations), "caption")
        raise LeftOutError("no caption", f"{row.where}: {shown(name)} is empty; write a caption or remove that row")
    return captions, questions, media


def captions_of(value: Any, column: str, where: str) -> tuple[str, ...]:
    """The captions in a value: a text, or a list of texts (or of objects that hold one) of which some are not given.

    Raises:
        LeftOutError: It is something else.
    """
    texts = []
    for each in value if isinstance(value, list | tuple) else [value]:
        if isinstance(each, Mapping):
            found = first_given(each, ("caption", "text", "raw", "sentence", "value"))
            each = found[1] if found else None
        each = given(each)
        if each is not None and not isinstance(each, str):
            raise LeftOutError(
                "captions that are no texts",
                f"{where}: {shown(column)} is neither a text nor a list of texts; fix that row",
            )
        if each is not None:
            texts.append(checked_text(each.strip(), where))
    return tuple(texts)


def questions_of(row: Row) -> tuple[Question, ...]:
    """A list of ``{question, answer}`` (in a CSV it is JSON), and a column of questions with one of answers.

    Raises:
        LeftOutError: It is something else.
    """
    value = given(row.values.get("questions"))
    if isinstance(value, str):
        try:
            value = parse_json(value, row.where)
        except EmulusError:
            value = [None]
    pairs = []
    for pair in () if value is None else value if isinstance(value, list | tuple) else [None]:
        texts = [pair.get("question"), pair.get("answer")] if isinstance(pair, Mapping) else [None]
        plain = [checked_text(text.strip(), row.where) for text in texts if isinstance(text, str) and text.strip()]
        if len(plain) < 2:
            raise LeftOutError(
                "questions in another form",
                f'{row.where}: questions are a list of {{"question": "...", "answer": "..."}}; fix that row',
            )
        pairs.append(Question(*plain))
    question, answer = given(row.values.get("question")), first_given(row.values, ("answer", "answers"))
    if isinstance(question, str) and answer:
        first = captions_of(answer[1], answer[0], row.where)[:1]
        pairs += [Question(checked_text(question.strip(), row.where), text) for text in first]
    return tuple(pairs)


def media_of(
    row: Row, columns: Columns, reading: Reading, folders: Sequence[Path], named: Sequence[str] = ()
) -> tuple[str, Stored]:
    """The medium of a row and the column that gives it.

    Args:
        row: The row.
        columns: Of its table.
        reading: The data set.
        folders: That names may be relative to; the first in which the file is.
        named: Media that its conversation names.

    Raises:
        LeftOutError: The row names no media, or the file does not exist.
    """
    if row.stored is not None:
        return columns.media[0], row.stored
    found = first_given(row.values, [name for name in columns.media if name not in columns.conversations])
    column, value = found or (columns.media[0], named[0] if named else None)
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise LeftOutError(
                "several media in one row",
                f"{row.where} has {len(value)} images or clips, and an item holds one; give each its own row",
            )
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("path") or value.get("file_name")
    first: LeftOutError | None = None
    for folder in folders:
        try:
            return column, inside(folder, value, row.where)
        except LeftOutError as error:
            first = first or error
    assert first is not None
    path = reading.find(value) if first.reason == NOT_THERE and isinstance(value, str) else None
    if path is None:
        raise first
    return column, path


def _split(value: Any, where: str) -> Split:
    text = str(value).strip()
    split = split_called(text) or split_named(text)
    if split is None:
        reason = f"the split {shown(text)} is not one of {', '.join(SPLITS)}"
        raise LeftOutError(reason, f"{where}: the split {shown(text)} is unknown{did_you_mean(text, SPLITS)}")
    return split


def _fps(row: Row) -> float | None:
    value = given(row.values.get("fps"))
    return None if value is None else checked_fps(value, row.where)


def _score(row: Row) -> float:
    value = given(row.values.get("score"))
    score = 0.0 if value is None else number_of(value)
    if not math.isfinite(score):
        raise LeftOutError(
            "its score is not a number", f"{row.where}: score {shown(value)} is not a number; fix that row"
        )
    return score
