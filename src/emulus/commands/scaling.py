"""The scaling law of a ladder, from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from emulus.commands.train import take_recipe
from emulus.config import from_flags
from emulus.scaling.ladder import ScalingConfig
from emulus.scaling.run import run_scaling


def scaling(arguments: Sequence[str]) -> None:
    """``emulus scaling RECIPE [--fit-only] [--config FILE] [flags]``: prints the page's path."""
    chosen, rest = take_recipe(arguments, "scaling")
    # What a run draws is not what is asked here.
    default = ScalingConfig(base=dataclasses.replace(chosen.decoder, evaluation_pictures=0))
    config = from_flags(default, rest, program="emulus scaling RECIPE")
    print(run_scaling(config))
