"""The files of a data set -> what of them is read, and how; the rest is counted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from emulus.data.item import Item, Split
from emulus.data.samples import (
    TEXT_SUFFIXES,
    WORD_SUFFIXES,
    is_binary,
    leave_out_loose,
    loose_items,
    tar_items,
    text_items,
)
from emulus.data.sources.account import UnfitError
from emulus.data.sources.card import Card, read_card
from emulus.data.sources.columns import ALSO_MEDIA, MEDIA_SUFFIXES
from emulus.data.sources.formats import known_format
from emulus.data.sources.rows import Reading
from emulus.data.sources.splits import names_splits, split_called, split_of_path
from emulus.data.sources.walk import is_about
from emulus.data.stored import LFS_REASON, head_of, is_lfs_pointer
from emulus.data.tables import Table, open_table, table_type
from emulus.errors import EmulusError
from emulus.media import media_type
from emulus.media.signatures import HEAD

TABLES = tuple(f"{stem}.{suffix}" for stem in ("captions", "metadata") for suffix in ("jsonl", "csv", "parquet"))
"""The names a table of captions goes by in a folder of media files, the first that exists."""
_COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".rar", ".7z", ".lz4")
_OWN_FOLDER = frozenset({"train", "training", "validation", "valid", "val", "test", "testing"})
_MEDIA = MEDIA_SUFFIXES | ALSO_MEDIA
_WORDS = WORD_SUFFIXES | TEXT_SUFFIXES
_UNFIT = "tables with neither texts nor media and captions"
_DAMAGED = "tables that cannot be read"

Part = tuple[Path, Iterable[Item]]


@dataclass(kw_only=True)
class Choice:
    """What a data set consists of, by kinds of files.

    Attributes:
        reading: The data set.
        folder: Whether a whole folder was named, not files.
        tables: Tables whose columns are understood.
        tars: Tars.
        media: Pictures and clips in files of their own.
        loose: All other files, and those of ``media``, by their names.
        errors: Why tables cannot be used.
    """

    reading: Reading
    folder: bool
    tables: list[Table] = field(default_factory=list)
    tars: list[Path] = field(default_factory=list)
    media: list[Path] = field(default_factory=list)
    loose: dict[str, Path] = field(default_factory=dict)
    errors: list[EmulusError] = field(default_factory=list)

    def name(self, file: Path) -> str:
        """A file's name inside the data set."""
        return file.relative_to(self.reading.root).as_posix()

    def short(self, error: EmulusError) -> str:
        """A message in which files are called by their names inside the data set."""
        return str(error).replace(f"{self.reading.root}/", "")


def parts_of(files: Sequence[Path], reading: Reading, *, folder: bool, what: Path) -> Iterator[Part]:
    """What is read of a data set's files: files or folders, each with its items. What is not read is counted.

    Args:
        files: All files.
        reading: The data set.
        folder: Whether a whole folder was named, not files.
        what: Names the data set in messages.

    Raises:
        EmulusError: There is nothing to be read, or a file is damaged.
    """
    choice = Choice(reading=reading, folder=folder)
    card = read_card(reading.root, map(choice.name, files), reading.account) if folder else None
    _sort(files, choice, card)
    if not folder:
        _add_words(choice)
    chosen, beside = _choose(choice)
    read: set[Path] = set()
    bare = chosen == "samples" and not _has_samples(choice)
    if not chosen or (bare and (choice.errors or (len(choice.loose) == 1 and not folder))):
        raise _nothing(choice, what)
    reading.media = choice.media
    if isinstance(chosen, list):
        read = {each.path if isinstance(each, Table) else each for each in chosen}
        _decide_splits(choice, sorted(read), card)
        for each in chosen:
            yield (each.path, each.items(reading)) if isinstance(each, Table) else _part(each, reading)
    else:
        read = set(choice.loose.values())
        _decide_splits(choice, choice.media, card)
        yield reading.root, loose_items(reading.root, choice.loose, reading)
    _count_rest(choice, read, beside)


def _part(file: Path, reading: Reading) -> Part:
    name = file.relative_to(reading.root)
    if file.suffix.lower() == ".tar":
        return file, tar_items(file, name.with_suffix("").as_posix(), reading)
    return file, text_items(reading.root, {name.as_posix(): file}, reading)


