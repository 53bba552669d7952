"""One piece of host memory for copies of many tensors, which a GPU writes to by itself."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from emulus.log import logger

_ALIGNED = 64
"""Bytes that each tensor's place is a multiple of: a cache line."""


class Slab:
    """Host memory cut into buffers, pinned if the tensors to be copied are on a GPU.

    Memory pinned by PyTorch (``pin_memory=True``) is rounded up to a power of 2 for each tensor: an eighth more for the
    state of an 8B model.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the memory; its contents are arbitrary.

        Args:
            tensors: What will be copied, by name.
        """
        places, size = cut([tensor.nbytes for tensor in tensors.values()])
        memory = torch.empty(size, dtype=torch.uint8)
        self.buffers = {
            name: memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for (name, tensor), place in zip(tensors.items(), places, strict=True)
        }
        """By name, of the tensors' shapes and types."""
        if any(tensor.is_cuda for tensor in tensors.values()) and _pin(memory):
            # The finalizer holds the memory, which must be unpinned before it is given back.
            weakref.finalize(self, _unpin, memory).atexit = False

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these tensors have the names, shapes and types of the buffers."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == {
            name: (buffer.shape, buffer.dtype) for name, buffer in self.buffers.items()
        }


def cut(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where pieces of so many bytes begin in one piece of memory, and how many bytes it has."""
    ends = [0, *accumulate(-(-size // _ALIGNED) * _ALIGNED for size in sizes)]
    return ends[:-1], ends[-1]


def _pin(memory: Tensor) -> bool:
    """Keep memory where it is, so that a GPU can write to it; whether that succeeded."""
    portable = 1  # to all GPUs
    failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, portable))
    if failed:
        logger.warning("host memory cannot be pinned (CUDA error %d): training waits longer for each save", failed)
    return not failed


def _unpin(memory: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
