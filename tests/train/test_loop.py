"""The loop on a model small enough to be trained many times."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emulus.errors import EmulusError
from emulus.parallel.processes import Processes
from emulus.train.average import Average
from emulus.train.checkpoint import complete_checkpoints
from emulus.train.config import TrainConfig
from emulus.train.loop import Interrupted, train
from emulus.train.metrics import read_metrics
from emulus.train.objective import Evaluation, Objective, StepLoss


class Line(Objective[Tensor, nn.Sequential]):
    """Learn ``y = sum(x)``, with dropout, so that the random state matters."""

    unit = "points"

    def __init__(self, *, width: int = 8, kill_at: int | None = None, signal_at: int | None = None) -> None:
        self.config = CONFIG
        self.processes = Processes(device=torch.device("cpu"))
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.2), nn.Linear(width, 1))
        self.seen = torch.zeros(())
        self.kill_at, self.signal_at = kill_at, signal_at

    def batches(self, step: int) -> list[Tensor]:
        if step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        generator = torch.Generator().manual_seed(step)
        return [torch.randn(8, 4, generator=generator) for _ in range(2)]

    def loss(self, batch: Tensor, step_weight: float) -> StepLoss:
        total = F.mse_loss(self.model(batch)[:, 0], batch.sum(1)) / step_weight
        self.seen += 1
        return StepLoss(total=total, figures={"error": (total.detach() * step_weight, 1.0)}, items=len(batch))

    def extra_tensors(self) -> dict[str, Tensor]:
        return {"seen": self.seen}

    def evaluate(self, model: nn.Sequential) -> Evaluation:
        x = torch.ones(4, 4)
        return Evaluation(metrics={"error": float(F.mse_loss(model(x)[:, 0], x.sum(1)))})

    def save_model(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        (folder / "weights.json").write_text(json.dumps({name: tensor.tolist() for name, tensor in tensors.items()}))


CONFIG = TrainConfig(
    steps=24,
    learning_rate=0.05,
    warmup_steps=2,
    save_every=5,
    evaluate_every=10,
    log_every=8,
    ema_decay=0.9,
    device="cpu",
)


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run) if line["kind"] == "train"}


def test_it_learns_and_leaves_its_traces(tmp_path: Path) -> None:
    model = train(CONFIG, Line(), tmp_path)
    assert losses(tmp_path)[24] < losses(tmp_path)[1]
    assert model == tmp_path / "checkpoints/step-00000024/model"
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step-00000020", "step-00000024"]
    assert [line["step"] for line in read_metrics(tmp_path) if line["kind"] == "evaluation"] == [10, 20, 24]


def test_killed_and_restarted_equals_uninterrupted(tmp_path: Path) -> None:
    """Kill -9 in mid-run, at two places, in a process of its own; the losses and the weights are the same bits."""
    whole = train(CONFIG, Line(), tmp_path / "whole")
    for kill_at in (13, 19):
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r});"
            "import test_loop; from pathlib import Path;"
            f"test_loop.train(test_loop.CONFIG, test_loop.Line(kill_at={kill_at}), Path({str(tmp_path / 'killed')!r}))"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    resumed = train(CONFIG, Line(), tmp_path / "killed")
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert (whole / "weights.json").read_text() == (resumed / "weights.json").read_text()


def test_sigterm_saves_first(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="step 8 of 24"):
        train(CONFIG, Line(signal_at=7), tmp_path / "stopped")
    assert complete_checkpoints(tmp_path / "stopped/checkpoints")[-1].name == "step-00000008"
    train(CONFIG, Line(), tmp_path / "stopped")
    train(CONFIG, Line(), tmp_path / "whole")
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


def test_an_evaluation_that_a_stop_prevented_is_made_up_for(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(CONFIG, Line(), whole)
    with pytest.raises(Interrupted, match="step 10 of 24"):
        train(CONFIG, Line(signal_at=9), stopped)
    train(CONFIG, Line(), stopped)
    evaluations = [[line for line in read_metrics(run) if line["kind"] == "evaluation"] for run in (whole, stopped)]
    assert evaluations[0] == evaluations[1]
    last = tmp_path / "last"
    with pytest.raises(Interrupted, match="is finished"):
        train(CONFIG, Line(signal_at=23), last)
    assert [line for line in read_metrics(last) if line["kind"] == "evaluation"] == evaluations[0]


def test_an_evaluation_that_failed_is_made_up_for(tmp_path: Path) -> None:
    class Failing(Line):
        def evaluate(self, model: nn.Sequential) -> Evaluation:
            raise EmulusError("no")

    with pytest.raises(EmulusError, match="no"):
        train(dataclasses.replace(CONFIG, evaluate_every=0), Failing(), tmp_path)
    train(dataclasses.replace(CONFIG, evaluate_every=0), Line(), tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path) if line["kind"] == "evaluation"] == [24]


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    train(CONFIG, Line(), tmp_path)
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    train(CONFIG, Line(), tmp_path)
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_torn_checkpoint_is_not_used(tmp_path: Path) -> None:
    train(CONFIG, Line(), tmp_path)
    (tmp_path / "checkpoints/step-00000024/COMPLETE").unlink()
    assert complete_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000020"
    train(CONFIG, Line(), tmp_path)
    assert complete_checkpoints(tmp_path / "checkpoints")[-1].name == "step-00000024"


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    train(CONFIG, Line(), tmp_path)
    path = next((tmp_path / "checkpoints/step-00000024/trainer").iterdir())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(EmulusError, match="step-00000024 is damaged"):
        train(CONFIG, Line(), tmp_path)


def test_another_models_checkpoint_is_named(tmp_path: Path) -> None:
    train(CONFIG, Line(), tmp_path)
    with pytest.raises(EmulusError, match="another model"):
        train(CONFIG, Line(width=9), tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second checkpoint meets a full disk: one clear line, and the first is still there to go on from."""

    class Full(Line):
        def save_model(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
            if "00000010" in folder.parent.name:
                with open("/dev/full", "w", buffering=1) as disk:
                    disk.write("x" * 10_000)
            super().save_model(tensors, folder)

    with pytest.raises(EmulusError, match="the disk is full"):
        train(CONFIG, Full(), tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000005"]
    train(CONFIG, Line(), tmp_path)
    assert len(losses(tmp_path)) == 24


def test_not_finite_steps_are_skipped(tmp_path: Path) -> None:
    class Spike(Line):
        def loss(self, batch: Tensor, step_weight: float) -> StepLoss:
            result = super().loss(batch, step_weight)
            return StepLoss(total=result.total * float("nan"), figures=result.figures, items=result.items)

    objective = Spike()
    before = [parameter.clone() for parameter in objective.model.parameters()]
    train(TrainConfig(steps=2, device="cpu"), objective, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, objective.model.parameters(), strict=True))


def test_a_run_without_hope_ends(tmp_path: Path) -> None:
    class Broken(Line):
        def loss(self, batch: Tensor, step_weight: float) -> StepLoss:
            result = super().loss(batch, step_weight)
            return dataclasses.replace(result, total=result.total * float("inf"))

    with pytest.raises(EmulusError, match="100 steps in a row"):
        train(dataclasses.replace(CONFIG, steps=200, save_every=1000, evaluate_every=0), Broken(), tmp_path)


def test_tensorboard(tmp_path: Path) -> None:
    train(dataclasses.replace(CONFIG, steps=2, boards=("tensorboard",)), Line(), tmp_path)
    (events,) = (tmp_path / "tensorboard").glob("events.out.*")
    assert b"train/loss" in events.read_bytes()


def test_average() -> None:
    model = nn.BatchNorm1d(1)
    average = Average(model, 0.75)
    model.weight.data.fill_(3.0)
    model.num_batches_tracked.fill_(7)
    average.update(100)
    assert average.tensors["weight"].item() == pytest.approx(1.5)
    assert int(average.tensors["num_batches_tracked"]) == 7
    with average.in_place() as changed:
        assert changed is model
        assert model.weight.item() == pytest.approx(1.5)
    assert model.weight.item() == 3.0
    assert average.tensors["weight"].item() == pytest.approx(1.5)


def test_two_signals_do_not_wait(tmp_path: Path) -> None:
    """A second Ctrl-C stops at once, without a checkpoint."""

    class Impatient(Line):
        def batches(self, step: int) -> list[Tensor]:
            if step == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return super().batches(step)

    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, Impatient(), tmp_path)
    assert not complete_checkpoints(tmp_path / "checkpoints")
