"""Trainer checkpoints: folders ``step-00000500`` that are whole or not there.

Inside:

- ``trainer/``: weights, averages and optimiser state in safetensors files, one per process, which any number of
  processes in any layout can read; ``tensors.json`` lists the shape and type of each tensor.
- ``trainer.json``: all else that a run needs to go on.
- ``model/``: what :func:`emulus.load` takes.
- ``COMPLETE``: written last.

The folder is filled under another name, flushed, marked ``COMPLETE`` and renamed, so a kill or a full disk leaves the
checkpoints before it as they were. Processes on several machines must share the file system.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from emulus.codec import decode
from emulus.errors import EmulusError, shown
from emulus.files import COMPLETE, disk_errors, finish_folder, read_json, remove_folder, write_json, write_text
from emulus.train.parts import HostCopy, Shapes, WholeTensors, fill, read_table, system_error

TRAINER = "trainer"
VALUES = "trainer.json"
MODEL = "model"
INDEX = "tensors.json"
STEP_FOLDER = re.compile(r"step-(\d{8})")

WriteModel = Callable[[Mapping[str, Tensor], Path], None]
"""Writes a model, given whole tensors by name and a folder."""

_T = TypeVar("_T")
_PATIENCE = timedelta(hours=2)  # the first process writes the model while the others wait
_VISIBLE_SECONDS = 10.0  # network file systems show a new folder with a delay


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints under ``folder``, oldest first. Half-written ones are not among them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name) and (path / COMPLETE).exists())


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, if there is one."""
    whole = complete_checkpoints(folder)
    return whole[-1] if whole else None


