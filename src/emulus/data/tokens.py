"""items -> codes on disk. Every picture and clip is encoded once; training never touches pixels.

A tokens folder holds everything that pretraining needs: ``train-00000.parquet`` … and ``validation-…``, ``test-…`` with
codes and captions, ``tokenizer.json`` (text), ``vocabulary.json``, ``vision/`` (the tokenizer that made the codes) and
``tokens.json`` (the settings), which is written last.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from emulus.config import to_dict
from emulus.data.media_dataset import decode_item, shifted, to_pixels, whole_codes
from emulus.data.source import SPLITS, Item, open_source
from emulus.device import pick_device
from emulus.errors import EmulusError, at_least, did_you_mean
from emulus.files import read_json, write_file, write_json
from emulus.log import logger, progress
from emulus.sequence import Image, Video
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer
from emulus.tokenizer.vision.weights import load_vision_tokenizer, save_vision_tokenizer
from emulus.tokenizer.vocabulary import Vocabulary

SETTINGS = "tokens.json"
SHARD_ITEMS = 1024
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("fps", pa.float64()),
        ("shape", pa.list_(pa.int32())),
        ("codes", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Encode a data set.

    Attributes:
        data: A data set (see docs/data.md).
        vision: A vision tokenizer's folder.
        out: Where the tokens go.
        size: Side in pixels that pictures and clips are brought to.
        fps: Frame rate clips are brought to; 0 keeps theirs.
        max_frames: Longest clip in frames; the rest is cut. 0 keeps all.
        views: Versions of each training item: the first as it is, the others shifted by up to ``shift`` pixels.
        shift: See ``views``.
        text_size: Size of the byte-level vocabulary trained on the training captions.
        splits: Which splits to encode.
        batch: Pictures encoded at a time.
        device: ``auto``, ``cpu``, ``cuda`` ...
        seed: Of the shifts.
    """

    data: Path
    vision: Path
    out: Path
    size: int = 64
    fps: float = 0.0
    max_frames: int = 0
    views: int = 4
    shift: int = 4
    text_size: int = 2048
    splits: tuple[str, ...] = SPLITS
    batch: int = 32
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, size=self.size, views=self.views, batch=self.batch)
        at_least(0, fps=self.fps, max_frames=self.max_frames, shift=self.shift, seed=self.seed)
        for split in self.splits:
            if split not in SPLITS:
                raise EmulusError(f"there is no split {split!r}{did_you_mean(split, SPLITS)}")


@dataclass(frozen=True, kw_only=True)
class TokenizedItem:
    """One view of a picture or clip as codes, and the texts that describe it."""

    id: str
    captions: tuple[str, ...]
    media: Image | Video


def tokenize(config: TokenizeConfig) -> Path:
    """Encode a data set, going on where an earlier call with the same settings was stopped.

    An item that cannot be read is left out, counted and named.

    Args:
        config: What, with what, to where.

    Returns:
        ``config.out``.

    Raises:
        EmulusError: The folder holds tokens made with other settings, or an input is missing or damaged.
    """
    device = pick_device(config.device)
    vision = load_vision_tokenizer(config.vision, device)
    source = open_source(config.data)
    settings = _settings(config, source, vision)
    if _finished(config.out, settings):
        logger.info(f"{config.out} is complete")
        return config.out
    logger.info(f"encoding {config.data}: {source.counts()}")
    write_json(config.out / "making.json", settings)
    save_vision_tokenizer(vision, config.out / "vision")
    _make_vocabulary(config, source, vision.config.codebook_size)
    counts: Counter[str] = Counter()
    for split in config.splits:
        items = [item for item in source if item.split == split]
        views = config.views if split == "train" else 1
        for number, start in enumerate(range(0, len(items), SHARD_ITEMS)):
            path = config.out / f"{split}-{number:05d}.parquet"
            if not path.exists():
                rows = list(_encode(config, vision, items[start : start + SHARD_ITEMS], views, f"{split} {number}"))
                table = pa.Table.from_pylist(rows, schema=SCHEMA)
                write_file(path, partial(pq.write_table, table, compression="zstd"))
            counts[split] += pq.read_metadata(path).num_rows
    write_json(config.out / SETTINGS, {**settings, "rows": dict(counts)})
    (config.out / "making.json").unlink()
    logger.info(f"{config.out}: {dict(counts)} items as codes")
    return config.out


def _settings(config: TokenizeConfig, source: Sequence[Item], vision: VisionTokenizer) -> dict[str, Any]:
    """What the codes depend on: the flags, the words and names of the data, and the vision tokenizer's weights."""
    values = to_dict(config)
    for key in ("vision", "out", "batch", "device"):
        del values[key]
    words = hashlib.sha256()
    for item in source:
        words.update(repr((item.id, item.split, item.kind, item.fps, item.captions)).encode())
    return {**values, "data_sha256": words.hexdigest(), "vision_sha256": vision_digest(vision)}


