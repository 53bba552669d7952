"""The same on a GPU as on the CPU: run with ``pytest -m gpu``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import emulus
from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.parallel.config import ParallelConfig
from emulus.pipeline import Emulus
from emulus.tokenizer.vision import VisionTokenizerConfig
from emulus.train.config import TrainConfig
from emulus.train.metrics import read_metrics
from emulus.train.pretrain import PretrainConfig, pretrain
from emulus.train.tokenizer import TokenizerTrainConfig, train_tokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def both(tiny: Emulus, tmp_path: Path) -> tuple[Emulus, Emulus]:
    tiny.save(tmp_path)
    return emulus.load(tmp_path, device="cpu"), emulus.load(tmp_path, device="cuda")


def test_the_same_codes_and_logits(both: tuple[Emulus, Emulus]) -> None:
    cpu, gpu = both
    pixels = torch.rand(4, 8, 3, 16, 16) * 2 - 1
    codes = cpu.vision.encode(pixels)
    assert (gpu.vision.encode(pixels.cuda()).cpu() == codes).float().mean() > 0.99
    painted = gpu.vision.decode(codes.cuda()).cpu()
    torch.testing.assert_close(painted, cpu.vision.decode(codes), atol=2e-2, rtol=0)
    ids = torch.randint(cpu.decoder.config.vocab_size, (2, 40))
    with torch.inference_mode():
        torch.testing.assert_close(gpu.decoder(ids.cuda()).cpu(), cpu.decoder(ids), atol=2e-2, rtol=0)


def test_every_task(both: tuple[Emulus, Emulus]) -> None:
    _, gpu = both
    picture = gpu.generate_image("a red apple")
    assert picture.tobytes() == gpu.generate_images(["a bird", "a red apple"])[1].tobytes()
    assert isinstance(gpu.describe(picture), str)
    assert len(gpu.continue_video(gpu.generate_video("a bird"), num_frames=16).frames) == 16


def test_both_trainings(tiny: Emulus, shapes: Path, tmp_path: Path) -> None:
    pytest.importorskip("array_record")
    pytest.importorskip("grain")
    quick = TrainConfig(steps=6, learning_rate=3e-3, warmup_steps=2, save_every=3, evaluate_every=3, device="cuda")
    vision = TokenizerTrainConfig(
        data=shapes,
        out=tmp_path / "vision",
        size=16,
        model=VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(), codebook_size=32),
        train=quick,
        clip_frames=8,
    )
    train_tokenizer(dataclasses.replace(vision, train=dataclasses.replace(quick, steps=3)))
    train_tokenizer(vision)
    tokens = tokenize(
        TokenizeConfig(
            sources=(shapes,), vision=vision.out, out=tmp_path / "tokens", size=16, text_size=300, device="cuda"
        )
    )
    last = {}
    for name, parallel in {
        "plain": ParallelConfig(),
        "recomputing": ParallelConfig(recompute=True),
        "compiled": ParallelConfig(compile=True, recompute=True),
    }.items():
        run = PretrainConfig(
            tokens=(str(tokens),),
            out=tmp_path / name,
            context=128,
            dropout=0.0,
            row_tokens=256,
            train=dataclasses.replace(quick, parallel=parallel),
            defaults=tiny.defaults,
        )
        pretrain(run)
        losses = [line["loss"] for line in read_metrics(run.out) if line["kind"] == "train"]
        assert losses[-1] < losses[0]
        last[name] = losses[-1]
    assert list(last.values()) == pytest.approx([last["plain"]] * 3, rel=1e-2)
