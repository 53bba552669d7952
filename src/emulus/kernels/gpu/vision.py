"""Norms of the vision tokenizer's feature maps."""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor, nn

from emulus.kernels.gpu import launch

if find_spec("triton") is not None:
    from emulus.kernels.programs import vision as programs

# Channels and places of a tile; the programs that a sample's work is dealt out to, about.
_CHANNELS = 128
_ROWS = 32
_PROGRAMS = 512
# A program that takes fewer tiles costs more than it saves.
_TILES = 4


def group_norm(
    x: Float[Tensor, "n c *places"],
    norm: nn.GroupNorm,
    *,
    steering: tuple[Float[Tensor, "n c i j"], Float[Tensor, "n c i j"]] | None = None,
    silu: bool = False,
) -> Float[Tensor, "n c *places"]:
    """Normalise groups of channels, then scale and shift each place by its own factors, then SiLU, in two launches.

    Moments and all arithmetic are in float32; the result is rounded once. A sample's result does not depend on the
    others beside it.

    Args:
        x: A map of frames, or of clips ``(n, c, t, h, w)``; copied if its channels are not last in memory.
        norm: The norm, with a weight and a bias.
        steering: Scales and shifts on a grid that divides the map's, for ``(n, c, h, w)`` only.
        silu: Whether SiLU comes last.

    Returns:
        The type and shape of ``x``, channels last in memory.
    """
    x = last(x)
    out = torch.empty_like(x)
    n, channels, *sides = x.shape
    if not x.numel():
        return out
    places = math.prod(sides)
    groups = norm.num_groups
    width = channels // groups
    wide = 1 << (width - 1).bit_length()
    together = _together(groups, wide)
    splits = _splits(places, groups // together)
    rows = max(16, min(_ROWS, _ROWS * _CHANNELS // (together * wide)))
    tiles = launch.blocks(launch.blocks(places, splits), rows)
    sums = torch.empty(n, 2, splits, groups, dtype=torch.float32, device=x.device)
    times, plus = (x, x) if steering is None else (last(each) for each in steering)
    shape = {"CHANNELS": channels, "WIDTH": width, "WIDE": wide, "GROUPS": together, "SPLITS": splits, "ROWS": rows}
    down, across = (1, 1) if steering is None else (sides[-2] // times.shape[-2], sides[-1] // times.shape[-1])
    grid = (splits, groups // together, n)
    launch.run(programs.moments, grid, x, sums, places, tiles, **shape, num_warps=4)
    launch.run(
        programs.normalise,
        grid,
        *(x, sums, norm.weight, norm.bias, times, plus, out, places, tiles, sides[-1], norm.eps),
        **shape,
        STEERED=steering is not None,
        DOWN=down,
        ACROSS=across,
        SILU=silu,
        num_warps=4,
    )
    return out


def last(x: Tensor) -> Tensor:
    """The same tensor with its channels last in memory."""
    kind = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=kind)


def _together(groups: int, wide: int) -> int:
    """Groups that one program takes: the largest power of 2 that divides them and fits a tile."""
    most = groups & -groups
    return min(most, max(1, _CHANNELS // wide))


def _splits(places: int, blocks: int) -> int:
    """Shares of a sample's places, a power of 2; from its shape alone, so that sums do not depend on the batch."""
    wanted = min(_PROGRAMS // blocks, launch.blocks(places, _ROWS * _TILES))
    return 1 << max(0, wanted.bit_length() - 1)
