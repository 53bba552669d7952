"""Writing files so that a crash, a full disk or a kill never leaves half of one, and one run at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from emulus.codec import check_not_lfs, parse_json
from emulus.errors import EmulusError, shown
from emulus.log import logger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_JSON_BYTES = 2**28
"""The largest tokenizer.json have some 30 MB."""
COMPLETE = "COMPLETE"
LOCK = ".lock"
MAX_NAME = 255
"""Bytes that most file systems allow in the name of a file or folder."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "disk full" and "not allowed" into one line that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"the disk is full: could not write {path}; free some space and run the same command again"
        elif isinstance(error, PermissionError):
            message = f"not allowed to write {path}; choose another folder or change its permissions"
        else:
            message = f"could not write {path} ({error.strerror or error}); choose another place"
        raise EmulusError(message) from error


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a rename after it cannot be seen before its content."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically: readers see the old file or the whole new one.

    Args:
        path: Where the file shall be.
        write: Writes its content to the temporary path it is given.

    Raises:
        EmulusError: The disk is full or the folder may not be written to; ``path`` is untouched.
    """
    # The suffix is kept, since writers like Pillow choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Some writers (safetensors) give their files to their owner alone, whatever the umask says.
            temporary.touch()
            mode = temporary.stat().st_mode
            temporary.unlink()
            write(temporary)
            temporary.chmod(mode)
            fsync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically (see :func:`write_file`)."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically (see :func:`write_file`)."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_bytes(path: Path, *, most: int) -> bytes:
    """Read a whole file of bounded size.

    Args:
        path: A regular file: a device or pipe would never end.
        most: Bytes that it may have.

    Raises:
        EmulusError: It is missing, no regular file, too large, a Git LFS pointer, or cannot be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise EmulusError(f"{path} cannot be read: it is not a regular file; name a file")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except FileNotFoundError:
        raise EmulusError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise EmulusError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(content) > most:
        raise EmulusError(f"{path} has more than the {most:,} bytes that such a file may have")
    check_not_lfs(content[:200], path)
    return content


def read_json(path: Path) -> Any:
    """Read JSON, strictly (see :func:`emulus.codec.parse_json`).

    Raises:
        EmulusError: The file is missing, too large or not valid JSON.
    """
    return parse_json(read_bytes(path, most=MAX_JSON_BYTES), str(path))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that appears at ``path`` only when it is whole.

    Yields a temporary folder beside it. At the end :func:`finish_folder` puts it in place (of an older one, if there is
    one). On an error the temporary folder is removed and ``path`` is what it was.

    Raises:
        EmulusError: The disk is full or the place may not be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            finish_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def finish_folder(temporary: Path, path: Path) -> None:
    """Flush every file of a folder, write a ``COMPLETE`` marker into it and rename it to ``path``.

    Args:
        temporary: The folder, on the same file system as ``path``.
        path: Its name from now on. A folder that has it is removed.

    Raises:
        OSError: As the system says.
    """
    for file in temporary.rglob("*"):
        fsync(file)
    (temporary / COMPLETE).touch()
    fsync(temporary)
    if path.exists():
        remove_folder(path)
    os.replace(temporary, path)
    fsync(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder that is whole; nobody sees half of it under its name, whenever this is stopped.

    Raises:
        OSError: It may not be renamed.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    # Left by one that was killed and had the same number.
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    # Its name must be gone on the disk before its files are.
    fsync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold a folder for this process: no other run may write to it meanwhile.

    The lock is the system's (``flock`` on the file ``.lock``), so it ends with the process, however that ends. Where
    the file system has no locks a warning says so, and nothing is held. A read-only folder is not locked either:
    nothing can be written to it.

    Args:
        folder: Made if it is not there.

    Raises:
        EmulusError: Another run holds it, or it cannot be made.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = _open_lock(folder / LOCK)
    if file is None:
        yield
        return
    with file:
        _lock(file, folder)
        yield


def check_not_running(folder: Path) -> None:
    """Refuse a folder that another run holds (see :func:`only_run`), before anything is computed; nothing is written.

    Raises:
        EmulusError: Another run holds it.
    """
    try:
        file = (folder / LOCK).open("r+b")
    except OSError:
        return
    with file:
        _lock(file, folder)


def _open_lock(path: Path) -> BinaryIO | None:
    try:
        return path.open("ab")
    except OSError as error:
        if error.errno in _NOT_WRITABLE:
            return None
        raise


def _lock(file: BinaryIO, folder: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks on this system")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise EmulusError(
            f"another run is writing to {folder}; wait until it has ended, or choose another --out"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(f"{folder} cannot be locked here ({error.strerror}); start no second run with this --out")


def check_out(out: Path, **read: Path | str | None) -> None:
    """Refuse an output folder that cannot be written, before anything is computed.

    Args:
        out: The folder; it need not exist.
        read: What is read, by the name of its flag, such as ``source=...``: a folder or file, which ``out`` must not
            be. Names of the hub and empty ones are passed over.

    Raises:
        EmulusError: It is a file, its name is too long or not UTF-8, a part of its path is a file, it may not be made
            there, or it is what is read.
    """
    check_path(out, "--out")
    try:
        exists = out.exists()
        if exists and not out.is_dir():
            raise EmulusError(f"--out {out} is not a folder; choose another --out")
        parent = next(each for each in (out.absolute(), *out.absolute().parents) if each.exists())
        if not parent.is_dir():
            raise EmulusError(f"{parent} is not a folder, so --out {out} cannot be made; choose another --out")
        if any(len(os.fsencode(part)) > MAX_NAME for part in out.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    except OSError as error:
        raise EmulusError(f"--out {out} cannot be used ({error.strerror}); choose another --out") from None
    if not exists and not os.access(parent, os.W_OK | os.X_OK):
        raise EmulusError(f"not allowed to write to {parent}; choose another --out or change its permissions")
    for flag, place in read.items():
        if place and os.path.exists(place) and os.path.realpath(place) == os.path.realpath(out):
            raise EmulusError(f"--out {out} is the {flag.replace('_', ' ')}, which is read; choose another --out")


def check_path(path: Path | str, what: str) -> None:
    """Refuse a path that cannot be written into configs, manifests and libraries' calls.

    Args:
        path: From a flag or a caller.
        what: Names it in the message.

    Raises:
        EmulusError: It is not UTF-8, or holds a zero byte.
    """
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise EmulusError(f"{what}: the name {shown(text)} is not UTF-8; rename it or choose another") from None
    if "\0" in text:
        raise EmulusError(f"{what}: the name {shown(text)} holds a zero byte; choose another")