def _sort(files: Sequence[Path], choice: Choice, card: Card | None) -> None:
    """Put every file where it belongs, by its name and by its first bytes."""
    account = choice.reading.account
    keys: set[Path] = set()
    if any(file.suffix.lower() == ".json" for file in files):
        keys = {key for file in files if file.suffix.lower() in _MEDIA for key in (file, file.with_suffix(""))}
    root_table = next((name for name in TABLES if choice.folder and choice.reading.root / name in files), None)
    for file in files:
        name, kind, suffix = choice.name(file), table_type(file), file.suffix.lower()
        is_container = bool(kind) or suffix == ".tar"
        named_texts = not choice.folder and suffix in TEXT_SUFFIXES
        if is_about(file.name) and not named_texts:
            account.pass_over("about the data set", name)
        elif card is not None and name in card.others:
            account.leave_out("files of other configs of the card", name)
        elif card is not None and is_container and kind != "json" and name not in card.files:
            account.leave_out("files that the card does not name", name)
        elif is_container and is_lfs_pointer(head_of(file, 64)):
            account.leave_out(LFS_REASON, name)
            choice.errors.append(EmulusError(f"{file}: {LFS_REASON}"))
        elif suffix == ".tar":
            choice.tars.append(file)
        elif kind == "json" and file.with_suffix("") in keys:
            choice.loose[name] = file
        elif kind:
            _sort_table(file, kind, choice, is_root=name == root_table)
        elif suffix in _COMPRESSED:
            account.leave_out("compressed archives; unpack them", name)
        else:
            choice.loose[name] = file
            unknown = suffix not in _WORDS
            if suffix in _MEDIA or (unknown and media_type(head_of(file, HEAD)) is not None):
                choice.media.append(file)


def _add_words(choice: Choice) -> None:
    """Where a pattern names pictures, the words beside them belong to them."""
    for folder in {file.parent for file in choice.media}:
        keys = {key for file in choice.media if file.parent == folder for key in (file.with_suffix(""), file)}
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in WORD_SUFFIXES and file.with_suffix("") in keys and file.is_file():
                choice.loose[choice.name(file)] = file


def _sort_table(file: Path, kind: str, choice: Choice, *, is_root: bool) -> None:
    account, name = choice.reading.account, choice.name(file)
    try:
        table = open_table(file)
    except EmulusError as error:
        # What holds media or texts itself and is damaged is no stray file.
        if kind in ("parquet", "arrow") and not isinstance(error, UnfitError):
            raise
        choice.errors.insert(0 if is_root else len(choice.errors), error)
        if kind == "json" or file.suffix.lower() in _WORDS:
            choice.loose[name] = file
        else:
            unfit = isinstance(error, UnfitError)
            account.leave_out(_UNFIT if unfit else _DAMAGED, name if unfit else choice.short(error))
        return
    if table.columns.media or table.columns.texts:
        choice.tables.append(table)
    elif file.suffix.lower() in _WORDS:
        choice.loose[name] = file
    else:
        account.leave_out("tables without rows", name)
        choice.errors.append(EmulusError(f"{file} has no rows; add some"))


def _choose(choice: Choice) -> tuple[list[Table | Path] | str, str]:
    """What is read, and what it is called where something else is left out beside it.

    Media go before texts, so that captions of media never become texts; what holds its media goes before what names
    files.
    """
    root = choice.reading.root
    holding = [table for table in choice.tables if table.holds_media]
    naming = [table for table in choice.tables if not table.holds_media]
    if not choice.folder and not choice.media:
        return [*choice.tables, *choice.tars, *_texts(choice)], "the files that were named"
    for name in TABLES if choice.folder else ():
        for table in choice.tables:
            if table.path == root / name:
                return [table], name
    if any(not table.columns.is_texts for table in holding):
        return [*holding], "Parquet files"
    if choice.tars:
        return [*choice.tars], "tars"
    captioned = [table for table in naming if not table.columns.is_texts]
    if _has_samples(choice):
        captioned = [table for table in captioned if table_type(table.path) != "json"]
    if captioned:
        return [*captioned], "tables of captions"
    if choice.media:
        return "samples", "images and clips"
    if holding or naming:
        return [*(holding or naming)], "tables of texts"
    return [*_texts(choice)], "texts"