def vision_digest(vision: VisionTokenizer) -> str:
    """SHA-256 of a vision tokenizer's weights: codes of different ones mean different things."""
    digest = hashlib.sha256()
    for _, tensor in sorted(vision.state_dict().items()):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _finished(out: Path, settings: dict[str, Any]) -> bool:
    for name in (SETTINGS, "making.json"):
        if (out / name).exists():
            made = read_json(out / name)
            if {key: made.get(key) for key in settings} != settings:
                raise EmulusError(f"{out} holds tokens made with other settings; delete it or choose another --out")
            return name == SETTINGS
    return False


def _make_vocabulary(config: TokenizeConfig, source: Sequence[Item], codebook_size: int) -> None:
    captions = [caption for item in source if item.split == "train" for caption in item.captions]
    text = TextTokenizer.train(captions, size=config.text_size)
    text.save(config.out)
    Vocabulary.native(text_size=text.size, visual_size=codebook_size).save(config.out / "vocabulary.json")


def _encode(
    config: TokenizeConfig, vision: VisionTokenizer, items: Sequence[Item], views: int, what: str
) -> Iterator[dict[str, Any]]:
    """Rows of one shard: pictures in batches, clips one by one."""
    pending: list[tuple[Item, torch.Tensor]] = []
    for item in progress(items, what=f"encoding {what}"):
        try:
            frames, fps = _decode(config, item)
        except EmulusError as error:
            logger.warning(f"left out {item.id}: {error}")
            continue
        for view in range(views):
            shift = config.shift if view else 0
            draw = np.random.default_rng([config.seed, view, *item.id.encode()])
            moved = shifted(frames, draw, shift)
            if item.kind == "image":
                pending.append((item, moved[0]))
            else:
                yield _clip_row(vision, item, moved, fps)
        while len(pending) >= config.batch:
            yield from _picture_rows(vision, pending[: config.batch])
            del pending[: config.batch]
    if pending:
        yield from _picture_rows(vision, pending)


def _decode(config: TokenizeConfig, item: Item) -> tuple[torch.Tensor, float]:
    return decode_item(item, size=config.size, fps=config.fps or None, max_frames=config.max_frames or None)


def _picture_rows(vision: VisionTokenizer, pending: Sequence[tuple[Item, torch.Tensor]]) -> Iterator[dict[str, Any]]:
    pixels = to_pixels(torch.stack([frame for _, frame in pending]).to(vision.device))
    for (item, _), codes in zip(pending, vision.encode(pixels).cpu(), strict=True):
        yield _row(item, codes, 0.0)


def _clip_row(vision: VisionTokenizer, item: Item, frames: torch.Tensor, fps: float) -> dict[str, Any]:
    # A clip of one frame is still a clip: it is held to be one code long.
    frames = torch.cat([frames, frames]) if len(frames) == 1 else frames
    whole = whole_codes(frames, vision.config.temporal_factor)
    codes = vision.encode(to_pixels(whole.to(vision.device))[None])[0].cpu()
    return _row(item, codes, fps)


def _row(item: Item, codes: torch.Tensor, fps: float) -> dict[str, Any]:
    return {
        "id": item.id,
        "kind": item.kind,
        "captions": list(item.captions),
        "fps": fps,
        "shape": list(codes.shape),
        "codes": codes.flatten().tolist(),
    }


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """An opened tokens folder."""

    folder: Path
    text: TextTokenizer
    vocabulary: Vocabulary

    @classmethod
    def open(cls, folder: Path) -> Tokens:
        """Open a folder that :func:`tokenize` finished.

        Raises:
            EmulusError: It is not one, or not finished.
        """
        if not (folder / SETTINGS).exists():
            what = (
                "is not finished: run the same tokenize command to go on"
                if (folder / "making.json").exists()
                else "holds no tokens: make them with emulus tokenize"
            )
            raise EmulusError(f"{folder} {what}")
        text = TextTokenizer.from_file(folder / "tokenizer.json")
        return cls(folder=folder, text=text, vocabulary=Vocabulary.load(folder / "vocabulary.json"))

    def items(self, split: str) -> list[TokenizedItem]:
        """Every view of every item of a split.

        Raises:
            EmulusError: A shard is damaged or holds codes outside the vocabulary.
        """
        return [item for path in sorted(self.folder.glob(f"{split}-*.parquet")) for item in self._read(path)]

    def _read(self, path: Path) -> Iterator[TokenizedItem]:
        try:
            rows = pq.read_table(path, schema=SCHEMA).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise EmulusError(f"{path} is damaged ({error}); delete it and run tokenize again") from None
        for row in rows:
            codes = torch.tensor(row["codes"], dtype=torch.int64).reshape(row["shape"])
            if not 0 <= int(codes.min()) <= int(codes.max()) < self.vocabulary.visual_size:
                raise EmulusError(
                    f"{path}: {row['id']} has codes outside the vocabulary of {self.vocabulary.visual_size}"
                )
            media = Image(codes) if row["kind"] == "image" else Video(codes, fps=row["fps"])
            yield TokenizedItem(id=row["id"], captions=tuple(row["captions"]), media=media)
