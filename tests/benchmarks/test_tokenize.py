"""The benchmark of tokenising at toy size: every case runs, and its check finds what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import tokenize
from benchmarks.harness import Options, Unequal, main
from emulus.tokenizer.vision import VisionTokenizer


@pytest.mark.parametrize("name", tokenize.CASES)
def test_every_case(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tokenize.CASES, ["--json", "--toy", "--pairs", "1", "--only", name], settings=tokenize.SETTINGS) == 0
    found = json.loads(capsys.readouterr().out)
    about = found["conditions"]
    assert found["case"] == name
    assert found["spread"][0] <= found["ratio"] <= found["spread"][1]
    assert min(about[key] for key in ("items_per_s_bare", "items_per_s_ours", "wall_s_bare", "wall_s_ours")) > 0
    assert 1 <= about["sizes"] <= about["batches"] <= about["items"]


def test_other_codes_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = tokenize._batches

    def wrong(config: tokenize.TokenizeConfig, vision: VisionTokenizer) -> list[torch.Tensor]:
        return [batch.flip(-1) for batch in right(config, vision)]

    monkeypatch.setattr(tokenize, "_batches", wrong)
    with pytest.raises(Unequal, match="do not hold the codes"):
        tokenize.CASES["pictures"](Options(pairs=1, toy=True, settings={"pictures": 4, "batch": 2}))
