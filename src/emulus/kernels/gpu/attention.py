"""Keys and values put into lanes, and attention to them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from emulus.kernels.gpu import launch
from emulus.kernels.where import Where

if find_spec("triton") is not None:
    from emulus.kernels.programs import attention as programs
    from emulus.kernels.programs.common import TYPES

# Programs that the blocks of a head are dealt out to: as many for lanes of any length, since sums must not depend on
# which requests share a step.
_SPLITS = 16


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Sizes of a program of attention.

    Attributes:
        slots: Slots in a block of keys.
        rows: Tokens times query heads of a key head that share the block.
        warps: That work on it.
        stages: Blocks on their way at a time, and the one that is worked on.
    """

    slots: int
    rows: int
    warps: int
    stages: int


# 64 rows are the least that Hopper's own matrix instructions take. Elsewhere fewer rows need fewer registers; on
# Blackwell they also keep sums out of tensor memory, from where each block would have to fetch them.
_HOPPER = _Tile(slots=64, rows=64, warps=4, stages=3)
_OTHERS = _Tile(slots=64, rows=32, warps=4, stages=3)
# With narrow heads a third block on its way makes Blackwell's compiler spill.
_OTHERS_NARROW = _Tile(slots=64, rows=32, warps=4, stages=2)
# Products of float32 have no such instructions, and with larger blocks their sums do not fit into registers.
_FLOAT32 = _Tile(slots=16, rows=16, warps=8, stages=2)


def rotate_and_store(
    q: Float[Tensor, "n heads d"],
    k: Float[Tensor, "n kv_heads d"],
    v: Float[Tensor, "n kv_heads d"],
    cos: Float[Tensor, "n d"],
    sin: Float[Tensor, "n d"],
    where: Where,
    layer: int,
    *,
    q_norm: Float[Tensor, " d"] | None = None,
    k_norm: Float[Tensor, " d"] | None = None,
    eps: float = 0.0,
) -> Float[Tensor, "n heads d"]:
    """Turn queries and keys by their positions' angles, and put keys and values into the lanes.

    Args:
        q: Queries; like ``k`` and ``v`` possibly a view of a wider tensor, such as that of all three side by side.
        k: Keys.
        v: Values.
        cos: Cosines in the rotate-half layout, float32.
        sin: Sines in the same layout.
        where: Each token's place.
        layer: Which layer's part of the lanes.
        q_norm: Weights of the norm of each query head, applied first as :func:`~emulus.kernels.gpu.rms_norm` does;
            given together with ``k_norm`` or not at all.
        k_norm: Weights of the norm of each key head.
        eps: Added to the mean square in both norms.

    Returns:
        The queries, turned.
    """
    n, heads, width = q.shape
    out = torch.empty(n, heads, width, dtype=q.dtype, device=q.device)
    launch.run(
        programs.rotate_and_store,
        (n, heads + 2 * where.kv_heads),
        *(q, k, v, cos.contiguous(), sin.contiguous(), out, q if q_norm is None else q_norm),
        *(k if k_norm is None else k_norm, eps, where.base, where.capacity, where.position, layer),
        *(stride for tensor in (q, k, v) for stride in tensor.stride()[:2]),
        HEADS=heads,
        KV_HEADS=where.kv_heads,
        WIDTH=width,
        BLOCK=launch.power(width),
        LANE=TYPES[where.dtype],
        ALIGNED=launch.aligned(width * where.dtype.itemsize),
        NORMED=q_norm is not None,
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
    tile = _tile(q, where.dtype)
    group = heads // where.kv_heads
    launch.run(
        programs.attend,
        (n, where.kv_heads, _SPLITS),
        *(q, where.base, where.capacity, where.position, where.base if where.ready is None else where.ready),
        # Powers of 2 throughout, so the scale holds the logarithm's base too.
        *(sums, peaks, weights, where.finished, out, n, layer, width**-0.5 * 1.4426950408889634),
        *q.stride()[:2],
        HEADS=heads,
        KV_HEADS=where.kv_heads,
        WIDTH=width,
        WIDE=launch.power(width),
        TOKENS=max(1, tile.rows // group),
        ROWS=max(tile.rows, launch.power(group)),
        BLOCK=tile.slots,
        SPLITS=_SPLITS,
        LANE=TYPES[where.dtype],
        ALIGNED=launch.aligned(width * where.dtype.itemsize),
        DOT=launch.dot(q.dtype),
        READY=where.ready is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def _tile(q: Tensor, lane: torch.dtype) -> _Tile:
    if torch.float32 in (q.dtype, lane):
        return _FLOAT32
    # 0 is the interpreter, which tests what Hopper gets.
    if launch.capability(q) in (0, launch.HOPPER):
        return _HOPPER
    return _OTHERS if q.shape[-1] > 64 else _OTHERS_NARROW
