"""First bytes of a file -> what it is. Formats are told by their content, never by a file's suffix."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Literal

HEAD = 4096
"""Bytes at the start of a file that are enough to tell its format."""

_BOX_HEADER = 8


def media_type(head: bytes) -> Literal["image", "video"] | None:
    """Tell by its first bytes whether a file is an image or a video.

    Only signatures are compared; whether the rest of the file is sound shows when it is read. A file that holds
    sound only, in a container that may hold video, counts as ``"video"``.

    Args:
        head: The first 4,096 bytes of the file (:data:`HEAD`), or all of a shorter one.

    Returns:
        ``"image"`` for images, including formats that may be animated (GIF, WebP, PNG, AVIF); ``"video"`` for
        video containers; None for anything else: text, HTML, SVG, PDF, archives, other sound.
    """
    if image_format(head) is not None:
        return "image"
    return "video" if any(matches(head) for matches in _VIDEO) else None


def image_format(head: bytes) -> str | None:
    """Tell which readable image format has such first bytes.

    Args:
        head: The first 4,096 bytes of the file, or all of a shorter one.

    Returns:
        Pillow's name of the format, ``"HEIF"`` for HEIC images (which FFmpeg reads), or None.
    """
    return next((name for name, matches in _IMAGE.items() if matches(head)), None)


def _starts(*prefixes: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(prefixes)


def _riff(*kinds: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(b"RIFF") and head[8:12] in kinds


# Two bytes ("BM", "P1") also start texts, so the fields behind them must make sense, too.


def _bmp(head: bytes) -> bool:
    return head.startswith(b"BM") and _little(head, 14, "I") in (12, 40, 52, 56, 64, 108, 124)


def _netpbm(head: bytes) -> bool:
    return _NETPBM.match(head) is not None


_SPACE = rb"(?:\s|#[^\r\n]*[\r\n])+"
_NETPBM = re.compile(
    rb"P(?:[1-6]|0CMYK|y(?:P|RGBA|CMYK))" + _SPACE + rb"\d+" + _SPACE + rb"\d+\s|Pf\s+\d+\s+\d+\s+[-+.\d]"
)


def _ico(head: bytes) -> bool:
    # The reserved byte of the first entry is 0, and its image starts behind the directory.
    count = _little(head, 4, "H")
    return head.startswith(b"\0\0\1\0") and count > 0 and head[9:10] == b"\0" and _little(head, 18, "I") >= 6 + 16


def _tga(head: bytes) -> bool:
    """TGA has no signature, so every field of its header is checked."""
    if len(head) < 18:
        return False
    _, map_type, kind, _, map_length, map_depth = struct.unpack_from("<BBBHHB", head)
    width, height, depth, flags = struct.unpack_from("<HHBB", head, 12)
    if not (width and height) or flags & 0xC0:
        return False
    if kind in (1, 9):
        return map_type == 1 and map_length <= 256 and map_depth in (15, 16, 24, 32) and depth == 8
    depths = {2: (15, 16, 24, 32), 10: (15, 16, 24, 32), 3: (1, 8, 16), 11: (8, 16)}.get(kind, ())
    return map_type == 0 and head[3:8] == bytes(5) and depth in depths


def _pcx(head: bytes) -> bool:
    if len(head) < 128 or head[0] != 10 or head[1] not in (0, 2, 3, 5) or head[2] > 1:
        return False
    return head[3] in (1, 2, 4, 8) and head[64] == 0 and 1 <= head[65] <= 4


def _sgi(head: bytes) -> bool:
    return (
        len(head) >= 12 and head[:2] == b"\x01\xda" and head[2] <= 1 and head[3] in (1, 2) and head[4:6] in _SGI_RANKS
    )


_SGI_RANKS = (b"\0\1", b"\0\2", b"\0\3")


# Files of boxes: MP4, MOV, AVIF, HEIF.


def _brands(head: bytes) -> set[bytes]:
    """The brands that a file of boxes says it conforms to; empty for others."""
    if head[4:8] != b"ftyp":
        return set()
    end = min(struct.unpack(">I", head[:4])[0], len(head))
    return {head[8:12], *(head[at : at + 4] for at in range(16, end - 3, 4))}


def _avif(head: bytes) -> bool:
    brands = _brands(head)
    return head[8:12] in (b"avif", b"avis", b"mif1", b"msf1", b"miaf") and bool(brands & {b"avif", b"avis"})


def _heif(head: bytes) -> bool:
    return head[8:12] in _HEIF and bool(_brands(head))


_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_SOUND = (b"M4A ", b"M4B ", b"M4P ")
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")


def _boxes(head: bytes) -> bool:
    if head[4:8] not in _BOXES or len(head) < _BOX_HEADER:
        return False
    if head[4:8] == b"ftyp":
        return head[8:12] not in _SOUND
    # Sizes 0 and 1 mean "to the end of the file" and "of 64 bits".
    size = struct.unpack(">I", head[:4])[0]
    return size in (0, 1) or size >= _BOX_HEADER


def _transport_stream(head: bytes) -> bool:
    """Packets of 188 bytes, each starting with the same byte; with a time stamp (192) or check sums (204)."""
    for size, start in ((188, 0), (192, 4), (204, 0)):
        marks = head[start::size]
        if len(marks) >= 3 and set(marks) == {0x47}:
            return True
    return False


def _mxf(head: bytes) -> bool:
    # Some writers put up to 64 KiB of their own before it.
    return b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02\x01\x01\x02" in head


def _little(head: bytes, at: int, kind: str) -> int:
    """A little-endian number of the header; -1 behind the end of the file."""
    size = struct.calcsize(kind)
    return struct.unpack_from("<" + kind, head, at)[0] if at + size <= len(head) else -1


# In this order: signatures that are strong first, TGA last.
_IMAGE: dict[str, Callable[[bytes], bool]] = {
    "PNG": _starts(b"\x89PNG\r\n\x1a\n"),
    "JPEG": _starts(b"\xff\xd8\xff"),
    "WEBP": _riff(b"WEBP"),
    "GIF": _starts(b"GIF87a", b"GIF89a"),
    "BMP": _bmp,
    "TIFF": _starts(b"MM\0*", b"II*\0", b"MM*\0", b"II\0*", b"MM\0+", b"II+\0"),
    "AVIF": _avif,
    "HEIF": _heif,
    "JPEG2000": _starts(b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"),
    "PPM": _netpbm,
    "QOI": _starts(b"qoif"),
    "DDS": _starts(b"DDS "),
    "PSD": _starts(b"8BPS\0\1"),
    "ICO": _ico,
    "SGI": _sgi,
    "PCX": _pcx,
    "TGA": _tga,
}

_VIDEO: tuple[Callable[[bytes], bool], ...] = (
    _boxes,
    _starts(b"\x1a\x45\xdf\xa3"),  # Matroska, WebM
    _riff(b"AVI ", b"AVI\x19", b"AVIX"),
    _starts(b"FLV\1"),
    _starts(b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c"),  # ASF, WMV
    _starts(b"OggS"),
    _starts(b"DKIF"),  # IVF
    _starts(b"nut/multimedia container\0"),
    _starts(b"\0\0\1\xba"),  # MPEG program stream, VOB
    _starts(b"YUV4MPEG2 "),
    _transport_stream,
    _mxf,
)
