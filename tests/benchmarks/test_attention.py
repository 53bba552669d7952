"""The benchmark of attention at toy size: it runs, and its check finds what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import attention
from benchmarks.harness import Options, Unequal, main


def test_a_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(attention.CASES, ["--json", "--toy", "--pairs", "1", "--only", "mixed"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["case"] == "mixed"
    assert found["spread"][0] <= found["ratio"] <= found["spread"][1]
    assert 0 < found["conditions"]["ours_differs"] < attention.TOLERANCE


def test_unequal_values_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.attend_short

    def wrong(*given: Any) -> Any:
        return 1.05 * right(*given)

    monkeypatch.setattr(attention, "attend_short", wrong)
    with pytest.raises(Unequal, match="differ from float32"):
        attention.speed("mixed", Options(pairs=1, toy=True))
