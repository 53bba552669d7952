"""Products, norms, attention and choice for few tokens on a CUDA device, in Triton.

The names and meanings of :mod:`emulus.kernels.native`, for bfloat16 activations. At few tokens a step all of it waits
for memory: each weight is read once, and made whole in registers. Nothing waits for the host, and the number of
programs follows from shapes alone, so that a step can be captured in a CUDA graph. No sum depends on how many tokens
there are, or which.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

from emulus.kernels.gpu.attention import attend, rotate_and_store
from emulus.kernels.gpu.choice import choose
from emulus.kernels.gpu.products import FEW, Weight, gated, linear, linear_fp8, linear_group, linear_int4, linear_int8
from emulus.kernels.gpu.rows import rms_norm, silu_mul
from emulus.log import logger

__all__ = [
    "FEW",
    "Weight",
    "attend",
    "available",
    "choose",
    "gated",
    "linear",
    "linear_fp8",
    "linear_group",
    "linear_int4",
    "linear_int8",
    "rms_norm",
    "rotate_and_store",
    "silu_mul",
]


@functools.cache
def available() -> bool:
    """Whether the kernels can be used: there is a CUDA device, Triton, and what Triton needs to build a kernel."""
    if not torch.cuda.is_available() or find_spec("triton") is None:
        return False
    try:
        silu_mul(*torch.ones(2, 1, 16, dtype=torch.bfloat16, device="cuda"))
    except Exception as error:  # a missing compiler, an unsupported GPU, another version of Triton: each its own type
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("Triton cannot be used (%s); going on with plain PyTorch", reason)
        return False
    return True
