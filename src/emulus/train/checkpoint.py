"""Trainer checkpoints: folders ``step-00000500`` that are whole or not there.

Inside: ``model/`` (what :func:`emulus.load` takes), ``trainer.safetensors`` (raw weights, averages, optimiser state)
and ``trainer.json``. The folder is filled under another name, flushed, marked ``COMPLETE`` and renamed, so a kill or
a full disk leaves the checkpoints before it as they were.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from emulus.errors import EmulusError
from emulus.files import COMPLETE, new_folder, read_json, write_json
from emulus.weights import save_tensors

STEP_FOLDER = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """Everything a run needs to go on: tensors by name and a few plain values (``step`` among them)."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def save(folder: Path, step: int, state: TrainerState, save_model: Callable[[Path], None], *, keep: int) -> Path:
    """Write the checkpoint of a step and drop the oldest ones beyond ``keep``.

    Raises:
        EmulusError: The disk is full or the folder may not be written to; older checkpoints are untouched.
    """
    path = folder / f"step-{step:08d}"
    # Left by a run that was killed while saving.
    for stale in folder.glob(".step-*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    with new_folder(path) as temporary:
        (temporary / "model").mkdir()
        save_model(temporary / "model")
        save_tensors(state.tensors, temporary / "trainer.safetensors")
        write_json(temporary / "trainer.json", state.values)
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def complete_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints under ``folder``, oldest first. Half-written ones are not among them."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name) and (path / COMPLETE).exists())


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint, if there is one."""
    whole = complete_checkpoints(folder)
    return whole[-1] if whole else None


def load(path: Path, device: torch.device) -> TrainerState:
    """Read a trainer checkpoint.

    Raises:
        EmulusError: A file is missing or damaged.
    """
    values = read_json(path / "trainer.json")
    try:
        tensors = load_file(path / "trainer.safetensors", device=str(device))
    except (OSError, SafetensorError) as error:
        raise EmulusError(f"{path} is damaged ({error}); delete it to go on from the checkpoint before it") from None
    return TrainerState(tensors=tensors, values=values)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as ``optimizer.PARAMETER.KEY``."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"optimizer.{names[id(parameter)]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Take back what :func:`optimizer_tensors` gave."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            optimizer.state[parameters[parameter]][key] = value


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under ``prefix.``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def section(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``prefix.``, without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
