"""What the loop needs to know of the thing it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import PIL.Image
from torch import Tensor, nn

from emulus.parallel.processes import Processes

Batch = TypeVar("Batch")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """One batch's part of a step's loss.

    Attributes:
        total: What is differentiated; the step's loss is the sum over its batches.
        figures: Means to log, each as a sum and the number (or weight) it is to be divided by over the whole step. The
            same names for every batch, on every process.
        items: How many tokens or frames the batch held, for the speed.
        flops: Operations of its forward and backward pass, where they are known.
    """

    total: Tensor
    figures: dict[str, tuple[Tensor, float]]
    items: int
    flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A look at held-out data: figures, and pictures to save beside them."""

    metrics: dict[str, float]
    pictures: dict[str, PIL.Image.Image] = field(default_factory=dict)


class Objective(ABC, Generic[Batch, Model]):
    """A model, its data and its loss. The loop owns everything else.

    ``config`` is the dataclass that is saved with the run; ``processes`` is who trains.

    ``batches`` is a pure function of the step, and everything random in ``loss`` and ``after_step`` draws from torch's
    global generator, which the loop seeds from the step and the batch. So a run can stop anywhere and go on to the same
    bits.
    """

    model: Model
    config: Any
    processes: Processes
    unit: str = "items"

    @abstractmethod
    def batches(self, step: int) -> Sequence[Batch]:
        """What this process sees in a step, in pieces that each fit the memory; their gradients add up."""

    def number(self, place: int) -> int:
        """Which of the whole step's batches is this process's ``place``-th; decides what is random in it."""
        return place

    def weight(self, batch: Batch) -> float:
        """How much of the step's loss a batch is; the loop adds up those of all processes."""
        return 1.0

    @abstractmethod
    def loss(self, batch: Batch, step_weight: float) -> StepLoss:
        """Forward pass of one of a step's batches, as its part of a step that weighs ``step_weight``."""

    def fingerprint(self) -> str:
        """What a run may not change half-way: of the data, not of settings. Checked when a run is resumed."""
        return ""

    def before_step(self, step: int, steps: int) -> None:
        """Set whatever depends on how far the run is."""

    def after_step(self, step: int, steps: int) -> dict[str, float]:
        """What else changes after the optimiser's step; more figures for the log."""
        return {}

    def extra_tensors(self) -> dict[str, Tensor]:
        """State beside the model that a resumed run needs; a checkpoint is loaded into these tensors."""
        return {}

    def reading_state(self, step: int) -> dict[str, Any]:
        """Where the data stands before a step, as JSON."""
        return {}

    def load_reading_state(self, state: dict[str, Any]) -> None:
        """Go on reading from there."""

    @abstractmethod
    def evaluate(self, model: Model) -> Evaluation:
        """Measure ``model`` (with the averaged weights, in eval mode) on held-out data; all processes call it."""

    @abstractmethod
    def save_model(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write the model with these weights, whole and on the CPU, as a folder that :func:`emulus.load` takes."""

    def close(self) -> None:
        """Let go of what goes on in the background."""

    def describe(self) -> dict[str, Any]:
        """What the run is about, for the first log line."""
        return {"parameters": sum(parameter.numel() for parameter in self.model.parameters())}
