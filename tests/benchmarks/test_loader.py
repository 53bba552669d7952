"""The benchmarks of the loader at toy size: every case runs, and its checks find what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import loader
from benchmarks.harness import Options, Unequal, main

TINY = Options(pairs=1, toy=True)


@pytest.mark.parametrize("name", loader.CASES)
def test_every_case(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(loader.CASES, ["--json", "--toy", "--pairs", "1", "--only", name], settings=loader.SETTINGS_HERE) == 0
    found = json.loads(capsys.readouterr().out)
    about = found["conditions"]
    assert found["case"] == name
    assert found["spread"][0] <= found["ratio"] <= found["spread"][1]
    assert about["records"] == 40
    if name == "resume":
        assert about["planning_all_steps_before_s"] > 0
    else:
        assert min(about["baseline_per_s"], about["ours_per_s"]) > 0


def test_other_ids_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = loader.by_mmap

    def wrong(made: list[loader.Record], folder: Path) -> object:
        return right(made[::-1], folder)

    monkeypatch.setattr(loader, "by_mmap", wrong)
    with pytest.raises(Unequal, match="is not what was written"):
        loader.reads("mmap", TINY)
