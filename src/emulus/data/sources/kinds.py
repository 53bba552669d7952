"""Whether an item is an image or a clip: by its content, and by names only where the content says nothing."""

from __future__ import annotations

from pathlib import Path

from emulus.data.item import KINDS, Kind, Stored
from emulus.data.parquet import ArrowCell, ParquetCell
from emulus.data.sources.account import LeftOutError
from emulus.data.sources.columns import ALWAYS_VIDEO, NEVER_VIDEO, given
from emulus.data.sources.rows import Row
from emulus.data.stored import LFS_REASON, TarMember, head_of, is_lfs_pointer
from emulus.errors import EmulusError, did_you_mean, shown
from emulus.media import is_video, media_type
from emulus.media.signatures import HEAD, image_format

_VIDEO_COLUMNS = frozenset({"video", "videos", "video_path", "video_file", "video_name", "clip", "mp4", "webm"})
_IMAGE_COLUMNS = frozenset({"image", "images", "jpg", "jpeg"})
_ANIMATED = frozenset({"GIF", "WEBP", "PNG", "AVIF"})
# Of a WebP file, what says whether it moves (the chunk VP8X of an animation).
_WEBP_HEAD = 21


def kind_of(row: Row, column: str, stored: Stored) -> Kind:
    """What the row says; else what the column or the content says, and the file's suffix where nothing is known.

    Raises:
        LeftOutError: The row says something else.
    """
    head = head_of(stored, HEAD) if isinstance(stored, Path) else b""
    if is_lfs_pointer(head):
        assert isinstance(stored, Path)
        raise LeftOutError(LFS_REASON, f"{row.where}: {stored.name} is one of {LFS_REASON}")
    said = given(row.values.get("kind"))
    if said is not None:
        if said not in KINDS:
            raise LeftOutError(
                "an unknown kind", f"{row.where}: the kind {shown(said)} is unknown{did_you_mean(str(said), KINDS)}"
            )
        return "video" if said == "video" else "image"
    in_table = isinstance(stored, ParquetCell | ArrowCell)
    if column == "video" or (in_table and column in _VIDEO_COLUMNS):
        return "video"
    if column == "image" or (in_table and column in _IMAGE_COLUMNS):
        return "image"
    name = stored.name if isinstance(stored, Path | TarMember) else ""
    suffix = Path(name).suffix.lower()
    try:
        return _kind_by_content(stored, suffix, head)
    except EmulusError:
        # A broken file is reported by whoever reads it, and does not keep the others from being read.
        return "video" if suffix in ALWAYS_VIDEO else "image"


def _kind_by_content(stored: Stored, suffix: str, head: bytes) -> Kind:
    if isinstance(stored, Path):
        content: bytes | Path = stored
    elif isinstance(stored, TarMember):
        content, head = b"", stored.head(HEAD)
    else:
        found = stored if isinstance(stored, bytes | str) else stored.read()
        if isinstance(found, str):
            return "image"
        content, head = found, head_of(found) if isinstance(found, Path) else found[:HEAD]
    kind = media_type(head)
    if kind == "video":
        return "video"
    if kind == "image" and image_format(head) not in _ANIMATED:
        return "image"
    if kind is None and suffix in ALWAYS_VIDEO | NEVER_VIDEO:
        return "video" if suffix in ALWAYS_VIDEO else "image"
    if isinstance(stored, TarMember):
        # A tar of a million pictures is not read whole to find the few that move.
        still_webp = not (head[12:16] == b"VP8X" and head[_WEBP_HEAD - 1] & 2)
        if image_format(head) == "PNG" or (image_format(head) == "WEBP" and still_webp):
            return "image"
        content = stored.read()
    return "video" if is_video(content) else "image"
