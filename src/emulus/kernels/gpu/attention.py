"""Keys and values put into lanes, and attention to them."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from emulus.kernels.gpu import launch
from emulus.kernels.where import Where

if find_spec("triton") is not None:
    from emulus.kernels.programs import attention as programs
    from emulus.kernels.programs.common import TYPES

# Programs that the blocks of a head are dealt out to. By the queries' type: slots of a block of keys, and rows (tokens
# times query heads of a key head) that share it: the least that Hopper's matrix instructions take, if they know it.
_SPLITS = 16
_ATTENTION = {torch.bfloat16: (64, 64), torch.float16: (64, 64), torch.float32: (32, 16)}


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
    launch.run(
        programs.rotate_and_store,
        (n, heads + 2 * where.kv_heads),
        *(q, k, v, cos.contiguous(), sin.contiguous(), out, where.base, where.capacity, where.position, layer),
        *(stride for tensor in (q, k, v) for stride in tensor.stride()[:2]),
        HEADS=heads,
        KV_HEADS=where.kv_heads,
        WIDTH=width,
        BLOCK=launch.power(width),
        LANE=TYPES[where.dtype],
        ALIGNED=launch.aligned(width * where.dtype.itemsize),
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
    shape = {"HEADS": heads, "WIDTH": width, "WIDE": launch.power(width), "BLOCK": block, "SPLITS": _SPLITS}
    launch.run(
        programs.attend,
        (n, where.kv_heads, _SPLITS),
        *(q, where.base, where.capacity, where.position, where.base if where.ready is None else where.ready),
        # Powers of 2 throughout, so the scale holds the logarithm's base too.
        *(sums, peaks, weights, n, layer, width**-0.5 * 1.4426950408889634, q.stride(0), q.stride(1)),
        **shape,
        KV_HEADS=where.kv_heads,
        TOKENS=max(1, rows // group),
        ROWS=max(rows, launch.power(group)),
        LANE=TYPES[where.dtype],
        ALIGNED=launch.aligned(width * where.dtype.itemsize),
        DOT=launch.dot(q.dtype),
        READY=where.ready is not None,
        num_warps=4,
        num_stages=2 if q.dtype == torch.float32 else 3,
    )
    launch.run(programs.combine, (n, heads), sums, peaks, weights, where.position, out, **shape, num_warps=4)
    return out
