"""Decoders on disk: ``config.json`` and safetensors, read strictly and lazily."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch

from emulus.codec import as_mapping
from emulus.device import pick_device
from emulus.errors import EmulusError, shown
from emulus.files import read_config, write_json
from emulus.model.config import DecoderConfig
from emulus.model.quantize import (
    HEAD,
    Quantization,
    QuantizedLinear,
    check_kind,
    from_config,
    kind_of,
    make_room,
    put_rows,
    quantization_of,
    to_config,
)
from emulus.model.transformer import Decoder
from emulus.weights import (
    CONFIG,
    WEIGHTS,
    Place,
    Shapes,
    Stored,
    Tensors,
    check_shapes,
    fill,
    find_tensors,
    on_meta,
    place,
    read_pieces,
    read_tensor,
    save_tensors,
)

_TABLE = "model.embed_tokens.weight"
_WAVES = re.compile(r"(^|\.)rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
QUANTIZATION = "quantization"
"""Key of ``config.json`` under which a quantised decoder says how."""


def save_decoder(model: Decoder, folder: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write ``config.json`` and ``model.safetensors``, each atomically.

    A decoder that lies on several devices is written whole. Of a quantised one the quantised layers are written as
    they are, as ``NAME.q``, ``NAME.scale`` and (int4) ``NAME.low``, and the config says so.

    Args:
        model: What to save.
        folder: Where; made if missing.
        dtype: What to store; by default each tensor's own. Of a quantised decoder, what is not quantised.

    Raises:
        EmulusError: The disk is full, or the folder may not be written to.
    """
    folder = Path(folder)
    kept = {name for name, _ in model.named_buffers()}
    tensors = {
        name: tensor if name in kept else tensor.to(dtype=dtype)
        for name, tensor in model.state_dict().items()
        if not _is_tied(name, model.config)
    }
    save_tensors(tensors, folder / WEIGHTS)
    kind = quantization_of(model)
    said = {} if kind is None else {QUANTIZATION: to_config(kind)}
    write_json(folder / CONFIG, {"model_type": "emulus", **said, **model.config.to_dict()})


def load_config(folder: Path | str) -> DecoderConfig:
    """Read a folder's ``config.json``.

    Raises:
        EmulusError: It is missing, broken or another architecture's.
    """
    return _read_config(Path(folder))[0]


def read_own_config(values: Any) -> tuple[DecoderConfig, Quantization | None]:
    """Read our own ``config.json``: the decoder's shape, and how many bits its stored weights have.

    Raises:
        EmulusError: It is broken or another architecture's.
    """
    own = dict(as_mapping(values, "decoder config"))
    said = own.pop(QUANTIZATION, None)
    config = DecoderConfig.from_dict(own)
    return config, None if said is None else from_config(said)


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
        quantize: Keep projections and head in so many bits. A folder that is quantised already stays what it is.

    Raises:
        EmulusError: A file is missing, damaged or a pickle, its tensors are not this config's, or it is quantised
            otherwise.
    """
    folder = Path(folder)
    config, stored = _read_config(folder)
    if vocab_size is not None and vocab_size != config.vocab_size:
        raise EmulusError(
            f"{folder}: the decoder knows {config.vocab_size} ids but the vocabulary has {vocab_size}; "
            "they come from different models: use the vocabulary saved with this decoder"
        )
    tensors = drop_redundant(config, find_tensors(folder))
    return load_decoder_from(
        config, tensors, dtype=dtype, device=device, quantize=quantize, stored=stored, folder=folder
    )


def load_decoder_from(
    config: DecoderConfig,
    tensors: Tensors,
    *,
    dtype: torch.dtype | None,
    device: Place,
    quantize: Quantization | None = None,
    stored: Quantization | None = None,
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
        quantize: Keep projections and head in so many bits.
        stored: How many bits they have in the files; ``None`` if they are whole.
        folder: Where all this comes from, for messages.

    Raises:
        EmulusError: The tensors are not this config's, a file is damaged, a device is missing or full, a weight to be
            quantised is not finite, or the files are quantised otherwise than is asked for.
    """
    kind = check_stored(folder, stored, quantize)
    # The shapes are compared before a model of that size is built: nothing is allocated on a config's word
    # alone.
    check_shapes(folder, expected_shapes(config, stored), tensors)
    model = on_meta(lambda: Decoder(config))
    for where in sorted({str(device(name) if callable(device) else device) for name in tensors}):
        pick_device(where)
    layers = make_room(model, kind) if kind is not None else {}
    whole = {name: tensors[name] for name in whole_names(config, kind)}
    try:
        for name, layer in layers.items():
            if stored is None:
                quantize_rows(layer, tensors[source_of(name, config)], name, device)
            else:
                _read_quantized(layer, tensors, name.removesuffix(".weight"), device)
        fill(model, whole, dtype=dtype, device=device)
    except torch.OutOfMemoryError as error:
        raise EmulusError(
            f"{folder}: no memory left for the decoder ({shown(error, quote=False)}); take a smaller dtype, fewer bits "
            "(quantize int8 or int4), or let part of it lie on the CPU (device auto)"
        ) from None
    if kind is None and config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def drop_redundant(config: DecoderConfig, tensors: Tensors) -> Tensors:
    """The tensors without those that say again what is known.

    Older programs stored the rotary wave lengths, which the config gives; some store a tied head beside the embedding.

    Args:
        config: The decoder's.
        tensors: What its files hold, under our names.

    Raises:
        EmulusError: A tied head differs from the embedding, or a file is damaged.
    """
    kept = {name: stored for name, stored in tensors.items() if not _WAVES.search(name)}
    head, table = kept.get(HEAD), kept.get(_TABLE)
    if config.tie_word_embeddings and head is not None and table is not None and head.shape == table.shape:
        if not _same(head, table):
            raise EmulusError(
                f"{head.file}: {head.name} differs from {table.name}, but {CONFIG} says that they are one: "
                "set tie_word_embeddings to false there"
            )
        del kept[HEAD]
    return kept