def _has_samples(choice: Choice) -> bool:
    """Whether a picture or clip has words beside it."""
    words = {file.with_suffix("") for file in choice.loose.values() if file.suffix.lower() in WORD_SUFFIXES}
    return any(file.with_suffix("") in words or file in words for file in choice.media)


def _texts(choice: Choice) -> list[Path]:
    """Files of text that are no words about a file of another kind, such as an image in a format that is unknown."""
    others: dict[Path, Path] = {}
    for file in choice.loose.values():
        if file.suffix.lower() not in WORD_SUFFIXES | TEXT_SUFFIXES:
            head = head_of(file, HEAD)
            document = known_format(head) or ""
            if is_binary(head) and not document.startswith(("PDF", "HTML", "ZIP")):
                others |= {file.with_suffix(""): file, file: file}
    return [
        file
        for file in choice.loose.values()
        if file.suffix.lower() in TEXT_SUFFIXES and file.with_suffix("") not in others
    ]


def _decide_splits(choice: Choice, files: Sequence[Path], card: Card | None) -> None:
    """Find the split of each file that is read, by the card or by names."""
    reading, found = choice.reading, dict[Path, Split | None]()
    loose = files is choice.media
    for file in files:
        name = PurePosixPath(choice.name(file))
        # A picture may be called after anything; a table or tar is called after its split.
        is_container = not loose and (bool(table_type(file)) or file.suffix.lower() == ".tar")
        own = name.name if is_container or split_called(name.stem.split(".")[-1]) else ""
        said = card.files.get(name.as_posix()) if card else None
        found[file] = said or split_of_path(name.parts[:-1], own if not loose else "")
    if loose and not names_splits(found.values()):
        found = dict.fromkeys(found)
    whole = reading.root.resolve().name.lower()
    if not any(found.values()) and whole in _OWN_FOLDER:
        found = dict.fromkeys(found, split_called(whole))
    reading.splits = {file: split for file, split in found.items() if split is not None}
    if reading.splits:
        by = "the card" if card and set(card.files.values()) - {None} else "the names of files and folders"
        reading.rest = "train"
        reading.account.note(f"splits are those of {by}")


def _count_rest(choice: Choice, read: set[Path], beside: str) -> None:
    """Count every file that is not read; the files that tables name are known by now."""
    account, used = choice.reading.account, choice.reading.used
    why = f"not read beside {beside}; name them by a pattern to read them"
    for file in [*(table.path for table in choice.tables), *choice.tars]:
        if file not in read:
            account.leave_out(why, choice.name(file))
    media = set(choice.media)
    for name, file in choice.loose.items():
        if file in read or file in used:
            continue
        if file in media:
            named = beside in TABLES or beside == "tables of captions"
            account.leave_out(f"images and clips that {'no table names' if named else f'lie beside {beside}'}", name)
        elif file.suffix.lower() in WORD_SUFFIXES | TEXT_SUFFIXES:
            if file.suffix.lower() in TEXT_SUFFIXES and beside in ("texts", "the files that were named"):
                account.leave_out("texts beside a file of the same name and an unknown format", name)
            else:
                account.leave_out(f"texts beside {beside}", name)
        else:
            leave_out_loose(file, name, choice.reading)


def _nothing(choice: Choice, what: Path) -> EmulusError:
    """What to say where there is nothing to be read."""
    if choice.errors:
        return choice.errors[0]
    _count_rest(choice, set(), "nothing")
    summary = choice.reading.account.summary()
    if not choice.folder and what.suffix.lower() in _COMPRESSED:
        return EmulusError(
            f"{what} is compressed, so nothing in it can be found without reading all; decompress or unpack it"
        )
    if not choice.folder:
        if len(choice.loose) == 1:
            return EmulusError(
                f"{what} is no data set; name a table, a tar or a folder of media with captions (see docs/data.md)"
            )
        return EmulusError(f"{what} names no data; {summary or 'check the pattern'}")
    why = f"{summary}; " if summary else ""
    return EmulusError(
        f"{what} holds neither a table of captions (captions.jsonl, captions.csv, captions.parquet) nor tars, Parquet, "
        f"texts, or pictures with texts of the same name; {why}see docs/data.md"
    )
