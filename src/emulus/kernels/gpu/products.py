"""Products of a few tokens with matrices of every kind of weight."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int, UInt8
from torch import Tensor

from emulus.kernels.gpu import launch

if find_spec("triton") is not None:
    from emulus.kernels.programs import products as programs

FEW = 128
"""More tokens than this and a product waits for arithmetic instead, which PyTorch's own is better at."""

# Inputs of a row that one warp takes at a time, by the bytes of a weight; warps that share a block of rows.
_WIDTHS = {1: 64, 2: 64, 4: 32}
_PARTS = 8
# Groups of 4-bit weights that a block of rows takes at a time: two a warp, so that their scales fill a copy of 4 bytes.
_GROUPS = 16
_GROUP = 64
# Bytes that a program's copies on their way to a multiprocessor may take: two programs fit side by side.
_ON_THE_WAY = 100 * 1024


# Capability of the first GPUs that know float8_e4m3fn.
_ADA = 89

Tensors = tuple[Tensor, ...]
Weight = Tensor | tuple[Tensor, Tensor, Tensor | None]
"""A matrix: as it is, or its whole numbers (or floats of 8 bits), scales and low ends."""


def linear(
    x: Float[Tensor, "n in"], weight: Float[Tensor, "out in"], *, add: Float[Tensor, "n out"] | None = None
) -> Float[Tensor, "n out"]:
    """Multiply by a matrix.

    A few tokens in bfloat16 take a kernel of this module: PyTorch's chooses another order of summation for another
    number of tokens, and then a picture would depend on what is drawn beside it.

    Args:
        x: Activations.
        weight: bfloat16 or float32, possibly a slice of another's rows.
        add: What to add to the rounded product, in the activations' type.
    """
    if x.dtype != torch.bfloat16 or len(x) > FEW or weight.dtype not in (torch.bfloat16, torch.float32):
        product = F.linear(x, weight.to(x.dtype))
        return product if add is None else add + product
    return _multiply(x, [weight], add=add)


def linear_int8(
    x: Float[Tensor, "n in"],
    q: Int[Tensor, "out in"],
    scale: Float[Tensor, "out 1"],
    *,
    add: Float[Tensor, "n out"] | None = None,
) -> Float[Tensor, "n out"]:
    """Multiply by a matrix of whole numbers in 8 bits, a scale a row; ``add`` as in :func:`linear`."""
    return _multiply(x, [(q, scale, None)], add=add)


def linear_fp8(
    x: Float[Tensor, "n in"],
    q: Float[Tensor, "out in"],
    scale: Float[Tensor, "out 1"],
    *,
    add: Float[Tensor, "n out"] | None = None,
) -> Float[Tensor, "n out"]:
    """Multiply by a matrix of float8_e4m3fn, a scale a row; ``add`` as in :func:`linear`."""
    return _multiply(x, [(q, scale, None)], add=add)


def linear_int4(
    x: Float[Tensor, "n in"],
    q: UInt8[Tensor, "out bytes"],
    scale: BFloat16[Tensor, "out groups"],
    low: BFloat16[Tensor, "out groups"],
    *,
    add: Float[Tensor, "n out"] | None = None,
) -> Float[Tensor, "n out"]:
    """Multiply by a matrix in 4 bits, scale and low end a group of 64 inputs.

    Args:
        x: Activations.
        q: Two neighbouring inputs a byte, the first in the low half; ``32 * groups`` bytes a row.
        scale: Step between levels of each row and group.
        low: Lower end of each row and group.
        add: As in :func:`linear`.
    """
    return _multiply(x, [(q, scale, low)], add=add)


def linear_group(x: Float[Tensor, "n in"], weights: Sequence[Weight]) -> Float[Tensor, "n out"]:
    """Multiply by several matrices at once, bit for bit as one by one.

    Args:
        x: Activations, at most ``FEW`` tokens.
        weights: One to three matrices of one kind and width.

    Returns:
        The products side by side.
    """
    return _multiply(x, weights)


def gated(x: Float[Tensor, "n in"], gate: Weight, up: Weight) -> Float[Tensor, "n out"]:
    """Compute ``silu(x @ gate.T) * (x @ up.T)``, bit for bit as two products and :func:`emulus.kernels.gpu.silu_mul`.

    Args:
        x: Activations, at most ``FEW`` tokens.
        gate: A matrix.
        up: Another of the same kind and shape.
    """
    return _multiply(x, [gate, up], is_gated=True)


