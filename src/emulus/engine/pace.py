"""How far to guess ahead: weighs what a larger step costs against how many more guesses it brings home."""

from __future__ import annotations

# A step of the next candidate costs about twice as much where arithmetic is the limit, and the same where memory is.
_WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

_MEMORY = 0.9
"""Weight of the past in running means: some twenty steps, since pictures change as they go on."""


class Pace:
    """A cost model of steps, learned while they are made.

    A step of ``n`` tokens costs what steps of about ``n`` tokens have cost; where none was seen yet, what the next
    smaller ones did: so larger windows are tried, and given up when they do not pay. Each guess is supposed to be right
    by the same chance, if those before it were.

    Attributes:
        lanes: Sequences in a step now, each of which a window's ids are computed for.
    """

    def __init__(self) -> None:
        self.lanes = 1
        self._seconds: dict[int, float] = {}
        self._chance = 0.5

    def took(self, tokens: int, seconds: float) -> None:
        """Be told what a step cost."""
        bucket = tokens.bit_length()
        known = self._seconds.get(bucket, seconds)
        # The smaller of the two first: a pause of the machine is not the price of the step.
        self._seconds[bucket] = min(seconds, _MEMORY * known + (1 - _MEMORY) * seconds)

    def saw(self, tried: int, right: int) -> None:
        """Be told how many ids a window of ``tried`` gave; the first is always right."""
        for hit in [1.0] * (right - 1) + [0.0] * (right < tried):
            self._chance = _MEMORY * self._chance + (1 - _MEMORY) * hit

    def window(self) -> int:
        """The window that gives the most ids per second."""
        return max(_WINDOWS, key=lambda window: self._ids(window) / self._cost(window * self.lanes))

    def _ids(self, window: int) -> float:
        """Ids that a window is expected to give."""
        return sum(self._chance**guess for guess in range(window))

    def _cost(self, tokens: int) -> float:
        """Seconds that a step of so many tokens is expected to take."""
        seen = [seconds for bucket, seconds in self._seconds.items() if bucket <= tokens.bit_length()]
        return max(seen, default=1.0)
