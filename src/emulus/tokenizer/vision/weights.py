"""Vision tokenizers on disk, in the released layout: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

from pathlib import Path

import torch

from emulus.errors import EmulusError
from emulus.files import read_json, write_json
from emulus.tokenizer.vision.config import VisionTokenizerConfig
from emulus.tokenizer.vision.model import VisionTokenizer
from emulus.weights import (
    CONFIG,
    WEIGHTS,
    Tensors,
    check_shapes,
    fill,
    find_model,
    find_tensors,
    on_meta,
    save_tensors,
)


def save_vision_tokenizer(model: VisionTokenizer, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors``.

    Raises:
        EmulusError: The disk is full or the folder may not be written to.
    """
    save_tensors(model.state_dict(), folder / WEIGHTS)
    write_json(folder / CONFIG, model.config.to_dict())


def load_vision_tokenizer(folder: Path, device: torch.device | str = "cpu") -> VisionTokenizer:
    """Read a vision tokenizer, in eval mode and float32: rounded weights would move codes.

    Args:
        folder: A vision tokenizer's, the training run's that made it, or a whole model's.
        device: Where it shall lie.

    Raises:
        EmulusError: A file is missing or damaged, or the weights are not those of the config.
    """
    folder = find_model(folder)
    folder = folder / "vision" if (folder / "vision" / CONFIG).exists() else folder
    values = read_json(folder / CONFIG)
    if not isinstance(values, dict):
        raise EmulusError(f"{folder / CONFIG} is not a config: it holds no keys and values")
    config = VisionTokenizerConfig.from_dict(values)
    return load_vision_tokenizer_from(config, find_tensors(folder), device, folder=folder)


def load_vision_tokenizer_from(
    config: VisionTokenizerConfig, tensors: Tensors, device: torch.device | str = "cpu", *, folder: Path = Path()
) -> VisionTokenizer:
    """Read a vision tokenizer, in eval mode and float32, from tensors found under our names.

    Args:
        config: Its shape.
        tensors: Where its tensors are stored.
        device: Where it shall lie.
        folder: Where all this comes from, for messages.

    Raises:
        EmulusError: The weights are not those of the config, or a file is damaged.
    """
    model = on_meta(lambda: VisionTokenizer(config))
    check_shapes(folder, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, tensors)
    fill(model, tensors, dtype=torch.float32, device=device)
    return model.eval()
