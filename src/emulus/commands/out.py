"""Whether what a command makes can be written, found out before it is made: that may take hours."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image

from emulus.errors import EmulusError
from emulus.files import check_place
from emulus.media import Clip, check_writable
from emulus.media.image import WRITABLE
from emulus.media.source import encoding
from emulus.media.video import WRITERS
from emulus.outline import Shape

Kind = Literal["image", "clip", "file", "folder"]


def check_out(path: Path, kind: Kind) -> None:
    """Refuse a place that cannot be written to.

    Args:
        path: The output; missing parent folders are created later.
        kind: What it will be. The suffix of an image or clip says its format.

    Raises:
        EmulusError: The suffix is unknown or of the other kind, the name is too long, something of another kind has
            this name, what is above it is no folder, or nothing can be written there.
    """
    if kind in ("image", "clip"):
        _check_suffix(path, clip=kind == "clip")
    check_place(path, "folder" if kind == "folder" else "file")


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
