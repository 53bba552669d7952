"""Writing files so that a crash, a full disk or a kill never leaves half of one."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from emulus.errors import EmulusError

COMPLETE = "COMPLETE"


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


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        EmulusError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EmulusError(f"{path} is missing") from None
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EmulusError(
            f"{path} is not valid JSON ({error}); it may be truncated: restore it from its source"
        ) from None


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
