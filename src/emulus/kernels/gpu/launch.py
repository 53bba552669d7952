"""How a Triton kernel is launched, and the sizes of its blocks."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

if find_spec("triton") is not None:
    from emulus.kernels.programs.common import INTERPRETED, TYPES

HOPPER = 90
"""Capability of the first GPUs with programmatic dependent launch and matrix instructions for 64 rows."""
PDL = os.environ.get("EMULUS_PDL") != "0"
"""Whether kernels may use programmatic dependent launch, on GPUs that have it."""


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch a kernel; the only place that does.

    A kernel that takes ``PDL`` starts while the one before still runs, where the GPU can: it must call ``gdc_wait``
    before it reads what another kernel has written, and before it writes anything.

    Args:
        kernel: A Triton function.
        grid: Programs along each axis.
        args: Its arguments, the first of them a tensor on the device to launch on.
        options: Its constants, and Triton's own options.
    """
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(args[0]):
        if PDL and "PDL" in kernel.arg_names and capability(args[0]) >= HOPPER:
            options |= {"PDL": True, "launch_pdl": True}
        kernel[grid](*args, **options)


def capability(tensor: Tensor) -> int:
    """Compute capability of a tensor's GPU times 10, as in ``sm_90``; 0 in the interpreter, and without a GPU."""
    if INTERPRETED:
        return 0
    from triton.runtime.driver import driver

    try:
        active = driver.active
    except RuntimeError:  # launches are counted where nothing can be launched
        return 0
    with torch.cuda.device_of(tensor):
        return _capability(active.get_current_device())


@functools.cache
def _capability(device: int) -> int:
    """Compute capability times 10 of the current device."""
    from triton.runtime.driver import driver

    target = driver.active.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0


def stride(rows: Tensor) -> int:
    """Numbers from a row to the next; a single row's own can be anything, and another number is another build."""
    return rows.stride(0) if len(rows) > 1 else rows.shape[1]


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
