"""Triton kernels built for a card that is not there, and what the build says of them.

The launchers of :mod:`emulus.kernels.gpu` are called as ever, on tensors of the meta device; inside :func:`building`
each launch builds its kernel for the given architecture and runs nothing. Needs Triton, which brings the tools that
read its builds.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""Cards by what NVIDIA calls their code: Ampere (A100), Hopper (H100, H200), Blackwell (B200)."""
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes of it that one program may have."""
_UNITS = ("HMMA", "HGMMA", "UTCHMMA")


class Card:
    """As much of Triton's driver as building for a card asks for."""

    def __init__(self, architecture: str) -> None:
        self.capability = ARCHITECTURES[architecture]

    def get_current_target(self) -> object:
        """What to build for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """A number of its own for each architecture: Triton keeps its builds by device."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Built:
    """One launch's kernel.

    Attributes:
        name: Name of the Triton function.
        args: What it was launched with, in order.
        options: Its constants and Triton's own options.
        kernel: What Triton made of it.
        grid: Programs along each axis.
    """

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    kernel: Any
    grid: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a kernel needs.

    Attributes:
        registers: Registers per thread.
        stack: Bytes of memory a thread has because registers do not suffice.
        shared: Bytes of shared memory of a program.
        spills: Instructions that read or write that stack.
        loop: Instructions of one warp in the longest innermost loop; 0 where there is no loop.
        products: Matrix instructions among them.
    """

    registers: int
    stack: int
    shared: int
    spills: int
    loop: int
    products: int


@contextmanager
def building(architecture: str, folder: Path, names: str = "") -> Iterator[list[Built]]:
    """Build kernels instead of running them.

    Args:
        architecture: One of :data:`ARCHITECTURES`.
        folder: Where Triton keeps its builds meanwhile.
        names: Only kernels whose names begin so.

    Yields:
        The launches so far.
    """
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: list[Built] = []
    run, active, cache = JITFunction.run, driver._active, knobs.cache.dir

    def build(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        if not self.fn.__name__.startswith(names):
            return None
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launches.append(Built(name=self.fn.__name__, args=args, options=options, kernel=kernel, grid=grid))
        return kernel

    try:
        JITFunction.run, driver._active, knobs.cache.dir = build, Card(architecture), str(folder)
        yield launches
    finally:
        JITFunction.run, driver._active, knobs.cache.dir = run, active, cache


def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory, for a launcher."""
    return torch.empty(shape, dtype=dtype, device="meta")


def usage(kernel: Any) -> Usage:
    """Read what a built kernel needs out of its machine code."""
    code = kernel.asm["cubin"]
    said = _tool(code, "-res-usage")
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", said)
    lines = instructions(code)
    loop = innermost_loop(lines)
    return Usage(
        registers=int(registers),
        stack=int(stack),
        shared=kernel.metadata.shared,
        spills=sum(text.startswith(("LDL", "STL")) for _, text in lines),
        loop=len(loop),
        products=sum(text.startswith(_UNITS) for text in loop),
    )


def instructions(code: bytes) -> list[tuple[int, str]]:
    """Give the address and text of each instruction, without its predicate."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", _tool(code, "--dump-sass"))
    return [(int(address, 16), text.strip()) for address, text in found]


def innermost_loop(lines: list[tuple[int, str]]) -> list[str]:
    """Give the longest loop that has no other inside, from where it jumps back to up to the jump."""
    jumps = []
    for address, text in lines:
        target = re.search(r"^BRA\S* .*?0x([0-9a-f]+)", text)
        # A jump to itself fills up the end of the code.
        if target and int(target[1], 16) < address:
            jumps.append((int(target[1], 16), address))
    inner = [(a, b) for a, b in jumps if not any(a <= c and d <= b for c, d in jumps if (c, d) != (a, b))]
    if not inner:
        return []
    start, end = max(inner, key=lambda jump: jump[1] - jump[0])
    return [text for address, text in lines if start <= address <= end]


def _tool(code: bytes, option: str) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
