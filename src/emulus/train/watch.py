"""What looks wrong while a run goes on: outlier gradients, loss spikes, slow processes."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emulus.codec import decode_fields
from emulus.errors import EmulusError, at_least

NORMS, LEAST_NORMS = 64, 16
LOSSES, LEAST_LOSSES, DEVIATIONS = 128, 16, 5.0
SPAN, SLOWER = 16, 1.5
# By less than so many seconds a step, slowness is only what else the machine had to do.
LEAST_SLOWER = 0.1
MOST_IN_A_ROW = 8
# Below this share of the mean a rise is no spike, however even the losses were before.
LEAST_RISE = 0.01
MOST_NOT_FINITE = 100


@dataclass(frozen=True, kw_only=True)
class WatchState:
    """What a resumed run needs to decide alike.

    Attributes:
        norms: The last gradient norms.
        losses: The last losses.
        in_a_row: Outliers since the last usual norm.
        skipped: Steps left out so far.
        spikes: Loss spikes so far.
        not_finite: Steps left out for a gradient that was not finite; older checkpoints do not say.
    """

    norms: list[float]
    losses: list[float]
    in_a_row: int
    skipped: int
    spikes: int
    not_finite: int | None = None

    def __post_init__(self) -> None:
        at_least(0, in_a_row=self.in_a_row, skipped=self.skipped, spikes=self.spikes)


class Watch:
    """Watches norms, losses and times, which must be the same numbers on every process.

    Attributes:
        skipped: Steps left out so far.
        not_finite: Those of them whose gradient was NaN or infinite.
        spikes: Loss spikes so far.
    """

    def __init__(self, skip_norm: float = 0.0) -> None:
        """Start with nothing seen.

        Args:
            skip_norm: A gradient norm of more than this many times the median of the last ones is an outlier; 0 finds
                only norms that are not finite.
        """
        self.skip_norm = skip_norm
        self.skipped, self.not_finite, self.spikes = 0, 0, 0
        self._norms: deque[float] = deque(maxlen=NORMS)
        self._losses: deque[float] = deque(maxlen=LOSSES)
        self._in_a_row = 0
        self._not_finite = 0
        # Not part of the state: times are of this machine and decide nothing.
        self._times: list[Sequence[float]] = []

    def outlier(self, norm: float) -> bool:
        """Whether a step is to be left out because of its gradient norm, which is counted.

        After eight outliers in a row the norm is taken to have changed for good, and its usual size is learnt anew:
        otherwise a run could skip every step from some point on.
        """
        if not math.isfinite(norm):
            self.skipped += 1
            self.not_finite += 1
            self._not_finite += 1
            return True
        self._not_finite = 0
        known = self.skip_norm > 0 and len(self._norms) >= LEAST_NORMS
        if known and norm > self.skip_norm * statistics.median(self._norms):
            if self._in_a_row < MOST_IN_A_ROW:
                self._in_a_row += 1
                self.skipped += 1
                return True
            self._norms.clear()
        self._in_a_row = 0
        self._norms.append(norm)
        return False

    @property
    def is_hopeless(self) -> bool:
        """Whether so many norms in a row were not finite that none will be."""
        return self._not_finite >= MOST_NOT_FINITE

    def skip_note(self, step: int, norm: float) -> str:
        """What to say of a step that :meth:`outlier` left out; more, where non-finite gradients begin."""
        note = f"step {step}: the gradient's norm is {norm:.4g}; the step was skipped"
        if self._not_finite != 1:
            return note
        return (
            f"{note}. NaN or infinite gradients train nothing: if they come again, lower the learning rate or train "
            "with --train.precision fp32"
        )

    def summary(self, steps: int) -> str | None:
        """What a run that ends after so many steps must say about those that it left out, if any."""
        if not self.skipped:
            return None
        return (
            f"{self.skipped:,} of {steps:,} steps were skipped and trained nothing: {self.not_finite:,} with a NaN or "
            f"infinite gradient, {self.skipped - self.not_finite:,} with an outlier of --train.skip-norm"
        )

    def loss(self, step: int, loss: float) -> str | None:
        """Look at a step's loss.

        Args:
            step: Number of the step, for the note.
            loss: Its loss.

        Returns:
            A note if it is not finite, or above the mean of the last losses by more than five standard deviations.
        """
        if not math.isfinite(loss):
            self.spikes += 1
            return f"step {step}: the loss is {loss}"
        note = None
        if len(self._losses) >= LEAST_LOSSES:
            mean = statistics.fmean(self._losses)
            deviation = statistics.pstdev(self._losses, mean)
            limit = mean + max(DEVIATIONS * deviation, LEAST_RISE * abs(mean))
            if loss > limit:
                self.spikes += 1
                note = f"step {step}: loss spike, {loss:.4g} after a mean of {mean:.4g} (deviation {deviation:.2g})"
            # A spike counts as the limit, so that one does not hide the next; a new level is still learnt.
            loss = min(loss, limit)
        self._losses.append(loss)
        return note

    def seconds(self, per_rank: Sequence[float]) -> str | None:
        """Look at how long each process computed by itself.

        Args:
            per_rank: Seconds of each process, in the order of ranks, since the last call; waiting for other processes
                must not count, or all are equally slow.

        Returns:
            Every 16 calls at most one note: the slowest process, if it took over 1.5 times the median.
        """
        if self._times and len(self._times[0]) != len(per_rank):
            self._times.clear()
        self._times.append(tuple(per_rank))
        if len(self._times) < SPAN:
            return None
        totals = [sum(times) for times in zip(*self._times, strict=True)]
        self._times.clear()
        # Of two processes the faster is the measure.
        usual, slowest = statistics.median_low(totals), max(totals)
        if len(totals) < 2 or slowest <= max(SLOWER * usual, usual + SPAN * LEAST_SLOWER):
            return None
        return (
            f"process {totals.index(slowest)} is slow: {slowest / SPAN:.3g} s where the median is {usual / SPAN:.3g} s"
        )

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to decide alike, as JSON values."""
        state = WatchState(
            norms=list(self._norms),
            losses=list(self._losses),
            in_a_row=self._in_a_row,
            skipped=self.skipped,
            not_finite=self.not_finite,
            spikes=self.spikes,
        )
        return asdict(state)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave.

        Raises:
            EmulusError: It is not that.
        """
        try:
            values = decode_fields(WatchState, state, "they")
        except EmulusError as error:
            raise EmulusError(f"the figures of norms and losses are damaged ({error})") from None
        self._norms.clear()
        self._norms.extend(values.norms)
        self._losses.clear()
        self._losses.extend(values.losses)
        self._in_a_row, self.skipped, self.spikes = values.in_a_row, values.skipped, values.spikes
        # Checkpoints of before did not tell these apart; without a threshold there are no others.
        unknown = 0 if self.skip_norm else values.skipped
        self.not_finite = unknown if values.not_finite is None else values.not_finite
