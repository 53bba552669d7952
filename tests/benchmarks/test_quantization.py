"""The benchmark of fewer bits at toy size."""

from __future__ import annotations

import json

import pytest

from benchmarks import quantization
from benchmarks.harness import main


def test_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(quantization.CASES, ["--json", "--toy"], settings=quantization.SETTINGS) == 0
    found = {case["case"]: case for case in map(json.loads, capsys.readouterr().out.splitlines())}
    assert found.keys() == quantization.CASES.keys()
    errors = {name: case["conditions"]["logits_relative_error"] for name, case in found.items()}
    assert 0 < errors["int8"] < errors["fp8"] < errors["int4"] < 0.5
    for kind in ("int8", "fp8", "int4"):
        assert 0 < errors[f"{kind}-calibrated"] != errors[kind]
    for case in found.values():
        assert 0.95 < case["spread"][0] <= case["ratio"] <= case["spread"][1] < 1.05
        about = case["conditions"]
        assert about["visual_bits"] > 0
        assert about["text_bits"] > 0
        assert (about["calibration_ids"] > 0) == case["case"].endswith("calibrated")


def test_nothing_changed_costs_nothing() -> None:
    about = quantization.subject(8, 8, True)
    same = quantization.scores(about.decoder, about)
    assert same.error == 0
    assert same.per_id() == quantization.baseline(8, 8, True).per_id()
