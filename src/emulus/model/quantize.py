"""Weights -> fewer bits: the seven matrices of each block and the head, where nearly all of a decoder's bytes are.

Here each weight is rounded to the nearest value there is; :mod:`emulus.model.calibrate` looks at inputs and does
better. The embedding, of which a step reads a row a token, and the norms stay as they are. The head decides between ids
whose logits lie close together, so it never has fewer than 8 bits.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor, nn

from emulus.codec import as_mapping
from emulus.errors import EmulusError, did_you_mean, shown
from emulus.model.linear import GROUP as GROUP
from emulus.model.linear import Packed
from emulus.model.linear import Quantization as Quantization
from emulus.model.linear import QuantizedLinear as QuantizedLinear
from emulus.model.transformer import Decoder
from emulus.weights import on_meta

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Last part of the names of the layers that are quantised."""

HEAD = "lm_head.weight"
_FP8_LARGEST = torch.finfo(torch.float8_e4m3fn).max


def quantize(weight: Float[Tensor, "out in"], kind: Quantization) -> QuantizedLinear:
    """Make a quantised layer of a matrix, on the matrix's device.

    Raises:
        EmulusError: A weight is infinite, not a number, or too large; or there is no such kind.
    """
    layer = QuantizedLinear(weight.shape[1], weight.shape[0], check_kind(kind), weight.device)
    put_rows(layer, 0, weight)
    return layer


def put_rows(layer: QuantizedLinear, start: int, weight: Float[Tensor, "rows in"], *, name: str = "the matrix") -> None:
    """Quantise some rows of a layer.

    Args:
        layer: It is given the rows.
        start: The first row's number.
        weight: The rows.
        name: What to call the matrix in a message.

    Raises:
        EmulusError: A weight is infinite, not a number, or too large.
    """
    packed = _ROUNDED[layer.kind](weight.to(layer.q.device).float())
    # The scale comes from the largest weights, and what is not a number makes it one that is not.
    if not packed.scale.isfinite().all():
        raise EmulusError(f"{name} holds a weight that is not a number, or too large, so it cannot be quantised")
    rows = slice(start, start + len(weight))
    layer.q[rows], layer.scale[rows] = packed.q, packed.scale
    if layer.low is not None and packed.low is not None:
        layer.low[rows] = packed.low


@torch.no_grad()
def quantize_decoder(decoder: Decoder, kind: Quantization) -> Decoder:
    """Make a quantised copy of a decoder, in eval mode; what is not quantised is shared with the original.

    Args:
        decoder: It is left as it is.
        kind: How many bits.

    Raises:
        EmulusError: A weight is not finite, the decoder is quantised already, or there is no such kind.
    """
    copy = shared_copy(decoder)
    for name, layer in make_room(copy, check_kind(kind)).items():
        weight = decoder.get_parameter(name)
        layer.to_empty(device=weight.device)
        put_rows(layer, 0, weight, name=name)
    return copy


@torch.no_grad()
def dequantize_decoder(decoder: Decoder) -> Decoder:
    """Make a copy whose matrices are whole again, in eval mode and the type of what was never quantised.

    Args:
        decoder: It is left as it is; what is not quantised is shared.
    """
    copy = on_meta(lambda: Decoder(decoder.config))
    dtype = decoder.model.embed_tokens.weight.dtype
    for name, module in decoder.named_modules():
        if isinstance(module, QuantizedLinear):
            copy.get_submodule(name).weight = nn.Parameter(module.dequantize().to(dtype))
    for name, parameter in decoder.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        setattr(copy.get_submodule(path), leaf, parameter)
    return copy.eval()


def shared_copy(decoder: Decoder) -> Decoder:
    """Make a decoder of the same tensors, in eval mode: its layers can be replaced, and the original stays.

    Raises:
        EmulusError: The decoder is quantised.
    """
    if is_quantized(decoder):
        raise EmulusError("the decoder is quantised already; quantise the original")
    copy = on_meta(lambda: Decoder(decoder.config))
    for name, parameter in decoder.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        setattr(copy.get_submodule(path), leaf, parameter)
    return copy.eval()


