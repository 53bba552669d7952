"""tokens folders -> one numbered set of records, and how long the documents are that each can become.

All that is kept of a record are the lengths of its spans, 20 bytes and four for each span; the ids stay on the disk
until a row is built.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from emulus.data.records import LETTERS, REMEDY, Kind, Record, Shard, ShardLine, read_lengths
from emulus.data.source import even
from emulus.data.tokens import TokenizedItem, Tokens
from emulus.errors import EmulusError, did_you_mean, shown
from emulus.files import check_path
from emulus.sequence.templates import NATIVE
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import Vocabulary

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

PartKind = Literal["all", "text", "image", "video"]
PART_KINDS: tuple[PartKind, ...] = get_args(PartKind)
Numbers = npt.NDArray[np.int64]
Small = npt.NDArray[np.int32]

ENDS = 2
"""Ids of a document beside its spans: BOS and EOS."""
# Opening a shard takes longer than reading a record of it, and the system limits how many files are open.
_OPEN_SHARDS = 256
if resource is not None:
    _OPEN_SHARDS = min(4096, max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of a mixture.

    Attributes:
        folder: A tokens folder.
        kind: Which of its records; ``all`` takes every kind.
        weight: Share of the documents, in any unit; None counts the records.
    """

    folder: Path
    kind: PartKind = "all"
    weight: float | None = None

    @property
    def name(self) -> str:
        """As it is written, without the weight."""
        return str(self.folder) if self.kind == "all" else f"{self.folder}:{self.kind}"


def parse_part(text: str) -> Part:
    """Read ``FOLDER[:KIND][=WEIGHT]``, such as ``runs/tokens:image=0.7``.

    A path that exists is taken as it is, whatever letters it has: ``lr=0.1-tokens``, ``mine:v2`` and, beside a folder
    ``mine``, ``mine=2`` (the weight 2 of ``mine`` is then written ``mine=2.0``).

    Raises:
        EmulusError: There is no such folder, and read as a part it has an unknown kind or a weight that is not a
            number of 0 or more. A part that makes sense may be missing.
    """
    check_path(text, "a tokens folder")
    if not text:
        raise EmulusError("a tokens folder without a name; write FOLDER, FOLDER:KIND or FOLDER:KIND=0.7")
    there = next((part for part in _readings(text) if _exists(part.folder)), None)
    if there is not None:
        return there
    folder, weight = text, None
    before, equals, number = text.rpartition("=")
    if equals and not _has_separator(number):
        folder, weight = before, _weight(text, number)
    path, colon, kind = folder.rpartition(":")
    if not colon or _has_separator(kind):
        path, kind = folder, "all"
    if kind not in PART_KINDS:
        raise EmulusError(
            f"there is no folder {shown(folder)}, and no records of kind {shown(kind)}"
            f"{did_you_mean(kind, PART_KINDS)}; name a folder that emulus tokenize made, or FOLDER:KIND=0.7"
        )
    if not path:
        raise EmulusError(f"{shown(text)} names no folder; write FOLDER, FOLDER:KIND or FOLDER:KIND=0.7")
    return Part(folder=Path(path), kind=kind, weight=weight)


def _readings(text: str) -> Iterator[Part]:
    """All that a text can mean, the least of which is read into it first."""
    yield Part(folder=Path(text))
    before, _, number = text.rpartition("=")
    weighted: list[tuple[str, float | None]] = [(text, None)]
    with suppress(EmulusError):
        weighted.insert(0, (before, _weight(text, number)))
    for folder, weight in weighted:
        if folder and weight is not None:
            yield Part(folder=Path(folder), weight=weight)
        path, _, kind = folder.rpartition(":")
        if path and kind in PART_KINDS:
            yield Part(folder=Path(path), kind=kind, weight=weight)


