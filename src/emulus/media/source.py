"""Where media come from: what a source is called, how it is opened, and how a broken one is reported."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emulus.errors import EmulusError

MAX_STREAM = 2**31
"""Most bytes that are read from a file object that cannot seek: its content is held in memory."""


@runtime_checkable
class BinaryFile(Protocol):
    """An object with the content of a file: an open file, ``io.BytesIO``, a response, a member of an archive."""

    def read(self, size: int = -1, /) -> bytes: ...


Source = str | Path | bytes | bytearray | memoryview | BinaryFile
"""A file: its path, its content, or an open binary file, which is read from its start and left open."""

ImageSource = Source | Image.Image | np.ndarray | Tensor
"""An image: a file, an open Pillow image, or a uint8 array or tensor (see :func:`given_image`)."""

WHAT = (
    "give a path, bytes, a binary file, a PIL image, or a uint8 array or tensor of shape (H, W), (H, W, 3), "
    "(H, W, 4), (3, H, W) or (4, H, W)"
)
"""What may be given, for messages."""

_CHANNELS = (1, 3, 4)


def name_of(source: Any) -> str:
    """What to call a source in a message: its path, ``<N bytes>``, or what kind of object it is."""
    if isinstance(source, bytes | bytearray):
        return f"<{len(source)} bytes>"
    if isinstance(source, memoryview):
        return f"<{source.nbytes} bytes>"
    if isinstance(source, str | os.PathLike):
        return _path(source)
    if isinstance(source, Image.Image):
        return "the given image"
    if isinstance(source, np.ndarray | Tensor):
        return f"the given {_kind(source)}"
    name = getattr(source, "name", None)
    return name if isinstance(name, str) and name else "the given file"


@contextmanager
def opened(source: ImageSource) -> Iterator[BinaryIO]:
    """Open a source for reading.

    Decoders are given this open file and never the path, which some would take for an address or a list of
    files.

    Raises:
        EmulusError: It is missing, empty, a folder, not a plain file, may not be read, or is no file at all.
    """
    name = name_of(source)
    if isinstance(source, bytes | bytearray | memoryview):
        file: BinaryIO = BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        file = _open_path(name)
    elif isinstance(source, BinaryFile):
        with _reading(name):
            file = _seekable(source, name)
            _check_not_empty(file, name)
        # The caller's own file stays open.
        yield file
        return
    else:
        raise EmulusError(f"cannot read {_a(type(source).__name__)}; {WHAT}")
    with file:
        _check_not_empty(file, name)
        yield file


def given_image(source: Any) -> Image.Image | None:
    """Give the image that a source already is; None for one that has to be opened and decoded.

    An array's channels are its last axis (height, width, channels), a tensor's the first (channels, height,
    width), as libraries of each kind have it; where that axis has not 1, 3 or 4 entries and the other has, the
    other is taken. Only ``uint8`` is taken, since values of other types have no one range.

    Args:
        source: Whatever the user gave. Tensors may be on any device.

    Returns:
        An image of mode L, RGB or RGBA, or the given Pillow image itself.

    Raises:
        EmulusError: An array or tensor of another type or shape.
    """
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, np.ndarray | Tensor):
        return None
    if source.dtype not in (np.uint8, torch.uint8):
        remedy = "convert it to uint8"
        if isinstance(source, Tensor) and source.is_floating_point():
            remedy = "pass emulus.media.pixels_to_image(x) for values in [-1, 1], (x * 255).byte() for [0, 1]"
        elif isinstance(source, np.ndarray) and source.dtype.kind == "f":
            remedy = "pass (x * 255).round().astype('uint8') for values in [0, 1], x.astype('uint8') for [0, 255]"
        raise EmulusError(f"{name_of(source)} has no one range of values; {remedy}")
    first, last = (0, -1) if isinstance(source, Tensor) else (-1, 0)
    array = source.detach().cpu().numpy() if isinstance(source, Tensor) else np.asarray(source)
    if array.ndim == 3:
        axis = next((axis for axis in (first, last) if array.shape[axis] in _CHANNELS), None)
        if axis is not None:
            array = np.moveaxis(array, axis, -1)
            array = array[..., 0] if array.shape[-1] == 1 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in _CHANNELS):
        raise EmulusError(f"{name_of(source)} is not an image; {WHAT}")
    if not array.size:
        raise EmulusError(f"{name_of(source)} has no pixels; give an image of at least 1×1")
    return Image.fromarray(np.ascontiguousarray(array))


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


def _open_path(name: str) -> BinaryIO:
    try:
        status = os.stat(name)
        if stat.S_ISDIR(status.st_mode):
            raise EmulusError(f"{name} is a folder; name a file in it")
        if not stat.S_ISREG(status.st_mode):
            raise EmulusError(f"{name} is not a plain file; copy what it gives into a file first")
        return open(name, "rb")
    except PermissionError as error:
        raise EmulusError(f"not allowed to read {name}; change its permissions") from error
    # A null byte or an over-long name is a ValueError or an OSError; no such file can exist.
    except (OSError, ValueError) as error:
        raise EmulusError(f"{name!r} does not exist; check the path") from error


def _seekable(source: BinaryFile, name: str) -> BinaryIO:
    """The file itself at its start, or what it holds where it cannot seek."""
    if isinstance(source, io.TextIOBase):
        raise EmulusError(f"{name} is open as text; open it with mode 'rb'")
    seekable = getattr(source, "seekable", None)
    if seekable is not None and seekable():
        file = cast(BinaryIO, source)
        file.seek(0)
        return file
    pieces, size = [], 0
    while piece := source.read(min(2**20, MAX_STREAM + 1 - size)):
        if not isinstance(piece, bytes):
            raise EmulusError(f"{name} gives {type(piece).__name__} and not bytes; open it in binary mode")
        pieces.append(piece)
        size += len(piece)
        if size > MAX_STREAM:
            raise EmulusError(f"{name} is longer than {MAX_STREAM:,} bytes and cannot seek; save it to a file first")
    return BytesIO(b"".join(pieces))


def _check_not_empty(file: BinaryIO, name: str) -> None:
    if not file.seek(0, os.SEEK_END):
        raise EmulusError(f"{name} is empty; restore it from its source")
    file.seek(0)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn whatever a given file object raises (closed, connection lost, ...) into one line."""
    try:
        yield
    except EmulusError:
        raise
    except Exception as error:
        raise EmulusError(f"{name} cannot be read ({_one_line(error)}); open it again, or give its path") from error


def _path(source: str | os.PathLike) -> str:
    return os.fsdecode(source)


def _kind(source: np.ndarray | Tensor) -> str:
    kind = "tensor" if isinstance(source, Tensor) else "array"
    shape = "×".join(map(str, source.shape)) or "no axes"
    return f"{kind} ({shape}, {str(source.dtype).removeprefix('torch.')})"


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
