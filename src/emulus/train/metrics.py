"""The run's figures: one line a step on the screen, ``metrics.jsonl`` always, boards on request."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from emulus.codec import MAX_INTEGER, as_mapping, decode, parse_json
from emulus.errors import EmulusError, at_least
from emulus.files import disk_errors, write_file, write_text
from emulus.log import logger
from emulus.train.boards import open_boards

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

METRICS_FILE = "metrics.jsonl"
TRACE_FILE, TABLE_FILE = "trace.json.gz", "operations.txt"
# Bytes of a line of metrics.jsonl; Emulus writes no longer ones.
_MOST_LINE = 2**20
# Figures that are counted and summed up: finite, 0 or more.
_COUNTS = {"tokens", "frames", "pictures", "seconds", "skipped", "again", "time"}
_MOST_FIGURE = 1e39
# A profile begins with this step: before it, memory is still taken and kernels are chosen or compiled.
PROFILED_FROM = 10


class MetricsLog:
    """Writes figures of steps and evaluations. Opening it for a resumed run forgets the steps that are done again.

    Of several processes only the first writes.
    """

    def __init__(self, run: Path, *, resumed_at: int, boards: Sequence[str] = ()) -> None:
        """Open ``metrics.jsonl`` and the boards.

        Args:
            run: Folder of the run.
            resumed_at: Steps that the run has behind it.
            boards: See :func:`emulus.train.boards.open_boards`.

        Raises:
            EmulusError: The file cannot be written, or a board's package is not installed.
        """
        self.path = run / METRICS_FILE
        self._first = _is_first()
        self._boards = open_boards(boards, run, resumed_at) if self._first else ()
        if not self._first:
            return
        write_file(self.path, lambda temporary: _copy_until(run, resumed_at, temporary))

    def write(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        """Append one line: the step (from 1), ``train`` or ``evaluation``, and the figures."""
        if not self._first:
            return
        self._append({"step": step, "kind": kind, **figures})
        for board in self._boards:
            board.write(step, kind, figures)

    def note(self, step: int, text: str) -> None:
        """Say that something is unusual, on the screen and as a line of the kind ``note``."""
        if self._first:
            logger.warning(text)
            self._append({"step": step, "kind": "note", "text": text})

    def close(self) -> None:
        """Close the boards."""
        for board in self._boards:
            board.close()

    def _append(self, line: dict[str, Any]) -> None:
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _copy_until(run: Path, step: int, path: Path) -> None:
    """Write the lines up to a step, and one that says how many steps will be done again."""
    newest = -1
    with path.open("w", encoding="utf-8") as file:
        for line in scan_metrics(run):
            newest = max(newest, line["step"])
            if line["step"] <= step:
                file.write(json.dumps(line) + "\n")
        if newest >= 0:
            again = {"step": step, "kind": "restart", "again": max(newest - step, 0), "time": time.time()}
            file.write(json.dumps(again) + "\n")


def read_metrics(run: Path, damage: Counter[str] | None = None) -> list[dict[str, Any]]:
    """:func:`scan_metrics`, all at once."""
    return list(scan_metrics(run, damage))


def scan_metrics(run: Path, damage: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """Every whole line of a run's ``metrics.jsonl``, one by one; a line cut by a kill is dropped.

    Each has a ``step`` (0 or more) and a ``kind``: ``train`` and ``evaluation`` have figures, which are numbers,
    ``note`` has a ``text``, ``restart`` says how many steps are done ``again``. Whatever is of another type is damaged
    and left out.

    Args:
        run: Folder of the run; without the file there are no lines.
        damage: Counts ``lines`` and ``values`` that were left out.

    Raises:
        EmulusError: The file cannot be read.
    """
    path = run / METRICS_FILE
    if not path.exists():
        return
    if not path.is_file():
        raise EmulusError(f"{path} is not a file; move it away")
    damage = Counter[str]() if damage is None else damage
    try:
        with path.open("rb") as file:
            while text := file.readline(_MOST_LINE):
                if line := _parse_line(text, damage):
                    yield line
    except OSError as error:
        raise EmulusError(f"{path} cannot be read ({error.strerror}); restore it") from None


def _parse_line(text: bytes, damage: Counter[str]) -> dict[str, Any] | None:
    try:
        values = as_mapping(parse_json(text.decode(errors="replace"), METRICS_FILE), METRICS_FILE)
        line = {"step": decode(int, values.get("step"), "step"), "kind": decode(str, values.get("kind"), "kind")}
        at_least(0, step=line["step"])
    except EmulusError:
        damage["lines"] += 1
        return None
    for name, value in values.items():
        if name in line:
            continue
        if isinstance(value, str) if (line["kind"], name) == ("note", "text") else _is_figure(name, value):
            line[name] = value
        else:
            damage["values"] += 1
    return line


def _is_figure(name: str, value: object) -> bool:
    if type(value) is not float and not (type(value) is int and abs(value) < MAX_INTEGER):
        return False
    if name in _COUNTS:
        return 0 <= value < MAX_INTEGER
    # A loss may be infinite or not a number; such are drawn as gaps. Others are of float32.
    return not math.isfinite(value) or abs(value) < _MOST_FIGURE


class StepLine:
    """Times the steps, and prints the step line: the speed since the last one and the time left."""

    def __init__(self, steps: int, unit: str, device: torch.device, flops_peak: float = 0.0) -> None:
        """Start the clock.

        Args:
            steps: Of the whole run.
            unit: What is counted: ``tokens`` or ``frames``.
            device: Whose memory is shown.
            flops_peak: Operations a second of all devices together that the counts of :meth:`step` stand for; 0 if
                there is no telling, and then no MFU either.
        """
        self.steps, self.unit, self.device, self.flops_peak = steps, unit, device, flops_peak
        self._since = self._last = time.monotonic()
        self._items, self._flops, self._wait, self._count = 0, 0.0, 0.0, 0

    def step(self, *, items: int, flops: float = 0.0, wait: float = 0.0) -> dict[str, float]:
        """Count one step.

        Args:
            items: Its tokens or frames, over all processes.
            flops: Operations that its model needed, likewise; see :func:`emulus.train.flops.decoder_flops`.
            wait: Seconds spent waiting for data.

        Returns:
            Figures for ``metrics.jsonl``: the items, seconds, items a second, shares of the peak (``mfu``) and of the
            time waited (``wait``), and GiB of memory.
        """
        now = time.monotonic()
        seconds = max(now - self._last, 1e-9)
        self._last = now
        self._items += items
        self._flops += flops
        self._wait += wait
        self._count += 1
        return {self.unit: float(items), "seconds": seconds, **self._speeds(items, flops, wait, seconds)}

    def show(self, step: int, figures: Mapping[str, float]) -> None:
        """Print the line of ``step`` and start a new span.

        Args:
            step: From 1.
            figures: Of the step: losses, ``grad_norm``, ``learning_rate``; ``skipped`` steps show when there are any.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        speeds = self._speeds(self._items, self._flops, self._wait, seconds)
        left = int((self.steps - step) * seconds / max(self._count, 1))
        own = {self.unit, "seconds", *speeds}
        parts = [f"step {step}/{self.steps}", *(_shown(*pair) for pair in figures.items() if pair[0] not in own)]
        parts.append(f"{speeds[f'{self.unit}_per_second']:,.0f} {self.unit}/s")
        if "mfu" in speeds:
            parts.append(f"MFU {100 * speeds['mfu']:.1f} %")
        parts.append(f"wait {100 * speeds['wait']:.1f} %")
        if "memory" in speeds:
            parts.append(f"{speeds['memory']:.1f} GiB")
        parts.append(f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
        if _is_first():
            logger.info("  ".join(part for part in parts if part))
        self.restart()

    def restart(self) -> None:
        """Forget the span, so that an evaluation or a save does not count as slow steps."""
        self._since = self._last = time.monotonic()
        self._items, self._flops, self._wait, self._count = 0, 0.0, 0.0, 0

    def _speeds(self, items: int, flops: float, wait: float, seconds: float) -> dict[str, float]:
        speeds = {f"{self.unit}_per_second": items / seconds}
        if flops and self.flops_peak:
            speeds["mfu"] = flops / seconds / self.flops_peak
        speeds["wait"] = min(wait / seconds, 1.0)
        if memory := _memory(self.device):
            speeds["memory"] = memory / 2**30
        return speeds


@contextmanager
def profiled(steps: int, folder: Path) -> Iterator[Profiler]:
    """Record some steps with PyTorch's profiler, from the tenth of this start on.

    Args:
        steps: How many to record; 0 records none.
        folder: Gets ``trace.json.gz``, which ``chrome://tracing`` and Perfetto show, and ``operations.txt``, a table of
            the operations that took longest. Of several processes only the first records.

    Yields:
        What is to be told of each step's end.
    """
    if not steps or not _is_first():
        yield Profiler()
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=PROFILED_FROM - 2, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda profile: _save_profile(profile, steps, folder),
        record_shapes=True,
    ) as profile:
        yield Profiler(profile)


class Profiler:
    """Told of each step's end; does nothing unless there is something to record."""

    def __init__(self, profile: torch.profiler.profile | None = None) -> None:
        self._profile = profile

    def step(self) -> None:
        """A step has ended."""
        if self._profile is not None:
            self._profile.step()


def _save_profile(profile: torch.profiler.profile, steps: int, folder: Path) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(folder / TRACE_FILE))
    longest = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    write_text(folder / TABLE_FILE, profile.key_averages().table(sort_by=longest, row_limit=30))
    logger.info(f"profile of {steps} steps in {folder}")


def _shown(name: str, value: float) -> str:
    """One figure of the step line; empty for what is only shown when there is something to show."""
    if name == "skipped":
        return f"skipped {value:.0f}" if value else ""
    if name == "learning_rate":
        mantissa, _, power = f"{value:.1e}".partition("e")
        return f"lr {mantissa}e{int(power)}"
    return f"{name} {value:.4g}"


def _memory(device: torch.device) -> int:
    """The most bytes used so far: the GPU's, or the process's; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _is_first() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
