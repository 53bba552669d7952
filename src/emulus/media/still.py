"""painted frames that go on from given ones -> the same, with the given pixels where nothing has moved."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_NEAR = 3
"""Side in pixels of a neighbourhood."""
_LEAST = 0.3
"""Change of a colour, of the range of 2, below which a neighbourhood stands still."""
_RAMP = 0.1
"""Change beyond that over which the given pixels fade out."""


def keep_still(
    painted: Float[Tensor, "t 3 h w"], given: Float[Tensor, "n 3 h w"], *, cell: int
) -> Float[Tensor, "further 3 h w"]:
    """Show the last given frame itself wherever the frames after it show what a painting of it shows.

    A vision tokenizer loses detail, which would be seen as a jump where the given frames end. What moves has no given
    pixels and is left as it was painted; so is what is near it, for it may have been moved by a part of a code.

    Args:
        painted: A whole clip as painted from codes, in [-1, 1].
        given: The frames that it begins with, as they were given.
        cell: Side in pixels of what one code stands for.

    Returns:
        What follows the given frames, composed of both.
    """
    last, ahead = painted[len(given) - 1], painted[len(given) :]
    change = (ahead - last).abs().amax(1, keepdim=True)
    # Single pixels flicker; what is as small as two by two moves.
    change = F.avg_pool2d(change, _NEAR, stride=1, padding=_NEAR // 2, count_include_pad=False)
    around = cell // 2
    change = F.max_pool2d(change, 2 * around + 1, stride=1, padding=around)
    moved = ((change - _LEAST) / _RAMP).clamp(0, 1)
    return given[-1] + moved * (ahead - given[-1])
