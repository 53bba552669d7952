"""Memory that nobody has written holds NaN: what reads it shows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emulus.kernels import build, native

FILL = os.environ.get("EMULUS_FILL_UNINITIALIZED", "") not in ("", "0")
"""Whether the whole session runs that way."""

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "convolution", "scaled_dot_product")


def fill_from_now_on() -> None:
    """Let PyTorch and the native kernels fill what they allocate with NaN (integers: the largest)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    if native.available():
        native._library = native.load(build.library(native.load, macros=["FILL_UNINITIALIZED"]))


@contextmanager
def filled() -> Iterator[None]:
    """Do so for a while, PyTorch only, and look at what products are given."""
    mode, warn = torch.get_deterministic_debug_mode(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with products_read_written_memory():
            yield
    finally:
        torch.use_deterministic_algorithms(mode > 0, warn_only=warn)


class _Products(TorchDispatchMode):
    """Looks at all memory that lies between the rows of what is multiplied, whether or not it belongs to the view.

    Some processors' products read it and multiply it by zeros; only what is finite is harmless then.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if any(name == product or name.startswith(product + "_") for product in _PRODUCTS):
            for each in args:
                if isinstance(each, Tensor) and each.is_floating_point() and each.numel():
                    assert _around(each).isfinite().all(), f"{name} is given memory that was not written"
        return func(*args, **(kwargs or {}))


def _around(x: Tensor) -> Tensor:
    """Everything from a tensor's first to its last number, and the rest of its last row."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    longest = max((stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1), default=1)
    room = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    return x.as_strided((min(last + longest, room),), (1,))


@contextmanager
def products_read_written_memory() -> Iterator[None]:
    """Fail where a product's operand has NaN or infinity beside or between its rows."""
    with _Products():
        yield
