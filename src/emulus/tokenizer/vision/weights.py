"""Vision tokenizers on disk, in the released layout: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

from pathlib import Path

import torch

from emulus.errors import EmulusError
from emulus.files import read_config, write_json
from emulus.tokenizer.vision.blocks import heavy_convolutions
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

PAINTS = ("decoder.", "post_quant_conv.")
"""How the names of the weights begin that turn codes into pixels; the others choose the codes."""


def save_vision_tokenizer(model: VisionTokenizer, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write ``config.json`` and ``model.safetensors``.

    Args:
        model: In float32.
        folder: Where.
        dtype: Of the weights that paint. The others are never rounded, since that would move codes.

    Raises:
        EmulusError: The disk is full or the folder may not be written to, or the weights have been rounded.
    """
    if any(tensor.dtype == torch.bfloat16 for tensor in model.state_dict().values()):
        raise EmulusError("a vision tokenizer in bfloat16 is for inference and not saved; load it in float32")
    tensors = model.state_dict()
    paints = {
        name: tensor.to(dtype)
        for name, tensor in tensors.items()
        if name.startswith(PAINTS) and tensor.is_floating_point()
    }
    save_tensors({**tensors, **paints}, folder / WEIGHTS)
    write_json(folder / CONFIG, model.config.to_dict())


def load_vision_tokenizer(
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    encoder_dtype: torch.dtype = torch.float32,
) -> VisionTokenizer:
    """Read a vision tokenizer, in eval mode.

    Args:
        folder: A vision tokenizer's, the training run's that made it, or a whole model's.
        device: Where it shall lie.
        dtype: Of the decoder's large convolutions: float32 or bfloat16, which is for inference only.
        encoder_dtype: Of the encoder's; bfloat16 moves some codes (see :meth:`VisionTokenizer.to_bfloat16`).

    Raises:
        EmulusError: A file is missing or damaged, or the weights are not those of the config.
    """
    folder = find_model(folder)
    folder = folder / "vision" if (folder / "vision" / CONFIG).exists() else folder
    values = read_config(folder / CONFIG)
    try:
        config = VisionTokenizerConfig.from_dict(values)
    except EmulusError as error:
        raise EmulusError(f"{folder / CONFIG}: {error}") from None
    return load_vision_tokenizer_from(
        config, find_tensors(folder), device, folder=folder, dtype=dtype, encoder_dtype=encoder_dtype
    )


def load_vision_tokenizer_from(
    config: VisionTokenizerConfig,
    tensors: Tensors,
    device: torch.device | str = "cpu",
    *,
    folder: Path = Path(),
    dtype: torch.dtype = torch.float32,
    encoder_dtype: torch.dtype = torch.float32,
) -> VisionTokenizer:
    """Read a vision tokenizer, in eval mode, from tensors found under our names.

    Args:
        config: Its shape.
        tensors: Where its tensors are stored.
        device: Where it shall lie.
        folder: Where all this comes from, for messages.
        dtype: Of the decoder's large convolutions (see :func:`load_vision_tokenizer`).
        encoder_dtype: Of the encoder's.

    Raises:
        EmulusError: The weights are not those of the config, a file is damaged, or a type is neither float32 nor
            bfloat16.
    """
    for kind in (dtype, encoder_dtype):
        if kind not in (torch.float32, torch.bfloat16):
            raise EmulusError(f"a vision tokenizer's weights are float32 or bfloat16, not {kind}")
    model = on_meta(lambda: VisionTokenizer(config))
    check_shapes(folder, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, tensors)
    rounded = {
        f"{half}.{name}.weight"
        for half, kind in (("decoder", dtype), ("encoder", encoder_dtype))
        if kind == torch.bfloat16
        for name in heavy_convolutions(model.get_submodule(half))
    }
    # Each is read straight in its type: the float32 weights of what is rounded are never all there.
    for kind, names in ((torch.bfloat16, rounded), (torch.float32, tensors.keys() - rounded)):
        fill(model, {name: tensors[name] for name in names}, dtype=kind, device=device)
    for name in rounded:
        model.get_parameter(name).requires_grad_(False)
    return model.eval()
