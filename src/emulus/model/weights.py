"""Decoders on disk: ``config.json`` and safetensors, read strictly and lazily."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from emulus.errors import EmulusError
from emulus.files import read_json, write_json
from emulus.model.config import DecoderConfig
from emulus.model.transformer import Decoder
from emulus.weights import CONFIG, WEIGHTS, check_shapes, fill, find_tensors, save_tensors


def save_decoder(model: Decoder, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors``, each atomically.

    Args:
        model: What to save.
        folder: Where; made if missing.
        dtype: What to store; by default each tensor's own.

    Raises:
        EmulusError: The disk is full or the folder may not be written to.
    """
    folder = Path(folder)
    tensors = {
        name: tensor.to(dtype=dtype) for name, tensor in model.state_dict().items() if not _is_tied(name, model.config)
    }
    save_tensors(tensors, folder / WEIGHTS)
    write_json(folder / CONFIG, {"model_type": "emulus", **model.config.to_dict()})


def load_config(folder: Path | str) -> DecoderConfig:
    """Read a folder's ``config.json``.

    Raises:
        EmulusError: It is missing, broken or another architecture's.
    """
    path = Path(folder) / CONFIG
    values = read_json(path)
    try:
        return DecoderConfig.from_dict(values)
    except EmulusError as error:
        raise EmulusError(f"{path}: {error}") from None


def load_decoder(
    folder: Path | str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    vocab_size: int | None = None,
) -> Decoder:
    """Read a decoder, in eval mode.

    Tensors are mapped and converted one at a time, so that the peak is the model in its target dtype and one
    tensor.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors`` (or its shards and their index).
        dtype: What to compute in; by default what is stored.
        device: Where it shall lie.
        vocab_size: What the vocabulary beside it counts; a model of another size is refused.

    Raises:
        EmulusError: A file is missing, damaged or a pickle, or its tensors are not this config's.
    """
    folder = Path(folder)
    config = load_config(folder)
    if vocab_size is not None and vocab_size != config.vocab_size:
        raise EmulusError(
            f"{folder}: the decoder knows {config.vocab_size} ids but the vocabulary has {vocab_size}; "
            "they come from different models: use the vocabulary saved with this decoder"
        )
    tensors = find_tensors(folder)
    # The shapes are compared before a model of that size is built: nothing is allocated on a config's word
    # alone.
    first = dataclasses.replace(config, num_hidden_layers=1)
    with torch.device("meta"):
        wanted = _expected(Decoder(first), config)
    check_shapes(folder, wanted, tensors)
    with torch.device("meta"):
        model = Decoder(config)
    fill(model, tensors, dtype=dtype, device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def _is_tied(name: str, config: DecoderConfig) -> bool:
    return name == "lm_head.weight" and config.tie_word_embeddings


def _expected(model: Decoder, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name every tensor of a model of ``config``, given one with a single block."""
    block = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if _is_tied(name, config):
            continue
        copies = range(config.num_hidden_layers) if name.startswith(block) else range(1)
        for index in copies:
            shapes[name.replace(block, f"model.layers.{index}.")] = tuple(tensor.shape)
    return shapes
