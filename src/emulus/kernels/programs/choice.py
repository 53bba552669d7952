# mypy: ignore-errors
"""The next id: guidance, filter, noise, the largest."""

from __future__ import annotations

import triton
import triton.language as tl


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
