# mypy: ignore-errors
"""Norms of the vision tokenizer's feature maps, which have their channels last."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _channels(first, WIDTH: tl.constexpr, WIDE: tl.constexpr, GROUPS: tl.constexpr):
    """Channels of ``GROUPS`` groups from this one on, each padded to ``WIDE``, and which of them there are."""
    at = tl.arange(0, GROUPS * WIDE)
    if WIDTH == WIDE:
        return first * WIDTH + at, at >= 0
    return (first + at // WIDE) * WIDTH + at % WIDE, at % WIDE < WIDTH


@triton.jit
def _spread(values, WIDE: tl.constexpr, GROUPS: tl.constexpr):
    """Each group's value for each of its channels."""
    return tl.reshape(tl.broadcast_to(values[:, None], (GROUPS, WIDE)), (GROUPS * WIDE,))


@triton.jit(do_not_specialize=["places", "tiles"])
def moments(
    x,
    sums,
    places,
    tiles,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Mean and sum of squares around it of some groups, over a share of a sample's places.

    Each element of a tile keeps a running mean of its own, so the loop needs no exchange between threads, and no
    digits are lost where a mean is large.

    Source: Welford 1962 for the running moments; Chan et al. 1979 for putting them together.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    split, first, sample = tl.program_id(0), tl.program_id(1) * GROUPS, tl.program_id(2).to(tl.int64)
    channel, real = _channels(first, WIDTH, WIDE, GROUPS)
    end = tl.minimum((split + 1) * tiles * ROWS, places)
    lane = tl.arange(0, ROWS)
    mean = tl.zeros((ROWS, GROUPS * WIDE), tl.float32)
    square = tl.zeros((ROWS, GROUPS * WIDE), tl.float32)
    base = x + sample * places * CHANNELS
    seen = 0.0
    for tile in tl.range(0, tiles, num_stages=3):
        place = (split * tiles + tile) * ROWS + lane
        there = place < end
        at = place.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        value = tl.load(base + at, mask=there[:, None] & real[None, :], other=0.0).to(tl.float32)
        seen += 1.0
        off = tl.where(there[:, None], value - mean, 0.0)
        mean += off * (1.0 / seen)
        square += off * tl.where(there[:, None], value - mean, 0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    rounds = tl.cdiv(tl.maximum(end - split * tiles * ROWS - lane, 0), ROWS).to(tl.float32)
    count = tl.maximum(tl.sum(rounds, 0), 1.0)
    by_channel = tl.sum(mean * rounds[:, None], 0) / count
    by_group = tl.sum(tl.reshape(tl.where(real, by_channel, 0.0), (GROUPS, WIDE)), 1) / WIDTH
    off = mean - _spread(by_group, WIDE, GROUPS)[None, :]
    spread = tl.where(real, tl.sum(square + rounds[:, None] * off * off, 0), 0.0)
    at = sums + ((sample * 2 * SPLITS + split) * (CHANNELS // WIDTH) + first) + tl.arange(0, GROUPS)
    tl.store(at, by_group)
    tl.store(at + SPLITS * (CHANNELS // WIDTH), tl.sum(tl.reshape(spread, (GROUPS, WIDE)), 1))


@triton.jit
def _whole(
    sums,
    sample,
    first,
    places,
    share,
    ALL: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Mean and variance of some groups over all places of a sample, from those of its shares."""
    split = tl.arange(0, SPLITS)
    at = sums + (sample * 2 * SPLITS + split)[:, None] * ALL + first + tl.arange(0, GROUPS)[None, :]
    part = tl.minimum(tl.maximum(places - split * share, 0), share).to(tl.float32)[:, None] / places
    each = tl.load(at)
    mean = tl.sum(each * part, 0)
    off = each - mean[None, :]
    squares = tl.load(at + SPLITS * ALL) / (places * 1.0)
    return mean, tl.sum(squares / WIDTH + part * off * off, 0)


@triton.jit(do_not_specialize=["places", "tiles", "wide"])
def normalise(
    x,
    sums,
    weight,
    bias,
    times,
    plus,
    out,
    places,
    tiles,
    wide,
    eps,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    STEERED: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    SILU: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Normalise some groups over a share of a sample's places; then each place's own scale and shift, and SiLU.

    The map is ``wide`` places wide, and ``DOWN`` by ``ACROSS`` of them have one scale and shift.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    split, first, sample = tl.program_id(0), tl.program_id(1) * GROUPS, tl.program_id(2).to(tl.int64)
    channel, real = _channels(first, WIDTH, WIDE, GROUPS)
    mean, variance = _whole(sums, sample, first, places, tiles * ROWS, CHANNELS // WIDTH, WIDTH, GROUPS, SPLITS)
    centre = _spread(mean, WIDE, GROUPS)
    scale = tl.load(weight + channel, mask=real, other=0.0).to(tl.float32)
    scale *= _spread(1.0 / tl.sqrt_rn(variance + eps), WIDE, GROUPS)
    shift = tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
    end = tl.minimum((split + 1) * tiles * ROWS, places)
    coarse = wide // ACROSS
    base = sample * places * CHANNELS
    steer = sample * (places // (DOWN * ACROSS)) * CHANNELS
    for tile in tl.range(0, tiles, num_stages=3):
        place = (split * tiles + tile) * ROWS + tl.arange(0, ROWS)
        inside = (place < end)[:, None] & real[None, :]
        at = place.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        value = tl.load(x + base + at, mask=inside, other=0.0).to(tl.float32)
        value = (value - centre[None, :]) * scale[None, :] + shift[None, :]
        if STEERED:
            row = place // wide
            cell = row // DOWN * coarse + (place - row * wide) // ACROSS
            near = steer + cell.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
            value *= tl.load(times + near, mask=inside, other=0.0).to(tl.float32)
            value += tl.load(plus + near, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            value = value / (1.0 + tl.exp(-value))
        tl.store(out + base + at, value.to(out.dtype.element_ty), mask=inside)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
