"""Any number of processes, shared out in any way, trains the same model on the same batches."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import emulus
from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.errors import EmulusError
from emulus.model import Decoder, sized
from emulus.parallel.config import ParallelConfig
from emulus.parallel.processes import Processes, first_host, running, settle
from emulus.parallel.spread import spread
from emulus.pipeline import Emulus
from emulus.sequence import Batch
from emulus.train.checkpoint import complete_checkpoints
from emulus.train.config import TrainConfig
from emulus.train.loop import train
from emulus.train.metrics import read_metrics
from emulus.train.pretrain import PretrainConfig, PretrainObjective, pretrain
from tests.ranks import run_ranks

STEPS, FIRST = 6, 3
LAYOUTS = {
    "one": (1, ParallelConfig()),
    "replicate 2": (2, ParallelConfig()),
    "shard 2": (2, ParallelConfig(shard=2)),
    "tensor 2": (2, ParallelConfig(tensor=2)),
    "context 2": (2, ParallelConfig(context=2)),
    "replicate 2 x shard 2": (4, ParallelConfig(shard=2)),
    "shard 4": (4, ParallelConfig(shard=4)),
    "shard 2 x tensor 2": (4, ParallelConfig(shard=2, tensor=2)),
    "shard 2 x context 2, recomputing": (4, ParallelConfig(shard=2, context=2, recompute=True)),
    "context 2 x tensor 2": (4, ParallelConfig(context=2, tensor=2)),
}


@pytest.fixture(scope="module")
def config(tiny: Emulus, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    folder = tmp_path_factory.mktemp("elastic")
    tiny.save(folder / "model")
    tokens = TokenizeConfig(
        sources=(shapes,), vision=folder / "model", out=folder / "tokens", size=16, views=1, text_size=300
    )
    tokenize(tokens)
    loop = TrainConfig(
        steps=STEPS,
        learning_rate=3e-3,
        warmup_steps=2,
        schedule="wsd",
        decay_share=0.0,
        save_every=FIRST,
        evaluate_every=2,
        precision="fp32",
        device="cpu",
    )
    return PretrainConfig(
        tokens=(str(tokens.out),),
        out=folder,
        context=128,
        dropout=0.0,
        row_tokens=160,
        rows_per_step=4,
        window=32,
        evaluation_pictures=2,
        train=loop,
        defaults=tiny.defaults,
    )


def laid_out(config: PretrainConfig, sizes: ParallelConfig, out: Path, steps: int = STEPS) -> PretrainConfig:
    loop = dataclasses.replace(config.train, parallel=sizes, steps=steps)
    return dataclasses.replace(config, out=out, train=loop)


def train_as(name: str, config: PretrainConfig, out: Path, steps: int = STEPS) -> None:
    world, sizes = LAYOUTS[name]
    run_ranks(world, pretrain, laid_out(config, sizes, out, steps))


@pytest.fixture(scope="module")
def runs(config: PretrainConfig) -> Path:
    """Every layout from the start, and a run that changes its layout half-way, twice."""
    for name in LAYOUTS:
        train_as(name, config, config.out / name)
    for steps, name in ((2, "shard 2 x tensor 2"), (4, "one"), (STEPS, "shard 4")):
        train_as(name, config, config.out / "changing", steps)
    return config.out


EXTRAS = {"replicate 2": 0.2, "shard 2": 0.2, "tensor 2": 0.0, "shard 2 x context 2, recomputing": 0.0}


@pytest.mark.parametrize("dropout", [0.2, 0.0])
def test_muon_and_dropout_do_not_depend_on_the_layout(config: PretrainConfig, dropout: float) -> None:
    """Dropout only where processes share neither rows nor matrices; Muon everywhere."""
    loop = dataclasses.replace(config.train, optimizer="muon", steps=3, evaluate_every=0)
    changed = dataclasses.replace(config, dropout=dropout, z_loss=1e-3, train=loop, evaluation_pictures=0)
    out = config.out / f"muon {dropout}"
    names = ["one", *(name for name, rate in EXTRAS.items() if rate == dropout)]
    for name in names:
        train_as(name, changed, out / name, steps=3)
        assert figures(out / name, "loss") == pytest.approx(figures(out / "one", "loss"), abs=1e-5, rel=1e-5)


def figures(run: Path, name: str, kind: str = "train") -> list[float]:
    return [line[name] for line in read_metrics(run) if line["kind"] == kind]


@pytest.mark.parametrize("name", [*LAYOUTS, "changing"])
def test_losses_do_not_depend_on_the_layout(runs: Path, name: str) -> None:
    for figure in ("loss", "visual", "text", "grad_norm"):
        ours, alone = figures(runs / name, figure), figures(runs / "one", figure)
        assert len(ours) == STEPS
        assert ours == pytest.approx(alone, abs=1e-5, rel=1e-5), figure
    assert figures(runs / name, "tokens") == figures(runs / "one", "tokens")
    ours, alone = (figures(runs / each, "visual_bits", "evaluation") for each in (name, "one"))
    assert ours == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("name", [*LAYOUTS, "changing"])
def test_the_models_are_the_same(runs: Path, name: str) -> None:
    ours, alone = (emulus.load(runs / each, device="cpu").decoder.state_dict() for each in (name, "one"))
    for key, weight in alone.items():
        torch.testing.assert_close(ours[key], weight, atol=2e-5, rtol=1e-4)
    assert (runs / name / f"evaluations/drawn-{STEPS:08d}.png").exists()


class Disturbed(PretrainObjective):
    """One of the processes gets a signal before it reads the rows of a step."""

    def __init__(self, config: PretrainConfig, processes: Processes, number: int) -> None:
        super().__init__(config, processes)
        self.signal = number

    def batches(self, step: int) -> Sequence[Batch]:
        if step == 4 and self.processes.rank == 1:
            os.kill(os.getpid(), self.signal)
        return super().batches(step)


def disturbed(config: PretrainConfig, number: int) -> tuple[str, int]:
    """What this process says at its end, and its exit status."""
    config = laid_out(config, ParallelConfig(shard=2), config.out / f"signal {number}")
    with pytest.raises(EmulusError) as error, running(config.train.parallel, "cpu") as processes:
        train(config.train, Disturbed(config, processes, number), config.out)
    return str(error.value), error.value.status


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all(config: PretrainConfig, number: int) -> None:
    for said, status in run_ranks(2, disturbed, config, int(number)):
        assert "stopped at step 5 of 6 and saved" in said
        assert status == 75
    assert complete_checkpoints(config.out / f"signal {int(number)}/checkpoints")[-1].name == "step-00000005"


def test_a_process_that_dies_is_noticed_by_the_others(config: PretrainConfig) -> None:
    first, second = run_ranks(2, disturbed, config, int(signal.SIGKILL))
    assert second is None
    assert "another process of this run has stopped" in first[0]
    assert complete_checkpoints(config.out / "signal 9/checkpoints")[-1].name == "step-00000003"


def refused(config: PretrainConfig) -> str:
    with pytest.raises(EmulusError) as error:
        pretrain(laid_out(config, ParallelConfig(tensor=4), config.out / "refused"))
    return str(error.value)


def test_a_model_that_cannot_be_shared_out_is_refused(config: PretrainConfig) -> None:
    for said in run_ranks(4, refused, config):
        assert "tensor 4 does not divide the model's num_key_value_heads 2" in said


def test_sizes_must_multiply_to_the_processes() -> None:
    assert settle(ParallelConfig(shard=2, tensor=2), 8).replicate == 2
    with pytest.raises(EmulusError, match="6 processes cannot be shared out as replicate any x shard 4"):
        settle(ParallelConfig(shard=4), 6)
    with pytest.raises(EmulusError, match="torchrun --nproc-per-node 4"):
        settle(ParallelConfig(shard=2, context=2), 1)


def test_what_does_not_go_together() -> None:
    sizes = ParallelConfig(replicate=1, tensor=2, float8=True)
    model = Decoder(sized("tiny", vocab_size=64))
    with pytest.raises(EmulusError, match="float8 does not go together with tensor"):
        spread(model, Processes(device=torch.device("cpu"), world=2, sizes=sizes))
    tied = Decoder(sized("tiny", vocab_size=64, tie_word_embeddings=True))
    with pytest.raises(EmulusError, match="head is the embedding"):
        spread(tied, Processes(device=torch.device("cpu")))


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[007-010,012],cpu3", "gpu007"), ("a,b", "a"), ("one", "one"), ("n[3,5]", "n3")]
)
def test_slurms_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_who_does_what() -> None:
    sizes = ParallelConfig(replicate=1, shard=2, context=2, tensor=2)
    seen = [Processes(device=torch.device("cpu"), rank=rank, world=8, sizes=sizes) for rank in range(8)]
    assert [each.data_rank for each in seen] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [each.context_rank for each in seen] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert {each.summed_over for each in seen} == {4}
