"""The places where the content of an item can lie: files, members of tars, lines of tables, or nowhere."""

from __future__ import annotations

import csv
import os
import unicodedata
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from emulus.codec import parse_json
from emulus.data.sources.account import LeftOutError
from emulus.errors import EmulusError, shown

MAX_MEMBER = 2**30
"""Bytes of a picture or clip inside an archive or table that are taken into memory."""
MAX_TEXT = 2**26
"""Bytes of one text, or of one line of a table, that are taken into memory."""
NOT_THERE = "names files that do not exist"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_REASON = "Git LFS pointers, not the files themselves; run 'git lfs install && git lfs pull' in their clone"


@dataclass(frozen=True, kw_only=True, slots=True)
class TarMember:
    """One file inside a tar, which is read in place."""

    path: Path
    """Of the tar."""
    name: str
    offset: int
    size: int

    @property
    def where(self) -> str:
        """Its name in a message."""
        return f"{self.path}: {self.name}"

    @property
    def mark(self) -> object:
        """Tells its content from another: its CRC-32 (raises OSError where the tar is gone)."""
        return crc_of(self.path, self.offset, self.size)

    def read(self) -> bytes:
        """Read the file's bytes.

        Raises:
            EmulusError: It is too large, or the tar is gone or shorter than it was.
        """
        return read_slice(self.path, self.offset, self.size, self.where, most=MAX_MEMBER)

    def head(self, count: int) -> bytes:
        """Read the first bytes, at most ``count`` (raises EmulusError like :meth:`read`)."""
        return read_slice(self.path, self.offset, min(count, self.size), self.where, most=MAX_MEMBER)


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonLine:
    """A text inside a table of JSON objects, which may be larger than memory."""

    path: Path
    column: str
    offset: int
    """Of the line, or of the object."""
    size: int
    checksum: int
    """CRC-32 of the line, by which a table that changed meanwhile is found out."""

    @property
    def where(self) -> str:
        """Its name in a message."""
        return f"{self.path} at byte {self.offset}"

    @property
    def mark(self) -> object:
        """Tells its content from another."""
        return self.checksum

    def read(self) -> str:
        """Read the text.

        Raises:
            EmulusError: The table is gone or not what it was.
        """
        line = read_slice(self.path, self.offset, self.size, self.where, most=MAX_TEXT)
        if zlib.crc32(line) != self.checksum:
            raise EmulusError(f"{self.where} is not what it was; leave the tables as they are until all is read")
        return str(parse_json(line, self.where)[self.column])


@dataclass(frozen=True, kw_only=True, slots=True)
class CsvRow:
    """A text inside a CSV table in UTF-8, which may be larger than memory."""

    path: Path
    place: int
    """Number of the field in its row."""
    delimiter: str
    offset: int
    """Of the row's first line."""
    size: int
    checksum: int
    """CRC-32 of the text."""

    @property
    def where(self) -> str:
        """Its name in a message."""
        return f"{self.path} at byte {self.offset}"

    @property
    def mark(self) -> object:
        """Tells its content from another."""
        return self.checksum

    def read(self) -> str:
        """Read the text.

        Raises:
            EmulusError: The table is gone or not what it was.
        """
        content = read_slice(self.path, self.offset, self.size, self.where, most=2 * MAX_TEXT)
        try:
            lines = content.decode().splitlines(keepends=True)
            text = next(csv.reader(_rejoined(lines), delimiter=self.delimiter, strict=True))[self.place]
        except (csv.Error, UnicodeDecodeError, StopIteration, IndexError):
            text = ""
        if zlib.crc32(text.encode("utf-8", "surrogatepass")) != self.checksum:
            raise EmulusError(f"{self.where} is not what it was; leave the tables as they are until all is read")
        return text


def _rejoined(lines: list[str]) -> list[str]:
    """Lines as CSV has them: characters other than CR and LF that Python takes for ends of lines are none."""
    joined: list[str] = []
    for line in lines:
        if joined and not joined[-1].endswith(("\r", "\n")):
            joined[-1] += line
        else:
            joined.append(line)
    return joined


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """Stands for what an item of a large collection lacks: reading it says so, and the others can still be read."""

    path: Path
    reason: str

    @property
    def mark(self) -> object:
        """Nothing is there to be told from another."""
        return None

    def read(self) -> bytes:
        """Say what is missing.

        Raises:
            EmulusError: Always.
        """
        raise EmulusError(self.reason)


def read_slice(path: Path, offset: int, size: int, where: str, *, most: int) -> bytes:
    """Some bytes of a file, however large it says they are.

    Args:
        path: The file.
        offset: Where they begin.
        size: How many there should be.
        where: Names them in a message.
        most: How many are taken into memory at most.

    Raises:
        EmulusError: There are too many, or the file is gone or too short.
    """
    if size > most:
        raise EmulusError(f"{where} has {size:,} bytes, more than the {most:,} allowed; make it smaller")
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror}); restore it") from None
    if len(content) < size:
        raise EmulusError(f"{path} is shorter than it was; restore it from its source")
    return content


