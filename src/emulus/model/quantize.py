"""Projections kept in 8 or 4 bits: the seven matrices of each block, where nearly all of a decoder's bytes are.

Embedding, head and norms stay as they are: the head decides between ids whose logits lie close together.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from emulus.errors import EmulusError, did_you_mean

Quantization = Literal["int8", "int4"]

GROUP = 64
"""Neighbours along the input that share a scale in int4."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Last part of the names of the layers that are quantised."""

# Weights that are made whole at a time: enough to keep a multiplication busy, little beside the model.
_CHUNK = 2**20


class QuantizedLinear(nn.Module):
    """A linear layer without bias, its weights rounded to whole multiples of a scale.

    - ``int8``: one scale per output row, ``weight = scale * q`` with q in [-127, 127].
    - ``int4``: one scale and one low end per output row and :data:`GROUP` inputs, ``weight = low + scale * q`` with q
      in [0, 15]; two values lie in a byte, the first in its low half. The low end is at most 0 and the high end at
      least 0, so that rounding the two to bfloat16 moves neither far.

    Either way a weight is at most half a scale away from what it was. Plain PyTorch: a part of the rows is made whole
    in the input's type and multiplied, then the next.

    Attributes:
        q: ``(out, in)`` int8, or ``(out, in / 2)`` uint8, the inputs filled up to whole groups.
        scale: ``(out, 1)`` float32, or ``(out, groups)`` bfloat16.
        low: ``(out, groups)`` bfloat16; ``None`` in int8.
    """

    q: Tensor
    scale: Tensor
    low: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, kind: Quantization, device: torch.device | str = "cpu"
    ) -> None:
        """Allocate, all zeros.

        Args:
            in_features: Width of the input.
            out_features: Width of the output.
            kind: How many bits.
            device: Where it lies.
        """
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        groups = -(-in_features // GROUP)
        if kind == "int8":
            self.register_buffer("q", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
            self.register_buffer("scale", torch.zeros(out_features, 1, device=device))
            self.register_buffer("low", None)
        else:
            ends = torch.zeros(out_features, groups, dtype=torch.bfloat16, device=device)
            shape = (out_features, groups * GROUP // 2)
            self.register_buffer("q", torch.zeros(shape, dtype=torch.uint8, device=device))
            self.register_buffer("scale", ends)
            self.register_buffer("low", ends.clone())

    def put(self, start: int, weight: Float[Tensor, "rows in"], *, name: str = "the matrix") -> None:
        """Quantise some rows.

        Args:
            start: The first row's number.
            weight: The rows.
            name: What to call the matrix in a message.

        Raises:
            EmulusError: A weight is infinite, not a number, or too large.
        """
        weight = weight.to(self.q.device).float()
        q, scale, low = _to_int8(weight) if self.low is None else _to_int4(weight)
        # The scale comes from the largest weights, and what is not a number makes it one that is not.
        if not scale.isfinite().all():
            raise EmulusError(f"{name} holds a weight that is not a number, or too large, so it cannot be quantised")
        rows = slice(start, start + len(weight))
        self.q[rows], self.scale[rows] = q, scale
        if self.low is not None and low is not None:
            self.low[rows] = low

    def dequantize(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "rows in"]:
        """Give rows from ``start`` to before ``stop`` as float32 weights."""
        q, scale = self.q[start:stop], self.scale[start:stop].float()
        if self.low is None:
            return q.float().mul_(scale)
        halves = torch.stack((q & 15, q >> 4), dim=-1).view(len(q), -1, GROUP).float()
        whole = halves.mul_(scale[..., None]).add_(self.low[start:stop, :, None].float())
        return whole.flatten(1)[:, : self.in_features]

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Multiply, in the input's type."""
        step = max(1, _CHUNK // self.in_features)
        parts = [self._rows(x, start, start + step) for start in range(0, self.out_features, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        if self.low is not None:
            return F.linear(x, self.dequantize(start, stop).to(x.dtype))
        # One scale a row may as well be multiplied at the end, where there is less to multiply.
        whole = F.linear(x, self.q[start:stop].to(x.dtype))
        return (whole.float() * self.scale[start:stop, 0]).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


def quantize(weight: Float[Tensor, "out in"], kind: Quantization) -> QuantizedLinear:
    """Make a quantised layer of a matrix, on the matrix's device.

    Raises:
        EmulusError: A weight is infinite, not a number, or too large; or there is no such kind.
    """
    layer = QuantizedLinear(weight.shape[1], weight.shape[0], check_kind(kind), weight.device)
    layer.put(0, weight)
    return layer


def make_room(model: nn.Module, kind: Quantization) -> dict[str, QuantizedLinear]:
    """Put a quantised layer, still on the meta device, in the place of each projection.

    Args:
        model: A decoder on the meta device.
        kind: How many bits.

    Returns:
        The name of each replaced matrix, and the layer that shall be given its rows.
    """
    replaced: dict[str, QuantizedLinear] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_projection(f"{name}.weight"):
            layer = QuantizedLinear(module.in_features, module.out_features, kind, "meta")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
            replaced[f"{name}.weight"] = layer
    return replaced


def is_projection(name: str) -> bool:
    """Whether the tensor of this name is one that is quantised."""
    parts = name.split(".")
    return len(parts) > 2 and parts[-2] in PROJECTIONS and parts[-1] == "weight"


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of a model is quantised."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


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
    raise EmulusError(f"unknown quantisation {kind!r}{did_you_mean(kind, kinds)}")


# Both work in place where they can: beside a row as it was, one more of it is in memory.


def _to_int8(weight: Tensor) -> tuple[Int[Tensor, "rows in"], Float[Tensor, "rows 1"], None]:
    largest = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True))
    scale = (largest / 127).clamp_(min=_least(torch.float32))
    return (weight / scale).round_().clamp_(-127, 127).to(torch.int8), scale, None


def _to_int4(
    weight: Tensor,
) -> tuple[Int[Tensor, "rows bytes"], Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    # Zeros fill the last group up; they change nothing, since 0 is within the ends of every group anyhow.
    missing = -weight.shape[1] % GROUP
    groups = (F.pad(weight, (0, missing)) if missing else weight).view(len(weight), -1, GROUP)
    low = groups.amin(-1).clamp_(max=0).bfloat16()
    high = groups.amax(-1).clamp_(min=0)
    # What is rounded to is computed from the ends as they are stored.
    scale = (high - low.float()).div_(15).clamp_(min=_least(torch.bfloat16)).bfloat16()
    steps = (groups - low[..., None].float()).div_(scale[..., None].float())
    pairs = steps.round_().clamp_(0, 15).to(torch.uint8).view(len(weight), -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4), scale, low


def _least(dtype: torch.dtype) -> float:
    """Smallest scale: a row of zeros must not divide by zero, nor tiny weights by a number that lost its digits."""
    return torch.finfo(dtype).tiny
