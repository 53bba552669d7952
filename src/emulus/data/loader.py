"""a mixture of records -> the packed rows of every step, the same on any number of processes.

An endless line of places is filled with records by :mod:`emulus.data.order`; which caption a document has and in which
order, or which questions it asks, is drawn for each place. Every ``window`` places are packed together by their lengths
alone, so all processes plan the same rows and each reads only its own. Nothing depends on what was read before: where a
step begins is two numbers, the window and the row in it.
"""

from __future__ import annotations

import logging
import math
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from emulus.codec import decode_fields
from emulus.data.mixture import ENDS, Branch, Longest, Mixture, Numbers, Part, Source, Spans, parse_part
from emulus.data.order import hashed, mixed, shuffled, uniform
from emulus.data.records import REMEDY, Ids32, Record
from emulus.data.source import even
from emulus.errors import EmulusError, at_least
from emulus.lazy import missing
from emulus.sequence.packing import Batch, join, pack
from emulus.tokenizer.vocabulary import Vocabulary

__all__ = [
    "Branch",
    "Loader",
    "Longest",
    "Mixture",
    "Part",
    "ReadingConfig",
    "StepRows",
    "held_out",
    "parse_part",
]

# How a record becomes a document.
TEXT, CAPTION_FIRST, CAPTION_LAST, QUESTION = range(4)
NO_WORDS = -1

# What the draws of a run are for; each has numbers of its own.
_ORDER, _DOCUMENT, _ROWS = 1, 2, 3
_MOST_PLACES = 2**48
"""Documents of a run; far more than any reads, and few enough to count with."""
_PLANS_KEPT = 8
_STEPS_AHEAD = 4


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How documents are made of what is stored.

    Attributes:
        caption_first: Share of documents that begin with their caption (drawing); the others end with it (captioning).
        null_caption: Share of caption-first documents without a caption, from which guidance learns.
        question: Share of the documents of records that have questions that ask and answer; the questions are seen and
            not learned.
        turns: Most questions of a record that one document asks, one after the other, as a conversation does. How many
            is drawn evenly, so that each number of turns is learned to end; a row's length may cut them short.
        visual_weight: Weight of visual ids in the loss; all others weigh 1 (0.5 in the paper).
        answer_weight: Weight of the ids of answers. A few ids among hundreds of codes are learned late at 1.
    """

    caption_first: float = 0.5
    null_caption: float = 0.1
    question: float = 0.3
    turns: int = 1
    visual_weight: float = 0.5
    answer_weight: float = 1.0

    def __post_init__(self) -> None:
        at_least(1, turns=self.turns)
        at_least(0, visual_weight=self.visual_weight, answer_weight=self.answer_weight)
        for name in ("visual_weight", "answer_weight"):
            if math.isinf(getattr(self, name)):
                raise EmulusError(f"{name} must be finite, got {getattr(self, name)}")
        for name in ("caption_first", "null_caption", "question"):
            if not 0 <= getattr(self, name) <= 1:
                raise EmulusError(f"{name} must be in [0, 1], got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ReadingState:
    """Where a step begins, and the settings that it is the right place for: in others it would be another one.

    Attributes:
        step: The step.
        window: Its first row's window.
        row: And which of the window's rows that is.
        window_size: Documents that are packed together.
        row_tokens: Most ids in a row.
        seed: Of the order; None where an older version of Emulus noted neither it nor the following ones.
        caption_first: As in :class:`ReadingConfig`; decides how long documents are, like the rest.
        null_caption: Likewise.
        question: Likewise.
        turns: Likewise.
    """

    step: int
    window: int
    row: int
    window_size: int
    row_tokens: int
    seed: int | None = None
    caption_first: float | None = None
    null_caption: float | None = None
    question: float | None = None
    turns: int | None = None

    def __post_init__(self) -> None:
        at_least(0, step=self.step, window=self.window, row=self.row)
        at_least(1, window_size=self.window_size, row_tokens=self.row_tokens)
        if self.window * self.window_size >= _MOST_PLACES:
            raise EmulusError(f"window {self.window} is further than any run reads")


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """One process's rows of a step.

    Attributes:
        rows: The rows.
        numbers: Their places among all rows of the step.
        documents: How many documents they hold.
        sources: How many ids of each part.
    """

    rows: list[Batch]
    numbers: list[int]
    documents: int
    sources: dict[str, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Documents:
    """Documents before their ids are read, one entry of each array for each.

    Attributes:
        source: Which source of the mixture.
        record: Which of its records.
        task: ``TEXT``, ``CAPTION_FIRST``, ``CAPTION_LAST`` or ``QUESTION``.
        words: Which of the record's spans; of questions the one that asks first; ``NO_WORDS`` for none.
        turns: How many questions are asked; 1 where none are.
        stride: How many questions further the next one is, in the circle of the record's.
        lengths: Ids of the document.
    """

    source: Numbers
    record: Numbers
    task: Numbers
    words: Numbers
    turns: Numbers
    stride: Numbers
    lengths: Numbers


class Chosen(NamedTuple):
    """What some records become: as in :class:`Documents`."""

    task: Numbers
    words: Numbers
    turns: Numbers
    stride: Numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A window: its documents, and for each row the numbers of those in it."""

    documents: Documents
    rows: list[list[int]]