class Checkpoints:
    """The checkpoints of one run.

    All processes of the run make one of these and call its methods in the same order, with tensors of the same names.
    """

    def __init__(self, folder: Path, *, keep: int, keep_every: int = 0, background: bool = True) -> None:
        """Say where checkpoints lie; nothing is written yet.

        Args:
            folder: Holds the step folders.
            keep: How many of the newest stay.
            keep_every: Those of steps that are a multiple of this stay for good; 0 keeps none for good.
            background: Write while training goes on.
        """
        self.folder, self.keep, self.keep_every, self.background = folder, keep, keep_every, background
        self._ranks = _Ranks()
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        write_model: WriteModel,
        model_prefix: str,
    ) -> None:
        """Save the state as it is now; a save under way is waited for first.

        The tensors are copied to host memory before this returns. A thread writes the copies, so call :meth:`wait`
        before the process ends.

        Args:
            step: How many steps are behind the state.
            tensors: By name. Of a ``DTensor`` each process writes its part; a plain tensor is the same on all processes
                and written once.
            values: What JSON can hold; floats come back to the bit.
            write_model: Called on the first process, in the thread. Its tensors lie on the disk until they are asked
                for.
            model_prefix: ``write_model`` gets the tensors whose names start with this, under names without it.

        Raises:
            EmulusError: This save or the one before it failed, here or on another process: the disk is full, the folder
                may not be written to, or it is not shared. Older checkpoints are untouched.
        """
        self.wait()
        # Now, since the caller may change them.
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        self._copy.take(tensors)
        path = self.folder / step_name(step)
        job = _Job(path=path, values=text, write_model=write_model, model_prefix=model_prefix)
        if self.background:
            self._thread = threading.Thread(target=self._write_and_note, args=(job,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(job)

    @property
    def saving(self) -> bool:
        """Whether a save is under way here."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether a save failed and nobody was told yet; :meth:`wait` tells."""
        return self._error is not None

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            EmulusError: It failed; see :meth:`save`.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read a checkpoint into tensors that exist already.

        Args:
            path: A step folder.
            tensors: All that were saved, by name, in any layout over any number of processes. Changed in place.

        Returns:
            The values that were saved with them.

        Raises:
            EmulusError: A file is missing or damaged, or the tensors are not those that were saved.
        """
        self.wait()
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        # Headers are read once for all: a thousand processes would open a thousand files each.
        values, table = self._ranks.first(path, lambda: _open(path, shapes))
        self._ranks.every(path, lambda: _fill(path, table, tensors))
        return values

    def _write_and_note(self, job: _Job) -> None:
        """What the thread runs; whoever waits for it gets the error."""
        try:
            self._write(job)
        except BaseException as error:
            self._error = error

    def _write(self, job: _Job) -> None:
        path, ranks = job.path, self._ranks
        temporary = ranks.first(path, lambda: self._begin(path))
        try:
            ranks.every(path, lambda: _check_visible(temporary))
            shapes = ranks.every(path, lambda: self._copy.write(temporary / TRAINER, ranks.group))
            ranks.first(path, lambda: self._finish(job, temporary, shapes))
        finally:
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _begin(self, path: Path) -> Path:
        """A new folder to fill; what killed runs left behind is removed."""
        for stale in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        # The time makes it a name that no other machine can have by chance.
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{time.time_ns():x}.tmp")
        (temporary / TRAINER).mkdir(parents=True)
        return temporary

    def _finish(self, job: _Job, temporary: Path, shapes: Shapes) -> None:
        """Once every process has written its part: the rest, the marker, the name; then drop old checkpoints."""
        table = read_table(temporary / TRAINER, shapes)
        write_json(temporary / TRAINER / INDEX, _index(shapes))
        write_text(temporary / VALUES, job.values)
        (temporary / MODEL).mkdir()
        job.write_model(WholeTensors(table, shapes, job.model_prefix), temporary / MODEL)
        finish_folder(temporary, job.path)
        for old in complete_checkpoints(self.folder)[: -self.keep]:
            if not self.keep_every or int(old.name.removeprefix("step-")) % self.keep_every:
                remove_folder(old)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One save, after the tensors were copied."""

    path: Path
    values: str
    write_model: WriteModel
    model_prefix: str


class _Ranks:
    """All processes of the run, on a group of their own, so that a thread can use it beside the training's.

    What goes wrong on one is raised on all.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo", timeout=_PATIENCE) if several else None
        self.rank = dist.get_rank() if several else 0

    def first(self, path: Path, work: Callable[[], _T]) -> _T:
        """Do it on the first process only; all get what it returned."""
        result, error = _attempt(path, work) if self.rank == 0 else (None, None)
        box: list[Any] = [result, _reason(path, error)]
        if self.group is not None:
            with _lost(path):
                dist.broadcast_object_list(box, src=0, group=self.group)
        _raise(box[1], error)
        return box[0]

    def every(self, path: Path, work: Callable[[], _T]) -> _T:
        """Do it on every process; each gets what its own returned."""
        result, error = _attempt(path, work)
        reasons = [_reason(path, error)]
        if self.group is not None:
            reasons *= dist.get_world_size()
            with _lost(path):
                dist.all_gather_object(reasons, reasons[0], group=self.group)
        _raise(next((reason for reason in reasons if reason), None), error)
        return result


def _attempt(path: Path, work: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return work(), None
    except SafetensorError as error:
        return None, system_error(path, error)
    except Exception as error:
        return None, error


def _reason(path: Path, error: Exception | None) -> str | None:
    """One line for an error, for the processes that did not see it."""
    if error is None:
        return None
    try:
        with disk_errors(path):
            raise error
    except EmulusError as named:
        return str(named)
    except Exception:
        return f"{path}: {error!r}"


def _raise(reason: str | None, error: Exception | None) -> None:
    """The same line on every process; a bug keeps its traceback on the one that has it."""
    if error is not None and not isinstance(error, EmulusError | OSError):
        raise error
    if reason is not None:
        raise EmulusError(reason) from error


@contextmanager
def _lost(path: Path) -> Iterator[None]:
    """Turn the end of another process into one line."""
    try:
        yield
    except RuntimeError as error:
        raise EmulusError(
            f"another process of this run ended before {path} was done (checkpoints before it are whole); "
            "see what that one said, then run the same command again"
        ) from error


def _check_visible(folder: Path) -> None:
    """Wait until the folder that the first process made is seen from here too."""
    end = time.monotonic() + _VISIBLE_SECONDS
    while not folder.is_dir():
        if time.monotonic() > end:
            raise EmulusError(
                f"{folder.parent} is not the same folder for all processes: what the first one writes is not seen by "
                "the others; choose an --out on a file system that all machines share"
            )
        time.sleep(0.1)


def _index(shapes: Shapes) -> dict[str, str]:
    """What a checkpoint holds, as text: tells one of another model from a damaged one."""
    return {name: f"{str(dtype).removeprefix('torch.')} {list(shape)}" for name, (shape, dtype) in shapes.items()}


def _open(path: Path, shapes: Shapes) -> tuple[dict[str, Any], Metadata]:
    """A checkpoint's values and where its tensors lie, once they are the wanted ones and all there."""
    values, index = _read(path, VALUES, dict[str, Any]), _read(path, f"{TRAINER}/{INDEX}", dict[str, str])
    wanted = _index(shapes)
    if wrong := sorted(name for name in {*wanted, *index} if wanted.get(name) != index.get(name)):
        there, here = (of.get(wrong[0], "missing") for of in (index, wanted))
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise EmulusError(
            f"{path} is of another model or other settings ({shown(wrong[0], quote=False)} is "
            f"{shown(there, quote=False)} there and {here} here{more}); "
            f"choose another --out, or delete {path.parent} to start over"
        )
    try:
        return values, read_table(path / TRAINER, shapes)
    except EmulusError as error:
        raise damaged(path, error) from None


def _read(path: Path, name: str, kind: Any) -> Any:
    try:
        return decode(kind, read_json(path / name), name)
    except EmulusError as error:
        raise damaged(path, error) from None


def _fill(path: Path, table: Metadata, tensors: Mapping[str, Tensor]) -> None:
    try:
        fill(tensors, path / TRAINER, table)
    except EmulusError as error:
        raise damaged(path, error) from None


def damaged(path: Path, reason: object) -> EmulusError:
    """What to raise about a checkpoint that cannot be read."""
    return EmulusError(f"{path} is damaged ({reason}); delete it to go on from the checkpoint before it")
