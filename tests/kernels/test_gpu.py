"""The GPU's kernels where there is no GPU: computed by Triton's interpreter, and built for a card that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emulus.kernels import gpu
from emulus.kernels.gpu import launch
from emulus.kernels.where import Where

TESTS = Path(__file__).parents[1]
SHARED_MEMORY = 227 * 1024
"""What a program may have of it on Hopper."""

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def test_known_whether_they_can_be_used() -> None:
    assert gpu.available() == (torch.cuda.is_available() and find_spec("triton") is not None)


@needs_triton
def test_right_in_the_interpreter() -> None:
    # It must be known before Triton is imported, and would stay so: hence another process.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", TESTS / "gpu/test_kernels.py"]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


class Hopper:
    """As much of a driver as building for a card asks for."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Kernels by name, built instead of run."""
    from triton.runtime.driver import driver

    kernels: dict[str, Any] = {}

    def build(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        kernels[kernel.fn.__name__] = kernel.warmup(*args, grid=grid, **options)

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "run", build)
    monkeypatch.setattr(driver, "_active", Hopper())
    return kernels


def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def check(kernel: Any, *wanted: str) -> None:
    """Assert that a kernel fits, keeps what it computes with in registers, and has these instructions."""
    assert kernel.metadata.shared <= SHARED_MEMORY
    for instruction in wanted:
        assert instruction in kernel.asm["ptx"]
    assert _stack(kernel) == 0


def _stack(kernel: Any) -> int:
    """Bytes of memory that a kernel needs because registers do not suffice."""
    import triton

    with tempfile.NamedTemporaryFile() as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", said)
    return int(stack)


@needs_triton
@pytest.mark.parametrize(
    ("n", "kind", "stored", "shape"),
    [
        (64, "plain", torch.bfloat16, (14336, 4096)),
        (16, "int8", torch.int8, (14336, 4096)),
        (2, "fp8", torch.float8_e4m3fn, (14336, 4096)),
        (2, "int4", torch.uint8, (14336, 2048)),
        (64, "int4", torch.uint8, (14336, 2048)),
    ],
)
def test_products_are_built(
    built: dict[str, Any], n: int, kind: str, stored: torch.dtype, shape: tuple[int, int]
) -> None:
    x, q = some(n, 4096), some(*shape, dtype=stored)
    if kind == "plain":
        gpu.linear(x, q)
    elif kind == "int4":
        gpu.linear_int4(x, q, some(shape[0], 64), some(shape[0], 64))
    else:
        (gpu.linear_int8 if kind == "int8" else gpu.linear_fp8)(x, q, some(shape[0], 1, dtype=torch.float32))
    for kernel in built.values():
        # Weights on their way while others are multiplied, 16 bytes a copy; matrix instructions for each token count.
        check(kernel, "cp.async.cg.shared.global [", ", 0x10", "mma.sync.aligned.m16n8k16")


@needs_triton
def test_the_rest_is_built(built: dict[str, Any]) -> None:
    numbers, table = some(2, dtype=torch.int64), some(2, 128, dtype=torch.float32)
    where = Where(
        base=numbers,
        capacity=numbers,
        position=numbers,
        dtype=torch.bfloat16,
        kv_heads=8,
        head_dim=128,
        ready=numbers,
    )
    gpu.rms_norm(some(2, 4096), some(4096), 1e-5)
    gpu.silu_mul(some(2, 14336), some(2, 14336))
    gpu.rotate_and_store(some(2, 32, 128), some(2, 8, 128), some(2, 8, 128), table, table, where, 3)
    gpu.attend(some(2, 32, 128), where, 3)
    logits = some(2, 32768, dtype=torch.float32)
    gpu.choose(logits, logits, scale=3, temperature=1, k=2048, seeds=numbers, positions=numbers, first_id=151854)
    assert len(built) == 6
    for name, kernel in built.items():
        check(kernel, *(("cp.async.cg.shared.global [", "wgmma.mma_async") if name == "attend" else ()))