def draw(spans: Spans, records: Numbers, reading: ReadingConfig, random: npt.NDArray[np.float64]) -> Chosen:
    """Choose what documents some records become.

    Args:
        spans: What the source has.
        records: Which records.
        reading: How often what is chosen.
        random: For each record six numbers in [0, 1).
    """
    captions, questions = spans.captions[records], spans.questions[records]
    asks, which, order, null, many, far = random.T
    asked = (questions > 0) & (asks < reading.question)
    first = (order < reading.caption_first) | (captions == 0)
    none = (captions == 0) | (first & (null < reading.null_caption))
    text = spans.media[records] == 0
    task = np.select([text, asked, first], [TEXT, QUESTION, CAPTION_FIRST], CAPTION_LAST)
    question = captions + 2 * (which * questions).astype(np.int64)
    words = np.select([text, asked, none], [0, question, NO_WORDS], (which * captions).astype(np.int64))
    turns = 1 + (many * np.minimum(questions, reading.turns)).astype(np.int64)
    return Chosen(task, words, np.where(task == QUESTION, turns, 1), _strides(questions, far))


def _strides(counts: npt.NDArray[np.integer], random: npt.NDArray[np.float64]) -> Numbers:
    """For each count one of the strides that meet all of a circle of so many before any comes again."""
    found = np.ones(len(counts), np.int64)
    for count in np.unique(counts).tolist():
        here, strides = counts == count, _coprime(count)
        found[here] = strides[(random[here] * len(strides)).astype(np.int64)]
    return found


@lru_cache(maxsize=64)
def _coprime(count: int) -> Numbers:
    numbers = np.arange(1, max(count, 1) + 1)
    return numbers[np.gcd(numbers, max(count, 1)) == 1]


def lengths_of(spans: Spans, records: Numbers, chosen: Chosen, *, between: int, most: int) -> tuple[Numbers, Numbers]:
    """Ids of the documents that :func:`draw` chose.

    Args:
        spans: What the source has.
        records: Which records.
        chosen: What they become.
        between: Ids between an answer and the next question.
        most: Ids of a document beyond which no further question is asked.

    Returns:
        The lengths, and the turns that they hold.
    """
    task, words, turns, stride = chosen
    known, first = spans.words, spans.first[records]
    captions, questions = (counts[records].astype(np.int64) for counts in (spans.captions, spans.questions))
    place = np.where(words == NO_WORDS, len(known) - 2, first + words)
    lengths = spans.media[records] + known[place] + np.where(task == QUESTION, known[place + 1], 0) + np.int64(ENDS)
    circle = np.maximum(questions, 1)
    for turn in range(1, int(turns.max(initial=1))):
        place = first + _asked(words, captions, circle, stride, turn)
        more = np.zeros_like(lengths)
        goes_on = turns > turn
        more[goes_on] = between + known[place[goes_on]] + known[place[goes_on] + 1]
        goes_on &= lengths + more <= most
        lengths = np.where(goes_on, lengths + more, lengths)
        turns = np.where(goes_on, turns, np.minimum(turns, turn))
    return lengths, turns


