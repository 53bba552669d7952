"""A step of the decoder recorded once for each shape of its inputs, then replayed in one go.

A step on a GPU is hundreds of short kernels; launched one by one from Python they would wait for the host most of the
time. A CUDA graph launches them all at once, on the same memory each time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from emulus.log import logger

_Key = tuple[tuple[torch.Size, torch.dtype] | None, ...]

_FIRST_PAUSE = 100
"""Calls of a shape that are not recorded after memory was short; twice as many after each further time."""


class Recorder(Protocol):
    """Records work on a device."""

    def suits(self, device: torch.device) -> bool:
        """Whether work on this device can be recorded."""
        ...

    def record(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        """Record what ``work`` launches.

        Returns:
            What launches it again, and the tensor that ``work`` returned, which every launch writes anew.

        Raises:
            RuntimeError: It cannot be recorded, or memory is short (``torch.OutOfMemoryError``).
        """
        ...


class CudaRecorder:
    """Records CUDA graphs, all on one stream of a device, so that they share their working memory."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pools: dict[torch.device, Any] = {}

    def suits(self, device: torch.device) -> bool:
        """Whether it is a CUDA device."""
        return device.type == "cuda"

    def record(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        """See :class:`Recorder`; ``work`` is called three times."""
        with torch.cuda.device(device):
            graph, output = self._captured(work, device)

        def replay() -> None:
            with torch.cuda.device(device):
                graph.replay()

        return replay, output

    def _captured(self, work: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        usual = torch.cuda.current_stream()
        # The allocator hands blocks of a pool on only between recordings of one stream, and libraries keep a workspace
        # for each stream.
        if device not in self._streams:
            self._streams[device], self._pools[device] = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream, pool = self._streams[device], self._pools[device]
        graph = torch.cuda.CUDAGraph()
        try:
            stream.wait_stream(usual)
            with torch.cuda.stream(stream):
                # Builds and chooses kernels, which cannot be done while recording.
                for _ in range(2):
                    work()
            usual.wait_stream(stream)
            # Other threads (a server's) may go on using the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = work()
        except BaseException:
            # What broke off the recording may have left its stream in place. The allocator may also count the
            # recording as going on, and then holds back blocks that several streams use; that costs memory only.
            torch.cuda.set_stream(usual)
            torch.cuda.empty_cache()
            raise
        return graph, output


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    replay: Callable[[], None]
    inputs: tuple[Tensor | None, ...]
    output: Tensor


class Graphs:
    """A function of tensors that is recorded where it can be, and called where not.

    The function gets the tensors in the same order. It launches work on one device only, asks nothing of the host that
    depends on their contents, and may be run twice on the same inputs without harm: before it is recorded it is run to
    build and choose its kernels. Whatever else it reads (weights, lanes) stays where it is in memory, or is found
    through addresses in the tensors.

    Several threads may call it: one records or replays at a time, and all launch their work on one stream (PyTorch's
    threads share the usual one).
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        device: torch.device | None = None,
        most: int = 64,
        recorder: Recorder | None = None,
    ) -> None:
        """Record nothing yet.

        Args:
            function: What to call.
            device: Where it computes; tensors that lie elsewhere are copied there. By default the first tensor's.
            most: Inputs whose first tensor has more rows than this are never recorded: their work outweighs the
                launches, and there are too many different numbers of rows.
            recorder: Records; by default CUDA graphs.
        """
        self._function, self._device, self._most = function, device, most
        self._recorder: Recorder = recorder or CudaRecorder()
        self._recorded: dict[_Key, _Recorded] = {}
        # Calls of a shape that are to pass before it is recorded, and how many passed the last time.
        self._waits: dict[_Key, float] = {}
        self._pauses: dict[_Key, float] = {}
        # Inputs and outputs lie in memory that all threads share.
        self._lock = threading.RLock()

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        """Give what the function gives for these tensors.

        Args:
            tensors: On the device, or on the host, best in pinned memory; ``None`` stays ``None``. At least one of
                them is a tensor.

        Returns:
            The function's own tensor, that nothing done later writes to.
        """
        first = next(tensor for tensor in tensors if tensor is not None)
        device = self._device or first.device
        if len(first) > self._most or not self._recorder.suits(device):
            return self._plain(tensors, device)
        key = tuple(None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors)
        failure = None
        with self._lock, torch.inference_mode():
            if key not in self._recorded and not self._waiting(key):
                failure = self._record(key, tensors, device)
            if key in self._recorded:
                return self._replay(self._recorded[key], tensors)
        # If this fails too, the failure has nothing to do with recording, and is raised as it is.
        result = self._plain(tensors, device)
        if failure is not None:
            logger.warning(f"{failure}; running without CUDA graphs meanwhile")
        return result

    def __len__(self) -> int:
        """How many shapes are recorded."""
        return len(self._recorded)

    def _plain(self, tensors: tuple[Tensor | None, ...], device: torch.device) -> Tensor:
        return self._function(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors))

    def _replay(self, recorded: _Recorded, tensors: tuple[Tensor | None, ...]) -> Tensor:
        """What the function gives for these tensors."""
        with self._lock:
            for kept, tensor in zip(recorded.inputs, tensors, strict=True):
                if kept is not None and tensor is not None:
                    kept.copy_(tensor, non_blocking=True)
            recorded.replay()
            # The next replay, of this graph or of one that shares its memory, writes over the output.
            return recorded.output.clone()

    def _waiting(self, key: _Key) -> bool:
        """Whether this shape is not to be recorded now; counts the call."""
        left = self._waits.get(key, 0)
        self._waits[key] = max(0, left - 1)
        return left > 0

    def _record(self, key: _Key, tensors: tuple[Tensor | None, ...], device: torch.device) -> str | None:
        """Record this shape; why it could not be, if so."""
        try:
            inputs = tuple(None if tensor is None else tensor.to(device, copy=True) for tensor in tensors)
            replay, output = self._recorder.record(lambda: self._function(*inputs), device)
        except torch.OutOfMemoryError:
            pause = self._pauses[key] = 2 * self._pauses.get(key, _FIRST_PAUSE / 2)
            self._waits[key] = pause
            return "there is too little memory to record a step"
        except RuntimeError as error:
            self._waits[key] = math.inf
            return f"a step cannot be recorded ({str(error).partition(chr(10))[0]})"
        self._recorded[key] = _Recorded(replay=replay, inputs=inputs, output=output)
        return None
