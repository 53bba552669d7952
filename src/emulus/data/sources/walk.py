"""A folder or a pattern -> the files of a data set, each once, in a fixed order."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from emulus.data.sources.account import Account
from emulus.errors import EmulusError, shown
from emulus.media import media_type

_NOT_DATA_FOLDERS = frozenset({"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information"})
_NOT_DATA_FILES = frozenset(
    {"thumbs.db", "desktop.ini", "ehthumbs.db", "_success", "_metadata", "_common_metadata", "_started", "_committed"}
)
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|authors|contributing|changelog|code_of_conduct)"
    r"([-_.][\w.-]*)?\.(md|txt|rst|cff|bib|html)|(readme|licen[cs]e|copying|notice|citation|authors)"
    r"|(dataset_infos?|dataset_dict|state)\.json",
    re.IGNORECASE,
)
_DATA_SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".tar", ".arrow")
_MOST_LOOKED_AT = 1000
_HIDDEN = "hidden, or made by the system"
_OWN = "written by Emulus (tokens, a training run or a model)"
_SEEN = "links to what is read already"


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not the user's data, by its name: ``.git``, ``__MACOSX``, ``Thumbs.db`` ..."""
    return name.startswith(".") or name.lower() in _NOT_DATA_FOLDERS or name.lower() in _NOT_DATA_FILES


def is_about(name: str) -> bool:
    """Whether a file is about the data set, not of it: README, LICENSE ..."""
    return _ABOUT.fullmatch(name) is not None


def own_output(names: set[str]) -> bool:
    """Whether a folder with these entries was written by Emulus: tokens, a training run, a checkpoint or a model."""
    if "making.json" in names or {"tokens.json", "manifest.jsonl"} <= names:
        return True
    if "manifest.jsonl" in names and any(name.endswith(".arrayrecord") for name in names):
        return True
    if "metrics.jsonl" in names and ("config.yaml" in names or "checkpoints" in names):
        return True
    if "COMPLETE" in names and ("trainer.json" in names or any(name.endswith(".safetensors") for name in names)):
        return True
    return "config.json" in names and any(name.endswith(".safetensors") for name in names)


def check_holds_no_data(out: Path) -> None:
    """Refuse an output folder with a user's own data: once Emulus has written there, they would be passed over.

    Args:
        out: The folder; it need not exist.

    Raises:
        EmulusError: It holds images, clips or tables, and is not an earlier output.
    """
    names = _names(out) if out.is_dir() else set()
    if own_output(names):
        return
    for name in sorted(names)[:_MOST_LOOKED_AT]:
        path = out / name
        if not is_hidden(name) and path.is_file() and (path.suffix.lower() in _DATA_SUFFIXES or _is_media(path)):
            raise EmulusError(
                f"--out {out} holds other files ({shown(name, quote=False)}); choose a folder that is new or empty"
            )


def _is_media(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return media_type(file.read(4096)) is not None
    except OSError:
        return False


def files_in(folder: Path, account: Account) -> list[Path]:
    """Every file under a folder, in the order of the path's parts.

    Links to folders are followed, each folder once; what lies in the folder itself is found under its own name rather
    than a link's. Hidden files and folders, and what Emulus wrote, are passed over.

    Raises:
        EmulusError: The folder cannot be read, or Emulus wrote it.
    """
    if own_output(_names(folder)):
        raise EmulusError(f"{folder} is {_OWN}, not a data set; name the data it was made from")
    return _Walk(folder, account).files()


def files_matching(pattern: Path, account: Account) -> list[Path]:
    """The files that a pattern such as ``data/**/*.tar`` matches, and all files in the folders that it matches.

    ``**`` stands for any number of folders; links are followed as in :func:`files_in`.
    """
    parts = pattern.parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:first]) if first else Path()
    found: dict[Path, None] = {}
    for path in _expand(base, parts[first:], account):
        if path.is_dir():
            if own_output(_names(path)):
                account.pass_over(_OWN, path, "folder")
            else:
                found.update(dict.fromkeys(_Walk(path, account).files()))
        elif _is_plain(path, account):
            found[path] = None
    return sorted(found, key=lambda path: path.parts)


