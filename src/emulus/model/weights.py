"""Decoders on disk: ``config.json`` and safetensors, read strictly and lazily."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from emulus.errors import EmulusError
from emulus.files import read_json, write_file, write_json
from emulus.model.config import DecoderConfig
from emulus.model.transformer import Decoder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


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
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if not _is_tied(name, model.config)
    }
    write_file(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
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
    shards = _shards(folder)
    # The shapes are compared before a model of that size is built: nothing is allocated on a config's word
    # alone.
    first = dataclasses.replace(config, num_hidden_layers=1)
    with torch.device("meta"):
        wanted = _expected(Decoder(first), config)
    _compare(folder, wanted, {name: shape for shapes in shards.values() for name, shape in shapes.items()})
    with torch.device("meta"):
        model = Decoder(config)
    for path, names in shards.items():
        _fill(model, path, list(names), dtype, device)
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


def _shards(folder: Path) -> dict[Path, dict[str, tuple[int, ...]]]:
    """List the weight files and the shape of every tensor in each, reading headers only."""
    if (folder / INDEX).exists():
        names = _indexed(folder / INDEX)
    elif (folder / WEIGHTS).exists():
        names = [WEIGHTS]
    else:
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise EmulusError(
                f"{folder} holds {pickles[0]}, a pickle, which could run code and is not read; "
                "convert it to safetensors first"
            )
        raise EmulusError(f"{folder} holds no {WEIGHTS}; is it a decoder's folder?")
    return {folder / name: _header(folder / name) for name in names}


def _indexed(path: Path) -> list[str]:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise EmulusError(f"{path} has no weight_map; restore it from its source")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise EmulusError(
                f"{path} points at {name!r}, which is not a .safetensors file beside it; it is not read"
            )
        if not (path.parent / name).exists():
            raise EmulusError(f"{path.parent / name} is missing; fetch the shard that {path.name} lists")
    return names


def _damaged(path: Path, error: Exception) -> EmulusError:
    reason = " ".join(str(error).split())
    return EmulusError(f"{path} is damaged or truncated ({reason}); restore it from its source")


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _compare(
    folder: Path, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    shared = [name for name in wanted if name in found]
    differences = (
        ("missing", [name for name in wanted if name not in found]),
        ("unexpected", [name for name in found if name not in wanted]),
        (
            "mis-shaped",
            [f"{name} {found[name]} for {wanted[name]}" for name in shared if found[name] != wanted[name]],
        ),
    )
    parts = [_listing(kind, names) for kind, names in differences if names]
    if parts:
        raise EmulusError(f"{folder}: the weights are not those of its {CONFIG}: {'; '.join(parts)}")


def _listing(kind: str, names: Sequence[str]) -> str:
    rest = f", and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {kind} ({', '.join(names[:3])}{rest})"


def _fill(
    model: Decoder, path: Path, names: Sequence[str], dtype: torch.dtype | None, device: torch.device | str
) -> None:
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in names:
                _assign(model, name, file.get_tensor(name).to(dtype=dtype))
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    # A tensor still backed by the file's mapping is copied: training would otherwise write into shared pages.
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.clone() if tensor.is_cpu else tensor))
