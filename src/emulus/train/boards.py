"""Where figures go beside ``metrics.jsonl``: TensorBoard, Weights & Biases, trackio."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from emulus.config import read_yaml
from emulus.errors import EmulusError, did_you_mean
from emulus.log import logger

PROJECT = "emulus"


class Board(Protocol):
    """Somewhere that figures are shown."""

    def write(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        """Add the figures of one step, as ``kind/name``."""

    def close(self) -> None:
        """Send what is still held back."""


class TensorBoard:
    """Event files under ``RUN/tensorboard``."""

    def __init__(self, run: Path, resumed_at: int) -> None:
        tensorboard = _imported("tensorboard", "torch.utils.tensorboard", "pip install 'emulus[tensorboard]'")
        # What an interrupted run wrote beyond its checkpoint is hidden.
        self._writer = tensorboard.SummaryWriter(str(run / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        """See :class:`Board`."""
        for name, value in figures.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """See :class:`Board`."""
        self._writer.close()


class Wandb:
    """A run of the project ``emulus`` at Weights & Biases.

    Each start is a run of its own, in a group that is named after the run's folder: steps that are done again after an
    interruption cannot be written over.
    """

    def __init__(self, run: Path, resumed_at: int) -> None:
        wandb = _imported("wandb", "wandb", "pip install 'wandb>=0.31'")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(run),
            group=run.resolve().name,
            name=_name(run, resumed_at),
            config=_config(run),
            mode=os.environ.get("WANDB_MODE") or ("online" if _logged_in(wandb) else "offline"),
        )

    def write(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        """See :class:`Board`."""
        self._run.log({f"{kind}/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        """See :class:`Board`."""
        self._run.finish()


class Trackio:
    """A run of the project ``emulus`` in trackio's database on this machine. Each start is a run of its own."""

    def __init__(self, run: Path, resumed_at: int) -> None:
        self._trackio = _imported("trackio", "trackio", "pip install trackio")
        # It talks to stdout, which is for results.
        with redirect_stdout(sys.stderr):
            self._run = self._trackio.init(
                project=PROJECT, group=run.resolve().name, name=_name(run, resumed_at), config=_config(run)
            )

    def write(self, step: int, kind: str, figures: Mapping[str, float]) -> None:
        """See :class:`Board`."""
        self._run.log({f"{kind}/{name}": value for name, value in figures.items()}, step=step)

    def close(self) -> None:
        """See :class:`Board`."""
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


_BOARDS: Mapping[str, Callable[[Path, int], Board]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def open_boards(names: Sequence[str], run: Path, resumed_at: int) -> tuple[Board, ...]:
    """Open boards by name.

    Args:
        names: ``tensorboard``, ``wandb``, ``trackio``.
        run: Folder of the run; its ``config.yaml`` is shown where a board can.
        resumed_at: Steps that the run has behind it.

    Raises:
        EmulusError: A name is unknown or its package is not installed.
    """
    for name in names:
        if name not in _BOARDS:
            raise EmulusError(f"there is no board {name!r}{did_you_mean(name, _BOARDS)}")
    return tuple(_BOARDS[name](run, resumed_at) for name in names)


def _imported(board: str, module: str, remedy: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise EmulusError(f"{board} is not installed: {remedy}, or leave it out of --train.boards") from None


def _logged_in(wandb: Any) -> bool:
    """Whether figures can be sent: there is an account, and the server answers. Nobody is asked for a key."""
    try:
        return bool(wandb.login(prompt=False))
    except wandb.Error as error:
        logger.warning(f"Weights & Biases cannot be reached, so its figures stay here for wandb sync: {error}")
        return False


def _name(run: Path, resumed_at: int) -> str:
    return f"{run.resolve().name} from step {resumed_at}" if resumed_at else run.resolve().name


def _config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    config = read_yaml(path) if path.exists() else {}
    return config if isinstance(config, dict) else {}
