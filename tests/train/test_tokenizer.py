"""Training of the vision tokenizer with all its terms."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from emulus.data.media_dataset import to_pixels
from emulus.errors import EmulusError
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig, perceptual
from emulus.tokenizer.vision.discriminator import AdversarialConfig
from emulus.tokenizer.vision.losses import ReconstructionConfig
from emulus.tokenizer.vision.perceptual import available
from emulus.tokenizer.vision.weights import load_vision_tokenizer, save_vision_tokenizer
from emulus.train.checkpoint import latest
from emulus.train.config import TrainConfig
from emulus.train.loop import CHECKPOINTS, train
from emulus.train.metrics import read_metrics
from emulus.train.tokenizer import TokenizerObjective, TokenizerTrainConfig, train_tokenizer
from emulus.weights import find_tensors

SHAPE = VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(), codebook_size=32)
# Flat, so that asking for fewer steps first changes nothing but where the run stops.
LOOP = TrainConfig(
    steps=4,
    learning_rate=3e-3,
    warmup_steps=2,
    schedule="wsd",
    decay_share=0.0,
    save_every=100,
    evaluate_every=0,
    precision="fp32",
    device="cpu",
)


@pytest.fixture
def config(shapes: Path, tmp_path: Path) -> TokenizerTrainConfig:
    """Every term from the first step on."""
    return TokenizerTrainConfig(
        data=shapes,
        out=tmp_path / "run",
        size=16,
        model=SHAPE,
        train=LOOP,
        reconstruction=ReconstructionConfig(l2=1.0, l1=0.1, perceptual=0.1 * available(), perceptual_frames=2),
        adversarial=AdversarialConfig(weight=0.1, start_share=0.0, rise_share=0.0, width=8, frames=3),
        pictures_per_batch=4,
        clip_frames=8,
        shift=1,
        batch_norm_share=0.0,
        revive_share=1.0,
        evaluation_items=4,
    )


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A tokenizer to start from: random weights that spread pixels over its codebook."""
    torch.manual_seed(1)
    model = VisionTokenizer(SHAPE).eval()
    with torch.no_grad():
        latents = model.latents(torch.rand(64, 3, 16, 16) * 2 - 1).movedim(1, -1).flatten(0, -2)
        model.quantize.embedding.weight.copy_(latents[torch.randperm(len(latents))[:32]])
    save_vision_tokenizer(model, tmp_path / "trained")
    return tmp_path / "trained"


