"""Files that belong together by their names -> items: WebDataset tars, and folders that such a tar would unpack to.

``000.jpg`` and ``000.txt`` are one sample; ``000.json`` may say more. Tars are read in place, by an index of where
each file lies. A sample that lacks something, or says what cannot be, is an item that cannot be read: it is counted
and named like a broken picture, and does not keep a large collection from being used.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

from emulus.codec import parse_json
from emulus.data.item import MAX_TEXT, Item, JsonLine, Split, Stored, TarMember
from emulus.data.sources.account import LeftOutError
from emulus.data.sources.columns import (
    ALSO_MEDIA,
    ALWAYS_VIDEO,
    CAPTION_COLUMNS,
    CONVERSATION_COLUMNS,
    MEDIA_SUFFIXES,
    MORE_CAPTION_COLUMNS,
    TEXT_COLUMNS,
    Columns,
    given,
)
from emulus.data.sources.formats import known_format
from emulus.data.sources.kinds import kind_of
from emulus.data.sources.parquetrows import MAX_WORDS
from emulus.data.sources.rows import Reading, Row, captions_of, item_of, missing_item, words_of
from emulus.data.sources.tar import tar_members
from emulus.data.sources.walk import is_hidden
from emulus.data.stored import LFS_REASON, decoded, head_of, is_lfs_pointer, plain_name, read_slice
from emulus.errors import EmulusError
from emulus.media import media_type
from emulus.media.signatures import HEAD

CAPTION_SUFFIXES = (".txt", ".caption", ".captions")
WORD_SUFFIXES = frozenset({*CAPTION_SUFFIXES, ".json"})
TEXT_SUFFIXES = frozenset({".txt", ".md"})
_KNOWN = MEDIA_SUFFIXES | WORD_SUFFIXES | ALSO_MEDIA

NO_MEDIUM = "texts without an image or clip of the same name"
NO_CAPTION = "no caption beside them"
_FURTHER = "further files of samples"
_UNKNOWN = "neither images, clips, texts nor tables"

P = TypeVar("P", Path, TarMember)


@dataclass
class _Sample(Generic[P]):
    """Files of one key, by what follows it in their names."""

    media: dict[str, P] = field(default_factory=dict)
    words: dict[str, P] = field(default_factory=dict)
    others: dict[str, P] = field(default_factory=dict)

    def add(self, suffix: str, place: P) -> None:
        lower = suffix.lower()
        parts = self.media if lower in MEDIA_SUFFIXES else self.words if lower in WORD_SUFFIXES else self.others
        # A second one, as of a.jpg and a.JPG, is kept apart, to be found by whoever chooses.
        parts[suffix.upper() if lower in parts else lower] = place

    def look(self) -> None:
        """Find the medium by content where no name tells it."""
        if not self.media:
            for suffix, place in list(self.others.items()):
                if suffix.count(".") <= 1 and media_type(_head(place)) is not None:
                    self.media[suffix] = self.others.pop(suffix)


def tar_items(path: Path, name: str, reading: Reading) -> Iterator[Item]:
    """The samples of a WebDataset tar: texts where they say so, or where it holds nothing but words.

    Args:
        path: The tar, not compressed.
        name: Begins the ids of its samples.
        reading: The data set.

    Raises:
        EmulusError: The tar is damaged, cut off or compressed.
    """
    files: dict[str, TarMember] = {}
    for member in tar_members(path):
        parts = member.name.split("/")
        if parts[-1].startswith("__") or any(is_hidden(part) for part in parts if part not in (".", "..")):
            reading.account.pass_over("hidden, or made by the system", f"{path.name}: {member.name}")
        elif member.name in files:
            reading.account.leave_out("a name that the tar has twice", f"{path.name}: {member.name}")
        else:
            files[member.name] = member
    samples = _by_dots(files)
    for key, sample in list(samples.items()):
        sample.look()
        if not sample.media and not sample.words:
            reading.account.leave_out(_UNKNOWN, f"{path.name}: {key}", "sample")
            del samples[key]
    texts = all(not sample.media and not _hides_media(sample) for sample in samples.values())
    for key, sample in samples.items():
        identity = f"{plain_name(name)}/{plain_name(key)}"
        split = reading.split_of(path) or reading.split_inside(key)
        for suffix in sample.others:
            reading.account.pass_over(_FURTHER, f"{path.name}: {key}{suffix}")
        yield _item(sample, identity, path, reading, split=split, texts=texts)


def _by_dots(files: Mapping[str, TarMember]) -> dict[str, _Sample[TarMember]]:
    """The samples of a tar. A key ends at the first dot of the file's name (WebDataset's rule).

    Names such as ``0.05.png`` break that rule. Where it finds no medium, or the last dot finds a medium with words, the
    key ends at the last dot.
    """
    first: dict[str, _Sample[TarMember]] = {}
    if all(name.rpartition("/")[2].count(".") <= 1 for name in files):
        for name, member in files.items():
            key, suffix = _divided(name, last=False)
            first.setdefault(key, _Sample()).add(suffix, member)
        return first
    last: dict[str, _Sample[TarMember]] = {}
    for name, member in files.items():
        for samples, (key, suffix) in ((first, _divided(name, last=False)), (last, _divided(name, last=True))):
            samples.setdefault(key, _Sample()).add(suffix, member)
    for sample in first.values():
        sample.look()
    found: dict[str, _Sample[TarMember]] = {}
    for name, member in files.items():
        key, suffix = _divided(name, last=False)
        other_key, other = _divided(name, last=True)
        whole = last[other_key].media and last[other_key].words
        if other_key != key and other.lower() in _KNOWN and (whole or not first[key].media):
            key, suffix = other_key, other
        found.setdefault(key, _Sample()).add(suffix, member)
    return found


def _divided(name: str, *, last: bool) -> tuple[str, str]:
    """The key and the suffix of a file's name: at the first dot of its last part, or at the last one."""
    folder, slash, base = name.rpartition("/")
    if folder.startswith(".") or "//" in name or "/./" in name:
        folder = PurePosixPath(name).parent.as_posix()
        folder, slash = ("", "") if folder == "." else (folder, "/")
    # A dot at the beginning or the end divides nothing.
    stop = len(PurePosixPath(base).stem) if last else base.find(".")
    stop = len(base) if stop < 0 else stop
    return f"{folder}{slash}{base[:stop]}", base[stop:]


