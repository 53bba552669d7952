"""The tokens of one step: laid side by side for kernels, or cut apart for plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from emulus.device import numbers
from emulus.engine.cache import Lane
from emulus.errors import EmulusError
from emulus.model.attention import Row, chunk_of

_COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Tokens of one sequence to be computed.

    Attributes:
        lane: Whose keys and values they see, and add to.
        ids: The tokens.
        positions: Where each stands in its sequence; None for one after another from ``lane.length`` on.
        wanted: Which of them are asked for what follows; None for the last.
    """

    lane: Lane
    ids: Sequence[int]
    positions: Sequence[int] | None = None
    wanted: Sequence[int] | None = None

    @property
    def slots(self) -> Sequence[int]:
        """Position of every token."""
        return range(self.lane.length, self.lane.length + len(self.ids)) if self.positions is None else self.positions


@dataclass(frozen=True, kw_only=True)
class Span:
    """The tokens of one lane in a step.

    Attributes:
        lane: The lane.
        tokens: Where they stand among all tokens of the step.
        positions: Where each stands in its sequence.
        visible: Slots of the lane that the last of them may see.
        row: How they attend if they are the last of these slots and see all before them; else None.
    """

    lane: Lane
    tokens: slice
    positions: Int64[Tensor, " tokens"]
    visible: int
    row: Row | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """The tokens of all feeds, one after another.

    Attributes:
        feeds: Tokens of distinct lanes.
        ids: The tokens.
        positions: Where each stands in its sequence.
        wanted: Places, among all tokens, of those that are asked for what follows.
        sources: Index into the ids chosen last for each token; -1 where ``ids`` holds the token.
        longest: Most tokens of one feed.
    """

    feeds: Sequence[Feed]
    ids: list[int]
    positions: list[int]
    wanted: list[int]
    sources: list[int]
    longest: int

    @classmethod
    def of(cls, feeds: Sequence[Feed], firsts: Sequence[int] = ()) -> Step:
        """Lay feeds side by side.

        Args:
            feeds: Tokens of distinct lanes, at least one feed.
            firsts: Index into the ids chosen last of each feed's first token; empty where all ids are known.

        Raises:
            EmulusError: A token would stand beyond its lane.
        """
        sources = [-1] * sum(len(feed.ids) for feed in feeds)
        if firsts:
            for start, first in zip(_starts(feeds), firsts, strict=True):
                sources[start] = first
        return cls(
            feeds=feeds,
            ids=[id for feed in feeds for id in feed.ids],
            positions=[slot for feed in feeds for slot in _checked(feed)],
            wanted=list(_wanted(feeds)),
            sources=sources,
            longest=max(len(feed.ids) for feed in feeds),
        )

    def parts(self, most: int) -> list[Step]:
        """Cut into steps of at most ``most`` tokens, between feeds; a longer feed is a step by itself.

        One part after another gives what all give at once, since sequences do not see each other.
        """
        if len(self.ids) <= most:
            return [self]
        parts: list[list[int]] = []
        size = 0
        for index, feed in enumerate(self.feeds):
            if not parts or size + len(feed.ids) > most:
                parts.append([])
                size = 0
            parts[-1].append(index)
            size += len(feed.ids)
        firsts = [self.sources[start] for start in _starts(self.feeds)]
        return [Step.of([self.feeds[i] for i in part], [firsts[i] for i in part]) for part in parts]

    def spans(self, positions: Int64[Tensor, " tokens"]) -> Iterator[Span]:
        """Cut into the tokens of each lane.

        Args:
            positions: Where each token stands in its sequence, on the device that computes.
        """
        for start, feed in zip(_starts(self.feeds), self.feeds, strict=True):
            tokens = slice(start, start + len(feed.ids))
            visible = max(feed.slots) + 1
            last = list(feed.slots) == list(range(visible - len(feed.ids), visible)) and feed.lane.ready is None
            row = Row(lengths=(visible,), chunks=(chunk_of((visible,), feed.slots[0], visible),)) if last else None
            yield Span(lane=feed.lane, tokens=tokens, positions=positions[tokens], visible=visible, row=row)

    def table(self, device: torch.device) -> list[list[int]]:
        """What kernels need to know, a row of one number per token each.

        Args:
            device: Which memory of the lanes.

        Returns:
            Ids; positions; addresses of lanes; slots of lanes; and, if any lane has one, addresses of maps of what may
            be seen, 0 where a lane has none.
        """
        lanes = [feed.lane for feed in self.feeds]
        rows = [
            self.ids,
            self.positions,
            self._each([lane.memory[device].data_ptr() for lane in lanes]),
            self._each([lane.capacity for lane in lanes]),
        ]
        if any(lane.ready for lane in lanes):
            rows.append(self._each([lane.ready[device].data_ptr() if lane.ready else 0 for lane in lanes]))
        return rows

    def _each(self, values: Sequence[int]) -> list[int]:
        return [value for value, feed in zip(values, self.feeds, strict=True) for _ in feed.ids]


def padded(table: list[list[int]], row: Sequence[int]) -> list[list[int]]:
    """Fill a step up to one of few numbers of tokens, so that few shapes of steps are recorded.

    Args:
        table: A row for each kind of number, a column per token.
        row: The columns' numbers of a token that nobody asks for.
    """
    count = len(table[0])
    missing = next((most for most in _COUNTS if most >= count), count) - count
    return [[*numbers, *[filler] * missing] for numbers, filler in zip(table, row, strict=True)]


def rows_of(x: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows of a tensor; a view where they follow one another."""
    if rows and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return x[rows[0] : rows[0] + len(rows)]
    return x[numbers(rows, x.device)]


def _starts(feeds: Sequence[Feed]) -> Iterator[int]:
    """Place of each feed's first token among all."""
    start = 0
    for feed in feeds:
        yield start
        start += len(feed.ids)


def _checked(feed: Feed) -> Sequence[int]:
    slots = feed.slots
    if max(slots) >= feed.lane.capacity:
        raise EmulusError(
            f"a sequence of {max(slots) + 1} tokens does not fit a key/value cache of {feed.lane.capacity}"
        )
    return slots


def _wanted(feeds: Sequence[Feed]) -> Iterator[int]:
    for start, feed in zip(_starts(feeds), feeds, strict=True):
        for index in [len(feed.ids) - 1] if feed.wanted is None else feed.wanted:
            yield start + index
