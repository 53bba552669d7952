"""Emoji packages -> the emoji data set (two Parquet files, a NOTICE and a data card)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from emulus.data.emoji import art
from emulus.data.emoji.captions import captions_of
from emulus.data.emoji.card import card, notice
from emulus.data.emoji.names import Emoji, has_skin_tone, normalise, read_emoji, split_of
from emulus.data.emoji.packages import (
    CLIPS,
    FLAT,
    NOTO,
    PICTURES_3D,
    TWEMOJI,
    Package,
    fetch_packages,
    read_member,
    read_members,
)
from emulus.data.source import Split
from emulus.errors import EmulusError
from emulus.files import write_file, write_text
from emulus.media.source import decoding

PICTURE_STYLES: dict[str, Package] = {"3d": PICTURES_3D, "flat": FLAT, "noto": NOTO, "twemoji": TWEMOJI}

_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("media", pa.binary(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("style", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("background", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class EmojiConfig:
    """What to build."""

    packages: Path = Path("packages")
    """Folder of package tarballs; those that are missing are fetched into it with npm."""
    out: Path = Path("data/emoji")
    """Folder that the data set is written to."""
    size: int = 64
    """Side of pictures and clips in pixels."""
    skin_tones: bool = False
    """Also build the skin-tone variants of pictures and clips."""
    quality: int = 70
    """WebP quality of pictures, 0..100."""
    clip_quality: int = 40
    """WebP quality of the frames of clips, 0..100."""


def build_emoji(config: EmojiConfig, *, report: Callable[[str], object] = print) -> dict[tuple[str, Split], int]:
    """Build the emoji data set; the same configuration gives the same bytes.

    Args:
        config: What to build, from where, and where to.
        report: Told one line per step.

    Returns:
        Number of items by style and split.

    Raises:
        EmulusError: The configuration is out of range, or a package cannot be fetched or is broken.
    """
    _check(config)
    fetch_packages(config.packages, report=report)
    emoji = read_emoji(config.packages)
    wanted = {key: words for key, words in emoji.items() if config.skin_tones or not has_skin_tone(key)}
    counts: Counter[tuple[str, Split]] = Counter()
    for name, rows in (("pictures", _pictures(config, wanted)), ("clips", _clips(config, wanted))):
        report(f"building {name} of {config.size}x{config.size}")
        table = sorted(rows, key=lambda row: row["id"])
        counts.update((row["style"], row["split"]) for row in table)
        _write(config.out / f"{name}.parquet", table)
    write_text(config.out / "NOTICE", notice())
    write_text(config.out / "README.md", card(counts, size=config.size, skin_tones=config.skin_tones))
    return dict(counts)


def _check(config: EmojiConfig) -> None:
    if not 16 <= config.size <= 256:
        raise EmulusError(f"--size {config.size} is out of range; choose 16 to 256 (the artwork has 256 pixels)")
    for flag, quality in (("--quality", config.quality), ("--clip-quality", config.clip_quality)):
        if not 0 <= quality <= 100:
            raise EmulusError(f"{flag} {quality} is out of range; choose 0 to 100")


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    # Media is compressed already; words shrink to a quarter. A list is compressed by the name of its leaves.
    leaves = [field.name.replace("captions", "captions.list.element") for field in _SCHEMA]
    compression = {leaf: "none" if leaf == "media" else "zstd" for leaf in leaves}
    write_file(
        path,
        lambda temporary: pq.write_table(
            table,
            temporary,
            compression=compression,
            use_dictionary=["split", "kind", "style", "group", "background"],
            write_statistics=False,
            row_group_size=512,
        ),
    )


def _row(emoji: Emoji, style: str, kind: str, background: str, media: bytes) -> dict[str, Any]:
    return {
        "id": f"{style}/{emoji.codepoint}",
        "split": split_of(emoji.codepoint),
        "kind": kind,
        "media": media,
        "captions": captions_of(emoji, style, background, _number("words", emoji.codepoint, style)),
        "label": emoji.label,
        "style": style,
        "group": emoji.group,
        "background": background,
    }


def _number(*parts: str) -> int:
    """A number that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:8])


def _pictures(config: EmojiConfig, emoji: dict[str, Emoji]) -> Iterator[dict[str, Any]]:
    for style, package in PICTURE_STYLES.items():
        tarball = config.packages / package.tarball
        drawings = _webp(tarball, emoji) if style == "3d" else _icons(tarball, emoji, config.size)
        for codepoint, drawing in drawings:
            background = art.choose_background(drawing, _number("background", codepoint, style))
            picture = art.composite(drawing, background, config.size)
            yield _row(emoji[codepoint], style, "image", background, art.encode_picture(picture, config.quality))


def _clips(config: EmojiConfig, emoji: dict[str, Emoji]) -> Iterator[dict[str, Any]]:
    for package in CLIPS:
        for codepoint, animation in _open_all(config.packages / package.tarball, emoji):
            if getattr(animation, "n_frames", 1) == 1:
                continue
            with decoding(f"{package.tarball}: {codepoint}"):
                frames = art.read_frames(animation)
            background = art.choose_background(frames[len(frames) // 2], _number("background", codepoint, "anim"))
            pictures = [art.composite(frame, background, config.size) for frame in frames]
            yield _row(emoji[codepoint], "anim", "video", background, art.encode_clip(pictures, config.clip_quality))


def _webp(tarball: Path, emoji: dict[str, Emoji]) -> Iterator[tuple[str, Image.Image]]:
    for codepoint, image in _open_all(tarball, emoji):
        with decoding(f"{tarball}: {codepoint}"):
            drawing = image.convert("RGBA")
        yield codepoint, drawing


def _open_all(tarball: Path, emoji: dict[str, Emoji]) -> Iterator[tuple[str, Image.Image]]:
    """Open the artwork in ``package/assets/CODEPOINT.webp``, once for each emoji that has words."""
    seen = set()
    for name, content in read_members(tarball, lambda name: name.endswith(".webp")):
        codepoint = normalise(Path(name).stem)
        # Some artwork lies there twice, with and without a variation selector.
        if codepoint in emoji and codepoint not in seen:
            seen.add(codepoint)
            yield codepoint, art.open_art(content, f"{tarball}/{name}")


def _icons(tarball: Path, emoji: dict[str, Emoji], size: int) -> Iterator[tuple[str, Image.Image]]:
    """Rasterise an Iconify set; its ``chars.json`` says which icon stands for which code point."""
    try:
        icons = json.loads(read_member(tarball, "package/icons.json"))
        names = json.loads(read_member(tarball, "package/chars.json"))
        keys = {normalise(codepoint): name for codepoint, name in names.items()}
        for codepoint in sorted(keys.keys() & emoji.keys()):
            icon = _icon(icons, keys[codepoint])
            width, height = (float(icon.get(side, icons.get(side, 16))) for side in ("width", "height"))
            yield codepoint, art.rasterise(icon, width, height, size)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EmulusError(f"{tarball} is not an Iconify set as expected ({error!r}); fetch it again") from error


def _icon(icons: dict[str, Any], name: str) -> dict[str, Any]:
    if name in icons["icons"]:
        return icons["icons"][name]
    alias = icons["aliases"][name]
    return {**icons["icons"][alias["parent"]], **alias}