def make_room(model: nn.Module, kind: Quantization) -> dict[str, QuantizedLinear]:
    """Put a quantised layer, still on the meta device, in the place of each projection and of the head.

    Args:
        model: A decoder.
        kind: How many bits.

    Returns:
        The name of each replaced matrix, and the layer that shall be given its rows.
    """
    replaced: dict[str, QuantizedLinear] = {}
    for name, module in list(model.named_modules()):
        bits = kind_of(f"{name}.weight", kind)
        if isinstance(module, nn.Linear) and bits is not None:
            layer = QuantizedLinear(module.in_features, module.out_features, bits, "meta")
            replace_layer(model, name, layer)
            replaced[f"{name}.weight"] = layer
    return replaced


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one called ``name``."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def kind_of(name: str, kind: Quantization) -> Quantization | None:
    """In how many bits the tensor of this name is kept in a decoder of a kind; ``None`` if it is not quantised."""
    if name == HEAD:
        return "fp8" if kind == "fp8" else "int8"
    parts = name.split(".")
    return kind if len(parts) > 2 and parts[-2] in PROJECTIONS and parts[-1] == "weight" else None


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of a model is quantised."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def quantization_of(model: nn.Module) -> Quantization | None:
    """How many bits a decoder's projections have; ``None`` if it is not quantised."""
    kinds = [module.kind for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    return kinds[0] if kinds else None


def quantized_bytes(shape: tuple[int, ...], kind: Quantization) -> int:
    """Memory that a matrix takes once quantised, scales included."""
    layer = QuantizedLinear(shape[1], shape[0], kind, "meta")
    return sum(buffer.nbytes for buffer in layer.buffers())


def check_kind(kind: str) -> Quantization:
    """Refuse a kind of quantisation that does not exist.

    Raises:
        EmulusError: Lists those that do.
    """
    kinds: tuple[Quantization, ...] = get_args(Quantization)
    for known in kinds:
        if kind == known:
            return known
    raise EmulusError(f"unknown quantisation {shown(kind)}{did_you_mean(kind, kinds)}")


def to_config(kind: Quantization) -> dict[str, Any]:
    """What the ``config.json`` of a quantised decoder says under ``quantization``."""
    group = {"group": GROUP} if kind == "int4" else {}
    return {"kind": kind, **group, "head": kind_of(HEAD, kind)}


def from_config(values: object) -> Quantization:
    """Read what :func:`to_config` wrote.

    Raises:
        EmulusError: It is of a kind that is not computed here.
    """
    said = as_mapping(values, "quantization")
    if not isinstance(said.get("kind"), str):
        raise EmulusError(f"quantization {shown(said)} names no kind; restore config.json from its source")
    kind = check_kind(said["kind"])
    read = to_config(kind)
    # "calibrated" is a note on how the weights were made.
    if any(said.get(key) != value for key, value in read.items()) or said.keys() - read.keys() - {
        "calibrated",
        "group",
    }:
        raise EmulusError(f"quantization {shown(said)} is not of the sort that is read here, {read}")
    return kind


# What follows works in place where it can: beside a row as it was, one more of it is in memory.


def to_int8(weight: Float[Tensor, "rows in"]) -> Packed:
    """Round each row to whole multiples of a 127th of its largest weight."""
    scale = (_largest(weight) / 127).clamp_(min=_least(torch.float32))
    return Packed(nearest_step(weight / scale, "int8").to(torch.int8), scale, None)


def to_fp8(weight: Float[Tensor, "rows in"]) -> Packed:
    """Round each row to the floats of 8 bits, its largest weight being the largest of them."""
    scale = (_largest(weight) / _FP8_LARGEST).clamp_(min=_least(torch.float32))
    return Packed(nearest_step(weight / scale, "fp8").to(torch.float8_e4m3fn), scale, None)


def to_int4(weight: Float[Tensor, "rows in"]) -> Packed:
    """Round each :data:`GROUP` neighbours to 16 steps from the least of them to the largest."""
    # Zeros fill the last group up; they change nothing, since 0 is within the ends of every group anyhow.
    missing = -weight.shape[1] % GROUP
    groups = (F.pad(weight, (0, missing)) if missing else weight).view(len(weight), -1, GROUP)
    low = groups.amin(-1).clamp_(max=0).bfloat16()
    high = groups.amax(-1).clamp_(min=0)
    # What is rounded to is computed from the ends as they are stored.
    scale = (high - low.float()).div_(15).clamp_(min=_least(torch.bfloat16)).bfloat16()
    steps = (groups - low[..., None].float()).div_(scale[..., None].float())
    return Packed(pack_int4(nearest_step(steps, "int4")), scale, low)


def nearest_step(steps: Float[Tensor, "*any"], kind: Quantization) -> Float[Tensor, "*any"]:
    """The nearest of the values that a kind's ``q`` can have, in place but for fp8."""
    if kind == "fp8":
        # What lies beyond the largest would become not a number.
        return steps.clamp_(-_FP8_LARGEST, _FP8_LARGEST).to(torch.float8_e4m3fn).float()
    return steps.round_().clamp_(*((0, 15) if kind == "int4" else (-127, 127)))


def pack_int4(steps: Shaped[Tensor, "rows groups group"]) -> UInt8[Tensor, "rows bytes"]:
    """Put two numbers from 0 to 15 into each byte, the first into its low half."""
    pairs = steps.to(torch.uint8).view(len(steps), -1, 2)
    packed: Int[Tensor, "rows bytes"] = pairs[..., 0] | (pairs[..., 1] << 4)
    return packed


def _largest(weight: Tensor) -> Tensor:
    return torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True))


def _least(dtype: torch.dtype) -> float:
    """Smallest scale: a row of zeros must not divide by zero, nor tiny weights by a number that lost its digits."""
    return torch.finfo(dtype).tiny


_ROUNDED = {"int8": to_int8, "int4": to_int4, "fp8": to_fp8}
