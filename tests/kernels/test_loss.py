"""The loss's kernel where there is no GPU: interpreted, and built for cards that are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emulus.kernels.gpu import loss
from scripts.built import ARCHITECTURES, building, instructions, some, usage
from tests.kernels.test_gpu import TESTS, needs_triton


@needs_triton
def test_right_in_the_interpreter() -> None:
    # It must be known before Triton is imported, and would stay so: hence another process.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", TESTS / "gpu/test_loss.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_built(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    with building(architecture, tmp_path) as launches:
        # As many ids as Emu3 has, which is no multiple of anything.
        loss.exponentials(some(3, 184_640, dtype=dtype)[:, :184_622])
    (built,) = launches
    needs = usage(built.kernel)
    assert (needs.stack, needs.spills) == (0, 0)
    assert needs.registers <= 80
    # 16 bytes at a time, there and back.
    lines = [text for _, text in instructions(built.kernel.asm["cubin"]) if text.startswith(("LDG", "STG"))]
    assert {text.split()[0] for text in lines} == {"LDG.E.128", "STG.E.128", "STG.E"}
    # Instructions for one number: at full bandwidth less than half of what a card can do.
    assert needs.loop <= 12 * built.options["BLOCK"] / 256
