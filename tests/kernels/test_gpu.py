"""The GPU's kernels where there is no GPU: computed by Triton's interpreter, and built for a card that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from emulus.kernels import gpu
from emulus.kernels.where import Where
from scripts.built import SHARED_MEMORY, Built, building, some, usage

TESTS = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def test_known_whether_they_can_be_used() -> None:
    assert gpu.available() == (torch.cuda.is_available() and find_spec("triton") is not None)


def interpret(tests: str) -> None:
    """Run GPU tests in Triton's interpreter; in another process, since it must be chosen before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", TESTS / tests],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@needs_triton
def test_right_in_the_interpreter() -> None:
    interpret("gpu/test_kernels.py")


@pytest.fixture
def built(tmp_path: Path) -> Iterator[list[Built]]:
    """Launches for Hopper, built instead of run."""
    with building("sm_90", tmp_path) as launches:
        yield launches


def check(kernel: Any, *wanted: str) -> None:
    """Assert that a kernel fits, keeps what it computes with in registers, and has these instructions."""
    assert kernel.metadata.shared <= SHARED_MEMORY["sm_90"]
    for instruction in wanted:
        assert instruction in kernel.asm["ptx"]
    assert usage(kernel).stack == 0


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
def test_products_are_built(built: list[Built], n: int, kind: str, stored: torch.dtype, shape: tuple[int, int]) -> None:
    x, q = some(n, 4096), some(*shape, dtype=stored)
    if kind == "plain":
        gpu.linear(x, q)
    elif kind == "int4":
        gpu.linear_int4(x, q, some(shape[0], 64), some(shape[0], 64))
    else:
        (gpu.linear_int8 if kind == "int8" else gpu.linear_fp8)(x, q, some(shape[0], 1, dtype=torch.float32))
    for launch in built:
        # Weights on their way while others are multiplied, 16 bytes a copy; matrix instructions for each token count.
        check(launch.kernel, "cp.async.cg.shared.global [", ", 0x10", "mma.sync.aligned.m16n8k16")


@needs_triton
def test_the_rest_is_built(built: list[Built]) -> None:
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
    for launch in built:
        wanted = ("cp.async.cg.shared.global [", "wgmma.mma_async") if launch.name == "attend" else ()
        check(launch.kernel, *wanted)