def loose_items(folder: Path, files: Mapping[str, Path], reading: Reading) -> Iterator[Item]:
    """Pictures and clips in a folder, each with its words in a file of the same name.

    Args:
        folder: The folder.
        files: By their names inside it.
        reading: The data set.

    Raises:
        EmulusError: Not one of them has words.
    """
    samples: dict[str, _Sample[Path]] = {}
    for name, path in files.items():
        key, suffix = _divided(name, last=True)
        samples.setdefault(key, _Sample()).add(suffix, path)
    for sample in samples.values():
        sample.look()
    _join_full_names(samples)
    if not any(sample.media and sample.words for sample in samples.values()):
        raise EmulusError(
            f"{folder} has no table of captions; add captions.jsonl, captions.csv or captions.parquet, "
            "or beside every picture.png a picture.txt (names of folders are not taken for captions)"
        )
    for key, sample in samples.items():
        if sample.media:
            for path in sample.others.values():
                reading.account.pass_over(_FURTHER, path.relative_to(folder))
            split = next((split for path in sample.media.values() if (split := reading.split_of(path))), None)
            yield _item(sample, plain_name(key), folder, reading, split=split, texts=False)
        else:
            for path in (*sample.words.values(), *sample.others.values()):
                leave_out_loose(path, path.relative_to(folder), reading)


def leave_out_loose(path: Path, name: object, reading: Reading) -> None:
    """Count a file that belongs to no sample, by what it is."""
    suffix = path.suffix.lower()
    if suffix in WORD_SUFFIXES:
        reading.account.leave_out(NO_MEDIUM, name)
    elif suffix in TEXT_SUFFIXES:
        reading.account.leave_out("texts beside images or clips; name them by a pattern to read them", name)
    else:
        reading.account.leave_out(known_format(head_of(path, HEAD)) or _UNKNOWN, name)


def _join_full_names(samples: dict[str, _Sample[Path]]) -> None:
    """Also ``a.png.txt`` holds words about ``a.png``."""
    for key, sample in list(samples.items()):
        for suffix in sample.media:
            words = samples.get(key + suffix) or samples.get(key + suffix.lower())
            if not sample.words and words is not None and words is not sample and not words.media:
                sample.words, words.words = words.words, {}


def text_items(root: Path, files: Mapping[str, Path], reading: Reading) -> Iterator[Item]:
    """Texts, each in a file of its own.

    Args:
        root: What is read.
        files: By their names inside it.
        reading: The data set.
    """
    for name, path in files.items():
        if is_lfs_pointer(head_of(path, 64)):
            reading.account.leave_out(LFS_REASON, name)
            continue
        row = Row(values={}, where=str(root), number=0)
        yield item_of(
            row, plain_name(name), reading, kind="text", captions=(), stored=path, split=reading.split_of(path)
        )


def _item(
    sample: _Sample[Any], identity: str, path: Path, reading: Reading, *, split: Split | None, texts: bool
) -> Item:
    where = f"{path}: {identity}"
    is_text = texts
    try:
        values: dict[str, Any] = _values(sample.words[".json"]) if ".json" in sample.words else {}
        row = Row(values=values, where=where, number=0)
        is_text = texts or given(values.get("kind")) == "text"
        if is_text:
            stored = _text(sample, row)
            return item_of(row, identity, reading, kind="text", captions=(), stored=stored, split=split)
        captions, questions = _words_about(sample, row)
        medium = _medium(sample, row)
        kind = kind_of(row, "", medium)
        return item_of(
            row, identity, reading, kind=kind, captions=captions, questions=questions, stored=medium, split=split
        )
    except EmulusError as error:
        fault = error if isinstance(error, LeftOutError) else LeftOutError("words that cannot be read", str(error))
        kind = "text" if is_text else "video" if sample.media.keys() & ALWAYS_VIDEO else "image"
        is_tar = isinstance(next(iter((*sample.media.values(), *sample.words.values()))), TarMember)
        return missing_item(
            fault, identity, identity, path, reading, kind=kind, split=split, unit="sample" if is_tar else "file"
        )


