"""what a user says about running -> engine: in which order ids are computed, in how much memory, how many at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from emulus.engine import Engine, Jacobi, Schedule, Sequential, Zipar
from emulus.engine.runner import Runner
from emulus.errors import EmulusError, at_least, did_you_mean
from emulus.log import logger
from emulus.model import Decoder
from emulus.sequence import Grammar

ScheduleName = Literal["auto", "sequential", "jacobi", "zipar"]

_WINDOWED: Mapping[str, type[Jacobi] | type[Zipar]] = {"jacobi": Jacobi, "zipar": Zipar}
_SCHEDULES: Mapping[str, type[Schedule]] = {"sequential": Sequential, **_WINDOWED}


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How to run an engine.

    Attributes:
        schedule: In which order ids are computed: a value of :mod:`emulus.engine`, or a name. ``auto`` is
            :func:`best_schedule`.
        kv_budget: Bytes for keys and values on each device; None is nine tenths of what is free.
        kv_dtype: Of keys and values, as for :class:`~emulus.engine.runner.Runner`.
        batch_size: Most requests that are computed together.
    """

    schedule: ScheduleName | Schedule = "auto"
    kv_budget: int | None = None
    kv_dtype: torch.dtype | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        names = get_args(ScheduleName)
        if not isinstance(self.schedule, str | Sequential | Jacobi | Zipar):
            raise EmulusError(f"schedule is {self.schedule!r} but must be a value of emulus.engine, or a name")
        if self.kv_dtype is not None and not isinstance(self.kv_dtype, torch.dtype):
            raise EmulusError(f"kv_dtype is {self.kv_dtype!r} but must be a type of torch, such as torch.bfloat16")
        if isinstance(self.schedule, str) and self.schedule not in names:
            raise EmulusError(f"there is no schedule {self.schedule!r}{did_you_mean(self.schedule, names)}")
        at_least(1, batch_size=self.batch_size)
        if self.kv_budget is not None:
            at_least(1, kv_budget=self.kv_budget)

    def engine(self, decoder: Decoder, grammar: Grammar) -> Engine:
        """Make the engine; one line says if it will draw other pictures than the reference."""
        schedule = _schedule(self.schedule, decoder)
        if not schedule.exact:
            logger.warning(f"{schedule} is lossy: its pictures are not those of one id after another")
        return Engine(decoder, grammar, schedule=schedule, kv_budget=self.kv_budget, kv_dtype=self.kv_dtype)


def best_schedule(decoder: Decoder) -> Schedule:
    """Guessing ahead where that changes no bit of any result, else one id after another.

    The native kernels compute the same for a token whatever is computed beside it. Elsewhere rounding depends on how
    many tokens there are, and which those are depends on time; but a seed should give the same picture every time.
    """
    return Jacobi() if Runner(decoder).steady else Sequential()


def schedule_called(name: ScheduleName, window: int | None = None) -> ScheduleName | Schedule:
    """A schedule by its name, with another window than its own.

    Args:
        name: Of the schedule; ``auto`` stays that.
        window: Of ``jacobi``, ids guessed at once; of ``zipar``, columns that the row above must be ahead.

    Raises:
        EmulusError: There is no such schedule, or it has no window.
    """
    if window is None:
        return name
    if name not in _WINDOWED:
        raise EmulusError(f"a window is of jacobi or zipar, and the schedule is {name}; choose one of these or none")
    return _WINDOWED[name](window=window)


def _schedule(schedule: str | Schedule, decoder: Decoder) -> Schedule:
    if not isinstance(schedule, str):
        return schedule
    return best_schedule(decoder) if schedule == "auto" else _SCHEDULES[schedule]()
