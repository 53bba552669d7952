"""Products of a few tokens with matrices of every kind of weight."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int, UInt8
from torch import Tensor

from emulus.kernels.gpu import launch

if find_spec("triton") is not None:
    from emulus.kernels.programs import products as programs

FEW = 64
"""More tokens than this and a product waits for arithmetic instead, which PyTorch's own is better at."""

# Inputs of a row that one warp takes at a time, by the bytes of a weight; warps that share a block of rows.
_WIDTHS = {1: 64, 2: 64, 4: 32}
_PARTS = 8
# Groups of 4-bit weights that a block of rows takes at a time: two a warp, so that their scales fill a copy of 4 bytes.
_GROUPS = 16
_GROUP = 64
# Bytes that a program's copies on their way to a multiprocessor may take: two programs fit side by side.
_ON_THE_WAY = 100 * 1024


def linear(x: Float[Tensor, "n in"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "n out"]:
    """Multiply by a matrix.

    A few tokens in bfloat16 take a kernel of this module: PyTorch's chooses another order of summation for another
    number of tokens, and then a picture would depend on what is drawn beside it.

    Args:
        x: Activations.
        weight: bfloat16 or float32, possibly a slice of another's rows.
    """
    if x.dtype != torch.bfloat16 or len(x) > FEW or weight.dtype not in (torch.bfloat16, torch.float32):
        return F.linear(x, weight.to(x.dtype))
    return _linear(x, weight, None)


def linear_int8(
    x: Float[Tensor, "n in"], q: Int[Tensor, "out in"], scale: Float[Tensor, "out 1"]
) -> Float[Tensor, "n out"]:
    """Multiply by a matrix of whole numbers in 8 bits, a scale a row."""
    return _linear(x, q, scale)


def linear_fp8(
    x: Float[Tensor, "n in"], q: Float[Tensor, "out in"], scale: Float[Tensor, "out 1"]
) -> Float[Tensor, "n out"]:
    """Multiply by a matrix of float8_e4m3fn, a scale a row."""
    return _linear(x, q, scale)


def linear_int4(
    x: Float[Tensor, "n in"],
    q: UInt8[Tensor, "out bytes"],
    scale: BFloat16[Tensor, "out groups"],
    low: BFloat16[Tensor, "out groups"],
) -> Float[Tensor, "n out"]:
    """Multiply by a matrix in 4 bits, scale and low end a group of 64 inputs.

    Args:
        x: Activations.
        q: Two neighbouring inputs a byte, the first in the low half; ``32 * groups`` bytes a row.
        scale: Of each row and group.
        low: Likewise.
    """
    n, outs, groups = len(x), len(q), scale.shape[1]
    out = torch.empty(n, outs, dtype=x.dtype, device=x.device)
    x = F.pad(x, (0, groups * _GROUP - x.shape[1])).to(torch.bfloat16).contiguous()
    tokens, rows = _tile(n, outs)
    # With fewer rows the scales are copied 2 bytes at a time, which cannot be done on the way; with more rows of many
    # tokens the sums do not fit into the registers.
    rows = 32 if tokens > 16 else max(32, rows)
    launch.run(
        programs.linear_int4,
        (launch.blocks(n, tokens), launch.blocks(outs, rows)),
        *(x.view(torch.int64), q.view(torch.int16), scale, low, out),
        *(n, outs, groups, q.stride(0) // 2, scale.stride(0)),
        TOKENS=tokens,
        ROWS=rows,
        PARTS=_GROUPS,
        EVEN=groups % _GROUPS == 0,
        DOT=launch.dot(torch.bfloat16),
        num_warps=8,
        num_stages=_stages(_GROUPS * (rows * (_GROUP // 2 + 4) + tokens * _GROUP * 2)),
    )
    return out


def _linear(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    (n, ins), outs = x.shape, len(weight)
    part = x.to(torch.bfloat16)
    out = torch.empty(n, outs, dtype=x.dtype, device=x.device)
    tokens, rows = _tile(n, outs)
    width = _WIDTHS[weight.element_size()]
    kind = {torch.float32: programs.ROUND, torch.float8_e4m3fn: programs.FP8}.get(weight.dtype, programs.CAST)
    launch.run(
        programs.linear,
        (launch.blocks(n, tokens), launch.blocks(outs, rows)),
        *(part, weight, out if scale is None else scale, out),
        *(n, outs, ins, part.stride(0), weight.stride(0)),
        TOKENS=tokens,
        ROWS=rows,
        WIDTH=width,
        PARTS=_PARTS,
        KIND=kind,
        SCALED=scale is not None,
        EVEN=ins % (width * _PARTS) == 0,
        DOT=launch.dot(torch.bfloat16),
        num_warps=_PARTS,
        num_stages=_stages(_PARTS * width * (rows * weight.element_size() + tokens * 2)),
    )
    return out


def _tile(n: int, outs: int) -> tuple[int, int]:
    """Tokens and rows that one program works on.

    Few rows leave no multiprocessor idle; but each block of them reads all activations, which many tokens make dear.
    """
    tokens = 8 if n <= 8 else 16 if n <= 16 else 32
    return tokens, 16 if outs <= 2048 else 64 if outs >= 8192 and tokens > 8 else 32


def _stages(size: int) -> int:
    """How many rounds of a loop are under way at a time, where each has copies of ``size`` bytes on their way."""
    return 1 + max(2, min(4, _ON_THE_WAY // size))
