"""The benchmark of busy machines at toy size: it runs, its check finds what is wrong, and it leaves nothing behind."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from benchmarks import busy
from benchmarks.harness import Options, Unequal, main


def test_a_case(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--json", "--toy", "--pairs", "1", "--only", "busy-1", "--clock", "wall"]
    assert main(busy.CASES, arguments, settings=busy.SETTINGS) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["case"] == "busy-1"
    assert found["conditions"]["busy"] == 1
    assert found["ratio"] > 0


def test_other_images_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()

    def found(way: str, options: Options) -> dict[str, Any]:
        return {"seconds": [1.0], "ids": str(next(numbers))}

    monkeypatch.setattr(busy, "_in_a_process", found)
    with pytest.raises(Unequal, match="ids of the images differ"):
        busy.image(0, Options(pairs=1, toy=True))
