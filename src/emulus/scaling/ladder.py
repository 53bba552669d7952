"""A ladder of runs: what it is made of, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emulus.errors import EmulusError, at_least
from emulus.model.config import sized
from emulus.scaling.fit import Fit, Interval
from emulus.scaling.rate import WIDTH_POWER
from emulus.train.pretrain import PretrainConfig

ALL = "all"
"""The modality of every id that a model has to choose: visual and text ids together, each counting the same."""


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """A ladder of runs, and a larger one that it is to foretell.

    Attributes:
        base: What all runs have in common. Its ``size`` is the one that ``train.learning_rate`` suits (see
            ``width_power``), its ``train.warmup_steps`` are at most a fifth of a run, and its ``train.steps`` only say
            what share of a run the average reaches back. Its ``out`` is not used.
        out: A folder for each run, ``scaling.json`` and ``scaling.html``.
        sizes: Named sizes of the ladder.
        token_counts: Each size is trained from scratch on each of these numbers of ids.
        held_out_size: Size of the run that is foretold. No run of its size or larger is fitted.
        held_out_tokens: Number of ids that it is trained on.
        width_power: The learning rate of a width is the base's times ``(base's width / width) ** width_power``.
        delta: Where the fit's loss turns from squares to absolute values.
        draws: Of the bootstrap that gives the intervals.
        level: Share of the draws that an interval holds.
        fit_only: Train nothing; fit the runs that are there.
    """

    base: PretrainConfig
    out: Path = Path("runs/scaling")
    sizes: tuple[str, ...] = ("emoji-3m", "emoji-6m", "emoji-10m", "emoji-25m")
    token_counts: tuple[int, ...] = (500_000, 1_000_000, 2_000_000, 4_000_000)
    held_out_size: str = "emoji-60m"
    held_out_tokens: int = 4_000_000
    width_power: float = WIDTH_POWER
    delta: float = 1e-3
    draws: int = 1000
    level: float = 0.9
    fit_only: bool = False

    def __post_init__(self) -> None:
        at_least(1, held_out_tokens=self.held_out_tokens, draws=self.draws)
        for count in self.token_counts:
            at_least(1, token_counts=count)
        for size in (*self.sizes, self.held_out_size):
            sized(size, vocab_size=1)
        if not 0 < self.level < 1:
            raise EmulusError(f"level must be between 0 and 1, got {self.level}")
        if not 0 < self.delta < float("inf"):
            raise EmulusError(f"delta must be positive, got {self.delta}")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run of the ladder.

    Attributes:
        size: Its named size.
        tokens: Number of ids it is to see.
        config: Everything about it.
    """

    size: str
    tokens: int
    config: PretrainConfig


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A run that is finished.

    Attributes:
        name: Of its folder.
        size: Its named size.
        parameters: N, see :func:`~emulus.scaling.rate.counted_parameters`.
        tokens: D, the ids it saw.
        losses: Bits per held-out id, by modality and over all.
    """

    name: str
    size: str
    parameters: int
    tokens: int
    losses: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Foretold:
    """What the law says of one modality, beside what the held-out run measured.

    Attributes:
        fit: Of the smaller runs.
        predicted: Of the held-out run.
        measured: None until it is trained.
    """

    fit: Fit
    predicted: Interval
    measured: float | None

    @property
    def inside(self) -> bool | None:
        """Whether the measured loss lies in the interval."""
        if self.measured is None:
            return None
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that is known of a ladder.

    Attributes:
        fitted: Runs that the law was fitted to.
        held_out: The larger run; its losses are empty until it is trained.
        missing: Names of runs that are not finished.
        foretold: By modality.
    """

    fitted: tuple[Measured, ...]
    held_out: Measured
    missing: tuple[str, ...]
    foretold: Mapping[str, Foretold]
