"""The two objectives on a handful of pictures and clips."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch

import emulus
from emulus.commands.quantize import quantize_folder
from emulus.config import write_yaml
from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.errors import EmulusError
from emulus.model.linear import Quantization, QuantizedLinear
from emulus.pipeline import Emulus
from emulus.recipes import recipe
from emulus.sequence import collate, modalities
from emulus.sequence.packing import pad
from emulus.tokenizer.vision import VisionTokenizerConfig
from emulus.train.config import TrainConfig
from emulus.train.metrics import read_metrics
from emulus.train.pretrain import PretrainConfig, PretrainObjective, pretrain
from emulus.train.tokenizer import TokenizerObjective, TokenizerTrainConfig, train_tokenizer
from tests.halted import halted

QUICK = TrainConfig(
    steps=6, learning_rate=3e-3, warmup_steps=2, save_every=3, evaluate_every=3, precision="fp32", device="cpu"
)


@pytest.fixture(scope="module")
def vision_config(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenizerTrainConfig:
    return TokenizerTrainConfig(
        data=shapes,
        out=tmp_path_factory.mktemp("vision") / "run",
        size=16,
        model=VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(), codebook_size=32),
        train=QUICK,
        pictures_per_batch=4,
        clip_frames=8,
        shift=1,
    )


@pytest.fixture(scope="module")
def decoder_config(tiny: Emulus, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    folder = tmp_path_factory.mktemp("decoder")
    tiny.save(folder / "model")
    tokens = TokenizeConfig(
        sources=(shapes,), vision=folder / "model", out=folder / "tokens", size=16, views=1, text_size=300
    )
    tokenize(tokens)
    return PretrainConfig(
        tokens=(str(tokens.out),),
        out=folder / "run",
        context=128,
        row_tokens=256,
        rows_per_step=2,
        window=64,
        train=QUICK,
        defaults=tiny.defaults,
    )


def figures(run: Path, kind: str, name: str) -> list[float]:
    return [line[name] for line in read_metrics(run) if line["kind"] == kind]


def test_a_vision_tokenizer_learns(vision_config: TokenizerTrainConfig) -> None:
    model = emulus.load(train_tokenizer(vision_config), device="cpu")
    assert model.vision.config == vision_config.model
    assert figures(vision_config.out, "train", "loss")[-1] < figures(vision_config.out, "train", "loss")[0]
    evaluated = read_metrics(vision_config.out)[-1]
    assert {"picture_psnr", "picture_ssim", "clip_psnr", "usage", "perplexity", "dead_codes"} <= evaluated.keys()
    assert (vision_config.out / "evaluations/pictures-00000006.png").exists()


@pytest.mark.parametrize("stage", ["tokenizer", "decoder"])
def test_resumed_equals_uninterrupted(
    stage: str, vision_config: TokenizerTrainConfig, decoder_config: PretrainConfig, tmp_path: Path
) -> None:
    """Stop after three of six steps by asking for three, then ask for six: the same losses to the bit."""

    def run(steps: int, out: Path) -> None:
        # The schedule is flat, so that asking for fewer steps first changes nothing but where the run stops.
        loop = dataclasses.replace(QUICK, steps=steps, schedule="wsd", decay_share=0.0)
        if stage == "tokenizer":
            shares = {"batch_norm_share": 0.0, "revive_share": 1.0}
            train_tokenizer(dataclasses.replace(vision_config, out=out, train=loop, **shares))
        else:
            pretrain(dataclasses.replace(decoder_config, out=out, train=loop))

    run(6, tmp_path / "whole")
    run(3, tmp_path / "parts")
    run(6, tmp_path / "parts")
    whole, parts = (figures(tmp_path / name, "train", "loss") for name in ("whole", "parts"))
    assert len(whole) == 6
    # The last step of a flat schedule's shorter run is the only one whose rate could differ; it does not.
    assert whole == parts


@pytest.mark.parametrize("stage", ["tokenizer-train", "pretrain"])
def test_killed_and_restarted_equals_uninterrupted(
    stage: str, vision_config: TokenizerTrainConfig, decoder_config: PretrainConfig, tmp_path: Path
) -> None:
    """Kill -9 the real command in mid-run and run it again: the same losses to the bit."""
    base = vision_config if stage == "tokenizer-train" else decoder_config
    loop = dataclasses.replace(QUICK, steps=14, save_every=2, evaluate_every=0)

    def run(out: Path, *, kill_after: int | None = None) -> None:
        config = dataclasses.replace(base, out=out, train=loop)  # type: ignore[type-var]
        write_yaml(tmp_path / "config.yaml", config)
        arguments = [stage, "demo-tiny", "--config", str(tmp_path / "config.yaml")]
        if kill_after is None:
            subprocess.run([sys.executable, "-m", "emulus", *arguments], stdout=subprocess.DEVNULL, check=True)
            return
        process = halted(tmp_path / "halted", "emulus.train.loop:_Loop.run_step", kill_after, arguments)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert len(figures(out, "train", "loss")) == kill_after

    run(tmp_path / "whole")
    run(tmp_path / "killed", kill_after=5)
    run(tmp_path / "killed")
    whole, killed = (figures(tmp_path / name, "train", "loss") for name in ("whole", "killed"))
    assert len(whole) == 14
    assert whole == killed


def test_other_data_is_not_gone_on_with(vision_config: TokenizerTrainConfig, shapes: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(vision_config, out=tmp_path / "run", train=dataclasses.replace(QUICK, steps=2))
    train_tokenizer(config)
    other = tmp_path / "other"
    other.mkdir()
    rows = (shapes / "captions.jsonl").read_text().splitlines()[:-20]
    for path in shapes.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "captions.jsonl").write_text("\n".join(rows[2:]))
    with pytest.raises(EmulusError, match="trained on other data"):
        train_tokenizer(dataclasses.replace(config, data=other))


def test_media_that_changed_since_a_run_began_are_told(
    vision_config: TokenizerTrainConfig, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = shutil.copytree(shapes, tmp_path / "data")
    config = dataclasses.replace(
        vision_config, data=data, out=tmp_path / "run", train=dataclasses.replace(QUICK, steps=1, evaluate_every=0)
    )
    train_tokenizer(config)
    logging.getLogger("emulus").propagate = True
    train_tokenizer(config)
    assert "media were changed" not in caplog.text
    PIL.Image.new("RGB", (16, 16), "purple").save(data / "0.png")
    train_tokenizer(config)
    assert "the media were changed, touched or copied since this run began" in caplog.text


def test_a_changed_setting_is_told(
    vision_config: TokenizerTrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(vision_config, out=tmp_path / "run", train=dataclasses.replace(QUICK, steps=2))
    train_tokenizer(config)
    logging.getLogger("emulus").propagate = True
    train_tokenizer(dataclasses.replace(config, flip=False, train=dataclasses.replace(QUICK, steps=3)))
    assert "flip was True in this run so far and is False from here on" in caplog.text


def test_a_decoder_learns(decoder_config: PretrainConfig) -> None:
    model = emulus.load(pretrain(decoder_config), device="cpu")
    losses = figures(decoder_config.out, "train", "loss")
    assert losses[-1] < losses[0]
    assert (
        figures(decoder_config.out, "evaluation", "visual_bits")[-1]
        < figures(decoder_config.out, "evaluation", "visual_bits")[0]
    )
    assert model.generate_image("a red square").size == (16, 16)
    # Four held-out pictures above four drawn ones.
    assert PIL.Image.open(decoder_config.out / "evaluations/drawn-00000006.png").size == (4 * 16, 2 * 16)


def test_a_steps_loss_does_not_depend_on_its_rows(decoder_config: PretrainConfig) -> None:
    """The same documents in one long row and in many short ones weigh the same."""
    objective = PretrainObjective(decoder_config)
    objective.model.eval()
    rows = objective.batches(0)
    weight = sum(objective.weight(row) for row in rows)
    apart = sum(objective.loss(row, weight).total.item() for row in rows)
    ids = [ids for row in rows for ids in row.input_ids.split(row.document_lengths)]
    together = collate(ids, objective.vocabulary, visual_weight=decoder_config.reading.visual_weight)
    assert objective.loss(together, weight).total.item() == pytest.approx(apart, rel=1e-5)


def test_losses_are_those_of_the_whole_table(decoder_config: PretrainConfig) -> None:
    objective = PretrainObjective(decoder_config)
    objective.model.eval()
    batch = objective.batches(0)[0]
    logits = objective.model(batch.input_ids[None], document_lengths=batch.document_lengths)[0]
    whole = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none") * batch.loss_weights
    found = objective.loss(batch, 1.0)
    torch.testing.assert_close(found.total, whole.sum())
    assert found.items == len(batch.input_ids)
    masks = modalities(batch.targets.numpy(), objective.vocabulary)
    for name, (total, count) in found.figures.items():
        chosen = torch.from_numpy(masks[name]) & (batch.loss_weights > 0)
        assert count == chosen.sum()
        torch.testing.assert_close(total, (whole / batch.loss_weights.clamp(min=1e-9))[chosen].sum())


def test_padded_rows_have_the_same_loss(decoder_config: PretrainConfig) -> None:
    objective = PretrainObjective(decoder_config)
    objective.model.eval()
    batch = objective.batches(0)[0]
    padded = objective.loss(pad(batch, 300, objective.vocabulary), 1.0)
    torch.testing.assert_close(padded.total, objective.loss(batch, 1.0).total)


def test_another_models_weights_to_start_from(decoder_config: PretrainConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(decoder_config, out=tmp_path / "first", train=dataclasses.replace(QUICK, steps=2))
    model = pretrain(config)
    fresh = dataclasses.replace(config, out=tmp_path / "second")
    objective = PretrainObjective(dataclasses.replace(fresh, init=str(model)))
    for name, weight in emulus.load(model, device="cpu").decoder.state_dict().items():
        assert torch.equal(weight, objective.model.state_dict()[name])
    with pytest.raises(EmulusError, match="4 blocks of width 128, this run 4 blocks of width 192"):
        PretrainObjective(dataclasses.replace(fresh, init=str(model), size="emoji-3m"))
    with pytest.raises(EmulusError, match="another vocabulary than the tokens"):
        PretrainObjective(dataclasses.replace(fresh, init="checkpoints/emoji"))
    other = tmp_path / "vision"
    other.mkdir()
    write_yaml(other / "config.yaml", recipe("emoji-64").tokenizer)
    # A run that goes on does not look for it again.
    PretrainObjective(dataclasses.replace(config, init="no/where"))
    with pytest.raises(EmulusError, match="run of another stage"):
        pretrain(dataclasses.replace(config, out=other))
    with pytest.raises(EmulusError, match="is the tokens folder, which is read; choose another --out"):
        pretrain(dataclasses.replace(config, out=Path(config.tokens[0])))
    (other / "making.json").touch()
    with pytest.raises(EmulusError, match="holds tokens"):
        pretrain(dataclasses.replace(config, out=other))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_fewer_bits_to_start_from(decoder_config: PretrainConfig, tmp_path: Path, kind: Quantization) -> None:
    config = dataclasses.replace(decoder_config, out=tmp_path / "first", train=dataclasses.replace(QUICK, steps=2))
    quantize_folder(pretrain(config), tmp_path / kind, kind)
    begun = dataclasses.replace(config, out=tmp_path / "second", init=str(tmp_path / kind))
    objective = PretrainObjective(begun)
    stored = emulus.load(tmp_path / kind, device="cpu").decoder
    for name, module in stored.named_modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.dequantize(), objective.model.get_parameter(f"{name}.weight"))
    for name, weight in stored.named_parameters():
        assert torch.equal(weight, objective.model.get_parameter(name))
    assert pretrain(begun).is_dir()


def test_optimisers_and_extras(decoder_config: PretrainConfig, tmp_path: Path) -> None:
    loop = dataclasses.replace(QUICK, steps=4, optimizer="muon", skip_norm=10.0, keep_every=2, save_every=1, keep=1)
    config = dataclasses.replace(decoder_config, out=tmp_path, z_loss=1e-4, train=loop)
    pretrain(config)
    assert figures(tmp_path, "train", "loss")[-1] < figures(tmp_path, "train", "loss")[0]
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["step-00000002", "step-00000004"]


def test_documents_longer_than_the_context(decoder_config: PretrainConfig) -> None:
    with pytest.raises(EmulusError, match="the context is 32"):
        PretrainObjective(dataclasses.replace(decoder_config, context=32))


def test_settings_that_cannot_be(vision_config: TokenizerTrainConfig, decoder_config: PretrainConfig) -> None:
    with pytest.raises(EmulusError, match="multiple of 4"):
        dataclasses.replace(vision_config, size=18)
    with pytest.raises(EmulusError, match="multiple of 4"):
        dataclasses.replace(vision_config, clip_frames=6)
    with pytest.raises(EmulusError, match="row_tokens"):
        dataclasses.replace(decoder_config, row_tokens=16)
    with pytest.raises(EmulusError, match="no training pictures"):
        TokenizerObjective(dataclasses.replace(vision_config, pictures_per_batch=0, clips_per_batch=0))


def test_recipes_fit_together() -> None:
    for name in ("demo-tiny", "emoji-64"):
        chosen = recipe(name)
        assert chosen.tokens.vision == chosen.tokenizer.out
        assert chosen.decoder.tokens == (str(chosen.tokens.out),)
        assert chosen.decoder.defaults.height == chosen.tokens.size == chosen.tokenizer.size
        assert chosen.decoder.defaults.num_frames == chosen.tokens.max_frames == chosen.tokenizer.clip_frames


def test_codes_that_look_alike_begin_alike(decoder_config: PretrainConfig) -> None:
    plain, objective = (
        PretrainObjective(dataclasses.replace(decoder_config, codebook_init=chosen)) for chosen in (False, True)
    )
    start, count = objective.vocabulary.visual_start, objective.vocabulary.visual_size
    codes = objective.vision.quantize.embedding.weight
    rows = [each.model.get_parameter("model.embed_tokens.weight") for each in (plain, objective)]
    near, far = torch.cdist(codes, codes).flatten().argsort()[[count, -1]].tolist()

    def apart(weight: torch.Tensor, pair: int) -> float:
        first, second = divmod(pair, count)
        return float((weight[start + first] - weight[start + second]).norm().detach())

    assert apart(rows[1], near) < 0.5 * apart(rows[1], far)
    torch.testing.assert_close(rows[1][start:].std(), rows[0][start:].std(), rtol=0.3, atol=0)
    assert torch.equal(rows[1][:start], rows[0][:start])
    again = PretrainObjective(dataclasses.replace(decoder_config, codebook_init=True))
    assert torch.equal(again.model.get_parameter("model.embed_tokens.weight"), rows[1])
