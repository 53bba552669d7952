"""How the vision tokenizer runs on a GPU: memory layout, precision, batches, recordings. A CPU takes none of it.

16-bit maps have their channels last in memory, as cuDNN's 16-bit convolutions want them, and each norm, with what
steers it and SiLU behind it, is two launches of one Triton kernel pair. Calls of a size that comes again are recorded
as CUDA graphs.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from emulus.kernels.graphs import CudaRecorder, Graphs, Recorder

PIECE_PIXELS = 2**20
"""Pixels that go through the layers together: at the released width a 16-bit map of them takes 0.5 GiB."""
MOST_RECORDINGS = 8
"""Sizes that are recorded, encoding and decoding together: each keeps its inputs and outputs, and all share one pool
of memory, as large as the largest."""
CALLS_BEFORE = 2
"""Calls of a size that pass before it is recorded: recording costs three."""

_SHORT = (torch.bfloat16, torch.float16)


def usable(x: Tensor) -> bool:
    """Whether norms of this map take the Triton kernels."""
    if not x.is_cuda or x.dtype not in _SHORT or torch.is_grad_enabled():
        return False
    # Triton is loaded where it is used only.
    from emulus.kernels import gpu

    return gpu.available()


def group_norm(x: Tensor, norm: nn.GroupNorm, steering: tuple[Tensor, Tensor] | None = None, *, silu: bool) -> Tensor:
    """See :func:`emulus.kernels.gpu.vision.group_norm`."""
    from emulus.kernels.gpu import vision as kernels

    return kernels.group_norm(x, norm, steering=steering, silu=silu)


def laid_out(x: Tensor, sign: nn.Conv2d, convolutions: Callable[[], dict[str, nn.Conv2d]]) -> Tensor:
    """Give input of 16-bit layers on a GPU with its channels last, and put the weights so too, once.

    Args:
        x: Input.
        sign: One of the convolutions, which says how the others are.
        convolutions: Gives all of them.
    """
    if not x.is_cuda or torch.is_grad_enabled() or sign.weight.dtype not in _SHORT:
        return x
    if not sign.weight.is_contiguous(memory_format=torch.channels_last):
        put_channels_last(convolutions().values())
    return x.contiguous(memory_format=torch.channels_last)


def put_channels_last(convolutions: Iterable[nn.Conv2d]) -> None:
    """Lay weights with their input channels last in memory, in place; cuDNN would do it at every call."""
    # Weights made in inference mode could not be trained any more.
    with torch.inference_mode(False), torch.no_grad():
        for conv in convolutions:
            conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


class _Ieee:
    """PyTorch's settings for float32 products on GPUs, changed while anyone needs them so.

    They belong to the process, so that the first one in remembers them and the last one out puts them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: tuple[str, ...] = ()
        self._older: bool | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._users:
                self._before = tuple(each.fp32_precision for each in _settings())
                self._older = _older_setting()
                self._set(("ieee",) * len(self._before), older=False)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._set(self._before, older=self._older)

    def _set(self, values: tuple[str, ...], *, older: bool | None) -> None:
        if self._older is not None:
            # Where it contradicts the others, reading it would raise in any thread. It changes them, so it comes first.
            cudnn: Any = torch.backends.cudnn  # its stubs know no assignment
            cudnn.allow_tf32 = older
        for each, value in zip(_settings(), values, strict=True):
            each.fp32_precision = value


def _settings() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn  # its stubs lack the settings by operation
    return cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul


def _older_setting() -> bool | None:
    """What came before the settings by operation; ``None`` where it already contradicts them."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:
        return None


_ieee = _Ieee()


def exact(device: torch.device) -> AbstractContextManager[None]:
    """Context in which float32 convolutions and products on this device have 24 bits: TF32's 11 move codes.

    What other threads compute meanwhile has 24 bits too, and their settings are back when the last one leaves.
    """
    return _ieee() if device.type == "cuda" else nullcontext()


class Recordings:
    """Functions of one tensor, recorded as CUDA graphs for the sizes that come again."""

    def __init__(self, recorder: Recorder | None = None, *, addresses: tuple[int, ...] = ()) -> None:
        """Record nothing yet.

        Args:
            recorder: Records; by default CUDA graphs.
            addresses: Addresses of the weights that the functions read (see :func:`addresses_of`).
        """
        self.addresses = addresses
        self._recorder = recorder
        self._graphs: dict[str, Graphs] = {}
        self._calls: Counter[tuple[object, ...]] = Counter()
        self._kept: set[tuple[object, ...]] = set()

    def __len__(self) -> int:
        """How many sizes are recorded, or will be at their next call."""
        return len(self._kept)

    def __call__(self, name: str, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Give what the function gives, from a recording if this is one of the sizes that have one.

        Args:
            name: Key of the function; the same function each time.
            function: Asks nothing of the host that depends on what ``x`` holds.
            x: Its samples along the first axis.
        """
        key = (name, x.shape, x.dtype)
        if key not in self._kept:
            self._calls[key] += 1
            if self._calls[key] <= CALLS_BEFORE or len(self._kept) >= MOST_RECORDINGS:
                return function(x)
            self._kept.add(key)
        return self._of(name, function)(x)

    def _of(self, name: str, function: Callable[[Tensor], Tensor]) -> Graphs:
        if name not in self._graphs:
            self._recorder = self._recorder or CudaRecorder()
            self._graphs[name] = Graphs(function, most=PIECE_PIXELS, recorder=self._recorder)
        return self._graphs[name]


def addresses_of(model: nn.Module) -> tuple[int, ...]:
    """Where the weights and buffers of a model and of all its parts lie in memory."""
    found: list[int] = []
    # Half the time of ``parameters()`` and ``buffers()``: this is asked at every call (0.2 ms at the released size).
    parts: list[nn.Module | None] = [model]
    while parts:
        part = parts.pop()
        if part is not None:
            held = (*part._parameters.values(), *part._buffers.values())
            found.extend(tensor.data_ptr() for tensor in held if tensor is not None)
            parts.extend(part._modules.values())
    return tuple(found)


def in_batches(
    function: Callable[[Tensor], Tensor], x: Tensor, *, pixels: int, recorded: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a function of samples of one size to as many of them at a time as a GPU takes.

    Args:
        function: Sees each sample alone.
        x: Samples along the first axis.
        pixels: Number of pixels in a sample.
        recorded: The same function for samples that fit into one batch.
    """
    if pixels > PIECE_PIXELS:
        return torch.cat([function(part) for part in x.split(1)])
    parts = x.split(max(1, PIECE_PIXELS // max(1, pixels)))
    results = [recorded(part) for part in parts]
    return results[0] if len(results) == 1 else torch.cat(results)
