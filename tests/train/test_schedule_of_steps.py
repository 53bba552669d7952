"""What the loop does with its settings in every step, against the same steps written out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from emulus.parallel.processes import Processes
from emulus.train.config import TrainConfig
from emulus.train.loop import train
from emulus.train.metrics import read_metrics
from emulus.train.objective import Evaluation, Objective, StepLoss
from emulus.train.optimizer import make_optimizer
from emulus.train.schedule import learning_rate

CONFIG = TrainConfig(
    steps=30,
    learning_rate=0.03,
    warmup_steps=5,
    schedule="wsd",
    final_learning_rate=0.2,
    decay_share=0.4,
    weight_decay=0.5,
    clip_norm=20.0,
    ema_decay=0.8,
    evaluate_every=0,
    save_every=30,
    device="cpu",
    precision="fp32",
)


class Plane(Objective[Tensor, nn.Linear]):
    """Learn a sum, from two batches a step whose sizes of gradient differ widely."""

    def __init__(self, *, bad_step: int | None = None) -> None:
        self.config = CONFIG
        self.processes = Processes(device=torch.device("cpu"))
        self.model = plane()
        self.bad_step = bad_step
        self.drawn: list[float] = []

    def batches(self, step: int) -> list[Tensor]:
        return [batch * torch.nan if step == self.bad_step else batch for batch in points(step)]

    def loss(self, batch: Tensor, step_weight: float) -> StepLoss:
        self.drawn.append(float(torch.rand(())))
        total = error(self.model, batch) / step_weight
        return StepLoss(total=total, figures={"error": (total.detach() * step_weight, 1.0)}, items=len(batch))

    def evaluate(self, model: nn.Linear) -> Evaluation:
        return Evaluation(metrics={"error": float(error(model, torch.ones(1, 3)))})

    def save_model(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        (folder / "weights.json").write_text(json.dumps({name: tensor.tolist() for name, tensor in tensors.items()}))


def plane() -> nn.Linear:
    model = nn.Linear(3, 1)
    model.weight.data.fill_(0.1)
    model.bias.data.fill_(-2.0)
    return model


def points(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(4, 3, generator=generator) * (1 + 3 * (step % 4)) for _ in range(2)]


def error(model: nn.Linear, batch: Tensor) -> Tensor:
    return (model(batch)[:, 0] - batch.sum(1)).square().mean()


def written_out(config: TrainConfig) -> tuple[dict[str, Tensor], list[float]]:
    """The averaged weights after all steps, and the norm of every step's gradient."""
    model, norms = plane(), []
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = make_optimizer(model.named_parameters(), config)
    for step in range(config.steps):
        optimizer.zero_grad()
        (sum(error(model, batch) for batch in points(step)) / 2).backward()
        norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
        norms.append(float(norm))
        for parameter in model.parameters():
            parameter.grad *= min(1.0, config.clip_norm / float(norm)) if config.clip_norm else 1.0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * new for name, new in model.state_dict().items()}
    return average, norms


@pytest.mark.parametrize("change", [{}, {"clip_norm": 0.0}, {"ema_decay": 0.99}, {"schedule": "cosine"}])
def test_steps_are_those_written_out(change: dict[str, float], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, **change)
    folder = train(config, Plane(), tmp_path)
    expected, norms = written_out(config)
    found = json.loads((folder / "weights.json").read_text())
    for name, tensor in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), tensor)
    lines = [line for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert [line["learning_rate"] for line in lines] == [learning_rate(config, step) for step in range(30)]
    assert [line["grad_norm"] for line in lines] == pytest.approx(norms, rel=1e-4)
    assert min(norms) < 20 < max(norms), "some steps are to be clipped and others not"


def test_a_step_without_a_finite_gradient_changes_no_weight(tmp_path: Path) -> None:
    runs = []
    for bad_step in (2, None):
        config = dataclasses.replace(CONFIG, steps=3, save_every=1, keep=3, ema_decay=0.0, learning_rate=0.01)
        train(config, Plane(bad_step=bad_step), tmp_path / str(bad_step))
        folders = sorted((tmp_path / str(bad_step) / "checkpoints").glob("step-*"))
        runs.append([json.loads((folder / "model/weights.json").read_text()) for folder in folders])
    skipped, whole = runs
    assert skipped[1] == skipped[2] == whole[1] != whole[2]


def test_every_batch_of_every_step_has_randomness_of_its_own(tmp_path: Path) -> None:
    objectives = [Plane(), Plane()]
    for number, objective in enumerate(objectives):
        train(dataclasses.replace(CONFIG, seed=number), objective, tmp_path / str(number))
    drawn = [number for objective in objectives for number in objective.drawn]
    assert len(set(drawn)) == len(drawn) == 2 * 2 * 30