class _Walk:
    """The files under one folder."""

    def __init__(self, folder: Path, account: Account, *, folders_only: bool = False) -> None:
        self._root, self._account = folder, account
        self._seen = {_identity(folder)}
        self._links: list[Path] = []
        self.folders = [folder]
        self._files: list[Path] = []
        self._folders_only = folders_only

    def files(self) -> list[Path]:
        self._visit(self._root)
        # Links come last, so that a folder is found under its own name.
        while self._links:
            links, self._links = sorted(self._links, key=lambda path: path.parts), []
            for link in links:
                if _identity(link) in self._seen:
                    self._account.pass_over(_SEEN, self._shown(link), "folder")
                else:
                    self._enter(link)
        return sorted(self._files, key=lambda path: path.parts)

    def _enter(self, folder: Path) -> None:
        self._seen.add(_identity(folder))
        if own_output(_names(folder)):
            self._account.pass_over(_OWN, self._shown(folder), "folder")
        else:
            self.folders.append(folder)
            self._visit(folder)

    def _visit(self, folder: Path) -> None:
        # By a list, not by recursion: folders can be nested deeper than Python allows calls.
        waiting = [folder]
        while waiting:
            here = waiting.pop()
            for entry in _entries(here, self._account):
                path = here / entry.name
                is_folder = _is_folder(entry)
                if is_hidden(entry.name):
                    self._account.pass_over(_HIDDEN, self._shown(path), "folder" if is_folder else "file")
                elif is_folder and entry.is_symlink():
                    self._links.append(path)
                elif is_folder and _identity(path) not in self._seen:
                    self._seen.add(_identity(path))
                    if own_output(_names(path)):
                        self._account.pass_over(_OWN, self._shown(path), "folder")
                    else:
                        self.folders.append(path)
                        waiting.append(path)
                elif not is_folder and not self._folders_only and _is_plain(path, self._account, self._shown(path)):
                    self._files.append(path)

    def _shown(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def _expand(folder: Path, parts: Sequence[str], account: Account) -> Iterator[Path]:
    """The paths under a folder that the parts of a pattern match."""
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        walk = _Walk(folder, Account(), folders_only=True)
        walk.files()
        if not rest:
            yield folder
            return
        for inner in walk.folders:
            yield from _expand(inner, rest, account)
    elif glob.has_magic(part):
        matches = re.compile(glob_to_regex(part)).fullmatch
        for entry in _entries(folder, account):
            hidden = is_hidden(entry.name) and not part.startswith(entry.name[:1])
            if matches(entry.name) and not hidden and (not rest or _is_folder(entry)):
                yield from _expand(folder / entry.name, rest, account)
    elif os.path.lexists(folder / part):
        yield from _expand(folder / part, rest, account)


def glob_to_regex(pattern: str) -> str:
    """A pattern of a path as a regular expression: ``*`` and ``?`` stay within a folder, ``**`` does not."""
    out, place = "", 0
    while place < len(pattern):
        letter = pattern[place]
        if pattern.startswith("**/", place):
            out, place = out + "(?:.*/)?", place + 3
        elif pattern.startswith("**", place):
            out, place = out + ".*", place + 2
        elif letter == "[" and (end := pattern.find("]", place + 2)) > 0:
            inner = pattern[place + 1 : end].replace("\\", "\\\\").replace("[", "\\[")
            out += f"[{'^' + inner[1:] if inner[0] in '!^' else inner}]"
            place = end + 1
        else:
            out += {"*": "[^/]*", "?": "[^/]"}.get(letter, re.escape(letter))
            place += 1
    return f"(?s:{out})"


def _entries(folder: Path, account: Account) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return []
        account.leave_out(f"cannot be read ({error.strerror})", folder, "folder")
        return []


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()  # said when it is walked


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(folder: Path) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise EmulusError(f"{folder} cannot be read ({error.strerror}); check its permissions") from None
    return status.st_dev, status.st_ino


def _is_plain(path: Path, account: Account, name: str | None = None) -> bool:
    """Whether a path is a regular file, or a link to one; else it is counted."""
    name = name or str(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        account.leave_out("links to nothing", name)
        return False
    except OSError as error:
        account.leave_out(f"cannot be read ({error.strerror})", name)
        return False
    if not stat.S_ISREG(mode):
        account.leave_out("not a regular file but a device, pipe or socket", name)
        return False
    return True
