"""Products, norms, attention and choice for few tokens on a CUDA device, in Triton.

The names and meanings of :mod:`emulus.kernels.native`, for bfloat16 activations. At few tokens a step all of it waits
for memory: each weight is read once, and made whole in registers. Nothing waits for the host, and the number of
programs follows from shapes alone, so that a step can be captured in a CUDA graph. No sum depends on how many tokens
there are, or which.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int, UInt8
from torch import Tensor

from emulus.kernels.where import Where
from emulus.log import logger

if find_spec("triton") is not None:
    from emulus.kernels import programs

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

# Programs that the blocks of a head are dealt out to. By the queries' type: slots of a block of keys, and rows (tokens
# times query heads of a key head) that share it: the least that Hopper's matrix instructions take, if they know it.
_SPLITS = 16
_ATTENTION = {torch.bfloat16: (64, 64), torch.float16: (64, 64), torch.float32: (32, 16)}

# Logits of a row that one program keeps in registers, and that it reads at a time else.
_REGISTERS = 32768
_CHUNK = 4096


@functools.cache
def available() -> bool:
    """Whether the kernels can be used: there is a CUDA device, Triton, and what Triton needs to build a kernel."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    try:
        silu_mul(*torch.ones(2, 1, 16, dtype=torch.bfloat16, device="cuda"))
    except Exception as error:  # a missing compiler, an unsupported card, a Triton of another time: each its own kind
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("Triton cannot be used (%s); going on with plain PyTorch", reason)
        return False
    return True


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
    _run(
        programs.linear_int4,
        (_blocks(n, tokens), _blocks(outs, rows)),
        *(x.view(torch.int64), q.view(torch.int16), scale, low, out),
        *(n, outs, groups, q.stride(0) // 2, scale.stride(0)),
        TOKENS=tokens,
        ROWS=rows,
        PARTS=_GROUPS,
        EVEN=groups % _GROUPS == 0,
        DOT=_dot(torch.bfloat16),
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
    _run(
        programs.linear,
        (_blocks(n, tokens), _blocks(outs, rows)),
        *(part, weight, out if scale is None else scale, out),
        *(n, outs, ins, part.stride(0), weight.stride(0)),
        TOKENS=tokens,
        ROWS=rows,
        WIDTH=width,
        PARTS=_PARTS,
        KIND=kind,
        SCALED=scale is not None,
        EVEN=ins % (width * _PARTS) == 0,
        DOT=_dot(torch.bfloat16),
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


def rms_norm(x: Float[Tensor, "n size"], weight: Float[Tensor, " size"], eps: float) -> Float[Tensor, "n size"]:
    """Scale each row to unit mean square, in float32."""
    n, size = x.shape
    out = torch.empty(n, size, dtype=x.dtype, device=x.device)
    block = _power(size)
    _run(
        programs.rms_norm,
        (n,),
        *(x, weight, out, size, x.stride(0), eps),
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )
    return out


def silu_mul(gate: Float[Tensor, "n size"], up: Float[Tensor, "n size"]) -> Float[Tensor, "n size"]:
    """Compute ``silu(gate) * up``, rounded once."""
    n, size = gate.shape
    out = torch.empty(n, size, dtype=gate.dtype, device=gate.device)
    block = min(1024, _power(size))
    grid = (_blocks(size, block), n)
    _run(programs.silu_mul, grid, gate, up, out, size, gate.stride(0), up.stride(0), BLOCK=block)
    return out


def rotate_and_store(
    q: Float[Tensor, "n heads d"],
    k: Float[Tensor, "n kv_heads d"],
    v: Float[Tensor, "n kv_heads d"],
    cos: Float[Tensor, "n d"],
    sin: Float[Tensor, "n d"],
    where: Where,
    layer: int,
) -> Float[Tensor, "n heads d"]:
    """Turn queries and keys by their positions' angles, and put keys and values into the lanes.

    Args:
        q: Queries; like ``k`` and ``v`` possibly a view of a wider tensor.
        k: Keys.
        v: Values.
        cos: Cosines in the rotate-half layout, float32.
        sin: Sines likewise.
        where: Each token's place.
        layer: Which layer's part of the lanes.

    Returns:
        The queries, turned.
    """
    n, heads, width = q.shape
    out = torch.empty(n, heads, width, dtype=q.dtype, device=q.device)
    _run(
        programs.rotate_and_store,
        (n, heads + 2 * where.kv_heads),
        *(q, k, v, cos.contiguous(), sin.contiguous(), out, where.base, where.capacity, where.position, layer),
        *(stride for tensor in (q, k, v) for stride in tensor.stride()[:2]),
        HEADS=heads,
        KV_HEADS=where.kv_heads,
        WIDTH=width,
        BLOCK=_power(width),
        LANE=programs.TYPES[where.dtype],
        ALIGNED=_aligned(width * where.dtype.itemsize),
        num_warps=1,
    )
    return out


def attend(q: Float[Tensor, "n heads d"], where: Where, layer: int) -> Float[Tensor, "n width"]:
    """Let each token attend to the slots of its lane up to its position, its own among them.

    Args:
        q: Queries, turned; their scale is ``d ** -0.5``.
        where: Each token's place; all keys and values are stored.
        layer: Which layer's part of the lanes.

    Returns:
        The mean values of each head, side by side.

    Source: Dao et al. 2023, "Flash-Decoding for long-context inference"; online softmax of Milakov & Gimelshein 2018
    (arXiv:1805.02867).
    """
    n, heads, width = q.shape
    out = torch.empty(n, heads * width, dtype=q.dtype, device=q.device)
    sums = torch.empty(n, heads, _SPLITS, width, dtype=torch.float32, device=q.device)
    peaks, weights = torch.empty(2, n, heads, _SPLITS, dtype=torch.float32, device=q.device)
    block, rows = _ATTENTION[q.dtype]
    group = heads // where.kv_heads
    shape = {"HEADS": heads, "WIDTH": width, "WIDE": _power(width), "BLOCK": block, "SPLITS": _SPLITS}
    _run(
        programs.attend,
        (n, where.kv_heads, _SPLITS),
        *(q, where.base, where.capacity, where.position, where.base if where.ready is None else where.ready),
        # Powers of 2 throughout, so the scale holds the logarithm's base too.
        *(sums, peaks, weights, n, layer, width**-0.5 * 1.4426950408889634, q.stride(0), q.stride(1)),
        **shape,
        KV_HEADS=where.kv_heads,
        TOKENS=max(1, rows // group),
        ROWS=max(rows, _power(group)),
        LANE=programs.TYPES[where.dtype],
        ALIGNED=_aligned(width * where.dtype.itemsize),
        DOT=_dot(q.dtype),
        READY=where.ready is not None,
        num_warps=4,
        num_stages=2 if q.dtype == torch.float32 else 3,
    )
    _run(programs.combine, (n, heads), sums, peaks, weights, where.position, out, **shape, num_warps=4)
    return out


def choose(
    cond: Float[Tensor, "n ids"],
    null: Float[Tensor, "n ids"] | None,
    *,
    scale: float,
    temperature: float,
    k: int,
    seeds: Int[Tensor, " n"],
    positions: Int[Tensor, " n"],
    first_id: int,
) -> Int[Tensor, " n"]:
    """Choose each row's next id: guidance, temperature, top-k, then the largest of logits plus noise.

    Args:
        cond: Logits given the prompt, of ids that follow one another.
        null: Logits given the null prompt, laid out alike; ``None`` for no guidance.
        scale: Strength of guidance.
        temperature: 0 takes the largest logit.
        k: How many of the largest logits may be chosen (and what ties with the last); 0 for all.
        seeds: Each row's seed, int64.
        positions: Where each row's id will stand, int64.
        first_id: The id of the first column.

    Returns:
        Columns, int64.
    """
    n, ids = cond.shape
    out = torch.empty(n, dtype=torch.int64, device=cond.device)
    cond = cond.contiguous()
    _run(
        programs.choose,
        (n,),
        *(cond, cond if null is None else null.contiguous(), seeds, positions, out, ids, cond.stride(0), k, first_id),
        *(float(scale), 1 / temperature if temperature else 1.0),
        GUIDED=null is not None and scale != 1,
        FILTERED=temperature != 0 and 0 < k < ids,
        NOISY=temperature != 0,
        WHOLE=_power(ids) if ids <= _REGISTERS else 0,
        CHUNK=_CHUNK,
        num_warps=16,
    )
    return out


def _run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _power(size: int) -> int:
    """The least power of 2 that is no smaller, and that a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


def _aligned(size: int) -> int:
    """What addresses of heads, ``size`` bytes each, are multiples of, up to the widest access."""
    return min(16, size & -size)


def _dot(dtype: torch.dtype) -> Any:
    """The type that matrices are multiplied in; the interpreter knows float32 alone."""
    return programs.TYPES[torch.float32 if programs.INTERPRETED else dtype]
