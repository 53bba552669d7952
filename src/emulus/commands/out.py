"""Whether what a command makes can be written, found out before it is made: that may take hours."""

from __future__ import annotations

import os
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image

from emulus.errors import EmulusError
from emulus.media import Clip, check_writable
from emulus.media.image import WRITABLE
from emulus.media.source import encoding
from emulus.media.video import WRITERS
from emulus.outline import Shape

Kind = Literal["image", "clip", "file", "folder"]

_LONGEST_NAME, _LONGEST_PATH = 255, 4095


def check_out(path: Path, kind: Kind) -> None:
    """Refuse a place that cannot be written to.

    Args:
        path: Where something shall be; folders above it that are missing are made later.
        kind: What it will be. The suffix of an image or clip says its format.

    Raises:
        EmulusError: The suffix is unknown or of the other kind, the name is too long, something of another kind has
            this name, what is above it is no folder, or nothing can be written there.
    """
    if kind in ("image", "clip"):
        _check_suffix(path, clip=kind == "clip")
    _check_name(path)
    try:
        _check_place(path, kind)
    except OSError as error:
        raise EmulusError(f"{path} cannot be written ({error.strerror or error}); choose another place") from None


def check_format(path: Path, shape: Shape, *, clip: bool) -> None:
    """Refuse a size or a rate that the format of this suffix cannot hold, by writing something empty of that kind.

    Raises:
        EmulusError: Names the format's bounds, or what its encoder says.
    """
    blank, suffix = Image.new("RGB", (shape.width, shape.height)), path.suffix.lower()
    with encoding(path):
        if not clip:
            kind, options = WRITABLE[suffix]
            blank.save(BytesIO(), kind, **options)
            return
        WRITERS[suffix](Clip((blank,), shape.fps))
        if suffix in WRITABLE or suffix == ".gif":
            # An animation's times are rounded frame by frame, so it takes all of them to find the shortest.
            WRITERS[suffix](Clip((Image.new("RGB", (16, 16)),) * shape.frames, shape.fps))


def _check_suffix(path: Path, *, clip: bool) -> None:
    suffix = path.suffix.lower()
    if clip and suffix in WRITABLE and suffix not in WRITERS:
        raise EmulusError(
            f"{path} would be a picture; clips are {' '.join(WRITERS)}, pictures come from emulus generate"
        )
    if not clip and suffix in WRITERS and suffix not in WRITABLE:
        raise EmulusError(f"{path} would be a clip; pictures are {' '.join(WRITABLE)}, clips come from emulus animate")
    check_writable(path, clip=clip)


def _check_name(path: Path) -> None:
    if "\0" in str(path):
        raise EmulusError("a name to write to holds a null byte; choose another")
    # In bytes, as file systems count.
    names = [os.fsencode(part) for part in path.parts]
    longest = max(map(len, names), default=0)
    if longest > _LONGEST_NAME or len(os.fsencode(path.absolute())) > _LONGEST_PATH:
        raise EmulusError(
            f"the name {os.fsdecode(max(names, key=len)[:40])}... is too long to be written; names have at most "
            f"{_LONGEST_NAME} bytes and paths {_LONGEST_PATH:,}: choose a shorter one"
        )


def _check_place(path: Path, kind: Kind) -> None:
    if path.is_dir():
        if kind != "folder":
            raise EmulusError(f"{path} is a folder; name a file, such as {path / 'out'}{path.suffix}")
        above = path
    else:
        if path.exists() and (kind == "folder" or not path.is_file()):
            what = "a file; choose a folder" if path.is_file() else "not a plain file; choose another name"
            raise EmulusError(f"{path} is {what}")
        above = next(folder for folder in path.absolute().parents if folder.exists() or folder.is_symlink())
    if not above.is_dir():
        raise EmulusError(f"{above} is not a folder, so {path} cannot be written; choose another place")
    # Asking for permissions is not enough: disks may be read-only, and /proc takes no files.
    with tempfile.NamedTemporaryFile(dir=above, prefix=".emulus-", suffix=".tmp"):
        pass
