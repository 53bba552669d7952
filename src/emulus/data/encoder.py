"""one unit of work -> one shard: decode ahead in threads, encode in batches of one size, write."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from emulus.data.item import Item, Kind, Question, Split
from emulus.data.media_dataset import decode_item, shifted, to_pixels, whole_codes
from emulus.data.origin import Seen, file_state, origin_of, see
from emulus.data.records import Ids32, Record, Role, ShardLine, Skipped, Span, shard_name, write_shard
from emulus.data.tables import plain_name
from emulus.data.tokenize_config import TokenizeConfig
from emulus.errors import EmulusError
from emulus.sequence import Grammar, Image, Text, Video
from emulus.sequence.templates import question_answer
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer
from emulus.tokenizer.vision.weights import load_vision_tokenizer
from emulus.tokenizer.vocabulary import Vocabulary

T = TypeVar("T")
R = TypeVar("R")

_CLIPS_AHEAD = 2
"""Clips that lie decoded beside those that are being decoded: each may have hundreds of megabytes."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of work: items that become one shard.

    Attributes:
        split: Of all of them.
        kind: Of all of them.
        number: Of the shard.
        items: In the order of the shard's records.
    """

    split: Split
    kind: Kind
    number: int
    items: tuple[Item, ...]

    @property
    def name(self) -> str:
        """Of the shard's file."""
        return shard_name(self.split, self.kind, self.number)


class _Words(NamedTuple):
    """What stands before the medium in a record: its ids, and which are whose."""

    ids: Ids32
    spans: tuple[Span, ...]


class _Decoded(NamedTuple):
    """An item as the encoder takes it."""

    views: list[Tensor]
    fps: float
    words: _Words


class _Waiting(NamedTuple):
    """A view that waits for its batch to fill."""

    place: tuple[int, int]
    """Number of the item in its unit, and of the view."""
    frames: Tensor
    item: Item
    decoded: _Decoded


