"""Sharding in a group of one process: the same body runs over NCCL in ``tests/gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train.sharded import train_sharded


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_model_of_one_process_trains_as_a_plain_one(optimizer: str, tmp_path: Path) -> None:
    ((sharded, plain),) = run_ranks(1, train_sharded, "cpu", optimizer, tmp_path)
    assert sharded == pytest.approx(plain, rel=2e-2)
