"""painted frames that go on from given ones -> the same, with the given pixels where nothing has moved."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_LEAST = 0.2
"""Change of a colour, of the range of 2, below which a neighbourhood stands still."""
_RAMP = 0.1
"""Change beyond that over which the given pixels fade out."""


def keep_still(
    frames: Float[Tensor, "t 3 h w"],
    painted: Float[Tensor, "3 h w"],
    given: Float[Tensor, "3 h w"],
    *,
    cell: int,
) -> Float[Tensor, "t 3 h w"]:
    """Show the last given frame itself wherever the frames after it show what a painting of it shows.

    A vision tokenizer loses detail, which would be seen as a jump where the given frames end. What moves has no given
    pixels and is left as it was painted.

    Args:
        frames: What follows, as painted from codes, in [-1, 1].
        painted: The last given frame, as painted from its codes.
        given: The last given frame itself.
        cell: Side in pixels of what one code stands for; change is averaged over about as much.

    Returns:
        The frames, composed of both.
    """
    change = (frames - painted).abs().amax(1, keepdim=True)
    # An odd window is centred.
    around = cell // 2
    near = F.avg_pool2d(change, 2 * around + 1, stride=1, padding=around, count_include_pad=False)
    moved = ((near - _LEAST) / _RAMP).clamp(0, 1)
    return given + moved * (frames - given)
