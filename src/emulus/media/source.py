"""Where media come from: what a source is called, how it is opened, and how a broken one is reported."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from emulus.errors import EmulusError

Source = str | Path | bytes
"""A file's path, or its content."""


def name_of(source: Source) -> str:
    """What to call a source in a message: its path, or ``<N bytes>``."""
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)


@contextmanager
def opened(source: Source) -> Iterator[BinaryIO]:
    """Open a source for reading.

    Decoders are given this open file and never the path, which some would take for an address or a list of
    files.

    Raises:
        EmulusError: It is missing, empty, a folder, not a plain file, or may not be read.
    """
    name = name_of(source)
    file: BinaryIO
    try:
        if isinstance(source, bytes):
            size = len(source)
            file = BytesIO(source)
        else:
            status = os.stat(source)
            if stat.S_ISDIR(status.st_mode):
                raise EmulusError(f"{name} is a folder; name a file in it")
            if not stat.S_ISREG(status.st_mode):
                raise EmulusError(f"{name} is not a plain file; copy what it gives into a file first")
            size = status.st_size
            file = open(source, "rb")  # noqa: SIM115 (closed below)
    except PermissionError as error:
        raise EmulusError(f"not allowed to read {name}; change its permissions") from error
    # A null byte or an over-long name is a ValueError or an OSError; no such file can exist.
    except (OSError, ValueError) as error:
        raise EmulusError(f"{name!r} does not exist; check the path") from error
    with file:
        if size == 0:
            raise EmulusError(f"{name} is empty; restore it from its source")
        yield file


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises about a broken file into one line that names the file.

    Only calls into the decoding libraries belong inside: on broken bytes they raise nearly every kind of
    exception (``SyntaxError``, ``struct.error``, ``zlib.error``, ``RuntimeError`` ...), so no list of kinds
    would be complete.

    Raises:
        EmulusError: The decoder gave up.
    """
    try:
        yield
    except EmulusError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise EmulusError(f"{name} asks for too much memory ({_one_line(error)}); make it smaller") from error
    except Exception as error:
        message = f"{name} is corrupt or truncated ({_one_line(error)}); restore it from its source"
        raise EmulusError(message) from error


@contextmanager
def encoding(path: Path) -> Iterator[None]:
    """Turn whatever an encoder raises (a size beyond its format's bounds, ...) into one line naming the file.

    Raises:
        EmulusError: The encoder gave up.
    """
    try:
        yield
    except Exception as error:
        message = f"cannot write {path} ({_one_line(error)}); choose another format or size"
        raise EmulusError(message) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
