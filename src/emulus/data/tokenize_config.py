"""Settings of ``emulus tokenize``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from emulus.data.item import SPLITS, checked_fps
from emulus.errors import EmulusError, at_least, did_you_mean

MOST_SIDE = 2**14
"""Pixels of a side; far more than any model draws."""
Engine = Literal["local", "daft"]


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Encode data sets.

    Attributes:
        sources: Data sets: folders, Parquet, WebDataset tars, tables of text ... (see docs/data.md).
        out: Where the tokens go.
        vision: A vision tokenizer's folder, or a name on the hub; by default that of ``vocabulary``.
        vocabulary: Take the text tokenizer and the vocabulary of this model (a folder or a name on the hub) or earlier
            tokens folder, instead of training a text tokenizer on the captions and texts.
        size: Side in pixels of the square that pictures and clips are cropped to.
        area: Keep their aspect instead, and bring them to about so many pixels; 0 crops to ``size``.
        fps: Frame rate clips are brought to; 0 keeps theirs.
        max_frames: Longest clip in frames; the rest is cut. 0 keeps all.
        max_text_ids: A longer text becomes several records; 0 keeps all in one.
        max_ids: Leave out items whose longest document, from BOS to EOS, has more ids; 0 keeps all.
        views: Versions of each training item: the first as it is, the others shifted by up to ``shift`` pixels.
        shift: See ``views``.
        text_size: Size of the byte-level vocabulary that is trained.
        splits: Which splits to encode.
        shard_items: Pictures in a shard; clips are an eighth of that, texts eight times as many.
        batch: Pictures (or frames of clips) encoded at a time. Another number rounds otherwise, as another device
            does, which a few codes can show.
        workers: Processes; each has a vision tokenizer of its own, and one CPU thread if there are several.
        readers: Threads of each that decode media ahead of it.
        engine: ``daft`` lets Daft run the workers, with ``DAFT_RUNNER=ray`` on a cluster.
        device: ``auto``, ``cpu``, ``cuda`` ...
        seed: Of the shifts.
    """

    sources: tuple[Path, ...]
    out: Path
    vision: Path | None = None
    vocabulary: str = ""
    size: int = 64
    area: int = 0
    fps: float = 0.0
    max_frames: int = 0
    max_text_ids: int = 0
    max_ids: int = 0
    views: int = 1
    shift: int = 4
    text_size: int = 2048
    splits: tuple[str, ...] = SPLITS
    shard_items: int = 1024
    batch: int = 32
    workers: int = 1
    readers: int = 2
    engine: Engine = "local"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(1, size=self.size, views=self.views, batch=self.batch, shard_items=self.shard_items)
        at_least(1, workers=self.workers, readers=self.readers)
        at_least(0, fps=self.fps, max_frames=self.max_frames, max_text_ids=self.max_text_ids, area=self.area)
        at_least(0, shift=self.shift, seed=self.seed, max_ids=self.max_ids)
        if self.fps:
            checked_fps(self.fps, "--fps")
        if self.size > MOST_SIDE or self.area > MOST_SIDE**2 or self.shift > MOST_SIDE:
            raise EmulusError(f"size and shift are at most {MOST_SIDE:,} pixels, area {MOST_SIDE**2:,}")
        if not self.splits:
            raise EmulusError(f"no split is named; choose from {', '.join(SPLITS)}")
        if len({os.path.realpath(source) for source in self.sources}) < len(self.sources):
            raise EmulusError("a source is named twice, which would double its items; name each once")
        if not self.sources:
            raise EmulusError("no source is named; give at least one data set")
        for split in self.splits:
            if split not in SPLITS:
                raise EmulusError(f"there is no split {split!r}{did_you_mean(split, SPLITS)}")
        if self.engine not in get_args(Engine):
            raise EmulusError(f"there is no engine {self.engine!r}{did_you_mean(self.engine, get_args(Engine))}")