def _multiply(x: Tensor, weights: Sequence[Weight], *, add: Tensor | None = None, is_gated: bool = False) -> Tensor:
    """Launch one kernel for all products of ``x``."""
    parts = [(weight, None, None) if isinstance(weight, Tensor) else weight for weight in weights]
    qs, scales, lows = (tuple(column) for column in zip(*parts, strict=True))
    outs = tuple(len(q) for q in qs)
    out = torch.empty(len(x), outs[0] if is_gated else sum(outs), dtype=x.dtype, device=x.device)
    rest = (None if add is None else add.contiguous(), out, len(x), outs)
    if lows[0] is None:
        _launch(x, qs, None if scales[0] is None else scales, *rest, is_gated)
    else:
        _launch_int4(x, qs, scales, lows, *rest, is_gated)
    return out


def _launch(
    x: Tensor,
    weights: Tensors,
    scales: Tensors | None,
    add: Tensor | None,
    out: Tensor,
    n: int,
    outs: tuple[int, ...],
    is_gated: bool,
) -> None:
    part, ins, (tokens, rows) = x.to(torch.bfloat16), x.shape[1], _tile(x, sum(outs))
    dtype, size = weights[0].dtype, weights[0].element_size()
    width = _WIDTHS[size]
    kind = {torch.float32: programs.ROUND, torch.float8_e4m3fn: programs.FP8}.get(dtype, programs.CAST)
    if kind == programs.FP8 and launch.capability(x) < _ADA:
        weights, kind = tuple(weight.view(torch.int8) for weight in weights), programs.FP8_BITS
    launch.run(
        programs.linear,
        (launch.blocks(n, tokens), launch.blocks(sum(outs), rows)),
        *(part, weights, scales, add, out, n, outs, ins),
        *(launch.stride(part), _strides(weights), None if scales is None else _strides(scales)),
        TOKENS=tokens,
        ROWS=rows,
        WIDTH=width,
        PARTS=_PARTS,
        KIND=kind,
        GATED=is_gated,
        EVEN=ins % (width * _PARTS) == 0,
        DOT=launch.dot(torch.bfloat16),
        num_warps=_PARTS,
        num_stages=_stages(_PARTS * width * (rows * size + tokens * 2)),
    )


def _launch_int4(
    x: Tensor,
    weights: Tensors,
    scales: Tensors,
    lows: Tensors,
    add: Tensor | None,
    out: Tensor,
    n: int,
    outs: tuple[int, ...],
    is_gated: bool,
) -> None:
    groups, (tokens, rows) = scales[0].shape[1], _tile(x, sum(outs))
    if x.shape[1] < groups * _GROUP:
        x = F.pad(x, (0, groups * _GROUP - x.shape[1]))
    even = groups % _GROUPS == 0
    words = tuple(weight.view(torch.int16) for weight in weights)
    # Masks of groups take registers, and then the sums of many tokens do not fit. Before Hopper it is shared memory.
    tokens = tokens if even and not _is_small(x) else min(tokens, 16)
    # With fewer rows the scales are copied 2 bytes at a time, which cannot be done on the way; with more rows of many
    # tokens the sums do not fit into the registers.
    rows = 32 if tokens > 16 else max(32, rows)
    launch.run(
        programs.linear_int4,
        (launch.blocks(n, tokens), launch.blocks(sum(outs), rows)),
        *(
            x.to(torch.bfloat16).contiguous().flatten().view(torch.int64),
            words,
            scales,
            lows,
            add,
            out,
            n,
            outs,
            groups,
        ),
        *(_strides(words), _strides(scales)),
        TOKENS=tokens,
        ROWS=rows,
        PARTS=_GROUPS,
        GATED=is_gated,
        EVEN=even,
        DOT=launch.dot(torch.bfloat16),
        num_warps=8,
        num_stages=_stages(_GROUPS * (rows * (_GROUP // 2 + 4) + tokens * _GROUP * 2)),
    )


def _strides(matrices: Tensors) -> tuple[int, ...]:
    return tuple(matrix.stride(0) for matrix in matrices)


def _tile(x: Tensor, outs: int) -> tuple[int, int]:
    """Tokens and rows that one program works on.

    Few rows leave no multiprocessor idle; but each block of them reads all activations, which many tokens make dear.
    """
    n = len(x)
    tokens = 8 if n <= 8 else 16 if n <= 16 else 32
    return tokens, 16 if outs <= 2048 else 64 if outs >= 8192 and tokens > 8 and not _is_small(x) else 32


def _is_small(x: Tensor) -> bool:
    """Whether this GPU has less shared memory than Hopper, into which the largest tiles do not fit."""
    return 0 < launch.capability(x) < launch.HOPPER


def _stages(size: int) -> int:
    """How many rounds of a loop are under way at a time, where each has copies of ``size`` bytes on their way."""
    return 1 + max(2, min(4, _ON_THE_WAY // size))