def extra_tensors(run: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint holds beside the model."""
    path = latest(run / CHECKPOINTS)
    assert path is not None
    tensors = {}
    for file in (path / "trainer").glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            tensors |= {name: reader.get_tensor(name) for name in reader.keys() if name.startswith("extra.")}  # noqa: SIM118
    return tensors


def test_resumed_equals_uninterrupted_with_every_term(config: TokenizerTrainConfig, tmp_path: Path) -> None:
    def run(steps: int, name: str) -> Path:
        loop = dataclasses.replace(LOOP, steps=steps)
        train_tokenizer(dataclasses.replace(config, out=tmp_path / name, train=loop))
        return tmp_path / name

    whole = run(3, "whole")
    run(1, "parts")
    parts = run(3, "parts")
    lines = [
        [{name: line[name] for name in line if name in names} for line in read_metrics(path) if line["kind"] == "train"]
        for path in (whole, parts)
        for names in [{"loss", "clip_adversarial", "discriminator_loss", "picture_perceptual", "grad_norm"}]
    ]
    assert len(lines[0]) == 3
    assert {"clip_adversarial", "discriminator_loss"} <= lines[0][0].keys()
    assert lines[0] == lines[1]
    one, other = extra_tensors(whole), extra_tensors(parts)
    assert any(name.startswith("extra.optimizer.") for name in one)
    assert one["extra.verdicts.painted"] != 0
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_saved_model_is_the_tokenizer_alone(config: TokenizerTrainConfig) -> None:
    folder = train_tokenizer(dataclasses.replace(config, train=dataclasses.replace(LOOP, steps=1)))
    assert find_tensors(folder).keys() == VisionTokenizer(SHAPE).state_dict().keys()
    evaluated = read_metrics(config.out)[-1]
    assert evaluated["picture_psnr"] > 0
    assert not available() or 0 < evaluated["clip_stlpips"] < 2


def test_the_discriminator_begins_later(config: TokenizerTrainConfig) -> None:
    adversarial = dataclasses.replace(config.adversarial, start_share=0.5)
    train_tokenizer(dataclasses.replace(config, adversarial=adversarial))
    lines = [line for line in read_metrics(config.out) if line["kind"] == "train"]
    assert ["discriminator_loss" in line for line in lines] == [False] * 2 + [True] * 2


def test_the_tokenizer_alone_learns_from_its_term(config: TokenizerTrainConfig) -> None:
    objective = TokenizerObjective(config)
    adversary = objective.adversary
    assert adversary is not None
    objective.before_step(0, 6)
    objective.loss(objective.batches(0)[0], 1.0).total.backward()
    assert all(parameter.grad is None for parameter in adversary.discriminator.parameters())
    before = {name: tensor.clone() for name, tensor in adversary.tensors().items()}
    assert objective.model.decoder.conv_out.weight.grad is not None
    figures = objective.after_step(0, 6)
    assert figures["discriminator_loss"] > 0
    after = adversary.tensors()
    assert not torch.equal(before["discriminator.layers.0.weight"], after["discriminator.layers.0.weight"])
    assert not any(parameter.requires_grad for parameter in adversary.discriminator.parameters())


def test_another_tokenizers_weights_to_start_from(config: TokenizerTrainConfig, trained: Path) -> None:
    objective = TokenizerObjective(dataclasses.replace(config, init=str(trained), batch_norm_share=0.5))
    for name, weight in load_vision_tokenizer(trained).state_dict().items():
        assert torch.equal(weight, objective.model.state_dict()[name])
    assert all(parameter.requires_grad for parameter in objective.model.encoder.parameters())
    objective.model.train()
    objective.before_step(0, 100)
    norms = [module for module in objective.model.modules() if isinstance(module, nn.BatchNorm3d)]
    assert not any(norm.training for norm in norms), "a batch's own figures would throw it back"
    codebook = objective.model.quantize.embedding.weight.clone()
    objective.loss(objective.batches(0)[0], 1.0)
    assert torch.equal(codebook, objective.model.quantize.embedding.weight), "it is not sampled anew"
    other = dataclasses.replace(SHAPE, codebook_size=64)
    with pytest.raises(EmulusError, match=r"has codebook_size 32, this run 64; give --model\.codebook-size 32"):
        TokenizerObjective(dataclasses.replace(config, init=str(trained), model=other))
    # Dropout has no weights.
    TokenizerObjective(dataclasses.replace(config, init=str(trained), model=dataclasses.replace(SHAPE, dropout=0.1)))


def test_a_run_that_goes_on_does_not_look_for_its_first_weights(config: TokenizerTrainConfig, trained: Path) -> None:
    loop = dataclasses.replace(LOOP, steps=1)
    train_tokenizer(dataclasses.replace(config, init=str(trained), train=loop))
    TokenizerObjective(dataclasses.replace(config, init="no/where"))


def test_a_frozen_encoder_keeps_its_codes(config: TokenizerTrainConfig, trained: Path) -> None:
    config = dataclasses.replace(config, init=str(trained), freeze_encoder=True)
    objective = TokenizerObjective(config)
    before = load_vision_tokenizer(trained)
    after = load_vision_tokenizer(train(config.train, objective, config.out))
    assert objective.pictures is not None
    assert objective.clips is not None
    for data, count in ((objective.pictures, 8), (objective.clips, 2)):
        pixels = [to_pixels(data[index]) for index in range(count)]
        batch = torch.stack(pixels) if len(pixels[0]) > 1 else torch.cat(pixels)
        assert torch.equal(before.encode(batch), after.encode(batch))
    changed = {
        name.split(".")[0]
        for name, tensor in after.state_dict().items()
        if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed == {"decoder", "post_quant_conv"}


def test_settings_that_do_not_go_together(config: TokenizerTrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EmulusError, match="freeze_encoder keeps the encoder of a trained tokenizer"):
        dataclasses.replace(config, freeze_encoder=True)
    monkeypatch.setattr(perceptual, "PACKAGE", "stlpips_missing")
    looks = dataclasses.replace(config, reconstruction=ReconstructionConfig(perceptual=0.1))
    with pytest.raises(EmulusError, match=r"pip install 'emulus\[perceptual\]'"):
        TokenizerObjective(looks)
    plain = dataclasses.replace(config, reconstruction=ReconstructionConfig())
    assert TokenizerObjective(plain).distance is None
