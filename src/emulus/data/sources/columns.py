"""Which columns of a table hold what, by their names and by what is in the first rows; what counts as not given."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from emulus.data.item import number_of
from emulus.data.sources.account import LeftOutError, UnfitError
from emulus.data.sources.conversations import read_conversation
from emulus.errors import did_you_mean, shown
from emulus.media import media_type

MEDIA_COLUMNS = ("media", "image", "video", "file_name", "file", "path")
MORE_MEDIA_COLUMNS = (
    *("images", "videos", "image_path", "video_path", "img_path", "img", "image_file", "video_file", "image_name"),
    *("video_name", "image_filename", "image_file_name", "picture", "photo", "clip", "image_bytes"),
    *("jpg", "jpeg", "png", "webp", "gif", "mp4", "webm", "mov", "avi", "mkv"),
)
CAPTION_COLUMNS = ("captions", "caption", "text")
MORE_CAPTION_COLUMNS = (
    *("prompt", "description", "sentences", "sentence", "txt", "alt_text", "alt", "long_caption", "short_caption"),
    *("generated_caption", "title", "comment", "label"),
)
"""Taken for captions where none of :data:`CAPTION_COLUMNS` is there."""
TEXT_COLUMNS = ("text", "content")
"""Hold the text itself in a table that has no column of media."""
CONVERSATION_COLUMNS = ("conversations", "messages", "conversation")
QUESTION_COLUMNS = ("questions", "question", "answer", "answers")
MORE_COLUMNS = frozenset({"id", "split", "kind", "fps", "score", "source", *QUESTION_COLUMNS})
ADDRESS_COLUMNS = ("url", "image_url", "img_url", "video_url", "image_link", "urls")
ALWAYS_VIDEO = frozenset({".mp4", ".m4v", ".webm", ".mkv", ".avi", ".mov"})
NEVER_VIDEO = frozenset({".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
MEDIA_SUFFIXES = ALWAYS_VIDEO | NEVER_VIDEO | {".png", ".webp", ".gif", ".avif"}

ALSO_MEDIA = frozenset({".jpe", ".jfif", ".heic", ".heif", ".jp2", ".tga", ".apng", ".mpg", ".mpeg", ".wmv", ".flv"})
_NOT_GIVEN = frozenset({"", "nan", "NaN", "NAN", "<NA>", "NaT", "None", "null", "NULL"})


def given(value: Any) -> Any:
    """A value, or None for all that tables write where there is none: null, NaN, empty or blank text, ``<NA>`` ..."""
    if value is None:
        return None
    if isinstance(value, str):
        return None if value.strip() in _NOT_GIVEN else value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, list | tuple | Mapping) and not value:
        return None
    # numpy's and pandas' values that are unequal to themselves or print so.
    return None if type(value).__name__ in ("NaTType", "NAType") else value


def first_given(values: Mapping[str, Any], names: Sequence[str]) -> tuple[str, Any] | None:
    """The first of the columns that has a value in this row."""
    for name in names:
        value = given(values.get(name))
        if value is not None:
            return name, value
    return None


_KNOWN = frozenset(
    {
        *(*MEDIA_COLUMNS, *MORE_MEDIA_COLUMNS, *CAPTION_COLUMNS, *MORE_CAPTION_COLUMNS, *TEXT_COLUMNS),
        *(*CONVERSATION_COLUMNS, *MORE_COLUMNS),
    }
)


def plain_columns(names: Iterable[str]) -> dict[str, str]:
    """By each name of a column, what it is called here: ``Caption`` and `` TEXT`` mean ``caption`` and ``text``."""
    names = list(names)
    plain = {}
    for name in names:
        lower = name.strip().lower()
        plain[name] = lower if lower in _KNOWN and lower != name and lower not in names else name
    return plain if len(set(plain.values())) == len(plain) else {name: name for name in names}


def known_columns(names: Iterable[str]) -> int:
    """How many of the names are known."""
    return sum(name.strip().lower() in _KNOWN for name in names)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table hold what.

    Attributes:
        media: Columns of media, of which a row gives one; empty for a table of texts.
        captions: Columns of captions, likewise.
        texts: Columns of texts, of a table of texts.
        conversations: Columns of conversations.
    """

    media: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    conversations: tuple[str, ...] = ()

    @property
    def is_texts(self) -> bool:
        """Whether this is a table of texts."""
        return not self.media and bool(self.texts)