def crc_of(path: Path, offset: int, size: int, crc: int = 0) -> int:
    """CRC-32 of some bytes of a file, or of as many of them as there are (raises OSError)."""
    with path.open("rb") as file:
        file.seek(max(offset, 0))
        while size > 0 and (block := file.read(min(size, 2**20))):
            crc, size = zlib.crc32(block, crc), size - len(block)
    return crc


def head_of(path: Path, count: int = 4096) -> bytes:
    """The first bytes of a file; none where it cannot be read, which whoever reads it all will say."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins so is a Git LFS pointer: it stands for the file in a clone made without git-lfs."""
    return head.startswith(_LFS_POINTER)


def decoded(content: bytes, where: str) -> str:
    """UTF-8 as text, without a byte order mark.

    Raises:
        EmulusError: It is not UTF-8.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise EmulusError(f"{where} line {line} is not UTF-8; save the file as UTF-8") from None


def inside(folder: Path, name: object, where: str) -> Path:
    """The path of a file that a data set names: it exists, and its name stays within the folder.

    A name written on Windows, with another Unicode normalisation or with other capitals is found as well, where it is
    clear which file is meant. Links are followed: whoever made the folder may have linked files and folders from
    elsewhere. (Archives hold no links that are followed.)

    Args:
        folder: What names are relative to.
        name: What the data set says.
        where: Names the row in messages.

    Raises:
        LeftOutError: It is no such name, or there is no such file.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise LeftOutError("no media", f"{where} has no media and names no file; fix that row")
    if _is_address(name):
        raise LeftOutError(
            "media are addresses (URLs), which are not downloaded",
            f"{where}: {shown(name)} is an address, and nothing is downloaded; fetch the files and name them",
        )
    plain = _below(folder, name)
    if plain is None:
        raise LeftOutError(
            "names files outside the folder",
            f"{where}: {shown(name)} is outside {folder}; name files relative to that folder, no '..'",
        )
    try:
        found = _find(folder, plain)
    except OSError as error:
        raise LeftOutError(
            "names files that cannot be opened",
            f"{where}: {shown(name)} cannot be looked for ({error.strerror}); fix that row",
        ) from None
    if found is None:
        raise LeftOutError(
            NOT_THERE,
            f"{where}: {shown(name)} is not in {folder}; restore that file or remove the row",
        )
    return found


def _is_address(name: str) -> bool:
    scheme = name.split(":", 1)[0].lower()
    return name.lower().startswith("data:") or ("://" in name and scheme.isalnum())


def _below(folder: Path, name: str) -> str | None:
    """The name relative to the folder; None if it leads elsewhere."""
    if PurePosixPath(name).is_absolute():
        try:
            name = PurePosixPath(name).relative_to(folder.absolute()).as_posix()
        except ValueError:
            return None
    windows = PureWindowsPath(name)
    return None if windows.anchor or ".." in windows.parts else name


def _find(folder: Path, name: str) -> Path | None:
    """The file of that name; else the only one whose name differs in separators, normalisation or capitals."""
    if (path := folder / name).is_file():
        return path
    for spelling in (name, name.replace("\\", "/")):
        for form in (spelling, unicodedata.normalize("NFC", spelling), unicodedata.normalize("NFD", spelling)):
            if (path := folder / form).is_file():
                return path
    path = folder
    for part in PurePosixPath(name.replace("\\", "/")).parts:
        if (path / part).exists():
            path = path / part
            continue
        alike = _alike(path, _status_time(path)).get(_folded(part), ())
        if len(alike) != 1:
            return None
        path = path / alike[0]
    return path if path.is_file() else None


@lru_cache(maxsize=64)
def _alike(folder: Path, changed: int) -> dict[str, tuple[str, ...]]:
    """The names in a folder, by what is left of them without capitals and normalisation."""
    found: dict[str, tuple[str, ...]] = {}
    try:
        names = os.listdir(folder)
    except OSError:
        return found
    for name in names:
        found[_folded(name)] = (*found.get(_folded(name), ()), name)
    return found


def _status_time(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def checked_text(text: str, where: str) -> str:
    """The text itself.

    Raises:
        LeftOutError: It has halves of characters, which JSON can spell and nothing can encode.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LeftOutError(
            "half a character (a lone surrogate)", f"{where} has half a character (a lone surrogate); fix it"
        ) from None
    return text


def plain_name(name: str) -> str:
    """A file's name without letters that cannot be encoded, which other systems' archives may have."""
    return name.encode("utf-8", "replace").decode()


def content_of(value: Any) -> Any:
    """Of a cell that holds a list, its only value (raises LeftOutError if there are several)."""
    if isinstance(value, list | tuple):
        present = [each for each in value if each is not None]
        if len(present) > 1:
            raise LeftOutError(
                "several media in one row",
                f"has {len(present)} images or clips, and an item holds one; give each its own row",
            )
        return present[0] if present else None
    return value