def _weight(text: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < math.inf:
        raise EmulusError(
            f"there is no folder {shown(text)}, and {shown(number)} is not a weight, a number of 0 or more; name a "
            "folder that emulus tokenize made, or FOLDER:KIND=0.7"
        )
    return weight


def _has_separator(text: str) -> bool:
    return "/" in text or "\\" in text


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


class Branch(NamedTuple):
    """A part of a mixture as it is shown.

    Attributes:
        name: The part.
        rows: Its records.
        tokens: Ids of all their spans.
        share: Of the documents that are drawn.
    """

    name: str
    rows: int
    tokens: int
    share: float


class Longest(NamedTuple):
    """The longest document that a mixture can give.

    Attributes:
        tokens: Its ids.
        name: Its record and part.
        kind: Of the record.
        words: How many of the ids are words; the others are the medium's, BOS and EOS.
    """

    tokens: int
    name: str
    kind: Kind = "text"
    words: int = 0

    def remedy(self, most: int) -> str:
        """What makes its documents short enough, as the end of a sentence.

        Args:
            most: Ids that a document may have.
        """
        leave_out = f"leave such items out with emulus tokenize --max-ids {most}"
        if self.kind == "text":
            return f"divide long texts with emulus tokenize --max-text-ids {most - ENDS}, or {leave_out}"
        too_wordy = self.words + ENDS >= most
        too_large = self.tokens - self.words > most
        smaller = "tokenize at a smaller --size (or --area)" + (
            " or fewer --max-frames" if self.kind == "video" else ""
        )
        if too_wordy and not too_large:
            return f"{self.words} of them are words: shorten those, or {leave_out}"
        if too_large and not too_wordy:
            return f"{smaller}, or {leave_out}"
        return f"shorten its {self.words} ids of words and {smaller}, or {leave_out}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Spans:
    """Lengths of the spans of many records.

    Attributes:
        media: Ids of each record's medium; 0 of a text.
        first: Where each record's other spans begin in ``words``.
        captions: How many captions each has; a text counts as none.
        questions: How many questions.
        words: Ids of all spans that are no media, record by record: captions, or questions each with its answer.
    """

    media: Small
    first: Numbers
    captions: Small
    questions: Small
    words: Small

    @classmethod
    def of_shard(cls, path: Path, line: ShardLine) -> Spans:
        """Read the lengths of one shard.

        Raises:
            EmulusError: They are damaged, or those of another shard.
        """
        found = read_lengths(path)
        if len(found.media) != line.rows or int(found.media.sum()) + int(found.lengths.sum()) != line.tokens:
            raise EmulusError(f"{path}: its lengths are not those of the manifest; {REMEDY}")
        if ((found.media == 0) != (line.kind == "text")).any():
            raise EmulusError(f"{path}: its records are not of the kind {line.kind}; {REMEDY}")
        bounds = found.offsets.astype(np.int64)
        before = [np.cumsum([0, *(found.roles == LETTERS[role])]) for role in ("caption", "question")]
        captions, questions = ((each[bounds[1:]] - each[bounds[:-1]]).astype(np.int32) for each in before)
        if (captions + 2 * questions + (found.media == 0) != np.diff(bounds)).any():
            raise EmulusError(f"{path}: its lengths are of spans that no record has; {REMEDY}")
        return cls(
            media=found.media.astype(np.int32),
            first=bounds[:-1],
            captions=captions,
            questions=questions,
            words=found.lengths.astype(np.int32),
        )

    @classmethod
    def joined(cls, shards: Sequence[Spans]) -> Spans:
        """Those of several shards, one after the other; ``words`` ends with two zeros more, for who has none."""
        media, captions, questions, words = (
            np.concatenate([np.empty(0, np.int32), *(getattr(spans, name) for spans in shards)])
            for name in ("media", "captions", "questions", "words")
        )
        starts = np.cumsum([0, *(len(spans.words) for spans in shards)])
        first = [spans.first + start for spans, start in zip(shards, starts, strict=False)]
        return cls(
            media=media,
            first=np.concatenate([np.empty(0, np.int64), *first]),
            captions=captions,
            questions=questions,
            words=np.append(words, np.zeros(2, np.int32)),
        )

    def longest(self) -> Numbers:
        """The longest document of each record."""
        owner = np.repeat(np.arange(len(self.media)), self.captions + 2 * self.questions + (self.media == 0))
        place = np.arange(len(self.words)) - self.first[owner] - self.captions[owner]
        lengths = self.words.astype(np.int64)
        # A question counts with its answer, which follows it.
        question = np.flatnonzero((place >= 0) & (place % 2 == 0) & (self.media[owner] > 0))
        lengths[question] += self.words[question + 1]
        most = np.zeros(len(self.media), np.int64)
        np.maximum.at(most, owner, lengths)
        return self.media + most + ENDS


class Source:
    """The records of one part and split.

    Args:
        part: Which.
        tokens: Its opened folder.
        split: Of which its records are.

    Attributes:
        lines: Its shards.
        starts: The number of each shard's first record and, at last, of all records.
        spans: How long what is of each record.
        longest: Ids of the longest document that one can become, and which one.

    Raises:
        EmulusError: The lengths of a shard are damaged.
    """

    def __init__(self, part: Part, tokens: Tokens, split: str) -> None:
        self.part = part
        self.tokens = tokens
        self.lines = [line for line in tokens.shards(split) if part.kind in ("all", line.kind) and line.rows]
        self.starts = np.cumsum([0, *(line.rows for line in self.lines)])
        self.longest = (0, 0)
        shards = []
        for line, start in zip(self.lines, self.starts.tolist(), strict=False):
            spans = Spans.of_shard(tokens.folder / line.name, line)
            lengths = spans.longest()
            self.longest = max(self.longest, (int(lengths.max()), start + int(lengths.argmax())))
            shards.append(spans)
        self.spans = Spans.joined(shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def size(self) -> int:
        """Ids of all records."""
        return sum(line.tokens for line in self.lines)


class Mixture:
    """Records of several tokens folders whose ids mean the same. Made by :meth:`open`.

    Attributes:
        parts: What was asked for.
        folders: The opened folders of all parts.
        split: ``train``, ``validation`` or ``test``.
        sources: The parts that have records of that split, and a weight above 0.
        weights: Of each source: as asked for, or its number of records.
        shares: Of the documents that are drawn, by source; their sum is 1.
    """

    def __init__(self, parts: Sequence[Part], folders: Mapping[Path, Tokens], split: str) -> None:
        self.parts = tuple(parts)
        self.folders = dict(folders)
        self.split = split
        found = [Source(part, folders[part.folder], split) for part in parts if part.weight != 0]
        self.sources = [source for source in found if len(source)]
        weighted = [(source, source.part.weight) for source in self.sources]
        self.weights = [len(source) if weight is None else weight for source, weight in weighted]
        self.shares = [weight / sum(self.weights) for weight in self.weights]
        self._open: OrderedDict[tuple[int, int], Shard] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, parts: Sequence[str], split: str = "train") -> Mixture:
        """Open tokens folders.

        Args:
            parts: As :func:`parse_part` reads them: all with a weight, or all without.
            split: Which split. Of ``train`` every part must have records; of others, those without are left out.

        Raises:
            EmulusError: A folder is none, has no such records, or was made by another tokenizer than the first; a
                shard is missing or damaged; or weights sum to zero.
        """
        parsed = [parse_part(text) for text in parts]
        for text, part in zip(parts, parsed, strict=True):
            if not part.folder.exists() and str(part.folder) != text:
                raise EmulusError(
                    f"neither {shown(text)} nor {shown(str(part.folder))} is a folder; make tokens with emulus tokenize"
                )
        names = [part.name for part in parsed]
        if not parsed:
            raise EmulusError("there is nothing to read; name at least one folder made by emulus tokenize")
        if doubled := {name for name in names if names.count(name) > 1}:
            raise EmulusError(f"{min(doubled)} is named twice; name it once, with the sum of the weights")
        weights = [part.weight for part in parsed if part.weight is not None]
        if weights and len(weights) < len(parsed):
            raise EmulusError("some parts have a weight and some have none; give all of them one, or none")
        if weights and not sum(weights):
            raise EmulusError("the weights of the parts sum to zero; give one of them a weight above 0")
        folders = {part.folder: Tokens.open(part.folder) for part in parsed}
        _check_alike(list(folders.values()))
        mixture = cls(parsed, folders, split)
        read = {source.part.name for source in mixture.sources}
        for part in parsed if split == "train" else ():
            if part.weight != 0 and part.name not in read:
                raise EmulusError(f"{part.name} has no records to train on; leave it out, or tokenize such a source")
        return mixture

    def of_split(self, split: str) -> Mixture:
        """The same parts' records of another split."""
        return Mixture(self.parts, self.folders, split)

    @property
    def tokens(self) -> Tokens:
        """One of the folders, for all that they have in common: one with a vision tokenizer, if any has."""
        folders = list(self.folders.values())
        return next((tokens for tokens in folders if tokens.vision_sha256), folders[0])

    @property
    def folder(self) -> Path:
        """Where the tokenizers of all parts are."""
        return self.tokens.folder

    @property
    def text(self) -> TextTokenizer:
        """The text tokenizer of all parts."""
        return self.tokens.text

    @property
    def between(self) -> list[int]:
        """What stands between an answer and the next question, as ids."""
        return self.text.encode(NATIVE.between)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of all parts."""
        return self.tokens.vocabulary

    def __len__(self) -> int:
        return sum(len(source) for source in self.sources)

    def tree(self) -> list[Branch]:
        """What is mixed, to be shown."""
        return [
            Branch(source.part.name, len(source), source.size, share)
            for source, share in zip(self.sources, self.shares, strict=True)
        ]

    def digest(self) -> str:
        """SHA-256 of all that decides what is read: what ids mean, the shards and the shares."""
        digest = hashlib.sha256(self.tokens.digest().encode())
        for source, share in zip(self.sources, self.shares, strict=True):
            digest.update(repr((share, [(line.name, line.sha256) for line in source.lines])).encode())
        return digest.hexdigest()

    def longest(self) -> Longest:
        """The longest document that any record can become; of 0 ids if there are no records."""
        found = [(*source.longest, number) for number, source in enumerate(self.sources)]
        if not found:
            return Longest(0, "")
        tokens, place, number = max(found)
        (record,) = self.read(number, [place])
        media = sum(map(len, record.of("media")))
        name = f"{record.id} of {self.sources[number].part.name}"
        return Longest(tokens, name, record.kind, tokens - media - ENDS)

    def pictures(self, split: str, count: int) -> list[TokenizedItem]:
        """At most so many pictures of a split that have captions, evenly spread."""
        return self.items(split, count, kinds=("image",), least_captions=1)

    def items(
        self, split: str, count: int, *, kinds: Sequence[Kind] = ("image", "video"), least_captions: int = 0
    ) -> list[TokenizedItem]:
        """At most so many pictures and clips of a split, evenly spread; nothing else is read."""
        held = self.of_split(split)
        places = []
        for number, source in enumerate(held.sources):
            fitting = np.repeat([line.kind in kinds for line in source.lines], [line.rows for line in source.lines])
            records = np.flatnonzero(fitting & (source.spans.captions >= least_captions))
            places.append(np.stack([np.full(len(records), number), records], 1))
        found = np.concatenate([np.empty((0, 2), np.int64), *places])
        return [
            held.sources[number].tokens.item(held.read(number, [record])[0])
            for number, record in found[even(range(len(found)), count)].tolist()
        ]

    def read(self, source: int, records: Sequence[int] | Numbers) -> list[Record]:
        """Some records of a source, in the order asked for.

        Raises:
            EmulusError: A shard is damaged, or not the one that was opened.
        """
        lines, starts = self.sources[source].lines, self.sources[source].starts
        numbers = np.asarray(records, np.int64)
        shards = np.searchsorted(starts, numbers, side="right") - 1
        found = []
        for shard, place in zip(shards.tolist(), (numbers - starts[shards]).tolist(), strict=True):
            opened = self._shard(source, shard)
            (record,) = opened.read([place])
            if record.kind != lines[shard].kind:
                raise EmulusError(f"{opened.path} record {place} is of another kind, {record.kind}; {REMEDY}")
            found.append(record)
        return found

    def _shard(self, source: int, shard: int) -> Shard:
        """An open shard. Few are kept open, since a process may have only so many files open."""
        with self._lock:
            opened = self._open.pop((source, shard), None)
            if opened is None:
                chosen = self.sources[source]
                opened = Shard(chosen.tokens.folder / chosen.lines[shard].name)
            self._open[source, shard] = opened
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return opened


def _check_alike(folders: Sequence[Tokens]) -> None:
    """Refuse to mix ids that mean different things."""
    first = folders[0]
    seen = next((tokens for tokens in folders if tokens.vision_sha256), first)
    for other in folders[1:]:
        if other.vocabulary != first.vocabulary or list(other.text.pieces) != list(first.text.pieces):
            raise EmulusError(
                f"{other.folder} has another vocabulary than {first.folder}; tokenize both with the same one"
            )
        if other.vision_sha256 and other.vision_sha256 != seen.vision_sha256:
            raise EmulusError(
                f"{other.folder} was made by another vision tokenizer than {seen.folder}; tokenize both with one"
            )