def columns_of(names: Sequence[str], sample: Sequence[Mapping[str, Any]], where: str) -> Columns:
    """Find out which columns of a table hold what.

    Args:
        names: Of all columns.
        sample: Some of its rows.
        where: Names the table in messages.

    Raises:
        UnfitError: It is neither a table of media with words nor one of texts; a name that looks like one that is
            sought is pointed out.
    """
    media = tuple(name for name in (*MEDIA_COLUMNS, *MORE_MEDIA_COLUMNS) if name in names)
    conversations = tuple(name for name in CONVERSATION_COLUMNS if name in names)
    captions = tuple(name for name in CAPTION_COLUMNS if name in names)
    texts = tuple(name for name in TEXT_COLUMNS if name in names)
    if not captions:
        captions = tuple(name for name in MORE_CAPTION_COLUMNS if name in names and _holds_words(name, sample))[:1]
    asks = bool(conversations) or "questions" in names or ("question" in names and {"answer", "answers"} & set(names))
    media = media or _like_media(names, sample, where)
    if not media and conversations and _shows_media(conversations, sample):
        media = conversations
    if texts and media and not captions and not asks and not _are_media(media, sample):
        return Columns(texts=texts)  # such as the path and content of sources of programs
    if media and (captions or asks):
        return Columns(media=media, captions=captions, conversations=conversations)
    if texts and not media:
        _check_no_addresses(names, sample, where)
        return Columns(texts=texts)
    if not media and any(given(row.get("kind")) == "text" for row in sample):
        return Columns(texts=TEXT_COLUMNS)
    wanted = CAPTION_COLUMNS if media else MEDIA_COLUMNS
    present = shown(", ".join(map(str, names)) or "none", quote=False)
    raise UnfitError(f"{where} has no column {' or '.join(wanted)}; it has {present}{_closest(wanted, names)}")


def _closest(wanted: Sequence[str], names: Collection[str]) -> str:
    """A hint when a column that is there looks like one that is sought."""
    if any(name in ADDRESS_COLUMNS for name in names) and wanted is MEDIA_COLUMNS:
        return "; addresses are not downloaded: fetch the files and name them in a column 'file'"
    for column in names:
        hint = did_you_mean(str(column), wanted)
        if "did you mean" in hint:
            return f"{hint.removesuffix('?')} for {shown(str(column))}?"
    return "; rename the one that is meant"


def _values(name: str, sample: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [value for row in sample if (value := given(row.get(name))) is not None]


def _holds_words(name: str, sample: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the values are texts: a label is often the number of a class."""
    values = _values(name, sample)
    return not values or any(isinstance(value, str | list | tuple) and not _is_number(value) for value in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, str) and math.isfinite(number_of(value))


def _like_media(names: Sequence[str], sample: Sequence[Mapping[str, Any]], where: str) -> tuple[str, ...]:
    """The column of another name whose values all name media files or hold their bytes."""
    known = {*MORE_COLUMNS, *CAPTION_COLUMNS, *MORE_CAPTION_COLUMNS, *TEXT_COLUMNS, *CONVERSATION_COLUMNS}
    known |= set(ADDRESS_COLUMNS)
    found = [name for name in names if name not in known and _are_media((name,), sample)]
    if len(found) > 1:
        several = shown(", ".join(found), quote=False)
        raise UnfitError(
            f"{where} has several columns of media ({several}); call the one that is meant 'image' or 'video'"
        )
    return tuple(found)


def _are_media(names: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> bool:
    values = [value for name in names for value in _values(name, sample)]
    return bool(values) and all(_is_media_like(value) for value in values)


def _is_media_like(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_media_like(each) for each in value)
    if isinstance(value, Mapping):
        return _is_media_like(value.get("bytes") or value.get("path"))
    if isinstance(value, bytes):
        return media_type(value[:4096]) is not None
    suffix = PurePosixPath(value.split("?")[0]).suffix.lower() if isinstance(value, str) and len(value) < 4096 else ""
    return suffix in MEDIA_SUFFIXES | ALSO_MEDIA


def _shows_media(conversations: Sequence[str], sample: Sequence[Mapping[str, Any]]) -> bool:
    for row in sample:
        found = first_given(row, conversations)
        try:
            if found and read_conversation(found[1], "").media:
                return True
        except LeftOutError:
            continue
    return False


def _check_no_addresses(names: Sequence[str], sample: Sequence[Mapping[str, Any]], where: str) -> None:
    """Refuse captions of images that are somewhere else: they are not a text corpus."""
    for name in names:
        is_address = str(name).lower() in ADDRESS_COLUMNS
        if is_address and (
            str(name).lower() != "url" or _are_media((name,), sample) or {"width", "height"} <= set(names)
        ):
            raise UnfitError(
                f"{where} names images by addresses ({name}), which are not downloaded; fetch the files and name them "
                "in a column 'file'"
            )
