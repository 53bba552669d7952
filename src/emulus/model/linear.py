"""Products with weights, in whatever they are kept: float32, bfloat16, or 8 or 4 bits.

Everything that may be quantised is multiplied by :func:`linear`, and only there is decided how: by the kernels of
:mod:`emulus.kernels` where they are, by plain PyTorch otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from emulus.kernels import native

Quantization = Literal["int8", "int4", "fp8"]

GROUP = 64
"""Neighbours along the input that share a scale in int4."""

# Weights that are made whole at a time: enough to keep a multiplication busy, little beside the model.
_CHUNK = 2**20


class Packed(NamedTuple):
    """Some rows of a quantised matrix, as they lie in memory.

    Attributes:
        q: The whole numbers (or, in fp8, the short floats).
        scale: What to multiply them by.
        low: What to add; ``None`` in int8 and fp8.
    """

    q: Shaped[Tensor, "rows columns"]
    scale: Float[Tensor, "rows groups"]
    low: Float[Tensor, "rows groups"] | None


class QuantizedLinear(nn.Module):
    """A linear layer without bias, its weights rounded to what a few bits can say.

    - ``int8``: one scale per output row, ``weight = scale * q`` with q in [-127, 127].
    - ``int4``: one scale and one low end per output row and :data:`GROUP` inputs, ``weight = low + scale * q`` with q
      in [0, 15]; two values lie in a byte, the first in its low half. The low end is at most 0 and the high end at
      least 0, so that rounding the two to bfloat16 moves neither far.
    - ``fp8``: one scale per output row, ``weight = scale * q`` with q a float of 4 bits of exponent and 3 of mantissa
      (e4m3fn), at most 448.

    How weights become such is in :mod:`emulus.model.quantize`.

    Attributes:
        q: ``(out, in)`` int8 or float8, or ``(out, in / 2)`` uint8, the inputs filled up to whole groups.
        scale: ``(out, 1)`` float32, or ``(out, groups)`` bfloat16.
        low: ``(out, groups)`` bfloat16; ``None`` but in int4.
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
        if kind == "int4":
            groups = -(-in_features // GROUP)
            ends = torch.zeros(out_features, groups, dtype=torch.bfloat16, device=device)
            shape = (out_features, groups * GROUP // 2)
            self.register_buffer("q", torch.zeros(shape, dtype=torch.uint8, device=device))
            self.register_buffer("scale", ends)
            self.register_buffer("low", ends.clone())
        else:
            stored = torch.int8 if kind == "int8" else torch.float8_e4m3fn
            self.register_buffer("q", torch.zeros(out_features, in_features, dtype=stored, device=device))
            self.register_buffer("scale", torch.zeros(out_features, 1, device=device))
            self.register_buffer("low", None)

    def packed(self, start: int = 0, stop: int | None = None) -> Packed:
        """Give rows from ``start`` to before ``stop`` as they lie in memory; nothing is copied."""
        # This is asked for at every product: looking attributes up through the module, and slices, would be felt.
        buffers = self._buffers
        packed = Packed(cast(Tensor, buffers["q"]), cast(Tensor, buffers["scale"]), buffers["low"])
        return packed if start == 0 and stop is None else _rows(packed, start, stop)

    def dequantize(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "rows in"]:
        """Give rows from ``start`` to before ``stop`` as float32 weights."""
        return _whole(self.packed(start, stop), self.in_features)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Multiply, in the input's type."""
        return linear(x, self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # A model may be cast to another type; what the bits here mean stays, and only the device changes.
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


def linear(
    x: Float[Tensor, "*rows in"], weight: Tensor | nn.Module, rows: tuple[int, int] | None = None
) -> Float[Tensor, "*rows out"]:
    """Multiply by a matrix, whatever its weights are kept in.

    Kernels are taken where there are some: on a CPU for float32 and bfloat16 inputs, on a GPU for a few bfloat16 ones;
    but not while a gradient is wanted, nor under autocast. Otherwise plain PyTorch makes a part of the rows whole in
    the input's type and multiplies, then the next.

    Args:
        x: In float32 or shorter; the result is of the same type.
        weight: ``(out, in)``: a tensor, a layer that has one and no bias, or a quantised layer.
        rows: Only these rows of the weight, from the first to before the second.
    """
    start, stop = rows or (0, None)
    if isinstance(weight, QuantizedLinear):
        part: Tensor | Packed = weight.packed(start, stop)
        wanted = x.requires_grad
    else:
        matrix = weight if isinstance(weight, Tensor) else weight.weight
        assert isinstance(matrix, Tensor), "a layer with a weight"
        part = matrix if rows is None else matrix[start:stop]
        wanted = x.requires_grad or matrix.requires_grad
    kernels = None if wanted and torch.is_grad_enabled() else _kernels(x)
    kernel = None if kernels is None else kernel_for(kernels, part)
    if kernel is not None:
        return _flat(x, kernel)
    return _dense(x, part) if isinstance(part, Tensor) else _quantized(x, part)


def _kernels(x: Tensor) -> ModuleType | None:
    """Kernels for such an input, if there are."""
    if not (x.is_cpu or x.is_cuda) or torch.is_autocast_enabled(x.device.type):
        return None
    if x.is_cpu:
        return native if x.dtype in (torch.float32, torch.bfloat16) and native.available() else None
    if x.is_cuda and x.dtype == torch.bfloat16:
        # Not at the top: where there is no GPU, its compiler need not be loaded.
        from emulus.kernels import gpu

        return gpu if x.numel() <= gpu.FEW * x.shape[-1] and gpu.available() else None
    return None


def kernel_for(kernels: ModuleType, part: Tensor | Packed) -> Callable[..., Tensor] | None:
    """The kernel of a module that multiplies rows of inputs by such weights; None if there is none."""
    if isinstance(part, Tensor):
        fits = part.dtype in (torch.float32, torch.bfloat16) and part.is_contiguous()
        return partial(kernels.linear, weight=part) if fits else None
    if part.low is not None:
        four = partial(kernels.linear_int4, q=part.q, scale=part.scale, low=part.low)
        # Beside what 4 bits have done to the weights, 8 bits do nothing to the inputs, and they are twice as fast.
        return partial(four, rounded=True) if kernels is native else four
    if part.q.dtype == torch.int8:
        return partial(kernels.linear_int8, q=part.q, scale=part.scale)
    # Only GPUs know these floats.
    return partial(kernels.linear_fp8, q=part.q, scale=part.scale) if hasattr(kernels, "linear_fp8") else None


def _flat(x: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a kernel, which knows matrices only and on a CPU only float32, to an input of any shape."""
    if x.dim() == 2 and x.dtype == (torch.float32 if x.is_cpu else torch.bfloat16) and x.stride(1) == 1:
        return kernel(x)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    product = kernel(flat.float() if x.is_cpu else flat)
    return product.view(*x.shape[:-1], product.shape[-1]).to(x.dtype)


def _dense(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply by a matrix that may be of a type other than the input's."""
    if weight.dtype == x.dtype or x.is_meta or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight)
    return _in_parts(len(weight), x, lambda start, stop: F.linear(x, weight[start:stop].to(x.dtype)))


def _quantized(x: Tensor, packed: Packed) -> Tensor:
    def part(start: int, stop: int) -> Tensor:
        piece = _rows(packed, start, stop)
        if piece.low is not None or x.dtype == torch.float16:
            return F.linear(x, _whole(piece, x.shape[-1]).to(x.dtype))
        # One scale a row may as well be multiplied at the end, where there is less to multiply; but float16 does not
        # reach as far as sums of unscaled values.
        product = F.linear(x, piece.q.to(x.dtype))
        return (product.float() * piece.scale[:, 0]).to(x.dtype)

    return _in_parts(len(packed.q), x, part)


def _rows(packed: Packed, start: int, stop: int | None) -> Packed:
    q, scale, low = packed
    return Packed(q[start:stop], scale[start:stop], None if low is None else low[start:stop])


def _in_parts(rows: int, x: Tensor, part: Callable[[int, int], Tensor]) -> Tensor:
    """Compute some output columns at a time."""
    step = max(1, _CHUNK // x.shape[-1])
    parts = [part(start, start + step) for start in range(0, max(rows, 1), step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _whole(packed: Packed, width: int) -> Float[Tensor, "rows in"]:
    q, scale, low = packed
    if low is None:
        return q.float().mul_(scale)
    halves = torch.stack((q & 15, q >> 4), dim=-1).view(*scale.shape, GROUP).float()
    whole = halves.mul_(scale.float()[..., None]).add_(low.float()[..., None])
    return whole.flatten(1)[:, :width]
