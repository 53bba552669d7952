"""The benchmark of training at toy size: every case runs, and its checks find what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from benchmarks import training
from benchmarks.harness import Options, Unequal, main

TINY = Options(pairs=1, toy=True)


@pytest.mark.parametrize(
    "name",
    [
        "useful-batch-fp32",
        "useful-all-bf16",
        "overhead-fp32",
        # Two processes that import everything.
        pytest.param("memory-184622", marks=pytest.mark.slow),
    ],
)
def test_cases(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(training.CASES, ["--json", "--toy", "--pairs", "1", "--only", name], settings=training.SETTINGS) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    about = found[0]["conditions"]
    assert found[0]["case"] == name
    if name.startswith("useful"):
        assert 0 < about["losses_differ"] < training.LOSS_TOLERANCE[name[-4:]]
        assert about["ids"] < about["ids_with_padding"]
        assert about["ours_useful_ids_per_second"] > 0
    elif name.startswith("memory"):
        assert 0 < about["ours_bytes"] < about["baseline_bytes"]
        assert about["ids"] <= about["ids_with_padding"]
    else:
        assert [each["case"] for each in found] == ["overhead-fp32", "wait-fp32"]
        assert all(0 <= share < 1 for share in found[1]["conditions"]["shares"])


def test_another_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = training._in_transformers

    def wrong(*arguments: object) -> object:
        theirs = right(*arguments)  # type: ignore[arg-type]
        theirs.model.layers[1].self_attn.q_proj.weight = torch.nn.Parameter(
            1.1 * theirs.model.layers[1].self_attn.q_proj.weight.detach()
        )
        return theirs

    monkeypatch.setattr(training, "_in_transformers", wrong)
    with pytest.raises(Unequal, match="differ by"):
        training.useful("fp32", "batch", TINY)


def test_padding() -> None:
    padded = training._collate([torch.tensor([3, 4, 5]), torch.tensor([6])], pad=0)
    assert padded["input_ids"].tolist() == [[3, 4, 5], [6, 0, 0]]
    assert padded["labels"].tolist() == [[3, 4, 5], [6, -100, -100]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert training._collate([torch.tensor([3])], pad=0, most=2)["input_ids"].tolist() == [[3, 0]]
