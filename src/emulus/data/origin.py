"""items -> what a shard was made from, so that media that changed under the same names are noticed.

Looking is cheap: sizes and times of files are compared first. Only where these differ (a copied data set, a touched
file) is the content read and its checksum compared, so that equal content is never encoded again.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from emulus.data.item import Item, JsonLine, Missing
from emulus.errors import EmulusError

_WHOLE = 2**26
"""Bytes of a file up to which all of it is read for its checksum."""
_BLOCK, _BLOCKS = 2**20, 64
"""What is read of a longer one: so many blocks, evenly spread, the last one at its end."""
_UNSETTLED = "changed while it was read"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a shard was made from. Each digest is the SHA-256 of what the shard's items say, in their order.

    Attributes:
        words: Captions, questions, frame rates and scores.
        files: Sizes and times of the files that hold the content.
        content: Checksums of the content itself; empty if a file changed while it was read, which equals nothing.
        linked: Whether some content lies in files that a table names, which only reading the table tells.
    """

    words: str
    files: str
    content: str
    linked: bool = False


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Of one item, what its content was when it was read."""

    files: str
    content: str
    linked: bool = False


def see(item: Item, before: str | None = None) -> Seen:
    """Look at an item's content.

    Args:
        item: Which.
        before: What :func:`file_state` gave before it was read for something else; None looks for the first time.
    """
    content, link = _content(item)
    after = file_state(item)
    # Change times are of no use here: some network file systems make them up.
    settled = before is None or before.split()[:2] == after.split()[:2]
    if link is not None:
        after = f"{after} {_state(link)}"
    return Seen(files=after, content=content if settled else _UNSETTLED, linked=link is not None)


def file_state(item: Item) -> str:
    """Size and times of the file that holds an item's content; cheap."""
    path = item.stored if isinstance(item.stored, Path) else item.container
    return _state(path) if path is not None else f"in memory {item.mark}"


def words_digest(items: Iterable[Item]) -> str:
    """SHA-256 of what items say beside their content."""
    return _digest(
        repr((item.captions, [tuple(pair) for pair in item.questions], item.fps, item.score)) for item in items
    )


def origin_of(items: Iterable[Item], seen: Iterable[Seen]) -> Origin:
    """The origin of a shard.

    Args:
        items: Its items.
        seen: What was seen of each.
    """
    found = list(seen)
    settled = all(each.content != _UNSETTLED for each in found)
    return Origin(
        words=words_digest(items),
        files=_digest(each.files for each in found),
        content=_digest(each.content for each in found) if settled else "",
        linked=any(each.linked for each in found),
    )


def files_digest(items: Iterable[Item], *, linked: bool) -> str:
    """What :attr:`Origin.files` is now.

    Args:
        items: Of the shard.
        linked: Its :attr:`Origin.linked`.
    """
    return _digest(see(item).files if linked else file_state(item) for item in items)


def _content(item: Item) -> tuple[str, Path | None]:
    """A checksum of the content, and the file that holds it where a table only names it."""
    stored = item.stored
    if isinstance(stored, Missing):
        return "missing", None
    if isinstance(stored, JsonLine):
        return f"{stored.checksum}", None
    try:
        content = stored if isinstance(stored, bytes | str | Path) else stored.read()
        if isinstance(content, Path):
            return _file_checksum(content), content if not isinstance(stored, Path) else None
        return f"{zlib.crc32(content.encode('utf-8', 'surrogatepass') if isinstance(content, str) else content)}", None
    except (EmulusError, OSError):
        return "cannot be read", None


def _file_checksum(path: Path) -> str:
    """Of a file of any size, at a cost that is bounded."""
    crc = 0
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        starts: Iterable[int] = range(0, size, _BLOCK)
        if size > _WHOLE:
            starts = [(size - _BLOCK) * place // (_BLOCKS - 1) for place in range(_BLOCKS)]
        for start in starts:
            file.seek(start)
            crc = zlib.crc32(file.read(_BLOCK), crc)
    return f"{crc} of {size}"


def _state(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:
        return "missing"
    # A file's change time moves with its content even where its modification time is put back.
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
