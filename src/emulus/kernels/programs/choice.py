# mypy: ignore-errors
"""The next id: guidance, filter, noise, the largest.

Several programs share a row. :func:`count` finds how many logits lie in each of ``BINS`` ranges, and so in which range
the k-th largest lies. :func:`choose` then scores what lies above that range, and lists what lies in it; the last of a
row's programs to finish finds the k-th largest on the list, and the best score of all.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The ranges that logits are counted in, by their first bits in the order of the floats; and the bits that remain.
BINS = tl.constexpr(1024)
_REST = tl.constexpr(22)
# Turns the order of columns round.
_LAST = tl.constexpr(0x7FFFFFFF)


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
    """Guided logits over the temperature; -inf past the end and for what is not a number."""
    at = row * stride + columns
    value = tl.load(cond + at, mask=columns < ids, other=float("-inf")).to(tl.float32)
    if GUIDED:
        base = tl.load(null + at, mask=columns < ids, other=0.0).to(tl.float32)
        value = base + scale * (value - base)
    value *= inverse
    return tl.where((columns < ids) & (value == value), value, float("-inf"))


@triton.jit
def _order(value):
    """Unsigned numbers that stand in the order of the floats, one for both zeros."""
    bits = tl.where(value == 0, 0.0, value).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _scored(value, key, columns, first_id, NOISY: tl.constexpr):
    """Score and column in one number: the largest has the best score, and of equal ones the first column."""
    if NOISY:
        value += _gumbel(key, first_id + columns)
    return (_order(value).to(tl.uint64) << 32) | (columns ^ _LAST).to(tl.uint64)


@triton.jit
def count(
    cond,
    null,
    counts,
    ends,
    ids,
    stride,
    scale,
    inverse,
    GUIDED: tl.constexpr,
    FILTERED: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Count the logits of one part of a row by range (if ``FILTERED``), and set the row's ``ends`` to 0."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part == 0:
        tl.store(ends + row * 2 + tl.arange(0, 2), tl.zeros((2,), tl.int32))
    if FILTERED:
        total = tl.zeros((BINS,), tl.int32)
        each = tl.cdiv(ids, PARTS)
        for start in range(part * each, tl.minimum(part * each + each, ids), CHUNK):
            columns = start + tl.arange(0, CHUNK)
            value = _guided(cond, null, row, columns, ids, stride, scale, inverse, GUIDED)
            inside = (columns < ids) & (columns < part * each + each)
            total += tl.histogram((_order(value) >> _REST).to(tl.int32), BINS, mask=inside)
        tl.store(counts + (row * PARTS + part) * BINS + tl.arange(0, BINS), total)


@triton.jit
def _threshold(orders, length, least, k, LIST: tl.constexpr):
    """Find the k-th largest of a list, bit by bit; it is known to begin with the bits of ``least``."""
    inner = tl.arange(0, LIST)
    bit = tl.full((), 1, tl.uint32) << (_REST - 1)
    if length <= LIST:
        # They stay in registers. What is no entry is 0, which no tried number is.
        listed = tl.load(orders + inner, mask=inner < length, other=0).to(tl.uint32, bitcast=True)
        for _ in range(_REST):
            enough = tl.sum((listed >= (least | bit)).to(tl.int32), 0) >= k
            least = tl.where(enough, least | bit, least)
            bit = bit >> 1
    else:
        for _ in range(_REST):
            found = tl.full((), 0, tl.int32)
            for start in range(0, length, LIST):
                listed = tl.load(orders + start + inner, mask=start + inner < length, other=0)
                found += tl.sum((listed.to(tl.uint32, bitcast=True) >= (least | bit)).to(tl.int32), 0)
            least = tl.where(found >= k, least | bit, least)
            bit = bit >> 1
    return least


@triton.jit(do_not_specialize=["seeds", "positions", "k", "first_id"])
def choose(
    cond,
    null,
    seeds,
    positions,
    counts,
    ends,
    bests,
    orders,
    scores,
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
    PARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    LIST: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Score one part of a row; the last of its programs to finish (``ends`` counts them) chooses the column."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    key = tl.full((), 0, tl.uint64)
    if NOISY:
        key = _mix(tl.load(seeds + row).to(tl.uint64) + 0x9E3779B97F4A7C15)
        key = _mix(key ^ tl.load(positions + row).to(tl.uint64))
    parts = tl.arange(0, PARTS)
    if FILTERED:
        bins = tl.arange(0, BINS)
        each_bin = tl.zeros((BINS,), tl.int32)
        for other in tl.static_range(PARTS):
            each_bin += tl.load(counts + (row * PARTS + other) * BINS + bins)
        # Among the k largest is all above this range; of the range itself the first so many.
        last_bin = tl.sum((tl.cumsum(each_bin, 0, reverse=True) >= k).to(tl.int32), 0) - 1
        k -= tl.sum(tl.where(bins > last_bin, each_bin, 0), 0)
        orders += row * ids
        scores += row * ids
    best = tl.full((), 0, tl.uint64)
    each = tl.cdiv(ids, PARTS)
    for start in range(part * each, tl.minimum(part * each + each, ids), CHUNK):
        columns = start + tl.arange(0, CHUNK)
        value = _guided(cond, null, row, columns, ids, stride, scale, inverse, GUIDED)
        inside = (columns < ids) & (columns < part * each + each)
        score = _scored(value, key, columns, first_id, NOISY)
        if FILTERED:
            order = _order(value)
            bin = (order >> _REST).to(tl.int32)
            listed = inside & (bin == last_bin)
            number = listed.to(tl.int32)
            # In no order: what is taken from the list does not depend on it.
            at = tl.atomic_add(ends + row * 2, tl.sum(number, 0), sem="relaxed", scope="gpu")
            at += tl.cumsum(number, 0) - number
            tl.store(orders + at, order.to(tl.int32, bitcast=True), mask=listed)
            tl.store(scores + at, score.to(tl.int64, bitcast=True), mask=listed)
            inside = inside & (bin > last_bin)
        best = tl.maximum(best, tl.max(tl.where(inside, score, 0), 0))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(bests + row * PARTS + part, best.to(tl.int64, bitcast=True))
    # What all warps stored comes before the count, and the count before what the last program reads.
    tl.debug_barrier()
    if tl.atomic_add(ends + row * 2 + 1, 1, sem="acq_rel", scope="gpu") == PARTS - 1:
        best = tl.max(tl.load(bests + row * PARTS + parts).to(tl.uint64, bitcast=True), 0)
        if FILTERED:
            length = tl.load(ends + row * 2)
            least = _threshold(orders, length, last_bin.to(tl.uint32) << _REST, k, LIST)
            for start in range(0, length, CHUNK):
                at = start + tl.arange(0, CHUNK)
                order = tl.load(orders + at, mask=at < length, other=0).to(tl.uint32, bitcast=True)
                score = tl.load(scores + at, mask=at < length, other=0).to(tl.uint64, bitcast=True)
                best = tl.maximum(best, tl.max(tl.where((at < length) & (order >= least), score, 0), 0))
        tl.store(out + row, (best & _LAST).to(tl.int64) ^ _LAST)