def _same(first: Stored, second: Stored) -> bool:
    pairs = zip(read_pieces(first), read_pieces(second), strict=True)
    return all(torch.equal(one.float(), other.float()) for (_, one), (_, other) in pairs)


def check_stored(folder: Path, stored: Quantization | None, wanted: Quantization | None) -> Quantization | None:
    """How many bits a decoder shall have, given how many it has in its files.

    Raises:
        EmulusError: There is no such kind, or the files have another already.
    """
    kind = stored if wanted is None else check_kind(wanted)
    if stored is not None and kind != stored:
        raise EmulusError(f"{folder} is quantised already, in {stored}, so it cannot be {kind}; take the original")
    return kind


def expected_shapes(config: DecoderConfig, stored: Quantization | None = None) -> Shapes:
    """The name and shape of every tensor that a decoder has on disk; nothing is allocated.

    Args:
        config: Its shape.
        stored: How many bits its projections and head have there.
    """
    single = on_meta(lambda: Decoder(dataclasses.replace(config, num_hidden_layers=1)))
    if stored is not None:
        make_room(single, stored)
    return _expected(single, config)


def whole_names(config: DecoderConfig, kind: Quantization | None) -> list[str]:
    """Names of the stored tensors that stay whole in a decoder of a kind."""
    return [name for name in expected_shapes(config) if kind is None or kind_of(name, kind) is None]


def source_of(name: str, config: DecoderConfig) -> str:
    """The stored tensor that the matrix called ``name`` is made of: a tied head is made of the embedding."""
    return _TABLE if _is_tied(name, config) else name


def quantize_rows(layer: QuantizedLinear, stored: Stored, name: str, device: Place) -> None:
    """Fill a quantised layer, still on the meta device, from a stored matrix, a few rows at a time.

    Raises:
        EmulusError: A weight is not finite, or the file is damaged.
    """
    layer.to_empty(device=place(device, name))
    for start, rows in read_pieces(stored):
        put_rows(layer, start, rows, name=f"{stored.file}: {name}")


def read_weight(
    name: str, shape: torch.Size, tensors: Tensors, kind: Quantization | None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """One of a decoder's weights in float32, from files in which it is whole or has fewer bits.

    Args:
        name: Of the parameter.
        shape: Its shape.
        tensors: Where the decoder's tensors are stored.
        kind: How many bits projections and head have there; ``None`` if they are whole.
        device: Where it shall be.

    Raises:
        EmulusError: The file is damaged.
    """
    bits = None if kind is None else kind_of(name, kind)
    if bits is None:
        return read_tensor(tensors[name], dtype=torch.float32, device=device).reshape(shape)
    layer = QuantizedLinear(shape[1], shape[0], bits, "meta")
    _read_quantized(layer, tensors, name.removesuffix(".weight"), device)
    return layer.dequantize()


def _read_config(folder: Path) -> tuple[DecoderConfig, Quantization | None]:
    path = folder / CONFIG
    values = read_config(path)
    try:
        return read_own_config(values)
    except EmulusError as error:
        raise EmulusError(f"{path}: {error}") from None


def _read_quantized(layer: QuantizedLinear, tensors: Tensors, name: str, device: Place) -> None:
    for leaf, wanted in list(layer.named_buffers()):
        stored = tensors[f"{name}.{leaf}"]
        tensor = read_tensor(stored, device=place(device, name))
        if tensor.dtype != wanted.dtype:
            raise EmulusError(
                f"{stored.file}: {stored.name} is of {tensor.dtype} and not {wanted.dtype}; restore it from its source"
            )
        setattr(layer, leaf, tensor)


def _is_tied(name: str, config: DecoderConfig) -> bool:
    return name == HEAD and config.tie_word_embeddings


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
