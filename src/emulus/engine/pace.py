"""How far to guess ahead: the window that has given the most ids per second."""

from __future__ import annotations

_WINDOWS = (1, 2, 4, 8, 16, 32)

_FIRST = _WINDOWS.index(4)

_TRIAL = 12
"""Steps that a window is tried for: guesses need a few to settle."""

_LOOK_ASIDE = 6
"""One trial of so many is of a window beside the best, since pictures and machines change."""

_MEMORY = 0.7
"""Weight of the past in a window's rate."""


class Pace:
    """Learns which window pays, while steps are made.

    What a larger window costs depends on the machine, the kind of weights and how many sequences are in a step; what it
    brings depends on the picture, and on the window itself, since a guess that stays in it longer is mended more often.
    So neither is foretold: ids and seconds are counted, and the window climbs to where there are most ids per second.
    """

    def __init__(self) -> None:
        self._index = _FIRST
        self._rates: dict[int, float] = {}
        self._lanes = 0
        self._trials = 0
        self._restart()

    def window(self) -> int:
        """Ids to choose at once in the next step."""
        return _WINDOWS[self._index]

    def made(self, ids: int, seconds: float, lanes: int) -> None:
        """Be told what a step gave.

        Args:
            ids: How many were added.
            seconds: What it took.
            lanes: Sequences that were in it.
        """
        if lanes.bit_length() != self._lanes:
            # With twice as many sequences everything costs something else.
            self._lanes = lanes.bit_length()
            self._rates.clear()
            self._restart()
        self._steps += 1
        self._ids += ids
        self._seconds += seconds
        if self._steps == _TRIAL:
            self._finish_trial()

    def _restart(self) -> None:
        self._steps, self._ids, self._seconds = 0, 0, 0.0

    def _finish_trial(self) -> None:
        rate = self._ids / max(self._seconds, 1e-9)
        known = self._rates.get(self._index, rate)
        self._rates[self._index] = _MEMORY * known + (1 - _MEMORY) * rate
        self._trials += 1
        self._restart()
        self._index = self._next()

    def _next(self) -> int:
        best = max(self._rates, key=self._rates.__getitem__)
        beside = [index for index in (best + 1, best - 1) if 0 <= index < len(_WINDOWS)]
        unknown = [index for index in beside if index not in self._rates]
        if unknown:
            return unknown[0]
        turn, aside = divmod(self._trials, _LOOK_ASIDE)
        return best if aside else beside[turn % len(beside)]
