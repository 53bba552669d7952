"""what a user says about running -> engine: in which order ids are computed, in how much memory, how many at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from emulus.checks import choice, shown, whole
from emulus.engine import Engine, Jacobi, Schedule, Sequential, Zipar
from emulus.engine.runner import Runner
from emulus.errors import EmulusError
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

    None is the default for each of them.

    Raises:
        EmulusError: A value is of the wrong type or out of range.
    """

    schedule: ScheduleName | Schedule = "auto"
    kv_budget: int | None = None
    kv_dtype: torch.dtype | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        schedule = "auto" if self.schedule is None else self.schedule
        if not isinstance(schedule, Sequential | Jacobi | Zipar):
            if not isinstance(schedule, str):
                raise EmulusError(f"schedule is {shown(schedule)} but must be a value of emulus.engine, or a name")
            choice("schedule", schedule, get_args(ScheduleName))
        if self.kv_dtype is not None and not isinstance(self.kv_dtype, torch.dtype):
            raise EmulusError(f"kv_dtype is {shown(self.kv_dtype)} but must be a type of torch, such as torch.bfloat16")
        together = 8 if self.batch_size is None else whole("batch_size", self.batch_size, least=1)
        budget = None if self.kv_budget is None else whole("kv_budget", self.kv_budget, least=1)
        for name, value in {"schedule": schedule, "batch_size": together, "kv_budget": budget}.items():
            object.__setattr__(self, name, value)

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
