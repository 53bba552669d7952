"""Training the judge of drawings from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emulus.commands.out import check_out
from emulus.config import from_flags
from emulus.dual.train import DualTrainConfig, train_dual
from emulus.recipes.emoji import DATA

_ABOUT = (
    "Train a small dual encoder, which says how well a picture and a text go together, on the training split of a data "
    "set. Ten minutes on one CPU core. Running the same command again goes on where it stopped."
)


def dual_train(arguments: Sequence[str]) -> None:
    """``emulus dual-train [--config FILE] [flags]``: prints the folder of the encoder."""
    default = DualTrainConfig(data=DATA, out=Path("runs/dual"))
    config = from_flags(default, arguments, program="emulus dual-train", description=_ABOUT)
    check_out(config.out, "folder")
    print(train_dual(config))