Whole = TypeVar("Whole", int, Numbers)


def _asked(words: Whole, captions: Whole, questions: Whole, stride: Whole, turn: int) -> Whole:
    """The span that asks in a turn: questions and their answers follow the captions and are a circle."""
    return captions + 2 * (((words - captions) // 2 + turn * stride) % questions)


class Planner:
    """Knows the rows of every window.

    Args:
        mixture: What is read.
        reading: How.
        seed: Of the order and of all draws.
        row_tokens: Most ids in a row.
        window: Documents that are packed together.
    """

    def __init__(self, mixture: Mixture, reading: ReadingConfig, *, seed: int, row_tokens: int, window: int) -> None:
        self.mixture = mixture
        self.reading = reading
        self.seed = seed
        self.row_tokens = row_tokens
        self.window = window
        self._between = len(mixture.between)
        self._plans: OrderedDict[int, Plan] = OrderedDict()

    def documents(self, places: Numbers) -> Documents:
        """The documents at some places of the endless line."""
        source, within = mixed(places, self.mixture.weights)
        random = uniform(self.seed, _DOCUMENT, places[:, None], np.arange(6))
        record, task, words, turns, stride, lengths = (np.zeros(len(places), np.int64) for _ in range(6))
        for number, found in enumerate(self.mixture.sources):
            here = source == number
            record[here] = shuffled(within[here], len(found), int(hashed(self.seed, _ORDER, number)[0]))
            chosen = draw(found.spans, record[here], self.reading, random[here])
            task[here], words[here], _, stride[here] = chosen
            lengths[here], turns[here] = lengths_of(
                found.spans, record[here], chosen, between=self._between, most=self.row_tokens
            )
        return Documents(
            source=source, record=record, task=task, words=words, turns=turns, stride=stride, lengths=lengths
        )

    def plan(self, window: int) -> Plan:
        """The rows of a window. Not for several threads at once."""
        found = self._plans.pop(window, None) or self._make(window)
        self._plans[window] = found
        if len(self._plans) > _PLANS_KEPT:
            self._plans.popitem(last=False)
        return found

    def _make(self, window: int) -> Plan:
        documents = self.documents(np.arange(window * self.window, (window + 1) * self.window))
        rows = pack(documents.lengths.tolist(), self.row_tokens)
        # Packing begins with the longest documents; steps shall be alike.
        order = np.argsort(hashed(self.seed, _ROWS, window, np.arange(len(rows))), kind="stable")
        return Plan(documents=documents, rows=[rows[number] for number in order.tolist()])


class _Piece(NamedTuple):
    """A stretch of a document."""

    ids: Ids32
    factor: float = 1.0
    """How many times their weight its ids count; 0 where they are seen and not learned."""


class Reader:
    """Reads rows that are planned."""

    def __init__(self, mixture: Mixture, reading: ReadingConfig) -> None:
        self.mixture = mixture
        self.vocabulary: Vocabulary = mixture.vocabulary
        self.reading = reading
        self._bos, self._eos, self._between = (
            np.array(ids, np.uint32) for ids in ([self.vocabulary.bos], [self.vocabulary.eos], mixture.between)
        )

    def row(self, documents: Documents, chosen: Sequence[int]) -> Batch:
        """Read documents and join them.

        Raises:
            EmulusError: A record is damaged, or not the one that was planned with.
        """
        pieces: list[_Piece] = []
        numbers = np.array(chosen, np.int64)
        lengths = documents.lengths[numbers].tolist()
        for place, record in enumerate(self._records(documents, numbers)):
            parts = self._parts(record, documents, chosen[place])
            found = sum(len(part.ids) for part in parts)
            if found != lengths[place]:
                source = self.mixture.sources[int(documents.source[chosen[place]])].part.name
                raise EmulusError(
                    f"{source}: {record.id} makes {found} ids where its lengths say {lengths[place]}: "
                    f"a shard and its lengths do not belong together; {REMEDY}"
                )
            pieces += parts
        ids = np.concatenate([piece.ids for piece in pieces]).astype(np.int64)
        self._check_ids(ids, documents, numbers)
        factors = np.repeat([piece.factor for piece in pieces], [len(piece.ids) for piece in pieces])
        return join(ids, lengths, self.vocabulary, visual_weight=self.reading.visual_weight, factors=factors)

    def _records(self, documents: Documents, numbers: Numbers) -> list[Record]:
        """The records of documents, in order."""
        found: dict[int, Record] = {}
        for source in np.unique(documents.source[numbers]).tolist():
            here = numbers[documents.source[numbers] == source]
            records = self.mixture.read(source, documents.record[here])
            found |= dict(zip(here.tolist(), records, strict=True))
        return [found[number] for number in numbers.tolist()]

    def _check_ids(self, ids: Numbers, documents: Documents, numbers: Numbers) -> None:
        """Refuse what the embedding has no row for."""
        most = int(ids.max())
        if most >= self.vocabulary.size:
            names = {self.mixture.sources[source].part.name for source in documents.source[numbers].tolist()}
            raise EmulusError(
                f"{' or '.join(sorted(names))} holds the id {most}, but the vocabulary has {self.vocabulary.size}; "
                "tokenize again, to another folder"
            )

    def _parts(self, record: Record, documents: Documents, number: int) -> list[_Piece]:
        """The ids of a document, from BOS to EOS, in pieces."""
        spans = [_Piece(record.ids[span.start : span.stop]) for span in record.spans]
        task, words = int(documents.task[number]), int(documents.words[number])
        if words >= len(spans) or (task == TEXT) != (record.kind == "text"):
            return []
        chosen = spans[words : words + 1] if words != NO_WORDS else []
        if task == TEXT:
            middle = chosen
        elif task == CAPTION_FIRST:
            middle = [*chosen, spans[-1]]
        elif task == CAPTION_LAST:
            middle = [spans[-1], *chosen]
        else:
            turns, stride = int(documents.turns[number]), int(documents.stride[number])
            middle = [spans[-1], *self._conversation(record, spans, words, turns, stride)]
        return [_Piece(self._bos), *middle, _Piece(self._eos)]

    def _conversation(
        self, record: Record, spans: Sequence[_Piece], words: int, turns: int, stride: int
    ) -> Iterator[_Piece]:
        """Questions with their answers; all but the answers is only seen."""
        roles = [span.role for span in record.spans]
        captions, questions = roles.count("caption"), roles.count("question")
        for turn in range(turns if questions else 0):
            place = _asked(words, captions, questions, stride, turn)
            if turn:
                yield _Piece(self._between, 0.0)
            yield _Piece(spans[place].ids, 0.0)
            yield _Piece(spans[place + 1].ids, self.reading.answer_weight)


class Loader:
    """Gives this process its rows of any step; those of the next steps are read in the background, by Grain.

    Args:
        mixture: What is read.
        reading: How documents are made of it.
        seed: Of everything drawn.
        row_tokens: Most ids in a row.
        rows_per_step: Rows of a step, over all processes.
        window: Documents that are packed together.
        rank: Which of ``world`` this process is: it has the rows ``rank``, ``rank + world`` ...
        world: Processes that have rows of their own.
        threads: That read in the background; 0 reads when asked.
        state: What :meth:`state` gave: steps from that one on are found without looking at those before.

    Raises:
        EmulusError: There is nothing to read, a document is longer than a row, ``world`` does not divide the rows, or
            the state is none.
    """

    def __init__(
        self,
        mixture: Mixture,
        reading: ReadingConfig,
        *,
        seed: int,
        row_tokens: int,
        rows_per_step: int,
        window: int = 1024,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        at_least(1, row_tokens=row_tokens, rows_per_step=rows_per_step, window=window, world=world)
        at_least(0, rank=rank, threads=threads, seed=seed)
        if rows_per_step % world or rank >= world:
            raise EmulusError(
                f"{rows_per_step} rows per step cannot be shared by {world} processes; "
                f"set rows_per_step to a multiple of {world}"
            )
        if not len(mixture):
            raise EmulusError(f"there are no records of the split {mixture.split}; name folders that have some")
        longest = mixture.longest()
        if longest.tokens > row_tokens:
            raise EmulusError(
                f"{longest.name} makes a document of {longest.tokens} ids but a row holds {row_tokens}: raise "
                f"--row-tokens; or {longest.remedy(row_tokens)} and another --out"
            )
        self.mixture = mixture
        self.rows_per_step = rows_per_step
        self.numbers = list(range(rank, rows_per_step, world))
        self._planner = Planner(mixture, reading, seed=seed, row_tokens=row_tokens, window=window)
        self._reader = Reader(mixture, reading)
        self._threads = threads
        self._lock = threading.Lock()
        self._start = ReadingState(
            step=0,
            window=0,
            row=0,
            window_size=window,
            row_tokens=row_tokens,
            seed=seed,
            caption_first=reading.caption_first,
            null_caption=reading.null_caption,
            question=reading.question,
            turns=reading.turns,
        )
        self._begin(self._start if state is None else _read_state(state, self._start))
        self._next = self._step
        self._ahead: Iterator[StepRows] | None = None

    def step(self, step: int) -> StepRows:
        """This process's rows of a step. Steps in order come from the background.

        Raises:
            EmulusError: A shard is damaged.
        """
        if step != self._next:
            self.close()
        found = self._from_background(step) if step == self._next and self._threads else self.read(step)
        self._next = step + 1
        return found

    def _from_background(self, step: int) -> StepRows:
        if self._ahead is None:
            self._ahead = _in_background(self, step, self._threads)
        return next(self._ahead)

    def read(self, step: int) -> StepRows:
        """The same as :meth:`step`, here and now."""
        plans = self._rows(step)
        rows = [self._reader.row(plan.documents, plan.rows[row]) for plan, row in plans]
        sizes = np.zeros(len(self.mixture.sources), np.int64)
        for plan, row in plans:
            np.add.at(sizes, plan.documents.source[plan.rows[row]], plan.documents.lengths[plan.rows[row]])
        names = [source.part.name for source in self.mixture.sources]
        return StepRows(
            rows=rows,
            numbers=list(self.numbers),
            documents=sum(len(plan.rows[row]) for plan, row in plans),
            sources=dict(zip(names, sizes.tolist(), strict=True)),
        )

    def state(self, step: int) -> dict[str, Any]:
        """Where a step begins: a loader made with it starts there at once, on any number of processes."""
        with self._lock:
            window, row = self._find(step, 0)
        return asdict(replace(self._start, step=step, window=window, row=row))

    def close(self) -> None:
        """Stop reading in the background."""
        if self._ahead is not None:
            self._ahead.close()  # type: ignore[attr-defined]
            self._ahead = None

    def _rows(self, step: int) -> list[tuple[Plan, int]]:
        """For each of this process's rows of a step the plan and the row's number in it."""
        with self._lock:
            found = [self._find(step, number) for number in self.numbers]
            return [(self._planner.plan(window), row) for window, row in found]

    def _begin(self, state: ReadingState) -> None:
        """Count rows from the beginning of a step on."""
        if state.row and state.row >= len(self._planner.plan(state.window).rows):
            raise EmulusError(f"{_NO_STATE} (its window has no row {state.row}); {_OTHER_CHECKPOINT}")
        self._step, self._window = state.step, state.window
        # Rows before each known window and, at last, before the next; counted from the first row of that step.
        self._before = [-state.row]

    def _find(self, step: int, number: int) -> tuple[int, int]:
        """The window of a step's row, and which of its rows it is."""
        if step < self._step:
            at_least(0, step=step)
            self._begin(self._start)
        row = (step - self._step) * self.rows_per_step + number
        while self._before[-1] <= row:
            rows = len(self._planner.plan(self._window + len(self._before) - 1).rows)
            self._before.append(self._before[-1] + rows)
        place = bisect_right(self._before, row) - 1
        return self._window + place, row - self._before[place]


_NO_STATE = "this is no state of a loader"
_OTHER_CHECKPOINT = "go on from another checkpoint"


def _read_state(values: Mapping[str, Any], now: ReadingState) -> ReadingState:
    """A state that a loader of the same settings gave.

    Raises:
        EmulusError: It is damaged, or of other settings.
    """
    try:
        state = decode_fields(ReadingState, values, "it")
    except EmulusError as error:
        raise EmulusError(f"{_NO_STATE} ({error}); {_OTHER_CHECKPOINT}") from None
    for field in fields(ReadingState)[3:]:
        before, value = getattr(state, field.name), getattr(now, field.name)
        if before is not None and before != value:
            raise EmulusError(
                f"{'window' if field.name == 'window_size' else field.name} was {before} in this run so far and cannot "
                f"become {value}: documents would be read twice or not at all; keep it, or start a new run: another "
                "--out, with --init naming this one"
            )
    return state


class _Steps:
    """The steps of a loader as Grain wants them: to be had by number."""

    def __init__(self, loader: Loader, start: int) -> None:
        self.loader = loader
        self.start = start

    def __len__(self) -> int:
        return 1 << 40

    def __getitem__(self, number: Any) -> StepRows:
        return self.loader.read(self.start + int(number))

    def __repr__(self) -> str:
        return f"steps from {self.start}"


def _in_background(loader: Loader, start: int, threads: int) -> Iterator[StepRows]:
    grain = _grain()
    steps = grain.MapDataset.source(_Steps(loader, start))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_STEPS_AHEAD)
    iterator: Iterator[StepRows] = iter(steps.to_iter_dataset(options))
    return iterator


def _grain() -> ModuleType:
    """Import Grain, which takes half a second and warns of a profiler that nobody asked for."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        import grain
    except ModuleNotFoundError as error:
        raise missing(error) from None
    finally:
        log.setLevel(level)
    return grain


def held_out(mixture: Mixture, count: int, reading: ReadingConfig, row_tokens: int) -> list[Batch]:
    """Documents of the validation split, the same at every call: of those with captions half begin with them.

    Args:
        mixture: What is trained on.
        count: How many documents at most, of each part as many as its share, evenly spread.
        reading: Its weight of visual ids.
        row_tokens: Most ids in a row.

    Returns:
        Packed rows; none where nothing was held out. Records without text or captions are left out.

    Raises:
        EmulusError: A document is longer than a row.
    """
    held = mixture.of_split("validation")
    parts = [
        _some(source, number, round(count * share))
        for number, (source, share) in enumerate(zip(held.sources, held.shares, strict=True))
    ]
    if not parts:
        return []
    names = [field.name for field in fields(Documents)]
    documents = Documents(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
    for number in np.flatnonzero(documents.lengths > row_tokens).tolist():
        record = held.read(int(documents.source[number]), [int(documents.record[number])])[0]
        length = int(documents.lengths[number])
        media = sum(map(len, record.of("media")))
        longest = Longest(length, record.id, record.kind, length - media - ENDS)
        raise EmulusError(
            f"{record.id}, which is held out, makes a document of {length} ids but a row holds {row_tokens}: raise "
            f"--row-tokens; or {longest.remedy(row_tokens)} and another --out"
        )
    reader = Reader(held, reading)
    return [reader.row(documents, row) for row in pack(documents.lengths.tolist(), row_tokens)]


def _some(source: Source, number: int, count: int) -> Documents:
    """Evenly spread documents of a source, with their first caption, first and last in turn."""
    spans = source.spans
    usable = np.flatnonzero((spans.media == 0) | (spans.captions > 0))
    records = usable[even(range(len(usable)), max(count, 1))]
    orders = np.where(np.arange(len(records)) % 2 == 0, CAPTION_LAST, CAPTION_FIRST)
    task = np.where(spans.media[records] == 0, TEXT, orders)
    none, one = np.zeros(len(records), np.int64), np.ones(len(records), np.int64)
    lengths, _ = lengths_of(spans, records, Chosen(task, none, one, one), between=0, most=0)
    return Documents(
        source=np.full(len(records), number),
        record=records,
        task=task,
        words=none,
        turns=one,
        stride=one,
        lengths=lengths,
    )
