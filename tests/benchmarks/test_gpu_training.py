"""The benchmark of training on a GPU, in tiny on a CPU."""

from __future__ import annotations

import json

import pytest

from benchmarks.gpu_training import CASES, SETTINGS
from benchmarks.harness import main


@pytest.mark.parametrize("name", [name for name in CASES if name != "train-float8"])
def test_every_case(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CASES, ["--json", "--toy", "--pairs", "1", "--only", name], settings=SETTINGS) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["case"] == name
    assert found["conditions"]["device"] == "cpu"


def test_float8_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CASES, ["--toy", "--pairs", "1", "--only", "train-float8"], settings=SETTINGS) == 1
    assert "Hopper" in capsys.readouterr().err