def _medium(sample: _Sample[Any], row: Row) -> Path | TarMember:
    """The picture or clip of a sample. Of a clip and its preview, the clip is meant."""
    found: dict[str, Path | TarMember] = sample.media
    if not found:
        other = next((known_format(_head(place)) for place in sample.others.values() if known_format(_head(place))), "")
        raise LeftOutError(other or NO_MEDIUM, f"{row.where} has words but no picture or clip")
    if len(found) > 1:
        clips = [suffix for suffix in found if suffix.lower() in ALWAYS_VIDEO]
        clips = clips or [suffix for suffix, place in found.items() if kind_of(row, "", place) == "video"]
        if len(clips) != 1:
            raise LeftOutError(
                "several media of the same name",
                f"{row.where} has several media ({', '.join(found)}); give each its own name and words",
            )
        return found[clips[0]]
    return next(iter(found.values()))


def _hides_media(sample: _Sample[Any]) -> bool:
    """Whether a sample without a known medium has a file of another kind than text beside its words."""
    return any(is_binary(_head(place)) for place in sample.others.values())


def is_binary(head: bytes) -> bool:
    """Whether a file that begins so is no text."""
    return b"\0" in head or known_format(head) is not None or media_type(head) is not None


def _text(sample: _Sample[Any], row: Row) -> Stored:
    """Where the text of a sample of words alone lies."""
    place = sample.words.get(".txt")
    if place is not None:
        if isinstance(place, TarMember) and place.size > MAX_TEXT:
            raise LeftOutError(
                "texts that are too long",
                f"{row.where} has {place.size:,} bytes, more than the {MAX_TEXT:,} allowed; split it",
            )
        return place
    column = next((name for name in TEXT_COLUMNS if name in row.values), None)
    if column is None or ".json" not in sample.words:
        raise LeftOutError("no text", f"{row.where} has no column {' or '.join(TEXT_COLUMNS)}; add a text")
    if not isinstance(row.values[column], str):
        raise LeftOutError("values that are not text", f"{row.where}: '{column}' is not a text; fix it")
    place = sample.words[".json"]
    content, offset = _content(place), place.offset if isinstance(place, TarMember) else 0
    path = place.path if isinstance(place, TarMember) else place
    return JsonLine(path=path, column=column, offset=offset, size=len(content), checksum=zlib.crc32(content))


def _words_about(sample: _Sample[Any], row: Row) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    captions: tuple[str, ...] = ()
    for suffix in CAPTION_SUFFIXES:
        if suffix in sample.words:
            captions += captions_of(decoded(_content(sample.words[suffix]), row.where), "text", row.where)
    told = any(given(row.values.get(name)) is not None for name in CAPTION_COLUMNS)
    names = CAPTION_COLUMNS if told or captions else MORE_CAPTION_COLUMNS
    questions: tuple[Any, ...] = ()
    if ".json" in sample.words:
        try:
            more, questions, _ = words_of(row, Columns(captions=names, conversations=CONVERSATION_COLUMNS))
            captions += more
        except LeftOutError as error:
            if not captions or error.reason != "no caption":
                raise
    if not captions and not questions:
        words = ", ".join(sample.words)
        raise LeftOutError(
            "empty captions" if words else NO_CAPTION,
            f"{row.where}: {words} is empty; write a caption"
            if words
            else f"{row.where} has no words beside it; add them as {', '.join(CAPTION_SUFFIXES[:2])} or .json",
        )
    return tuple(dict.fromkeys(captions)), questions


def _values(place: Path | TarMember) -> dict[str, Any]:
    where = str(place) if isinstance(place, Path) else place.where
    values = parse_json(_content(place), where, remedy="fix it")
    if not isinstance(values, dict):
        raise EmulusError(f'{where} is not an object such as {{"caption": "..."}}; fix it')
    return values


def _content(place: Path | TarMember) -> bytes:
    if isinstance(place, TarMember):
        return read_slice(place.path, place.offset, place.size, place.where, most=MAX_WORDS)
    try:
        return read_slice(place, 0, place.stat().st_size, str(place), most=MAX_WORDS)
    except OSError as error:
        raise EmulusError(f"{place} cannot be read ({error.strerror}); restore it") from None


def _head(place: Path | TarMember) -> bytes:
    return head_of(place, HEAD) if isinstance(place, Path) else place.head(HEAD)
