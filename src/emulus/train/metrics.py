"""The run's figures: one line a step on the screen, ``metrics.jsonl`` always, TensorBoard on request."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from emulus.errors import EmulusError
from emulus.files import disk_errors, write_text
from emulus.log import logger

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Writes figures of steps and evaluations. Opening it for a resumed run forgets the steps that are done again."""

    def __init__(self, run: Path, *, resumed_at: int, tensorboard: bool) -> None:
        self.path = run / METRICS_FILE
        kept = [line for line in read_metrics(run) if line["step"] <= resumed_at]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._board = _tensorboard(run, resumed_at) if tensorboard else None

    def write(self, step: int, kind: str, figures: dict[str, float]) -> None:
        """Append one line: the step (from 1), ``train`` or ``evaluation``, and the figures."""
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **figures}) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Every whole line of a run's ``metrics.jsonl``; a line cut by a kill is dropped."""
    path = run / METRICS_FILE
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def _tensorboard(run: Path, resumed_at: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise EmulusError(
            "tensorboard is not installed: pip install 'emulus[tensorboard]', or drop --train.tensorboard"
        ) from None
    return SummaryWriter(str(run / "tensorboard"), purge_step=resumed_at + 1)


class StepLine:
    """Prints the step line, with the speed since the last one and the time left."""

    def __init__(self, steps: int, unit: str, device: torch.device) -> None:
        self.steps, self.unit, self.device = steps, unit, device
        self._since, self._items, self._count = time.monotonic(), 0, 0

    def step(self, items: int) -> None:
        """Count one step's tokens or frames."""
        self._items += items
        self._count += 1

    def show(self, step: int, figures: dict[str, float]) -> None:
        """Print the line of ``step`` and start a new span."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        left = int((self.steps - step) * seconds / max(self._count, 1))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        speed = f"{self._items / seconds:,.0f} {self.unit}/s"
        eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        logger.info(f"step {step}/{self.steps}  {shown}  {speed}  {_memory(self.device)}  ETA {eta}")
        self.restart()

    def restart(self) -> None:
        """Forget the span, so that an evaluation or a save does not count as slow steps."""
        self._since, self._items, self._count = time.monotonic(), 0, 0


def _memory(device: torch.device) -> str:
    """The most memory used so far: the GPU's, or the process's."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    if resource is None:
        return ""
    # Kilobytes on Linux, bytes on macOS.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB"
