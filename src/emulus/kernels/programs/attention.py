# mypy: ignore-errors
"""Attention of a few tokens to the slots of their lanes.

In two steps: blocks of slots are dealt out among a fixed number of programs, whose sums are combined.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LEAST = tl.constexpr(-1.0e30)


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
def rotate_and_store(
    q,
    k,
    v,
    cos,
    sin,
    out,
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
):
    """One head of one token a program: first the query heads, then the key heads, then the value heads."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    inside = i < WIDTH
    # The other of the pair (i, i + WIDTH / 2), and the sign it is turned with.
    other = tl.where(i < WIDTH // 2, i + WIDTH // 2, i - WIDTH // 2)
    sign = tl.where(i < WIDTH // 2, -1.0, 1.0)
    c = tl.load(cos + token * WIDTH + i, mask=inside, other=0.0)
    s = tl.load(sin + token * WIDTH + i, mask=inside, other=0.0) * sign
    if head < HEADS:
        at = q + token * q_token + head * q_head
        x = tl.load(at + i, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(at + other, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + (token * HEADS + head) * WIDTH + i, (x * c + y * s).to(out.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(position + token) * WIDTH + i
        if head < HEADS + KV_HEADS:
            at = k + token * k_token + (head - HEADS) * k_head
            x = tl.load(at + i, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(at + other, mask=inside, other=0.0).to(tl.float32)
            # Rounded as the query is, whatever the lane could hold.
            turned = (x * c + y * s).to(k.dtype.element_ty)
            keys = _memory(base, capacity, token, layer, 0, head - HEADS, KV_HEADS, WIDTH, LANE, ALIGNED)
            tl.store(keys + slot, turned.to(LANE), mask=inside)
        else:
            number = head - HEADS - KV_HEADS
            values = _memory(base, capacity, token, layer, 1, number, KV_HEADS, WIDTH, LANE, ALIGNED)
            plain = tl.load(v + token * v_token + number * v_head + i, mask=inside, other=0.0)
            tl.store(values + slot, plain.to(LANE), mask=inside)


@triton.jit
def attend(
    q,
    base,
    capacity,
    position,
    ready,
    sums,
    peaks,
    weights,
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
):
    """Every SPLITS-th block of slots, for all query heads of a key head.

    Neighbouring tokens of one lane (and map) share what is read: the first of them in each ``TOKENS`` works for all,
    and the programs of the others end at once. A row sees the same blocks in the same order in any company: a block of
    which it may see nothing changes none of its sums.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    token, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, ROWS)
    row_token = token // TOKENS * TOKENS + row // GROUP
    present = (row < TOKENS * GROUP) & (row_token < n)
    mine = present & (tl.load(base + row_token, mask=present, other=0) == tl.load(base + token))
    if READY:
        map_at = tl.load(ready + token)
        mine = mine & (tl.load(ready + row_token, mask=present, other=0) == map_at)
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


@triton.jit
def combine(
    sums,
    peaks,
    weights,
    position,
    out,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Add up what the programs of :func:`attend` found for one head of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.arange(0, SPLITS)
    i = tl.arange(0, WIDE)
    # Only so many had a block of slots up to this position.
    full = split <= tl.load(position + token) // BLOCK
    place = (token * HEADS + head) * SPLITS + split
    peak = tl.load(peaks + place, mask=full, other=_LEAST)
    share = tl.where(full, tl.exp2(peak - tl.max(peak, 0)), 0.0)
    weight = tl.sum(share * tl.load(weights + place, mask=full, other=0.0), 0)
    at = place[:, None] * WIDTH + i[None, :]
    total = tl.load(sums + at, mask=full[:, None] & (i < WIDTH)[None, :], other=0.0)
    mean = tl.sum(total * share[:, None], 0) / weight
    tl.store(out + (token * HEADS + head) * WIDTH + i, mean.to(out.dtype.element_ty), mask=i < WIDTH)
