"""What a model or a recipe is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from torch import nn

from emulus.bundle import Bundle, load_bundle
from emulus.config import to_dict
from emulus.model import SIZES
from emulus.recipes import RECIPES, recipe
from emulus.weights import find_model


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Say what a model or a recipe is.

    Attributes:
        path: A model's folder, a training run's, or the name of a recipe.
        sizes: List the named decoder sizes and the recipes instead.
        json: Print JSON.
    """

    path: Annotated[str, tyro.conf.Positional] = "checkpoints/emoji"
    sizes: bool = False
    json: bool = False


def info(arguments: Sequence[str]) -> None:
    """``emulus info [PATH | RECIPE] [--json]``."""
    options = tyro.cli(InfoOptions, args=list(arguments), prog="emulus info")
    if options.sizes:
        found: dict[str, Any] = {"sizes": {name: dict(size) for name, size in SIZES.items()}, "recipes": list(RECIPES)}
    elif options.path in RECIPES:
        found = to_dict(recipe(options.path))
    else:
        folder = find_model(Path(options.path))
        found = {"folder": str(folder), **describe_bundle(load_bundle(folder, device="cpu", dtype=None))}
    print(
        json.dumps(found, indent=1)
        if options.json
        else yaml.safe_dump(found, sort_keys=False, allow_unicode=True).rstrip()
    )


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """The parts of a model in plain values: shapes, parameters, id ranges, what it can do."""
    found: dict[str, Any] = {}
    if bundle.decoder is not None:
        count = _parameters(bundle.decoder)
        memory = {name: f"{count * size / 2**20:.0f} MiB" for name, size in {"float32": 4, "bfloat16": 2}.items()}
        found["decoder"] = {"parameters": count, "memory": memory, **bundle.decoder.config.to_dict()}
    if bundle.vision is not None:
        config = bundle.vision.config
        factors = {"spatial_factor": config.spatial_factor, "temporal_factor": config.temporal_factor}
        found["vision"] = {"parameters": _parameters(bundle.vision), **factors, **config.to_dict()}
    if bundle.vocabulary is not None:
        vocabulary = bundle.vocabulary
        found["vocabulary"] = {
            "size": vocabulary.size,
            "text": list(vocabulary.text_range),
            "visual": list(vocabulary.visual_range),
            "specials": dict(vocabulary.specials),
        }
    if bundle.decoder is not None and bundle.vision is not None and bundle.vocabulary is not None:
        found["tasks"] = ["draw", "animate", "continue", "caption", "answer"]
        found["defaults"] = dataclasses.asdict(bundle.defaults)
    return found


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
