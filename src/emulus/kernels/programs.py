# mypy: ignore-errors
"""The programs of :mod:`emulus.kernels.gpu`, in Triton. Needs Triton; nothing else imports this.

Every sum is taken in an order that the layer's sizes fix: neither the number of tokens, nor which tokens stand beside
a token, nor which program ends first changes it.

Source: Tillet et al. 2019, "Triton: an intermediate language and compiler for tiled neural network computations".
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the programs run on the CPU, element by element, as tests have it where there is no GPU."""

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
}
"""What Triton calls the types that a lane may have."""

# The interpreter can neither multiply bfloat16 matrices nor read assembly.
_ASSEMBLY = tl.constexpr(not INTERPRETED)
# How a weight is brought to the type that is multiplied in.
CAST = tl.constexpr(0)
ROUND = tl.constexpr(1)
FP8 = tl.constexpr(2)
_GROUP = tl.constexpr(64)
_LEAST = tl.constexpr(-1.0e30)

# --- Products. Many warps share a block of rows, each takes its own columns, and their sums are added at the end: so a
# --- few rows keep a multiprocessor busy, and weights go from memory to registers once.


@triton.jit
def linear(
    x,
    weight,
    scale,
    out,
    n,
    outs,
    ins,
    x_stride,
    weight_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
):
    """Rows of ``weight`` times ``TOKENS`` tokens; a row's scale, if any, is multiplied at the end."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    # Rows past the end are read as the last one and not stored: no load of weights needs a mask.
    row_at = (tl.minimum(rows, outs - 1).to(tl.int64) * weight_stride)[None, :, None]
    token_at = (tokens * x_stride)[None, None, :]
    here = (tokens < n)[None, None, :]
    inner = tl.arange(0, PARTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((PARTS, ROWS, TOKENS), tl.float32)
    for start in range(0, ins, PARTS * WIDTH):
        columns = start + inner
        if EVEN:
            w = tl.load(weight + row_at + columns[:, None, :])
            part = tl.load(x + token_at + columns[:, :, None], mask=here, other=0.0)
        else:
            w = tl.load(weight + row_at + columns[:, None, :], mask=(columns < ins)[:, None, :], other=0.0)
            part = tl.load(x + token_at + columns[:, :, None], mask=here & (columns < ins)[:, :, None], other=0.0)
        if KIND == ROUND:
            w = w.to(tl.bfloat16)
        elif KIND == FP8:
            # By this detour every step has an instruction of full speed.
            w = w.to(tl.float16).to(tl.float32)
        total = tl.dot(w.to(DOT), part.to(DOT), total)
    sums = tl.sum(total, 0)
    if SCALED:
        sums *= tl.load(scale + rows, mask=rows < outs, other=0.0)[:, None]
    at = tokens.to(tl.int64)[None, :] * outs + rows[:, None]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(tokens < n)[None, :] & (rows < outs)[:, None])


@triton.jit
def _from_int4(words, scale, low, NUMBER: tl.constexpr):
    """Give the weights that stand as nibble ``NUMBER`` of 16-bit words, as bfloat16."""
    if _ASSEMBLY:
        # The last digits of 128 + q are q. Two words lie in a register; by itself the compiler takes them apart.
        raised = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t, c; shr.u32 t, $1, {4 * NUMBER}; mov.b32 c, 0x43004300; "
            "lop3.b32 $0, t, 0x000F000F, c, 0xEA; }",
            "=r,r",
            [words],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
        # The difference is exact; product and sum are rounded once, together.
        weights = tl.fma(raised - 128.0, scale, low)
    else:
        q = ((words >> (4 * NUMBER)) & 15).to(tl.float32)
        weights = (q * scale.to(tl.float32) + low.to(tl.float32)).to(tl.bfloat16)
    return weights


@triton.jit
def linear_int4(
    x,
    q,
    scale,
    low,
    out,
    n,
    outs,
    groups,
    q_stride,
    scale_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
):
    """Like :func:`linear`; ``q`` and ``x`` are read as words of four inputs, one of which is multiplied at a time."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.minimum(rows, outs - 1).to(tl.int64)
    token_at = (tokens * (groups * (_GROUP // 4)))[None, None, :]
    here = (tokens < n)[None, None, :]
    total = tl.zeros((PARTS, ROWS, TOKENS), tl.float32)
    for start in range(0, groups, PARTS):
        group = start + tl.arange(0, PARTS)
        inner = group[:, None] * (_GROUP // 4) + tl.arange(0, _GROUP // 4)[None, :]
        words_at = q + (row * q_stride)[None, :, None] + inner[:, None, :]
        ends_at = (row * scale_stride)[None, :] + group[:, None]
        if EVEN:
            words = tl.load(words_at)
            steps, least = tl.load(scale + ends_at), tl.load(low + ends_at)
            fours = tl.load(x + token_at + inner[:, :, None], mask=here, other=0)
        else:
            inside = (group < groups)[:, None]
            words = tl.load(words_at, mask=inside[:, :, None], other=0)
            steps = tl.load(scale + ends_at, mask=inside, other=0.0)
            least = tl.load(low + ends_at, mask=inside, other=0.0)
            fours = tl.load(x + token_at + inner[:, :, None], mask=here & inside[:, :, None], other=0)
        for number in tl.static_range(4):
            part = (fours >> (16 * number)).to(tl.int16).to(tl.bfloat16, bitcast=True)
            w = _from_int4(words, steps[:, :, None], least[:, :, None], number)
            total = tl.dot(w.to(DOT), part.to(DOT), total)
    sums = tl.sum(total, 0)
    at = tokens.to(tl.int64)[None, :] * outs + rows[:, None]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(tokens < n)[None, :] & (rows < outs)[:, None])


# --- Between the products


@triton.jit
def rms_norm(x, weight, out, size, x_stride, eps, BLOCK: tl.constexpr):
    """One row a program; the cast back comes before the weight, as released."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    wide = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    scaled = wide.to(out.dtype.element_ty).to(tl.float32) * tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(out + row * size + columns, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_mul(gate, up, out, size, gate_stride, up_stride, BLOCK: tl.constexpr):
    """Part of a row a program."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    a = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), mask=inside)


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


# --- Attention, in two steps: blocks of slots are dealt out among a fixed number of programs, whose sums are combined.


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
        queries = tl.load(q + q_at[:, None] + i[None, :], mask=mine[:, None] & inside, other=0.0).to(DOT)
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


# --- The next id


@triton.jit
def _mix(x):
    """Scramble 64 bits.

    Source: the finaliser of splitmix64, Steele et al. 2014, "Fast splittable pseudorandom number generators".
    """
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _gumbel(key, ids):
    """Noise of :func:`emulus.sampling.noise.gumbel`; in float64 a plain logarithm is as exact as log1p in float32."""
    bits = _mix(key + ids.to(tl.uint64) * 0x9E3779B97F4A7C15) >> 32
    uniform = ((bits.to(tl.float64) + 0.5) * 2.0**-32).to(tl.float32)
    uniform = tl.minimum(uniform, 1.0 - 2.0**-24)
    return -tl.log(-tl.log(1.0 - uniform.to(tl.float64)).to(tl.float32))


@triton.jit
def _guided(cond, null, row, columns, ids, stride, scale, inverse, GUIDED: tl.constexpr):
    """Guided logits over the temperature, -inf past the end."""
    at = row * stride + columns
    value = tl.load(cond + at, mask=columns < ids, other=float("-inf")).to(tl.float32)
    if GUIDED:
        base = tl.load(null + at, mask=columns < ids, other=0.0).to(tl.float32)
        value = base + scale * (value - base)
    return value * inverse


@triton.jit
def _order(value):
    """Unsigned numbers that stand in the order of the floats."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def choose(
    cond,
    null,
    seeds,
    positions,
    out,
    ids,
    stride,
    k,
    first_id,
    scale,
    inverse,
    GUIDED: tl.constexpr,
    FILTERED: tl.constexpr,
    NOISY: tl.constexpr,
    WHOLE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row a program: guidance, temperature, the k-th largest found bit by bit, noise, the largest.

    A row that fits into ``WHOLE`` columns stays in registers while bits are tried; a longer one (``WHOLE`` 0) is read
    again for each bit. What follows takes a chunk at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    inner = tl.arange(0, CHUNK)
    chunks = tl.cdiv(ids, CHUNK)
    least = tl.full((), 0, tl.uint32)
    if FILTERED:
        if WHOLE > 0:
            whole = _order(_guided(cond, null, row, tl.arange(0, WHOLE), ids, stride, scale, inverse, GUIDED))
        bit = tl.full((), 0x80000000, tl.uint32)
        for _ in range(32):
            tried = least | bit
            if WHOLE > 0:
                count = tl.sum((whole >= tried).to(tl.int32), 0)
            else:
                count = tl.full((), 0, tl.int32)
                for chunk in range(chunks):
                    part = _guided(cond, null, row, chunk * CHUNK + inner, ids, stride, scale, inverse, GUIDED)
                    count += tl.sum((_order(part) >= tried).to(tl.int32), 0)
            least = tl.where(count >= k, tried, least)
            bit = bit >> 1
    if NOISY:
        key = _mix(tl.load(seeds + row).to(tl.uint64) + 0x9E3779B97F4A7C15)
        key = _mix(key ^ tl.load(positions + row).to(tl.uint64))
    best = tl.full((), float("-inf"), tl.float32)
    chosen = tl.full((), 0, tl.int64)
    for chunk in range(chunks):
        columns = chunk * CHUNK + inner
        value = _guided(cond, null, row, columns, ids, stride, scale, inverse, GUIDED)
        score = tl.where(_order(value) >= least, value, float("-inf"))
        if NOISY:
            score += _gumbel(key, first_id + columns)
        peak = tl.max(score, 0)
        column = chunk * CHUNK + tl.argmax(score, 0)
        chosen = tl.where(peak > best, column.to(tl.int64), chosen)
        best = tl.maximum(best, peak)
    tl.store(out + row, chosen)
