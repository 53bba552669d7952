"""Sharding in a group of one process: the same body runs over NCCL in ``tests/gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emulus.log import logger
from emulus.model import Decoder, sized
from emulus.parallel.config import ParallelConfig
from emulus.parallel.processes import Processes
from emulus.parallel.spread import spread
from tests.ranks import run_ranks
from tests.train.sharded import train_sharded


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_model_of_one_process_trains_as_a_plain_one(optimizer: str, tmp_path: Path) -> None:
    ((sharded, plain),) = run_ranks(1, train_sharded, "cpu", optimizer, tmp_path)
    assert sharded == pytest.approx(plain, rel=2e-2)


@pytest.mark.parametrize("compiled", [False, True])
def test_float8_without_compiling_is_warned_of(
    compiled: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr("emulus.train.float8.to_float8", lambda model, skip: None)
    sizes = ParallelConfig(replicate=1, float8=True, compile=compiled)
    spread(Decoder(sized("tiny", vocab_size=64)), Processes(device=torch.device("cpu"), sizes=sizes))
    assert ("float8 is slower than bfloat16 unless blocks are compiled" in caplog.text) != compiled
