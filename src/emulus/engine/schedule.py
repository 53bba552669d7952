"""In which order ids are computed: one after another, guessed ahead and checked, or several rows at a time.

A schedule is a value; :meth:`Schedule.course` gives what follows one request by it. In every turn a course says which
ids to compute and after which of them it wants to know the next (:class:`Ask`), and is told what was chosen there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from emulus.engine.pace import Pace
from emulus.engine.request import Event
from emulus.engine.walk import Walk
from emulus.errors import EmulusError, at_least
from emulus.sequence.layout import CELL

_MOST = 64

# Ids of one request in a step: the kernels for few tokens take so many.
_MOST_IDS = 120


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Ids to compute for one request, and where the next is wanted.

    Attributes:
        ids: The ids.
        offsets: How far behind the ids that are there for good each one stands; None for one after another.
        wanted: Indices into ``ids``: after each of these one id is to be chosen.
        positions: Where in the request's sequence each chosen id will stand.
    """

    ids: Sequence[int]
    offsets: Sequence[int] | None = None
    wanted: Sequence[int]
    positions: Sequence[int]


class Course(Protocol):
    """One request on its way by some schedule."""

    def ask(self) -> Ask:
        """What to compute now; whatever may be chosen is of :meth:`Walk.allowed`'s ids."""

    def foreseen(self, most: int) -> list[list[int]]:
        """What the grammar forces after each of the next choices, whatever they are, and before a further one.

        The host need not look at those choices before it asks for the next. At most ``most``; none where a choice
        decides what is asked then.
        """

    def take(self, chosen: Sequence[int]) -> tuple[list[Event], int]:
        """Take what was chosen.

        Returns:
            What happened, and how many more ids, from the first asked about, are there for good.
        """


class Schedule(Protocol):
    """An order of computing."""

    @property
    def exact(self) -> bool:
        """Whether the ids are those of :class:`Sequential`."""

    def course(self, walk: Walk, pace: Pace) -> Course:
        """Begin with a request."""


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """One id after another: the reference."""

    exact = True

    def course(self, walk: Walk, pace: Pace) -> Course:
        """Begin with a request."""
        return _Ahead(walk, _Fixed(1))


@dataclass(frozen=True, kw_only=True)
class Jacobi:
    """Guess the next cells, compute all of them at once, and keep the guesses that turn out right. Exact.

    An id is the argmax of its logits plus noise that its seed and position fix. A guess that equals that argmax is what
    one-after-another decoding would have chosen, provided all ids before it are: so the ids are the same, and only the
    number of steps changes. A wrong guess is replaced by the argmax found in its place, computed with wrong ids
    before it but with the right noise (Gumbel coupling), which often is right the next time.

    Attributes:
        window: Ids chosen at once, at most 64; 1 is :class:`Sequential`, None is whichever has been fastest so far.

    Source: speculative Jacobi decoding (arXiv:2410.01699), its coupled variant (arXiv:2510.24211).
    """

    window: int | None = None
    exact = True

    def __post_init__(self) -> None:
        if self.window is not None:
            at_least(1, window=self.window)
            if self.window > _MOST:
                raise EmulusError(f"window is {self.window} but must be at most {_MOST}: more guesses hardly hold")

    def course(self, walk: Walk, pace: Pace) -> Course:
        """Begin with a request."""
        return _Ahead(walk, pace if self.window is None else _Fixed(self.window))


@dataclass(frozen=True, kw_only=True)
class Zipar:
    """Begin a row of cells before the row above is whole. Fewer steps, but not the same picture: lossy.

    Attributes:
        window: How many columns the row above must be ahead, by default half of them; as wide as the picture or wider
            is :class:`Sequential`.

    Source: ZipAR (arXiv:2412.04062).
    """

    window: int | None = None
    exact = False

    def __post_init__(self) -> None:
        if self.window is not None:
            at_least(1, window=self.window)

    def course(self, walk: Walk, pace: Pace) -> Course:
        """Begin with a request."""
        return _Rows(walk, self.window)


class _Window(Protocol):
    """Decides how far to guess ahead."""

    def window(self) -> int: ...


@dataclass(frozen=True)
class _Fixed:
    size: int

    def window(self) -> int:
        return self.size


class _Ahead:
    """Course of a window that slides over the sequence; outside of pictures and clips it is one id wide."""

    def __init__(self, walk: Walk, window: _Window) -> None:
        self._walk = walk
        self._window = window
        self._guesses: list[int] = []
        self._wanted: list[int] = []
        self._fed = 0

    def ask(self) -> Ask:
        walk = self._walk
        ids, wanted, positions = list(walk.fresh), [len(walk.fresh) - 1], [walk.position]
        # A cell is to be chosen now; each further one is preceded by a guess, and by forced ids at a row's end.
        upcoming = walk.upcoming(self._window.window())
        guesses = iter(self._guess(int((upcoming == CELL).sum()) - 1))
        for offset, entry in enumerate(upcoming[1:].tolist(), start=1):
            if len(ids) >= _MOST_IDS:
                break
            before = int(upcoming[offset - 1])
            ids.append(next(guesses) if before == CELL else before)
            if entry == CELL:
                wanted.append(len(ids) - 1)
                positions.append(walk.position + offset)
        self._wanted, self._fed = wanted, len(walk.fresh)
        return Ask(ids=ids, wanted=wanted, positions=positions)

    def foreseen(self, most: int) -> list[list[int]]:
        if most < 1 or self._window != _Fixed(1):
            return []
        follows: list[list[int]] = []
        before = CELL
        for entry in self._walk.upcoming(most + 1)[1:].tolist():
            if before == CELL:
                follows.append([])
            if entry != CELL:
                follows[-1].append(entry)
            before = entry
        return follows

    def take(self, chosen: Sequence[int]) -> tuple[list[Event], int]:
        walk = self._walk
        right = 1
        while right < len(chosen) and self._guesses[right - 1] == chosen[right - 1]:
            right += 1
        self._guesses = [*chosen[right:], *self._guesses[len(chosen) :]]
        events: list[Event] = []
        for id in chosen[:right]:
            events += walk.take(id)
            events += walk.run_forced()
        kept = self._wanted[right - 1] + 1
        del walk.fresh[:kept]
        return events, kept

    def _guess(self, count: int) -> list[int]:
        """The best guesses of the next cells: what earlier turns found there, else what is drawn nearby."""
        missing = count - len(self._guesses)
        if missing > 0:
            self._guesses += self._walk.nearby(self._guesses, missing)
        return self._guesses[: max(count, 0)]


