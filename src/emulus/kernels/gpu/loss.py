"""What the loss does to its logits between the products."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from emulus.kernels.gpu import launch

if find_spec("triton") is not None:
    from emulus.kernels.programs import loss as programs

UNIT = 16
"""Numbers that the distance between two rows is a multiple of."""
_BYTES = 8192
"""Of a row that a program has at a time: two accesses of 16 bytes a thread."""


def exponentials(logits: Float[Tensor, "n v"]) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"]]:
    """Replace each row by ``exp(row - peak)``, in float32 until it is stored.

    Args:
        logits: bfloat16, float16 or float32; rows a multiple of ``UNIT`` numbers apart, with memory up to there behind
            the last one too. What lies between the rows is set to 0.

    Returns:
        The rows' peaks, and the sums of the exponentials before they are rounded.
    """
    rows, width = logits.shape
    stride = logits.stride(0)
    assert (stride % UNIT, logits.stride(1)) == (0, 1), "rows begin at round places"
    peak, mass = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = _BYTES // logits.dtype.itemsize
        launch.run(programs.exponentials, (rows,), logits, peak, mass, width, stride, BLOCK=block, num_warps=8)
    return peak, mass
