"""A training of two processes that is killed again and again ends with the bits of one that was left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.kill_run import kill_run


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    assert kill_run(tmp_path, kills=3, seed=1, steps=20)
