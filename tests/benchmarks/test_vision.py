"""The benchmarks of the vision tokenizer at toy size: every case runs, and its checks find what is wrong."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import vision
from benchmarks.harness import Options, Unequal, main

TINY = Options(pairs=1, toy=True)


@pytest.mark.parametrize("name", vision.CASES)
def test_every_case(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(vision.CASES, ["--json", "--toy", "--pairs", "1", "--only", name], settings=vision.SETTINGS) == 0
    found = json.loads(capsys.readouterr().out)
    about = found["conditions"]
    assert found["case"] == name
    assert found["spread"][0] <= found["ratio"] <= found["spread"][1]
    if name.startswith("memory"):
        assert 0 < about["loaded_bytes"] <= about["peak_bytes"]
    else:
        assert about["baseline_s"] > 0
        assert about["ours_s"] > 0
    if name.startswith("decode"):
        assert 0 < about["pixels_differ_relatively"] < (1e-4 if name == "decode-fp32" else 0.05)
    if name.startswith("encode"):
        assert about["codes_that_differ"] <= 0.1 * about["codes"]
        assert about["different_codes"] > 100


@pytest.mark.parametrize("way", [vision.encode, vision.decode])
def test_unequal_weights_are_not_timed(way: object, monkeypatch: pytest.MonkeyPatch) -> None:
    right = vision.reference

    def wrong(model: vision.VisionTokenizer) -> object:
        theirs = right(model)
        for weights in theirs.parameters():
            weights.data = weights.data * 1.01
        return theirs

    monkeypatch.setattr(vision, "reference", wrong)
    with pytest.raises(Unequal):
        way("fp32", TINY)  # type: ignore[operator]


def test_the_reference_shares_the_weights() -> None:
    model = vision.tokenizer("fp32", toy=True)
    ours = {weights.untyped_storage().data_ptr() for weights in model.parameters()}
    assert {weights.untyped_storage().data_ptr() for weights in vision.reference(model).parameters()} == ours


def test_both_kinds_have_the_same_weights() -> None:
    whole, rounded = (vision.tokenizer(kind, toy=True).state_dict() for kind in vision.KINDS)
    assert all(torch.equal(rounded[name], value.to(rounded[name].dtype)) for name, value in whole.items())
    assert any(value.dtype == torch.bfloat16 for value in rounded.values())
