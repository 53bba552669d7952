"""Noise that depends on nothing but (seed, position, id), so that a result depends on nothing but its seed.

A stream of random numbers would make each draw depend on how many were drawn before it, and so on batch mates
and schedule. A hash has no order: any draw can be repeated, alone, on any device.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15


def gumbel(
    seeds: Int[Tensor, " batch"], positions: Int[Tensor, " batch"], ids: Int[Tensor, "batch ids"]
) -> Float[Tensor, "batch ids"]:
    """Give standard Gumbel noise: the argmax of logits plus this noise is a draw from their softmax.

    Args:
        seeds: Each row's seed, int64.
        positions: Each row's position in its sequence, int64.
        ids: The ids that may be drawn, int64.

    Returns:
        float32 noise, in about [-2.9, 22.9].

    Source: Gumbel-max trick, Maddison et al. 2014 (arXiv:1411.0030).
    """
    keys = _mix(_mix(seeds + _signed(_STEP)) ^ positions)[:, None]
    bits = _shift(_mix(keys + ids * _signed(_STEP)), 32)
    # Uniform in (0, 1); the largest values would round to 1, whose logarithm below is infinite.
    uniform = ((bits.double() + 0.5) / 2**32).float().clamp(max=1 - 2**-24)
    # log1p keeps the small values exact, and those make the largest noise, which decides the draw.
    return -torch.log(-torch.log1p(-uniform))


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer; PyTorch multiplies those modulo 2**64."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right filling with zeros (``>>`` repeats the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Scramble 64 bits.

    Source: the finaliser of splitmix64, Steele et al. 2014, "Fast splittable pseudorandom number generators".
    """
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)
