"""Products in 8-bit floats, for training on NVIDIA Hopper or newer."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec

import torch
from torch import nn

from emulus.errors import EmulusError

_MULTIPLE = 16


def to_float8(model: nn.Module, skip: Collection[str] = ()) -> None:
    """Let a model's linear layers multiply in float8, in place; weights stay what they are.

    Args:
        model: Any; its parameters may be on the meta device.
        skip: Names of layers that stay as they are; so do those inside them.

    Raises:
        EmulusError: torchao is not installed, the GPU cannot do it, or a layer's size is not a multiple of 16.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        raise EmulusError("float8 needs an NVIDIA GPU of the Hopper generation or newer; train without it")
    if find_spec("torchao") is None:
        raise EmulusError("float8 needs torchao: pip install torchao")
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and not _under(name, skip)]
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE:
            raise EmulusError(
                f"float8 needs sizes that are multiples of {_MULTIPLE}, but {name} is "
                f"{layer.out_features} x {layer.in_features}; choose another model or train without float8"
            )
    from torchao.float8 import convert_to_float8_training

    chosen = set(layers)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in chosen)


def _under(name: str, skip: Collection[str]) -> bool:
    return any(name == each or name.startswith(each + ".") for each in skip)
