"""A step of the decoder recorded once for each shape of its inputs, then replayed in one go.

A step on a GPU is hundreds of short kernels; launched one by one from Python they would wait for the host most of the
time. A CUDA graph launches them all at once, on the same memory each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emulus.log import logger

_Key = tuple[tuple[torch.Size, torch.dtype, torch.device] | None, ...]


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor | None, ...]
    output: Tensor


class Graphs:
    """A function of tensors that is recorded where it can be, and called where not.

    The function gets the tensors in the same order. It launches work on their one device only, asks nothing of the
    host that depends on their contents, and may be run twice on the same inputs without harm: before it is recorded
    it is run to build and choose its kernels. Whatever else it reads (weights, lanes) stays where it is in memory, or
    is found through addresses in the tensors.

    Several threads may call it: one records or replays at a time, and all launch their work on one stream (PyTorch's
    threads share the usual one).
    """

    def __init__(self, function: Callable[..., Tensor], *, most: int = 64) -> None:
        """Record nothing yet.

        Args:
            function: What to call.
            most: Inputs of more rows than this are never recorded: their work outweighs the launches, and there are
                too many different numbers of rows.
        """
        self._function, self._most = function, most
        self._recorded: dict[_Key, _Recorded] = {}
        self._pools: dict[torch.device, Any] = {}
        self._given_up = False
        # Inputs and outputs lie in memory that all threads share.
        self._lock = threading.RLock()

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        """Give what the function gives for these tensors.

        Args:
            tensors: All on one device, the first one's; ``None`` stays ``None``. At least one of them is a tensor.

        Returns:
            The function's own tensor, that nothing done later writes to.
        """
        first = next(tensor for tensor in tensors if tensor is not None)
        if self._given_up or not first.is_cuda or len(first) > self._most:
            return self._function(*tensors)
        key = tuple(None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
        before = torch.cuda.current_stream(first.device)
        with self._lock, torch.inference_mode(), torch.cuda.device(first.device):
            try:
                recorded = self._recorded.get(key) or self._record(key, tensors)
            except RuntimeError as error:
                # What broke off the recording may have left its stream in place.
                torch.cuda.set_stream(before)
                self._given_up = True
                reason = str(error).splitlines()[0]
                logger.warning("a step cannot be recorded (%s); going on without CUDA graphs", reason)
                return self._function(*tensors)
            return self._replay(recorded, tensors)

    def _replay(self, recorded: _Recorded, tensors: tuple[Tensor | None, ...]) -> Tensor:
        """What the function gives for these tensors."""
        with self._lock:
            for kept, tensor in zip(recorded.inputs, tensors, strict=True):
                if kept is not None and tensor is not None:
                    kept.copy_(tensor, non_blocking=True)
            recorded.graph.replay()
            # The next replay, of this graph or of one that shares its memory, writes over the output.
            return recorded.output.clone()

    def __len__(self) -> int:
        """How many shapes are recorded."""
        return len(self._recorded)

    def _record(self, key: _Key, tensors: tuple[Tensor | None, ...]) -> _Recorded:
        inputs = tuple(None if tensor is None else tensor.clone() for tensor in tensors)
        stream, usual = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(usual)
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._function(*inputs)
        usual.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = self._pools.setdefault(stream.device, torch.cuda.graph_pool_handle())
        # Other threads (a server's) may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = self._function(*inputs)
        self._recorded[key] = _Recorded(graph=graph, inputs=inputs, output=output)
        return self._recorded[key]
