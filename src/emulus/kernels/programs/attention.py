# mypy: ignore-errors
"""Attention of a few tokens to the slots of their lanes.

Blocks of slots are dealt out among a fixed number of programs; the last of them to finish combines their sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LEAST = tl.constexpr(-1.0e30)
# Rows that are combined at a time.
_TOGETHER = tl.constexpr(4)


@triton.jit
def _memory(
    base,
    capacity,
    token,
    layer,
    which,
    head,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    LANE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Where the keys (``which`` 0) or values (1) of a token's lane begin, of one layer and head."""
    lane = tl.load(base + token).to(tl.pointer_type(LANE))
    start = ((layer * 2 + which) * KV_HEADS + head) * tl.load(capacity + token) * WIDTH
    # An address made of a number could be odd, for all the compiler knows, and then it reads one value at a time.
    return tl.multiple_of(lane + start, ALIGNED)


@triton.jit
def _normed(at, columns, inside, factor, weight, NORMED: tl.constexpr):
    """Numbers of a head in float32, scaled as :func:`emulus.kernels.programs.rows.rms_norm` does, with its rounding."""
    x = tl.load(at + columns, mask=inside, other=0.0)
    if NORMED:
        scaled = (x.to(tl.float32) * factor).to(x.dtype).to(tl.float32)
        x = (scaled * tl.load(weight + columns, mask=inside, other=0.0)).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _turned(at, cos, sin, weight, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr):
    """A head turned by its position's angles, normed before; float32."""
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    # The other of the pair (i, i + WIDTH / 2), and the sign it is turned with.
    other = tl.where(i < WIDTH // 2, i + WIDTH // 2, i - WIDTH // 2)
    sign = tl.where(i < WIDTH // 2, -1.0, 1.0)
    c = tl.load(cos + i, mask=inside, other=0.0)
    s = tl.load(sin + i, mask=inside, other=0.0) * sign
    factor = 1.0
    if NORMED:
        wide = tl.load(at + i, mask=inside, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    x = _normed(at, i, inside, factor, weight, NORMED)
    y = _normed(at, other, inside, factor, weight, NORMED)
    return x * c + y * s


@triton.jit(do_not_specialize=["base", "capacity", "position", "layer"])
def rotate_and_store(
    q,
    k,
    v,
    cos,
    sin,
    out,
    q_norm,
    k_norm,
    eps,
    base,
    capacity,
    position,
    layer,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NORMED: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """One head of one token a program: first the query heads, then the key heads, then the value heads."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    cos += token * WIDTH
    sin += token * WIDTH
    if head < HEADS:
        x = _turned(q + token * q_token + head * q_head, cos, sin, q_norm, eps, WIDTH, BLOCK, NORMED)
        tl.store(out + (token * HEADS + head) * WIDTH + i, x.to(out.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(position + token) * WIDTH + i
        if head < HEADS + KV_HEADS:
            at = k + token * k_token + (head - HEADS) * k_head
            x = _turned(at, cos, sin, k_norm, eps, WIDTH, BLOCK, NORMED)
            keys = _memory(base, capacity, token, layer, 0, head - HEADS, KV_HEADS, WIDTH, LANE, ALIGNED)
            # Rounded as the query is, whatever the lane could hold.
            tl.store(keys + slot, x.to(k.dtype.element_ty).to(LANE), mask=inside)
        else:
            number = head - HEADS - KV_HEADS
            values = _memory(base, capacity, token, layer, 1, number, KV_HEADS, WIDTH, LANE, ALIGNED)
            plain = tl.load(v + token * v_token + number * v_head + i, mask=inside, other=0.0)
            tl.store(values + slot, plain.to(LANE), mask=inside)


@triton.jit
def _mine(base, ready, token, row_token, present, READY: tl.constexpr):
    """Which tokens share a lane (and map) with ``token``."""
    mine = present & (tl.load(base + row_token, mask=present, other=0) == tl.load(base + token))
    if READY:
        mine = mine & (tl.load(ready + row_token, mask=present, other=0) == tl.load(ready + token))
    return mine


@triton.jit(do_not_specialize=["base", "capacity", "position", "ready", "finished", "n", "layer"])
def attend(
    q,
    base,
    capacity,
    position,
    ready,
    sums,
    peaks,
    weights,
    finished,
    out,
    n,
    layer,
    scale,
    q_token,
    q_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    LANE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DOT: tl.constexpr,
    READY: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Every SPLITS-th block of slots, for all query heads of a key head.

    Neighbouring tokens of one lane (and map) share what is read: the first of them in each ``TOKENS`` works for all,
    and the programs of the others end at once. A row sees the same blocks in the same order in any company: a block of
    which it may see nothing changes none of its sums.

    ``finished`` counts the programs of a first token and key head that are done. It is 0 before and after.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    token, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, ROWS)
    row_token = token // TOKENS * TOKENS + row // GROUP
    mine = _mine(base, ready, token, row_token, (row < TOKENS * GROUP) & (row_token < n), READY)
    earlier = tl.sum((mine & (row_token < token)).to(tl.int32), 0)
    row_position = tl.load(position + row_token, mask=mine, other=-1)
    last = tl.max(row_position, 0)
    blocks = (last // BLOCK + 1).to(tl.int32)
    if (earlier == 0) & (split < blocks):
        i = tl.arange(0, WIDE)
        inside = (i < WIDTH)[None, :]
        keys = _memory(base, capacity, token, layer, 0, head, KV_HEADS, WIDTH, LANE, ALIGNED)
        values = _memory(base, capacity, token, layer, 1, head, KV_HEADS, WIDTH, LANE, ALIGNED)
        row_head = head * GROUP + row % GROUP
        q_at = row_token.to(tl.int64) * q_token + row_head * q_head
        # Rows of other lanes are read as row 0; they see nothing and are not stored. (With a mask of rows as well,
        # Triton 3.6 and 3.7 cannot build this with maps.)
        q_at = tl.where(mine, q_at, 0)
        queries = tl.load(q + q_at[:, None] + i[None, :], mask=inside, other=0.0).to(DOT)
        peak = tl.full((ROWS,), _LEAST, tl.float32)
        weight = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS, WIDE), tl.float32)
        if READY:
            # Address 0 is no map: then nothing is read, and every slot may be seen.
            map_at = tl.load(ready + token)
            mapped = tl.where(map_at != 0, last, -1)
        for block in range(split, blocks, SPLITS):
            slots = block * BLOCK + tl.arange(0, BLOCK)
            at = slots.to(tl.int64)[:, None] * WIDTH + i[None, :]
            # Past the lane's end lies other memory, and 0 times what is there need not be 0.
            written = (slots <= last)[:, None] & inside
            key = tl.load(keys + at, mask=written, other=0.0).to(DOT)
            score = tl.dot(queries, tl.trans(key), input_precision="ieee") * scale
            seen = slots[None, :] <= row_position[:, None]
            value = tl.load(values + at, mask=written, other=0.0).to(DOT)
            if READY:
                allowed = tl.load(map_at.to(tl.pointer_type(tl.uint8)) + slots, mask=slots <= mapped, other=1) != 0
                seen = seen & (allowed[None, :] | (slots[None, :] == row_position[:, None]))
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            share = tl.exp2(score - higher[:, None])
            shrink = tl.exp2(peak - higher)
            weight = weight * shrink + tl.sum(share, 1)
            total = total * shrink[:, None]
            if tl.float32 == LANE:
                total = tl.dot(share, value.to(tl.float32), total, input_precision="ieee")
            else:
                total = tl.dot(share.to(tl.bfloat16).to(DOT), value, total)
            peak = higher
        place = (row_token.to(tl.int64) * HEADS + row_head) * SPLITS + split
        tl.store(peaks + place, peak, mask=mine)
        tl.store(weights + place, weight, mask=mine)
        tl.store(sums + place[:, None] * WIDTH + i[None, :], total, mask=mine[:, None] & inside)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        # The sums of all warps come before the count, and the count before what the last program reads.
        tl.debug_barrier()
        parts = tl.minimum(blocks, SPLITS)
        counter = finished + token * KV_HEADS + head
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1:
            tl.store(counter, 0)
            final = tl.max(tl.where(mine, row, -1), 0) + 1
            for first in range(token % TOKENS * GROUP, final, _TOGETHER):
                rows = first + tl.arange(0, _TOGETHER)
                token_of = token // TOKENS * TOKENS + rows // GROUP
                wanted = _mine(base, ready, token, token_of, (rows < final) & (token_of < n), READY)
                number = token_of.to(tl.int64) * HEADS + head * GROUP + rows % GROUP
                mean = _combined(sums, peaks, weights, number, wanted, parts, WIDTH, WIDE, SPLITS)
                at = number[:, None] * WIDTH + i[None, :]
                tl.store(out + at, mean.to(out.dtype.element_ty), mask=wanted[:, None] & inside)


@triton.jit
def _combined(
    sums, peaks, weights, number, wanted, parts, WIDTH: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr
):
    """Mean values of rows: what each part found, added in the order of the parts, whichever was done first."""
    i = tl.arange(0, WIDE)
    place = number * SPLITS
    highest = tl.full(number.shape, _LEAST, tl.float32)
    for split in tl.static_range(SPLITS):
        peak = tl.load(peaks + place + split, mask=wanted & (split < parts), other=_LEAST)
        highest = tl.maximum(highest, peak)
    weight = tl.zeros(number.shape, tl.float32)
    total = tl.zeros((number.shape[0], WIDE), tl.float32)
    for split in tl.static_range(SPLITS):
        there = wanted & (split < parts)
        share = tl.exp2(tl.load(peaks + place + split, mask=there, other=_LEAST) - highest)
        weight = tl.fma(share, tl.load(weights + place + split, mask=there, other=0.0), weight)
        at = (place + split)[:, None] * WIDTH + i[None, :]
        part = tl.load(sums + at, mask=there[:, None] & (i < WIDTH)[None, :], other=0.0)
        total = tl.fma(part, tl.broadcast_to(share[:, None], part.shape), total)
    return total / tl.where(wanted, weight, 1.0)[:, None]
