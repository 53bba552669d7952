"""Decoders on disk: ``config.json`` and safetensors, read strictly and lazily."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from emulus.device import pick_device
from emulus.errors import EmulusError
from emulus.files import read_json, write_json
from emulus.model.config import DecoderConfig
from emulus.model.quantize import Quantization, check_kind, is_quantized, make_room
from emulus.model.transformer import Decoder
from emulus.weights import (
    CONFIG,
    WEIGHTS,
    Place,
    Shapes,
    Tensors,
    check_shapes,
    fill,
    find_tensors,
    on_meta,
    place,
    read_pieces,
    save_tensors,
)


def save_decoder(model: Decoder, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors``, each atomically.

    A decoder that lies on several devices is written whole.

    Args:
        model: What to save.
        folder: Where; made if missing.
        dtype: What to store; by default each tensor's own.

    Raises:
        EmulusError: The disk is full, the folder may not be written to, or the decoder is quantised.
    """
    if is_quantized(model):
        raise EmulusError("a quantised decoder is not saved; save the original, and quantise it when it is loaded")
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
    device: Place = "cpu",
    *,
    vocab_size: int | None = None,
    quantize: Quantization | None = None,
) -> Decoder:
    """Read a decoder of our own or the released layout, in eval mode.

    See :func:`load_decoder_from` for how; whether it fits is asked before, of :func:`emulus.placement.plan`.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors`` (or its shards and their index).
        dtype: What to compute in; by default what is stored.
        device: Where it shall lie: one device, or a placement over several.
        vocab_size: What the vocabulary beside it counts; a model of another size is refused.
        quantize: Keep the projections in so many bits.

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
    return load_decoder_from(config, tensors, dtype=dtype, device=device, quantize=quantize, folder=folder)


def load_decoder_from(
    config: DecoderConfig,
    tensors: Tensors,
    *,
    dtype: torch.dtype | None,
    device: Place,
    quantize: Quantization | None = None,
    folder: Path,
) -> Decoder:
    """Read a decoder, in eval mode, from tensors found under our names.

    Each tensor is read in pieces of a few MiB, straight into its type and place: the peak is the model as it will be,
    and one piece.

    Args:
        config: Its shape.
        tensors: Where its tensors are stored.
        dtype: What to compute in; ``None`` is what is stored.
        device: Where it shall lie: one device, or a placement over several.
        quantize: Keep the projections in so many bits.
        folder: Where all this comes from, for messages.

    Raises:
        EmulusError: The tensors are not this config's, a file is damaged, a device is missing or full, or a weight to
            be quantised is not finite.
    """
    # The shapes are compared before a model of that size is built: nothing is allocated on a config's word
    # alone.
    check_shapes(folder, expected_shapes(config), tensors)
    model = on_meta(lambda: Decoder(config))
    for where in sorted({str(device(name) if callable(device) else device) for name in tensors}):
        pick_device(where)
    layers = make_room(model, check_kind(quantize)) if quantize is not None else {}
    try:
        for name, layer in layers.items():
            layer.to_empty(device=place(device, name))
            for start, rows in read_pieces(tensors[name]):
                layer.put(start, rows, name=f"{tensors[name].file}: {name}")
        fill(model, {name: tensors[name] for name in tensors if name not in layers}, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        raise EmulusError(
            f"{folder}: no memory left for the decoder ({str(error).splitlines()[0]}); take a smaller dtype, int8 or "
            "int4, or let part of it lie on the CPU (device auto)"
        ) from None
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def expected_shapes(config: DecoderConfig) -> Shapes:
    """The name and shape of every tensor that a decoder of this config has on disk; nothing is allocated."""
    single = dataclasses.replace(config, num_hidden_layers=1)
    return _expected(on_meta(lambda: Decoder(single)), config)


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
