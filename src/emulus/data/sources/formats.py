"""Formats that are recognised and cannot be used, so that people are told what they have."""

from __future__ import annotations

import re

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (rb"%PDF-", "PDF documents"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL images"),
    (rb"RIFF....WAVE|ID3|fLaC|\xff[\xfb\xf3\xf2]|....ftypM4A ", "sound"),
    (rb"PK\x03\x04", "ZIP archives or office documents"),
    (rb"Rar!|7z\xbc\xaf|\x1f\x8b|BZh[1-9]|\xfd7zXZ|\x28\xb5\x2f\xfd", "compressed archives"),
    (rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?<svg", "SVG drawings"),
    (rb"(?i:\s*(?:<!doctype html|<html))", "HTML pages"),
    (rb"\x93NUMPY", "NumPy arrays"),
    (rb"SQLite format 3\0", "SQLite databases"),
    (rb"\x89HDF\r\n", "HDF5 files"),
    (rb"v/1\x01|\x76\x2f\x31\x01", "OpenEXR images"),
    (rb"#\?RADIANCE", "Radiance HDR images"),
)
_PATTERNS = tuple((re.compile(pattern, re.DOTALL), name) for pattern, name in _SIGNATURES)
_LFS = b"version https://git-lfs.github.com/spec/"
_REMEDIES = {
    "images": "; convert them to PNG or JPEG",
    "drawings": "; convert them to PNG",
    "archives": "; unpack them",
}


def known_format(head: bytes) -> str | None:
    """What a file is that cannot be used here, as a reason for leaving it out; None for what is not recognised.

    Args:
        head: Its first bytes.
    """
    if head.startswith(_LFS):
        return "Git LFS pointers, not the files themselves; run 'git lfs install && git lfs pull' in their clone"
    name = next((name for pattern, name in _PATTERNS if pattern.match(head)), None)
    if name is None:
        return None
    remedy = next((remedy for word, remedy in _REMEDIES.items() if word in name), "")
    return f"{name}, which cannot be read{remedy}"
