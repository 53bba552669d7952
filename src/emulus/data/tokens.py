"""What ``emulus tokenize`` wrote, opened: what its ids mean, and where its records are.

A tokens folder holds everything that pretraining needs: shards of records (see :mod:`emulus.data.records`), the text
tokenizer, ``vocabulary.json``, ``vision/`` (the tokenizer that made the codes) and ``tokens.json`` (the settings),
which is written last.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from emulus.codec import as_mapping, decode_fields
from emulus.data.records import (
    MANIFEST,
    REMEDY,
    Kind,
    Record,
    Shard,
    ShardLine,
    lengths_path,
    read_manifest,
    shard_digest,
)
from emulus.errors import EmulusError
from emulus.files import read_json
from emulus.sequence import Image, Video
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer
from emulus.tokenizer.vision.weights import PAINTS
from emulus.tokenizer.vocabulary import Vocabulary

SETTINGS = "tokens.json"
MAKING = "making.json"
"""The settings, until the folder is finished."""
_RECORDS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class MadeWith:
    """What is read of ``tokens.json`` and ``making.json`` beside the settings themselves.

    Attributes:
        vision_sha256: See :func:`vision_digest`; empty where there is no vision tokenizer.
        text_sha256: See :func:`text_digest`; empty until there is a text tokenizer, and in folders of older versions.
    """

    vision_sha256: str = ""
    text_sha256: str = ""

    @classmethod
    def read(cls, path: Path) -> MadeWith:
        """Read either file.

        Raises:
            EmulusError: It is missing or damaged.
        """
        values = read_json(path)
        try:
            known = {name: value for name, value in as_mapping(values, "it").items() if value is not None}
            return decode_fields(cls, known, "it", ignore=known)
        except EmulusError as error:
            raise EmulusError(f"{path} holds no settings ({error}); tokenize again, to another folder") from None


@dataclass(frozen=True, kw_only=True)
class TokenizedItem:
    """One view of a picture or clip as codes, and the texts that describe it."""

    id: str
    captions: tuple[str, ...]
    media: Image | Video


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """An opened tokens folder.

    Attributes:
        folder: Where it is.
        text: Its text tokenizer.
        vocabulary: What its ids mean.
        vision_sha256: Of the weights of the vision tokenizer that made the codes; empty where there are none.
        lines: Its finished shards.
    """

    folder: Path
    text: TextTokenizer
    vocabulary: Vocabulary
    vision_sha256: str = ""
    lines: tuple[ShardLine, ...] = ()

    @classmethod
    def open(cls, folder: Path) -> Tokens:
        """Open a folder that ``emulus tokenize`` finished.

        Raises:
            EmulusError: It is not one, not finished, or a part of it is missing or damaged.
        """
        if not (folder / SETTINGS).exists():
            what = "holds no tokens: make them with emulus tokenize"
            if (folder / MAKING).exists():
                what = "is not finished: run the same tokenize command to go on"
            raise EmulusError(f"{folder} {what if folder.exists() else f'does not exist, so it {what}'}")
        made = MadeWith.read(folder / SETTINGS)
        if not (folder / MANIFEST).exists():
            raise EmulusError(
                f"{folder} has no {MANIFEST}: it is damaged, or an older version of Emulus made it; tokenize again, to "
                "another folder"
            )
        text = TextTokenizer.from_file(folder)
        vocabulary = Vocabulary.load(folder / "vocabulary.json")
        if text.size != vocabulary.text_size:
            raise EmulusError(
                f"{folder}: the text tokenizer has {text.size} ids, the vocabulary {vocabulary.text_size} for text; "
                "tokenize again, to another folder"
            )
        if made.text_sha256 and made.text_sha256 != text_digest(text, vocabulary):
            raise EmulusError(
                f"{folder}: the text tokenizer or the vocabulary is not the one that its ids were made with; restore "
                "both, or tokenize again, to another folder"
            )
        tokens = cls(
            folder=folder,
            text=text,
            vocabulary=vocabulary,
            vision_sha256=made.vision_sha256,
            lines=tuple(read_manifest(folder)),
        )
        tokens._check_sizes()
        return tokens

    def shards(self, split: str, kind: Kind | None = None) -> list[ShardLine]:
        """The finished shards of a split, of one kind or of all, in order."""
        return [line for line in self.lines if line.split == split and kind in (None, line.kind)]

    def items(self, split: str) -> list[TokenizedItem]:
        """Every view of every picture and clip of a split; texts are none.

        Raises:
            EmulusError: A shard is damaged or holds codes outside the vocabulary.
        """
        return [self.item(record) for line in self.shards(split) if line.kind != "text" for record in self._read(line)]

    def item(self, record: Record) -> TokenizedItem:
        """A record of a picture or clip as words and codes.

        Raises:
            EmulusError: Its codes are not those of its shape and of the vocabulary.
        """
        (block,) = record.of("media")
        start, stop = self.vocabulary.visual_range
        codes = block[(block >= start) & (block < stop)].astype(np.int64) - start
        if len(codes) != math.prod(record.shape):
            raise EmulusError(
                f"{self.folder}: {record.id} has codes outside the vocabulary of {stop - start}, or not those of "
                f"{record.shape} cells; tokenize again, to another folder"
            )
        grid = torch.from_numpy(codes.reshape(record.shape))
        return TokenizedItem(
            id=record.id,
            captions=tuple(self.text.decode(ids.tolist()) for ids in record.of("caption")),
            media=Image(grid) if record.kind == "image" else Video(grid, fps=record.fps),
        )

    def digest(self) -> str:
        """SHA-256 of what ids mean: the vocabulary, the text tokenizer's pieces and the vision tokenizer."""
        digest = _of_text(self.text, self.vocabulary)
        digest.update(self.vision_sha256.encode())
        return digest.hexdigest()

    def check(self) -> None:
        """Read every shard and compare it with the manifest.

        Raises:
            EmulusError: One is missing or not what was written.
        """
        for line in self.lines:
            path = self.folder / line.name
            if shard_digest(path) != line.sha256:
                raise EmulusError(f"{path} is not what was written (its SHA-256 differs); {REMEDY}")

    def _check_sizes(self) -> None:
        """A look at every shard that costs next to nothing, before hours are spent on them."""
        for line in self.lines:
            path = self.folder / line.name
            found = sum(file.stat().st_size for file in (path, lengths_path(path)) if file.is_file())
            if found != line.bytes:
                raise EmulusError(
                    f"{path} and its lengths are missing or cut off: {found} bytes, {line.bytes} were written; {REMEDY}"
                )

    def _read(self, line: ShardLine) -> Iterator[Record]:
        shard = Shard(self.folder / line.name)
        if len(shard) != line.rows:
            raise EmulusError(f"{shard.path} has {len(shard)} rows, {line.rows} were written; {REMEDY}")
        for start in range(0, len(shard), _RECORDS_AT_ONCE):
            yield from shard.read(range(start, min(start + _RECORDS_AT_ONCE, len(shard))))


def text_digest(text: TextTokenizer, vocabulary: Vocabulary) -> str:
    """SHA-256 of what text ids mean: the vocabulary and the text tokenizer's pieces."""
    return _of_text(text, vocabulary).hexdigest()


def _of_text(text: TextTokenizer, vocabulary: Vocabulary) -> hashlib._Hash:
    digest = hashlib.sha256(json.dumps(vocabulary.to_dict(), sort_keys=True).encode())
    for piece in text.pieces:
        digest.update(len(piece).to_bytes(4, "little") + piece)
    return digest


def vision_digest(vision: VisionTokenizer) -> str:
    """SHA-256 of the weights that choose a vision tokenizer's codes: those of different ones mean different things.

    What paints is left out, so it may be trained further or rounded.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vision.state_dict().items()):
        if not name.startswith(PAINTS):
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
