"""The arithmetic of the vision tokenizer's costs."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from benchmarks import vision_floor
from emulus.tokenizer.vision import VisionTokenizerConfig

TINY = VisionTokenizerConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(1,), codebook_size=64)


def test_products_of_the_released_encoder() -> None:
    """The number of docs/engine.md for transformers, which encodes four equal frames."""
    found = vision_floor.cost(VisionTokenizerConfig(), "encode", "fp32", height=256, width=256)
    assert found.flop == pytest.approx(0.9e12, rel=0.1)
    found = vision_floor.cost(VisionTokenizerConfig(), "decode", "fp32", height=256, width=256)
    assert found.flop == pytest.approx(1.9e12, rel=0.1)


@pytest.mark.parametrize("half", ["encode", "decode"])
def test_ways_and_batches(half: str) -> None:
    def cost(way: str, count: int = 1, **card: float) -> vision_floor.Cost:
        size = {"height": 32, "width": 48, "count": count}
        return vision_floor.cost(TINY, half, way, **size, card=dataclasses.replace(vision_floor.H200, **card))  # type: ignore[arg-type]

    single, plain, fused = (cost(way) for way in get_args(vision_floor.Way))
    assert single.flop == plain.flop == fused.flop > 0
    assert fused.bytes < min(single.bytes, plain.bytes)
    assert fused.seconds < min(single.seconds, plain.seconds)
    assert 0 < fused.convolutions < fused.seconds
    many = cost("bf16-fused", 3)
    assert many.flop == 3 * fused.flop
    # Weights are read once a batch.
    assert fused.bytes < many.bytes < 3 * fused.bytes
    # Where memory is slow nothing but bytes counts.
    assert cost("bf16-fused", bandwidth=1e6).seconds == pytest.approx(fused.bytes / 1e6)


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["vision_floor", "--height", "64", "--width", "64"])
    vision_floor.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert all(line.count("|") == 6 for line in lines)
