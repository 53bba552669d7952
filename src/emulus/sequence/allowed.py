"""What may come next in a sequence, and where in it that falls: what every decoding state answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from emulus.sequence.document import MediaSize


@dataclass(frozen=True)
class Allowed:
    """Which ids may come next.

    Attributes:
        kind: ``"forced"`` when only one id may come, else what is chosen: ``"text"`` (words, or the start of
            a medium, or the end), ``"meta"`` (a letter of a size text), ``"visual"`` or ``"action"``.
        ranges: Half-open id ranges, sorted, apart from each other.
    """

    kind: str
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, kind: str, ranges: Iterable[tuple[int, int]]) -> Allowed:
        """Sort and join ranges; one id that is left is forced."""
        joined: list[tuple[int, int]] = []
        for start, stop in sorted(ranges):
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        single = len(joined) == 1 and joined[0][1] - joined[0][0] == 1
        return cls("forced" if single else kind, tuple(joined))

    @property
    def forced(self) -> int | None:
        """The only id that may come, or None where there is a choice. Feed it; never sample it."""
        return self.ranges[0][0] if self.kind == "forced" else None

    def contains(self, id: int) -> bool:
        """Whether this id may come."""
        return any(start <= id < stop for start, stop in self.ranges)


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where the next id falls.

    Attributes:
        kind: ``"text"``, ``"meta"`` (a size text), ``"image"``, ``"video"``, ``"action"`` or ``"end"``.
        size: Size of the open picture or clip.
        cells: How many of its cells are there. Row and frame ends do not count.
    """

    kind: str
    size: MediaSize | None = None
    cells: int = 0

    @property
    def rows(self) -> int:
        """Whole rows so far, over all frames."""
        return self.cells // self.size.w if self.size else 0

    @property
    def frames(self) -> int:
        """Whole frames of cells so far."""
        return self.rows // self.size.h if self.size else 0

    @property
    def row(self) -> int:
        """Row of the next cell in its frame."""
        return self.rows % self.size.h if self.size else 0

    @property
    def column(self) -> int:
        """Column of the next cell."""
        return self.cells % self.size.w if self.size else 0


def just(id: int) -> tuple[int, int]:
    """The range of one id."""
    return id, id + 1


@lru_cache(maxsize=64)
def only(id: int) -> Allowed:
    """One forced id."""
    return Allowed("forced", (just(id),))
