"""Emoji packages -> the emoji data set (two Parquet files, a NOTICE and a data card)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from emulus.data.emoji import art
from emulus.data.emoji.captions import captions_of
from emulus.data.emoji.card import card, notice
from emulus.data.emoji.names import Emoji, has_skin_tone, normalise, read_emoji, skin_tones_of, split_of
from emulus.data.emoji.packages import (
    CLIPS,
    FLAT,
    NOTO,
    PICTURES_3D,
    TWEMOJI,
    WORDS,
    Package,
    fetch_packages,
    read_member,
    read_members,
)
from emulus.data.emoji.questions import questions_of
from emulus.data.emoji.versions import Version, number_from, versions_of
from emulus.data.source import Split
from emulus.errors import EmulusError, at_least
from emulus.files import write_file, write_text
from emulus.lazy import later
from emulus.media.source import decoding

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
else:
    pa = later("pyarrow")
    pq = later("pyarrow.parquet")

PICTURE_STYLES: dict[str, Package] = {"3d": PICTURES_3D, "flat": FLAT, "noto": NOTO, "twemoji": TWEMOJI}
_TONE_STYLES = ("3d", "noto")

_COLUMNS = ("id", "split", "kind", "media", "captions", "questions", "label", "style", "group", "background")
_LEAVES = (
    *(name for name in _COLUMNS if name not in ("captions", "questions")),
    "captions.list.element",
    "questions.list.element.question",
    "questions.list.element.answer",
)


@lru_cache(maxsize=1)
def _schema() -> pa.Schema:
    question = pa.struct([pa.field("question", pa.string()), pa.field("answer", pa.string())])
    kinds = {"media": pa.binary(), "captions": pa.list_(pa.string()), "questions": pa.list_(question)}
    return pa.schema([pa.field(name, kinds.get(name, pa.string()), nullable=False) for name in _COLUMNS])


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
    versions: int = 1
    """Versions of each training item: further ones have another background, size, place and wording, and may be
    mirrored. What is held out has one."""
    tone_versions: int = 1
    """The same for training items with a skin tone; 0 trains on none of them."""
    clip_versions: int = 1
    """Most versions of a clip, which takes ten times the space of a picture."""
    held_out_tones: bool = False
    """Build nothing but pictures of two styles for validation that have one skin tone, to ask for it."""
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
    emoji = {key: words for key, words in read_emoji(config.packages).items() if _is_wanted(config, key)}
    styles = _TONE_STYLES if config.held_out_tones else tuple(PICTURE_STYLES)
    parts = {"pictures": _pictures(config, emoji, styles)}
    if not config.held_out_tones:
        parts["clips"] = _clips(config, emoji)
    counts: Counter[tuple[str, Split]] = Counter()
    for name, rows in parts.items():
        report(f"building {name} of {config.size}x{config.size}")
        table = sorted(rows, key=lambda row: row["id"])
        counts.update((row["style"], row["split"]) for row in table)
        _write(config.out / f"{name}.parquet", table)
    used = [WORDS, *(PICTURE_STYLES[style] for style in styles), *(CLIPS if "clips" in parts else ())]
    write_text(config.out / "NOTICE", notice(used))
    variants = f"{'with' if config.skin_tones else 'without'} skin-tone variants"
    if config.held_out_tones:
        variants = "variants with one skin tone only, none to be trained on"
    write_text(config.out / "README.md", card(counts, size=config.size, variants=variants, command=_command(config)))
    return dict(counts)


def _is_wanted(config: EmojiConfig, codepoint: str) -> bool:
    if config.held_out_tones:
        return len(skin_tones_of(codepoint)) == 1 and split_of(codepoint) == "validation"
    return config.skin_tones or not has_skin_tone(codepoint)


def _command(config: EmojiConfig) -> str:
    """What was called, but for the folders."""
    words = ["emulus data emoji", f"--size {config.size}"]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in ("packages", "out", "size") and value != field.default:
            words.append(f"--{field.name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(words)


def _check(config: EmojiConfig) -> None:
    if not 16 <= config.size <= 256:
        raise EmulusError(f"--size {config.size} is out of range; choose 16 to 256 (the artwork has 256 pixels)")
    for flag, quality in (("--quality", config.quality), ("--clip-quality", config.clip_quality)):
        if not 0 <= quality <= 100:
            raise EmulusError(f"{flag} {quality} is out of range; choose 0 to 100")
    at_least(1, versions=config.versions, clip_versions=config.clip_versions)
    at_least(0, tone_versions=config.tone_versions)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows, schema=_schema())
    # Media is compressed already; words shrink to a quarter. A list is compressed by the name of its leaves.
    compression = {leaf: "none" if leaf == "media" else "zstd" for leaf in _LEAVES}
    write_file(
        path,
        lambda temporary: pq.write_table(
            table,
            temporary,
            compression=compression,
            use_dictionary=["split", "kind", "style", "group", "background", *_LEAVES[-2:]],
            write_statistics=False,
            row_group_size=512,
        ),
    )


def _row(emoji: Emoji, style: str, kind: str, version: Version, media: bytes) -> dict[str, Any]:
    number, background = version.number, version.background
    choice = number_from("words", emoji.codepoint, style)
    return {
        "id": f"{style}/{emoji.codepoint}" + (f"+{number}" if number > 1 else ""),
        "split": split_of(emoji.codepoint),
        "kind": kind,
        "media": media,
        "captions": captions_of(emoji, style, background, choice, number),
        "questions": [pair._asdict() for pair in questions_of(emoji, style, background)],
        "label": emoji.label,
        "style": style,
        "group": emoji.group,
        "background": background,
    }


def _count(config: EmojiConfig, codepoint: str, *, clip: bool = False) -> int:
    """How many versions there are of an emoji's picture or clip."""
    if split_of(codepoint) != "train":
        return 1
    count = config.tone_versions if has_skin_tone(codepoint) else config.versions
    return min(count, config.clip_versions) if clip else count


def _pictures(config: EmojiConfig, emoji: dict[str, Emoji], styles: Sequence[str]) -> Iterator[dict[str, Any]]:
    for style in styles:
        tarball = config.packages / PICTURE_STYLES[style].tarball
        drawings = _webp(tarball, emoji) if style == "3d" else _icons(tarball, emoji, config.size)
        for codepoint, drawing in drawings:
            for version in versions_of(emoji[codepoint], style, drawing, _count(config, codepoint)):
                picture = art.encode_picture(version.show(drawing, config.size), config.quality)
                yield _row(emoji[codepoint], style, "image", version, picture)


def _clips(config: EmojiConfig, emoji: dict[str, Emoji]) -> Iterator[dict[str, Any]]:
    for package in CLIPS:
        for codepoint, animation in _open_all(config.packages / package.tarball, emoji):
            if getattr(animation, "n_frames", 1) == 1:
                continue
            with decoding(f"{package.tarball}: {codepoint}"):
                frames = art.read_frames(animation)
            count, middle = _count(config, codepoint, clip=True), frames[len(frames) // 2]
            for version in versions_of(emoji[codepoint], "anim", middle, count):
                clip = art.encode_clip([version.show(frame, config.size) for frame in frames], config.clip_quality)
                yield _row(emoji[codepoint], "anim", "video", version, clip)


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
