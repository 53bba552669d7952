"""batches -> weights: the one training loop."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from emulus.config import read_yaml, to_dict, write_yaml
from emulus.device import autocast, pick_device
from emulus.errors import EmulusError
from emulus.files import write_file
from emulus.log import logger
from emulus.train import checkpoint
from emulus.train.checkpoint import TrainerState
from emulus.train.config import TrainConfig
from emulus.train.metrics import MetricsLog, StepLine
from emulus.train.objective import Evaluation, Objective, StepLoss
from emulus.train.schedule import learning_rate

CHECKPOINTS = "checkpoints"


class Interrupted(EmulusError):
    """The run was asked to stop; it saved first."""


def train(config: TrainConfig, objective: Objective[Any, Any], run: Path) -> Path:
    """Train until ``config.steps``, going on from the newest whole checkpoint under ``run`` if there is one.

    Every batch and every random draw is a function of the seed and the step, so on the CPU a resumed run computes the
    same bits as one that was never stopped.

    Args:
        config: Settings of the loop.
        objective: Model, data and loss; its model must be on ``config.device`` already.
        run: Folder of the run: ``checkpoints/``, ``metrics.jsonl``, ``evaluations/``.

    Returns:
        The folder of the final model, which :func:`emulus.load` takes.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved.
        EmulusError: The disk is full, or the checkpoint to resume from does not fit the model.
    """
    loop = _Loop(config, objective, run)
    start = loop.resume()
    if start >= config.steps:
        logger.info(f"{run} is complete ({start} steps)")
        return loop.final_model()
    loop.save_config()
    loop.log = MetricsLog(run, resumed_at=start, tensorboard=config.tensorboard)
    logger.info(
        f"{'going on at step ' + str(start) if start else 'starting'}: {objective.describe()}, on {loop.device}"
    )
    line = StepLine(config.steps, objective.unit, loop.device)
    with _interrupts() as interrupts:
        for step in range(start, config.steps):
            figures, items = loop.step(step)
            done = step + 1
            loop.log.write(done, "train", figures)
            line.step(items)
            if done % config.log_every == 0 or done == config.steps:
                line.show(done, figures)
            # Saved first: what goes wrong in an evaluation costs no training.
            if _due(config.save_every, done, config.steps) or interrupts:
                loop.save(done)
                line.restart()
            if _due(config.evaluate_every, done, config.steps) and not interrupts:
                loop.evaluate(done)
                line.restart()
            if interrupts and done < config.steps:
                raise Interrupted(f"stopped at step {done} of {config.steps} and saved; run the same command to go on")
    return loop.final_model()


class _Loop:
    """The moving parts of one run."""

    log: MetricsLog

    def __init__(self, config: TrainConfig, objective: Objective[Any, Any], run: Path) -> None:
        self.config, self.objective, self.run = config, objective, run
        self.device = pick_device(config.device)
        self.model = objective.model
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval() if config.ema_decay else None
        self.optimizer = make_optimizer(self.model, config)

    @property
    def averaged(self) -> nn.Module:
        """What is evaluated and shipped."""
        return self.ema if self.ema is not None else self.model

    def step(self, step: int) -> tuple[dict[str, float], int]:
        """One optimiser step; its figures and how many tokens or frames it saw."""
        config, objective = self.config, self.objective
        self.model.train()
        objective.before_step(step, config.steps)
        # Dropout and the like draw from the global generator, so the step decides them too.
        torch.manual_seed(_mix(config.seed, step))
        losses: list[StepLoss] = []
        for batch in objective.batches(step):
            with autocast(self.device, config.precision):
                loss = objective.loss(batch)
            loss.total.backward()
            losses.append(loss)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or float("inf"))
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # A step whose gradient is not finite would poison the weights for good.
        if finite := bool(norm.isfinite()):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # Nor may the objective learn from it.
        extra = objective.after_step(step, config.steps) if finite else {}
        if self.ema is not None:
            update_average(self.ema, self.model, min(config.ema_decay, (1 + step) / (10 + step)))
        figures = {"loss": sum(float(loss.total.detach()) for loss in losses), **_means(losses)}
        figures |= {"grad_norm": float(norm), "learning_rate": rate, **extra}
        if not finite:
            logger.warning(f"step {step + 1}: the gradient is not finite; the step was skipped")
        return figures, sum(loss.items for loss in losses)

    def evaluate(self, step: int) -> Evaluation:
        """Held-out figures to the log, pictures to ``evaluations/``."""
        model = self.averaged.eval()
        with torch.inference_mode():
            torch.manual_seed(self.config.seed)
            result = self.objective.evaluate(model)
        self.log.write(step, "evaluation", result.metrics)
        logger.info("  held out: " + "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items()))
        for name, picture in result.pictures.items():
            write_file(self.run / "evaluations" / f"{name}-{step:08d}.png", picture.save)
        return result

    def save(self, step: int) -> Path:
        """A checkpoint of the state after ``step`` steps."""
        tensors = checkpoint.prefixed("model", self.model.state_dict())
        tensors |= checkpoint.optimizer_tensors(self.optimizer, self.model)
        tensors |= checkpoint.prefixed("extra", self.objective.extra_state())
        if self.ema is not None:
            tensors |= checkpoint.prefixed("ema", self.ema.state_dict())
        state = TrainerState(tensors=tensors, values={"step": step, "fingerprint": self.objective.fingerprint()})
        return checkpoint.save(
            self.run / CHECKPOINTS,
            step,
            state,
            lambda folder: self.objective.save_model(self.averaged, folder),
            keep=self.config.keep,
        )

    def resume(self) -> int:
        """Load the newest whole checkpoint; the number of steps it has behind it."""
        path = checkpoint.latest(self.run / CHECKPOINTS)
        if path is None:
            return 0
        state = checkpoint.load(path, self.device)
        if state.values.get("fingerprint", "") not in ("", self.objective.fingerprint()):
            raise EmulusError(
                f"{path} was trained on other data (or ids that mean something else) than given now; "
                f"choose another --out, or delete {self.run} to start over"
            )
        try:
            self.model.load_state_dict(checkpoint.section("model", state.tensors))
            if self.ema is not None:
                self.ema.load_state_dict(checkpoint.section("ema", state.tensors))
            checkpoint.load_optimizer(self.optimizer, self.model, state.tensors)
            self.objective.load_extra_state(checkpoint.section("extra", state.tensors))
        except (RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise EmulusError(
                f"{path} is of another model or other settings ({reason}); choose another --out or delete {self.run}"
            ) from None
        return int(state.values["step"])

    def save_config(self) -> None:
        """Write ``config.yaml``, and say what differs from the run's so far."""
        path = self.run / "config.yaml"
        new = to_dict(self.objective.config)
        if path.exists():
            for name, old, value in _changes(read_yaml(path), new):
                logger.warning(f"{name} was {old} in this run so far and is {value} from here on")
        write_yaml(path, self.objective.config)

    def final_model(self) -> Path:
        """The newest checkpoint's model folder."""
        path = checkpoint.latest(self.run / CHECKPOINTS)
        assert path is not None, "a finished run has saved"
        return path / "model"


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices and kernels only."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=True)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move every tensor of ``average`` towards ``model``'s; whole numbers are copied."""
    for mean, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(new, 1 - decay)
        else:
            mean.copy_(new)


def _mix(seed: int, index: int) -> int:
    """One seed out of two numbers, far apart for neighbours (the finaliser of splitmix64)."""
    value = (seed * 0x9E3779B97F4A7C15 + index * 0xBF58476D1CE4E5B9 + 1) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return value ^ (value >> 31)


def _means(losses: list[StepLoss]) -> dict[str, float]:
    """A step's means out of its batches' sums. A figure is of the batches that have it."""
    means = {}
    for name in sorted({name for loss in losses for name in loss.figures}):
        parts = [loss.figures[name] for loss in losses if name in loss.figures]
        means[name] = sum(float(total) for total, _ in parts) / sum(weight for _, weight in parts)
    return means


def _changes(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Fields of nested mappings that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in new:
            yield from _changes(old.get(key), new[key], f"{name}.{key}" if name else str(key))
    elif old != new:
        yield name, old, new


def _due(every: int, done: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that the step in flight ends and is saved. A second Ctrl-C stops at once."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        logger.info("stopping after this step; a checkpoint will be saved")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
