"""The first steps of the ladder's smallest model, compared with those on file (see ``tests/golden/curve.py``)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.curve import FIGURES, GOLDEN, HELD_OUT, STEPS, curve

TOLERANCE = 1e-4
"""Relative. Other versions of PyTorch, and other processors, add numbers in another order; what is off by more has
learned something else. Restricting a processor to AVX2, or to no vector instructions at all, moves losses by 4e-7 and
gradient norms by 1e-5."""


def test_the_losses_are_those_on_file(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    found = curve(tmp_path)
    assert found["tokens"] == golden["tokens"]
    assert len(found["loss"]) == STEPS
    for name in (*FIGURES, *HELD_OUT):
        assert found[name] == pytest.approx(golden[name], rel=TOLERANCE), name
    # That there is something to compare: it learns.
    assert golden["loss"][-1] < 0.7 * golden["loss"][0]
