"""Writing files so that a crash, a full disk or a kill never leaves half of one, and one run at a time."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from emulus.codec import as_mapping, check_not_lfs, parse_json
from emulus.errors import EmulusError, shown
from emulus.log import logger

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_JSON_BYTES = 2**28
"""The largest tokenizer.json have some 30 MB."""
MAX_CONFIG_BYTES = 2**25
"""The config of a whole model of transformers holds its vocabulary, 7 MB for Emu3."""
MAX_TEXT_VOCABULARY_BYTES = 2**27
"""Of emu3.tiktoken and emu3_vision_tokens.txt, which have 2 and 1 MB."""
COMPLETE = "COMPLETE"
LOCK = ".lock"
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
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
    temporary = _beside(path, suffix=path.suffix)
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


def read_json(path: Path, *, most: int = MAX_JSON_BYTES) -> Any:
    """Read JSON, strictly (see :func:`emulus.codec.parse_json`).

    Args:
        path: A regular file.
        most: Bytes that it may have.

    Raises:
        EmulusError: The file is missing, too large or not valid JSON.
    """
    return parse_json(read_bytes(path, most=most), str(path))


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size, such as ``config.json``.

    Raises:
        EmulusError: The file is missing, too large, not valid JSON or not an object.
    """
    return as_mapping(read_json(path, most=MAX_CONFIG_BYTES), str(path))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that appears at ``path`` only when it is whole.

    Yields a temporary folder beside it. At the end :func:`finish_folder` puts it in place (of an older one, if there is
    one). On an error the temporary folder is removed and ``path`` is what it was.

    Raises:
        EmulusError: The disk is full or the place may not be written to.
    """
    temporary = _beside(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        try:
            yield temporary
            finish_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path, *, suffix: str = "") -> Path:
    """A hidden name beside ``path`` that nobody else uses, whichever process, thread or machine: ``.NAME.NUMBER.tmp``.

    Args:
        path: What will have its own name later. Of a long name only the beginning is taken, or this one could be too
            long where the other is not.
        suffix: Stands at the end, too, since writers like Pillow choose the format by it.
    """
    name = os.fsencode(path.name.removesuffix(suffix))[:100].decode("utf-8", errors="ignore")
    number = f"{os.getpid()}{secrets.randbelow(10**12):012d}"
    return path.with_name(f".{name}.{number}.tmp{suffix if len(suffix) <= 20 else ''}")


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
    for _ in range(100):
        with suppress(FileNotFoundError):  # another thread may remove the older one, too
            if path.exists():
                remove_folder(path)
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            break
    else:
        raise OSError(errno.EBUSY, "others go on putting folders there", str(path))
    fsync(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder that is whole; nobody sees half of it under its name, whenever this is stopped.

    Raises:
        OSError: It may not be renamed.
    """
    aside = _beside(path)
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

    All processes of a run may ask at the same time: each takes a lock that can be shared, for a moment.

    Raises:
        EmulusError: Another run holds it.
    """
    try:
        file = (folder / LOCK).open("r+b")
    except OSError:
        return
    with file:
        _lock(file, folder, shared=True)


def _open_lock(path: Path) -> BinaryIO | None:
    try:
        return path.open("ab")
    except OSError as error:
        if error.errno in _NOT_WRITABLE:
            return None
        raise


def _lock(file: BinaryIO, folder: Path, *, shared: bool = False) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks on this system")
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
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
        EmulusError: As :func:`check_place`; or ``out`` is what is read.
    """
    check_place(out, "folder")
    for flag, place in read.items():
        if place and os.path.exists(place) and os.path.realpath(place) == os.path.realpath(out):
            raise EmulusError(f"--out {out} is the {flag.replace('_', ' ')}, which is read; choose another --out")


def check_place(path: Path, kind: Literal["file", "folder"]) -> None:
    """Refuse a place that cannot be written to, before anything is computed for it.

    Args:
        path: The output; missing parent folders are created later.
        kind: What it will be.

    Raises:
        EmulusError: The name is too long or not UTF-8, something of another kind has it, what is above it is no
            folder, or nothing can be written there.
    """
    check_path(path, "the output")
    _check_name(path)
    try:
        _check_free(path, kind)
    except OSError as error:
        raise EmulusError(f"{path} cannot be written ({error.strerror or error}); choose another place") from None


def _check_name(path: Path) -> None:
    # In bytes, as file systems count.
    names = [os.fsencode(part) for part in path.parts]
    longest = max(map(len, names), default=0)
    if longest > _LONGEST_NAME or len(os.fsencode(path.absolute())) > _LONGEST_PATH:
        raise EmulusError(
            f"the name {os.fsdecode(max(names, key=len)[:40])}... is too long to be written; names have at most "
            f"{_LONGEST_NAME} bytes and paths {_LONGEST_PATH:,}: choose a shorter one"
        )


def _check_free(path: Path, kind: Literal["file", "folder"]) -> None:
    if path.is_dir():
        if kind != "folder":
            raise EmulusError(f"{path} is a folder; name a file, such as {path / 'out'}{path.suffix}")
        above = path
    else:
        if path.exists() and (kind == "folder" or not path.is_file()):
            what = "not a folder; choose another place" if kind == "folder" else "not a plain file; choose another name"
            raise EmulusError(f"{path} is {what}")
        above = next(folder for folder in path.absolute().parents if folder.exists() or folder.is_symlink())
    if not above.is_dir():
        raise EmulusError(f"{above} is not a folder, so {path} cannot be written; choose another place")
    # Asking for permissions is not enough: disks may be read-only, and /proc takes no files.
    with tempfile.NamedTemporaryFile(dir=above, prefix=".emulus-", suffix=".tmp"):
        pass


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