@dataclass(kw_only=True)
class _Run:
    """One row of cells on its way.

    Attributes:
        offset: Of its first id behind the ids that are there for good.
        ids: What stands before its cells and has not been computed (what the grammar writes; for the first row also
            what was chosen last), and the cells so far.
        lead: How many of ``ids`` are no cells.
        skipped: Cells of the row that were there before.
        width: Cells that it will have, those included.
        fed: How many of ``ids`` have been computed.
    """

    offset: int
    ids: list[int]
    lead: int
    skipped: int
    width: int
    fed: int = 0

    @property
    def columns(self) -> int:
        """Cells that are there."""
        return self.skipped + len(self.ids) - self.lead

    @property
    def whole(self) -> bool:
        """Whether all are."""
        return self.columns == self.width


class _Rows:
    """Course of several rows at a time; outside of pictures and clips one id after another."""

    def __init__(self, walk: Walk, window: int | None) -> None:
        self._walk = walk
        self._window = window
        self._single = _Ahead(walk, _Fixed(1))
        self._rows: list[_Run] = []
        self._start = 0
        self._first = 0
        self._told = 0
        self._asked: list[_Run] = []
        self._computed: list[tuple[_Run, int]] = []

    def ask(self) -> Ask:
        if not self._rows:
            self._rows = _rows(self._walk)
            self._start = self._walk.position - len(self._walk.fresh)
            self._first = self._told = 0
        if not self._rows:
            return self._single.ask()
        ids: list[int] = []
        offsets: list[int] = []
        wanted: list[int] = []
        self._asked, self._computed = [], []
        for row in self._growing():
            if len(ids) + len(row.ids) - row.fed > _MOST_IDS and ids:
                break
            ids += row.ids[row.fed :]
            offsets += range(row.offset + row.fed, row.offset + len(row.ids))
            self._computed.append((row, len(row.ids)))
            if not row.whole:
                wanted.append(len(ids) - 1)
                self._asked.append(row)
        positions = [self._start + row.offset + len(row.ids) for row in self._asked]
        return Ask(ids=ids, offsets=offsets, wanted=wanted, positions=positions)

    def foreseen(self, most: int) -> list[list[int]]:
        return []

    def take(self, chosen: Sequence[int]) -> tuple[list[Event], int]:
        if not self._rows:
            return self._single.take(chosen)
        for row, fed in self._computed:
            row.fed = fed
        for row, id in zip(self._asked, chosen, strict=True):
            row.ids.append(id)
        events = list(self._tell())
        if not all(row.whole for row in self._rows):
            return events, 0
        # All but the last cell has been computed; it, and what the grammar writes after it, come next.
        last = self._rows[-1]
        kept = last.offset + last.fed
        del self._walk.fresh[:kept]
        self._rows = []
        return events, kept

    def _growing(self) -> Iterator[_Run]:
        """The rows that may go on now, and whole ones whose last cell has not been computed yet."""
        above: _Run | None = None
        # Rows that were told of are whole, and but for the last of them computed to the end.
        for row in self._rows[max(self._first - 2, 0) :]:
            lead = self._window or -(-row.width // 2)
            ahead = above is None or above.whole or above.columns >= row.columns + lead
            if row.whole or ahead:
                if row.fed < len(row.ids):
                    yield row
            else:
                return
            above = row

    def _tell(self) -> Iterator[Event]:
        """Tell of the cells that are there without a gap, in the order in which they stand."""
        while self._first < len(self._rows):
            row = self._rows[self._first]
            for id in row.ids[row.lead + self._told :]:
                yield from self._walk.take(id)
                yield from self._walk.run_forced()
            self._told = len(row.ids) - row.lead
            if not row.whole:
                return
            self._first, self._told = self._first + 1, 0


def _rows(walk: Walk) -> list[_Run]:
    """The rows that are missing of the open picture or clip; none unless something stands between any two of them."""
    rest = walk.rest
    if rest is None:
        return []
    rows: list[_Run] = []
    lead, before = list(walk.fresh), len(walk.fresh)
    cells = 0
    for offset, entry in enumerate([*rest.ids.tolist(), None]):
        if entry == CELL:
            cells += 1
        elif cells > rest.width:
            return []
        elif cells:
            start = before + offset - cells - len(lead)
            skipped = rest.width - cells if not rows else 0
            rows.append(_Run(offset=start, ids=lead, lead=len(lead), skipped=skipped, width=rest.width))
            lead, cells = [], 0
        if entry is not None and entry != CELL:
            lead.append(entry)
    return rows if all(row.lead for row in rows) else []
