"""A tar -> where each of its files lies, from the headers alone."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

from emulus.data.stored import LFS_REASON, TarMember, head_of, is_lfs_pointer
from emulus.errors import EmulusError, shown

_MAX_HEADER = 2**20
"""Bytes of a long file name or of extended attributes in a tar: what a header claims is not taken on trust."""


class _Headers(RawIOBase):
    """A tar as its headers are read: nothing large can be asked for at once."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise EmulusError(f"{self._name} has a header of {size:,} bytes; it is damaged: restore it")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def tar_members(path: Path) -> Iterator[TarMember]:
    """Every plain file in a tar, from its headers alone. Links in it are not followed.

    Raises:
        EmulusError: The tar is damaged, cut off or compressed.
    """
    damaged = f"{path} is damaged or cut off; restore it from its source"
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            # tarfile.open would take a size as a reason to guess at compression; this reads headers and nothing else.
            tar = tarfile.TarFile(fileobj=_Headers(file, str(path)), mode="r")
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every one of them
                if member.size < 0 or member.offset_data + member.size > size:
                    raise EmulusError(damaged)
                if member.isreg() and not member.issparse():
                    yield TarMember(path=path, name=member.name, offset=member.offset_data, size=member.size)
            # tarfile takes whatever is no header for the end.
            file.seek(tar.offset)
            if file.read(512).strip(b"\0"):
                raise EmulusError(damaged)
    except (tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        if is_lfs_pointer(head_of(path)):
            raise EmulusError(f"{path}: {LFS_REASON}") from None
        reason = shown(" ".join(str(error).split()), quote=False)
        raise EmulusError(f"{path} is no plain tar ({reason}); restore it, or decompress it first") from None
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror or error}); restore it") from None
