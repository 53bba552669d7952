"""Writing files so that a crash, a full disk or a kill never leaves half of one."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emulus.codec import as_mapping, check_not_lfs, parse_json
from emulus.errors import EmulusError

MAX_JSON_BYTES = 2**28
"""The largest tokenizer.json have some 30 MB."""
MAX_CONFIG_BYTES = 2**25
"""The config of a whole model of transformers holds its vocabulary, 7 MB for Emu3."""
MAX_TEXT_VOCABULARY_BYTES = 2**27
"""Of emu3.tiktoken and emu3_vision_tokens.txt, which have 2 and 1 MB."""
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
