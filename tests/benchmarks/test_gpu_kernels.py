"""The benchmark of single GPU kernels, in tiny in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import reference
from benchmarks.gpu_kernels import CASES, WORKS
from benchmarks.harness import main
from emulus.model import sized
from emulus.tokenizer.vocabulary import Vocabulary
from tests.kernels.test_gpu import needs_triton

SOME = ("qkv-int8-2", "gated-int4-4", "down-bf16-32", "attend-4096", "rotate", "norm", "choose", "step-2")


@needs_triton
def test_a_case_of_each_kind() -> None:
    # The interpreter must be asked for before Triton is imported.
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--toy", "--json"]
    done = subprocess.run(
        [*command, *(part for name in SOME for part in ("--only", name))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["case"] for each in found] == list(SOME)
    for each in found[:-1]:
        about = each["conditions"]
        assert about["bytes"] > 0
        assert about["us"] > about["floor_us"] >= 0
    about = found[-1]["conditions"]
    assert about["ms"] > about["floor_ms"] > 0


def test_every_kernel_has_a_case() -> None:
    assert len(WORKS) == 4 * 4 * 3 + 3 + 3
    assert {*CASES} == {*WORKS, "step-2", "step-4"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CASES, ["--only", "norm"]) == 1
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


def test_weights_are_drawn_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []
    usual = torch.Tensor.normal_

    def normal_(
        self: torch.Tensor, *args: Any, generator: torch.Generator | None = None, **options: Any
    ) -> torch.Tensor:
        if not self.is_meta:
            assert generator is not None
            devices.append(str(generator.device))
        return usual(self, *args, generator=generator, **options)

    monkeypatch.setattr(torch.Tensor, "normal_", normal_)
    vocabulary = reference.small_vocabulary(400, 64)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 400}

    def config(_: Vocabulary) -> object:
        return sized("tiny", **shape)

    asked: list[object] = []
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda *device: (asked.append(device), generator(*device))[1])
    reference.make_subject(config, vocabulary, device="cpu", bf16=True)  # type: ignore[arg-type]
    assert devices == ["cpu"] * 9
    # A CPU is named as any other device would be.
    assert asked == [("cpu",)]
