"""Where the numbers live and how many bits they have: the only place that decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from emulus.errors import EmulusError, shown

# The flag of the commands that train is another one.
_REMEDY = "choose cpu or cuda (--device; --train.device in training)"

Precision = Literal["auto", "fp32", "bf16"]


def pick_device(name: str = "auto") -> torch.device:
    """The device called ``name``; ``auto`` is the first GPU, or the CPU.

    Raises:
        EmulusError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = shown(str(error).partition("\n")[0], quote=False)
        raise EmulusError(f"no device {shown(name)} here ({reason}); {_REMEDY}") from None
    if device.type not in ("cpu", "cuda"):
        raise EmulusError(f"device {shown(name)} is not supported (it lacks float64); {_REMEDY}")
    if device.type == "cuda":
        # Convolutions in TF32 would be "float32" of 10 bits, and move codes.
        torch.backends.cudnn.allow_tf32 = False
    return device


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is faster than float32 on the device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions a CPU emulates bfloat16, several times slower than float32.
    probe: Callable[[], dict[str, object]] = getattr(torch.cpu, "get_capabilities", dict)
    capabilities = probe()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def computes_in_bfloat16(device: torch.device, precision: Precision) -> bool:
    """Whether products are in bfloat16 there: if asked for or (``auto``) if faster."""
    return precision == "bf16" or (precision == "auto" and has_fast_bfloat16(device))


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Context in which matrix products and convolutions run in bfloat16, if asked for or (``auto``) if faster."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=computes_in_bfloat16(device, precision))


def numbers(values: Sequence[int], device: torch.device) -> Int64[Tensor, " n"]:
    """Whole numbers as an int64 tensor; a GPU gets them without the host waiting for what it is doing."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)


def int_table(rows: Sequence[Sequence[int]], device: torch.device) -> Int64[Tensor, "rows n"]:
    """Rows of whole numbers as an int64 tensor on the host, from where a copy to ``device`` need not be waited for."""
    return torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host.

    Returns:
        What waits for the copy, but for nothing that the device is given later, and gives it.
    """
    if not tensor.is_cuda:
        return lambda: tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait
