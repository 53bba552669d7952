"""The benchmark of the loss at toy size: every case runs, and its check finds what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import loss
from benchmarks.harness import Options, Unequal, main


@pytest.mark.parametrize("name", [name for name in loss.CASES if name != "memory-bf16"])
def test_every_case(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(loss.CASES, ["--json", "--toy", "--pairs", "1", "--only", name]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["case"] == name
    assert found["spread"][0] <= found["ratio"] <= found["spread"][1]
    if not name.startswith("memory"):
        assert 0 < found["conditions"]["head_gradients_differ"] < 0.01


def test_unequal_losses_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loss.linear_cross_entropy

    def wrong(hidden: Any, head: Any, targets: Any, weights: Any) -> Any:
        return right(hidden, head, targets, weights * 1.01)

    monkeypatch.setattr(loss, "linear_cross_entropy", wrong)
    with pytest.raises(Unequal, match="gradients of the hidden states"):
        loss.speed("small-4096", "fp32", Options(pairs=1, toy=True))