class Encoder:
    """Makes shards: what a worker holds. Any number of them make the same bytes.

    Args:
        config: Of the run; its folder holds the tokenizers.
        device: Where the vision tokenizer computes.
        vision: That tokenizer, if it is loaded already.

    Raises:
        EmulusError: The folder lacks a tokenizer.
    """

    def __init__(
        self, config: TokenizeConfig, device: torch.device | str, vision: VisionTokenizer | None = None
    ) -> None:
        self.config = config
        self.vision = vision.to(device) if vision else load_vision_tokenizer(config.out / "vision", device)
        self.text = TextTokenizer.from_file(config.out)
        self.grammar = Grammar(Vocabulary.load(config.out / "vocabulary.json"), self.text)

    def make(self, unit: Unit) -> ShardLine:
        """Encode a unit's items and write their shard.

        Args:
            unit: What to encode.

        Returns:
            The shard's line for the manifest, with the items that could not be read or written.

        Raises:
            EmulusError: What holds the items is gone, or the disk refuses.
        """
        skipped: list[Skipped] = []
        seen: list[Seen] = []
        records = self._texts(unit, skipped, seen) if unit.kind == "text" else self._media(unit, skipped, seen)
        figures = write_shard(self.config.out / unit.name, records, skipped)
        # Every view of an item, and every part of a text, may be wrong in the same way.
        return ShardLine(
            name=unit.name,
            **asdict(figures),
            skipped=tuple(dict.fromkeys(skipped)),
            origin=origin_of(unit.items, seen),
        )

    def _texts(self, unit: Unit, skipped: list[Skipped], seen: list[Seen]) -> Iterator[Record]:
        most = self.config.max_text_ids
        for item, ids in self._prepared(unit, self._text, 2 * self.config.batch, skipped, seen):
            pieces = [ids[start : start + most] for start in range(0, len(ids), most)] if most else [ids]
            for number, piece in enumerate(pieces):
                name = item.id if len(pieces) == 1 else f"{item.id}#{number}"
                yield Record(
                    id=name,
                    kind="text",
                    ids=piece,
                    spans=(Span("text", 0, len(piece)),),
                    score=item.score,
                    source=item.source,
                )

    def _media(self, unit: Unit, skipped: list[Skipped], seen: list[Seen]) -> list[Record]:
        done: dict[tuple[int, int], Record] = {}
        waiting: dict[tuple[int, ...], list[_Waiting]] = {}
        ahead = 2 * self.config.batch if unit.kind == "image" else self.config.readers + _CLIPS_AHEAD
        prepared = self._prepared(unit, self._decoded, ahead, skipped, seen)
        for number, (item, decoded) in enumerate(prepared):
            for view, frames in enumerate(decoded.views):
                # Pictures of one size make a batch: nothing is padded, and clips are as many frames as pictures.
                batch = waiting.setdefault(tuple(frames.shape), [])
                batch.append(_Waiting((number, view), frames, item, decoded))
                if len(batch) * len(frames) >= self.config.batch:
                    done |= self._encoded(batch)
                    batch.clear()
        for batch in waiting.values():
            done |= self._encoded(batch)
        return [record for _, record in sorted(done.items(), key=lambda pair: pair[0])]

    def _prepared(
        self, unit: Unit, prepare: Callable[[Item], T], ahead: int, skipped: list[Skipped], seen: list[Seen]
    ) -> Iterator[tuple[Item, T]]:
        """Every item that can be read and written, prepared in threads while the caller does something else.

        ``skipped`` takes the others; ``seen`` takes of each, in order, what its content was.
        """

        def attempt(item: Item) -> tuple[T | Skipped, Seen]:
            before = file_state(item)
            return prepared(item), see(item, before)

        def prepared(item: Item) -> T | Skipped:
            try:
                return prepare(item)
            except EmulusError as error:
                if item.container is not None and not item.container.exists():
                    raise EmulusError(
                        f"{item.container} has vanished while it was read; bring it back and run the same command "
                        "again: finished shards are kept"
                    ) from None
                # A message may name a file whose name cannot be encoded.
                return Skipped(item.id, plain_name(str(error)))

        found = run_ahead(attempt, unit.items, threads=self.config.readers, ahead=ahead)
        for item, (result, look) in zip(unit.items, found, strict=True):
            seen.append(look)
            if isinstance(result, Skipped):
                skipped.append(result)
            else:
                yield item, result

    def _text(self, item: Item) -> Ids32:
        ids = self._ids(item.text)
        self._check_length(item, min(len(ids), self.config.max_text_ids or len(ids)))
        return np.array(ids, np.uint32)

    def _decoded(self, item: Item) -> _Decoded:
        config = self.config
        frames, fps = decode_item(
            item,
            size=config.size,
            area=config.area,
            factor=self.vision.config.spatial_factor,
            fps=config.fps or None,
            max_frames=config.max_frames or None,
        )
        if item.kind == "video":
            # A clip of one frame is still a clip: it is held to be one code long.
            frames = torch.cat([frames, frames]) if len(frames) == 1 else frames
            frames = whole_codes(frames, self.vision.config.temporal_factor)
        words = self._words(item)
        self._check_medium(item, frames, fps, words)
        views = []
        for view in range(config.views if item.split == "train" else 1):
            draw = np.random.default_rng([config.seed, view, *item.id.encode()])
            views.append(shifted(frames, draw, config.shift if view else 0))
        return _Decoded(views, fps, words)

    def _check_medium(self, item: Item, frames: Tensor, fps: float, words: _Words) -> None:
        """Refuse what no document can hold before it is encoded: one bad item must not end a run.

        Raises:
            EmulusError: It has too many cells or a frame rate that cannot be written, or is longer than is wanted.
        """
        factors, is_clip = self.vision.config, item.kind == "video"
        h, w = (side // factors.spatial_factor for side in frames.shape[-2:])
        t = len(frames) // factors.temporal_factor if is_clip else None
        opened = self.grammar.open_media(h=h, w=w, t=t, fps=fps if is_clip else None)
        if self.config.max_ids:
            lengths = [span.stop - span.start for span in words.spans]
            captions = len(item.captions)
            asked = map(sum, zip(lengths[captions::2], lengths[captions + 1 :: 2], strict=True))
            longest = max([*lengths[:captions], *asked], default=0)
            self._check_length(item, longest + len(opened) + self.grammar.media_length(h=h, w=w, t=t))

    def _check_length(self, item: Item, ids: int) -> None:
        most, length = self.config.max_ids, ids + 2  # BOS and EOS
        if most and length > most:
            raise EmulusError(f"{item.id} makes a document of {length:,} ids, more than max_ids {most:,}; shorten it")

    def _ids(self, text: str) -> list[int]:
        try:
            return self.text.encode(text)
        except BaseException as error:
            # tiktoken gives up so on a million blanks in a row; the class cannot be imported, and is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise EmulusError(
                "its text cannot be divided into ids; shorten it, long runs of blanks above all"
            ) from None

    def _words(self, item: Item) -> _Words:
        parts: list[tuple[Role, str]] = [("caption", caption) for caption in item.captions]
        for pair in item.questions:
            parts += zip(("question", "answer"), as_asked(pair), strict=True)
        ids: list[int] = []
        spans = []
        for role, text in parts:
            start = len(ids)
            ids += self._ids(text)
            spans.append(Span(role, start, len(ids)))
        return _Words(np.array(ids, np.uint32), tuple(spans))

    def _encoded(self, batch: Sequence[_Waiting]) -> dict[tuple[int, int], Record]:
        if not batch:
            return {}
        frames = torch.stack([each.frames for each in batch]).to(self.vision.device)
        is_clip = batch[0].item.kind == "video"
        codes = self.vision.encode(to_pixels(frames if is_clip else frames[:, 0])).cpu()
        return {each.place: self._record(each, grid) for each, grid in zip(batch, codes, strict=True)}

    def _record(self, each: _Waiting, grid: Tensor) -> Record:
        item, (words, spans) = each.item, each.decoded.words
        medium = Video(grid, fps=each.decoded.fps) if item.kind == "video" else Image(grid)
        block = self.grammar.media_ids(medium).astype(np.uint32)
        return Record(
            id=item.id,
            kind=item.kind,
            ids=np.concatenate([words, block]),
            spans=(*spans, Span("media", len(words), len(words) + len(block))),
            shape=tuple(grid.shape),
            fps=each.decoded.fps,
            score=item.score,
            source=item.source,
        )


# Which picture is asked about does not change the words.
_ANY_PICTURE = Image(torch.zeros(1, 1, dtype=torch.int64))


def as_asked(pair: Question) -> list[str]:
    """A question and its answer as they stand in a document, with the words around them."""
    segments = question_answer(_ANY_PICTURE, *pair).segments
    return [segment.text for segment in segments if isinstance(segment, Text)]


def run_ahead(function: Callable[[T], R], items: Iterable[T], *, threads: int, ahead: int) -> Iterator[R]:
    """Apply a function in threads, ahead of whoever takes the results.

    Args:
        function: What to apply.
        items: To what.
        threads: How many work.
        ahead: How many results may lie ready or be under way.

    Yields:
        The results, in the order of the items. What the function raised is raised in its place.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="reader") as pool:
        results: deque[Future[R]] = deque()
        try:
            for item in items:
                results.append(pool.submit(function, item))
                if len(results) >= ahead:
                    yield results.popleft().result()
            while results:
                yield results.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
