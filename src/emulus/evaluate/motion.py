"""How much clips move, how smoothly, and whether they end where they began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emulus.evaluate.perceptual import perceptual_metric

MOVING = 0.05
"""A pixel moves when a channel changes by more than this part of its range: less may be a codec's noise."""
STILL = 0.002
"""A clip is still when its pixels change by less than this part of their range, on average."""


@dataclass(frozen=True, kw_only=True)
class Motion:
    """How clips move; means over clips. None of it tells whether the motion is the right one.

    Attributes:
        count: How many.
        difference: Between neighbouring frames, as a part of the range of pixels.
        moving: Share of the pixels that change between neighbouring frames by more than ``MOVING``.
        still: Share of the clips that do not move.
        consistency: ST-LPIPS of neighbouring frames, lower where they are more alike; ``None`` without the extra
            ``emulus[perceptual]``. What moves more has more: to be read beside the amount of motion.
        flicker: How far frames are from the mean of their two neighbours, over how far they are from these: 0 where all
            pixels change evenly, 1 where every frame is undone by the next one.
        jumps: Difference of frames across the border of two codes, over that of frames of one code: 1 where nothing
            tells where a code ends; ``None`` where frames of one code do not differ, or all are of one.
        seam: ST-LPIPS of the last frame and the first: how well the clip can be played as a loop.
    """

    count: int
    difference: float
    moving: float
    still: float
    consistency: float | None
    flicker: float
    jumps: float | None
    seam: float | None


@dataclass(frozen=True, kw_only=True)
class _Moves:
    """Of one clip."""

    differences: Float[Tensor, " pairs"]
    moving: float
    bends: float
    neighbours: float
    distance: float | None
    seam: float | None


def motion(clips: Sequence[Float[Tensor, "t 3 h w"]], temporal_factor: int) -> Motion:
    """Measure how clips move.

    Args:
        clips: At least one, each of at least two frames in [-1, 1]; they may differ in length.
        temporal_factor: Frames of a code.
    """
    moves = [_moves(clip.clamp(-1, 1)) for clip in clips]
    differences = torch.cat([each.differences for each in moves])
    crosses = torch.cat([torch.arange(1, len(each.differences) + 1) % temporal_factor == 0 for each in moves])
    within = differences[~crosses].sum() / max(int((~crosses).sum()), 1)
    amounts = torch.stack([each.differences.mean() for each in moves])
    return Motion(
        count=len(moves),
        difference=float(amounts.mean()),
        moving=_mean([each.moving for each in moves]),
        still=float((amounts < STILL).float().mean()),
        consistency=None if moves[0].distance is None else _mean([each.distance or 0.0 for each in moves]),
        # Sums, not means of quotients: clips that hardly move have none worth counting.
        flicker=_ratio(_mean([each.bends for each in moves]), _mean([each.neighbours for each in moves])),
        jumps=float(differences[crosses].mean() / within) if crosses.any() and within > 0 else None,
        seam=None if moves[0].seam is None else _mean([each.seam or 0.0 for each in moves]),
    )


def _moves(clip: Float[Tensor, "t 3 h w"]) -> _Moves:
    # The range is 2 wide.
    changes = (clip[1:] - clip[:-1]).abs() / 2
    bends = (clip[1:-1] - (clip[:-2] + clip[2:]) / 2).abs() / 2
    metric = perceptual_metric()
    distances = None if metric is None else metric(clip, clip.roll(-1, dims=0))
    return _Moves(
        differences=changes.flatten(1).mean(1),
        moving=float((changes.amax(1) > MOVING).float().mean()),
        bends=_average(bends),
        neighbours=_average(changes[1:] + changes[:-1]) / 2,
        distance=None if distances is None else float(distances[:-1].mean()),
        seam=None if distances is None else float(distances[-1]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _average(values: Tensor) -> float:
    """0 of none: a clip of two frames does not bend."""
    return float(values.sum()) / max(values.numel(), 1)


def _ratio(value: float, other: float) -> float:
    """0 where nothing moves."""
    return value / other if other else 0.0
