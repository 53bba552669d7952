"""The loss's kernel where there is no GPU: interpreted, and built for cards that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from emulus.kernels.gpu import loss
from tests.kernels.test_gpu import TESTS, built, check, needs_triton, some

__all__ = ["built"]


@needs_triton
def test_right_in_the_interpreter() -> None:
    # It must be known before Triton is imported, and would stay so: hence another process.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", TESTS / "gpu/test_loss.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_built(built: dict[str, Any], dtype: torch.dtype) -> None:
    # As many ids as Emu3 has, which is no multiple of anything.
    loss.exponentials(some(3, 184_640, dtype=dtype)[:, :184_622])
    # 16 bytes at a time, there and back.
    check(built["exponentials"], "ld.global.v4.b32", "st.global.v4.b32")
