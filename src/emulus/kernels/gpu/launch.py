"""How a Triton kernel is launched, and the sizes of its blocks."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

if find_spec("triton") is not None:
    from emulus.kernels.programs.common import INTERPRETED, TYPES


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **options)


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def power(size: int) -> int:
    """The least power of 2 that is no smaller, and that a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


def aligned(size: int) -> int:
    """What addresses of heads, ``size`` bytes each, are multiples of, up to the widest access."""
    return min(16, size & -size)


def dot(dtype: torch.dtype) -> Any:
    """The type that matrices are multiplied in; the interpreter knows float32 alone."""
    return TYPES[torch.float32 if INTERPRETED else dtype]
