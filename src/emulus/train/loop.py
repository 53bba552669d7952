"""batches -> weights: the one training loop, for one process or many."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from emulus.config import read_yaml, to_dict, write_yaml
from emulus.device import autocast
from emulus.errors import EmulusError
from emulus.files import write_file
from emulus.log import logger
from emulus.parallel.processes import Processes, peers
from emulus.train import checkpoint
from emulus.train.average import Average
from emulus.train.checkpoint import Checkpoints
from emulus.train.config import TrainConfig
from emulus.train.flops import peak_flops
from emulus.train.metrics import MetricsLog, StepLine, profiled
from emulus.train.objective import Evaluation, Objective, StepLoss
from emulus.train.optimizer import clip_, make_optimizer, total_norm
from emulus.train.schedule import learning_rate
from emulus.train.watch import Watch

CHECKPOINTS = "checkpoints"
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Interrupted(EmulusError):
    """The run was asked to stop; it saved first. The exit status asks a cluster to start it again."""

    status = 75


def train(config: TrainConfig, objective: Objective[Any, Any], run: Path) -> Path:
    """Train until ``config.steps``, going on from the newest whole checkpoint under ``run`` if there is one.

    Every batch and every random draw is a function of the seed and the step, so on CPUs a resumed run computes the same
    bits as one that was never stopped.

    Args:
        config: Settings of the loop.
        objective: Model, data and loss; its model must be on its device, and spread over its processes, already.
        run: Folder of the run: ``checkpoints/``, ``metrics.jsonl``, ``evaluations/``. All processes must see it.

    Returns:
        The folder of the final model, which :func:`emulus.load` takes.

    Raises:
        Interrupted: Ctrl-C, SIGTERM or SIGUSR1 reached one of the processes; a checkpoint was saved.
        EmulusError: The disk is full, the checkpoint to resume from does not fit the model, or another process is
            gone.
    """
    with peers(objective.processes):
        loop = _Loop(config, objective, run)
        start = loop.resume()
        if start >= config.steps:
            logger.info(f"{run} is complete ({start} steps)")
            return loop.final_model()
        loop.begin(start)
        try:
            with _interrupts() as interrupts, profiled(config.profile_steps, run / "profile") as profiler:
                loop.interrupts = interrupts
                for step in range(start, config.steps):
                    stop = loop.run_step(step)
                    profiler.step()
                    if stop:
                        loop.checkpoints.wait()
                        raise Interrupted(
                            f"stopped at step {step + 1} of {config.steps} and saved; run the same command to go on"
                        )
            loop.checkpoints.wait()
        finally:
            # What is being written when something goes wrong is worth the wait.
            with suppress(EmulusError):
                loop.checkpoints.wait()
            loop.log.close()
        return loop.final_model()


class _Loop:
    """The moving parts of one run."""

    log: MetricsLog
    line: StepLine
    interrupts: list[int]

    def __init__(self, config: TrainConfig, objective: Objective[Any, Any], run: Path) -> None:
        self.config, self.objective, self.run = config, objective, run
        self.processes: Processes = objective.processes
        self.device = self.processes.device
        self.model: nn.Module = objective.model
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.average = Average(self.model, config.ema_decay) if config.ema_decay else None
        self.optimizer = make_optimizer(self.model.named_parameters(), config)
        self.watch = Watch(config.skip_norm)
        self.checkpoints = Checkpoints(
            run / CHECKPOINTS, keep=config.keep, keep_every=config.keep_every, background=config.background_saves
        )

    def begin(self, start: int) -> None:
        """Say what will be done, and where figures go."""
        config, objective = self.config, self.objective
        if self.processes.first:
            self.save_config()
        self.log = MetricsLog(self.run, resumed_at=start, boards=config.boards)
        with self._autocast():
            precision: Literal["bf16", "fp32"] = "bf16" if torch.is_autocast_enabled(self.device.type) else "fp32"
        peak = peak_flops(self.device, "fp8" if config.parallel.float8 else precision) * self.processes.world
        self.line = StepLine(config.steps, objective.unit, self.device, peak)
        state = f"going on at step {start}" if start else "starting"
        others = f" and {self.processes.world - 1} more" if self.processes.world > 1 else ""
        logger.info(f"{state}: {objective.describe()}, on {self.device}{others}")

    def run_step(self, step: int) -> bool:
        """One step and what is due after it; whether to stop."""
        config, done = self.config, step + 1
        figures, counts, stop = self.step(step)
        speeds = self.line.step(**counts)
        self.log.write(done, "train", {**figures, **speeds})
        if done % config.log_every == 0 or done == config.steps:
            self.line.show(done, figures)
        # Saved first: what goes wrong in an evaluation costs no training.
        if _due(config.save_every, done, config.steps) or stop:
            self.save(done)
            self.line.restart()
        if _due(config.evaluate_every, done, config.steps) and not stop:
            self.evaluate(done)
            self.line.restart()
        return stop and done < config.steps

    def step(self, step: int) -> tuple[dict[str, float], dict[str, Any], bool]:
        """One optimiser step.

        Returns:
            Its figures; its items, operations and seconds of waiting; whether some process was asked to stop.
        """
        config, objective = self.config, self.objective
        self.model.train()
        objective.before_step(step, config.steps)
        begun = time.monotonic()
        batches = objective.batches(step)
        wait = time.monotonic() - begun
        step_weight = self.processes.sum([sum(objective.weight(batch) for batch in batches)])[0]
        # Processor time, since the clock also runs while a process waits for the slowest one.
        busy = time.process_time()
        losses = self._backward(step, batches, step_weight)
        busy = time.process_time() - busy + wait
        norm = total_norm(self.parameters)
        figures, counts, stop = self._sum_up(step, losses, wait, busy)
        rate = learning_rate(config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # A step whose gradient is not finite would poison the weights for good.
        size = float(norm)
        kept = not self.watch.outlier(size)
        if kept:
            if config.clip_norm:
                clip_(self.parameters, norm, config.clip_norm)
            self.optimizer.step()
        else:
            self.log.note(step + 1, f"step {step + 1}: the gradient's norm is {size:.4g}; the step was skipped")
        self.optimizer.zero_grad(set_to_none=True)
        # Nor may the objective learn from it.
        extra = objective.after_step(step, config.steps) if kept else {}
        if self.average is not None:
            self.average.update(step)
        figures |= {"grad_norm": size, "learning_rate": rate, "skipped": float(self.watch.skipped), **extra}
        return figures, counts, stop

    def _backward(self, step: int, batches: Any, step_weight: float) -> list[StepLoss]:
        """Gradients of this process's batches."""
        objective, processes = self.objective, self.processes
        losses: list[StepLoss] = []
        for place, batch in enumerate(batches):
            # Dropout and the like draw from the global generator, so the step and the batch decide them too, not who
            # computes it.
            torch.manual_seed(mix(self.config.seed, step, objective.number(place), processes.context_rank))
            if isinstance(self.model, FSDPModule):
                # The processes' gradients are added up once, after the last batch.
                self.model.set_requires_gradient_sync(place == len(batches) - 1)
            with self._autocast():
                loss = objective.loss(batch, step_weight)
            # Sharding takes the mean over the processes where the sum is wanted.
            (loss.total * processes.summed_over if processes.summed_over > 1 else loss.total).backward()
            losses.append(loss)
        return losses

    def _sum_up(
        self, step: int, losses: list[StepLoss], wait: float, busy: float
    ) -> tuple[dict[str, float], dict[str, Any], bool]:
        """Figures over all processes, in one exchange."""
        names = sorted(losses[0].figures)
        totals = [sum(float(loss.total.detach()) for loss in losses)]
        for name in names:
            totals += [sum(float(loss.figures[name][part]) for loss in losses) for part in (0, 1)]
        totals += [float(sum(loss.items for loss in losses)), sum(loss.flops for loss in losses)]
        everyone = self.processes.gather([*totals, wait, busy, float(bool(self.interrupts))])
        sums = everyone[:: self.processes.sizes.tensor].sum(0).tolist()
        figures = {"loss": sums[0]}
        for place, name in enumerate(names):
            total, weight = sums[1 + 2 * place : 3 + 2 * place]
            if weight:
                figures[name] = total / weight
        for note in (self.watch.loss(step + 1, sums[0]), self.watch.seconds(everyone[:, -2].tolist())):
            if note:
                self.log.note(step + 1, note)
        counts = {"items": round(sums[-5]), "flops": sums[-4], "wait": float(everyone[:, -3].max())}
        return figures, counts, bool(everyone[:, -1].any())

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self.device, self.config.precision)

    def evaluate(self, step: int) -> Evaluation:
        """Held-out figures to the log, pictures to ``evaluations/``."""
        averaged = self.average.in_place() if self.average is not None else nullcontext(self.model)
        with averaged as model, torch.no_grad(), self._autocast():
            torch.manual_seed(self.config.seed)
            result = self.objective.evaluate(model.eval())
        self.log.write(step, "evaluation", result.metrics)
        logger.info("  held out: " + "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items()))
        if self.processes.first:
            for name, picture in result.pictures.items():
                write_file(self.run / "evaluations" / f"{name}-{step:08d}.png", picture.save)
        return result

    def _tensors(self) -> dict[str, Tensor]:
        """All that changes while the run goes on; checkpoints are made of these and loaded into them."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            tensors |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in state.items()}
        return tensors | {f"extra.{name}": tensor for name, tensor in self.objective.extra_tensors().items()}

    def save(self, step: int) -> None:
        """A checkpoint of the state after ``step`` steps."""
        values = {
            "step": step,
            "fingerprint": self.objective.fingerprint(),
            "reading": self.objective.reading_state(step),
            "watch": self.watch.state(),
        }
        prefix = "average." if self.average is not None else "model."
        self.checkpoints.save(step, self._tensors(), values, self.objective.save_model, prefix)

    def resume(self) -> int:
        """Load the newest whole checkpoint; the number of steps it has behind it."""
        path = checkpoint.latest(self.run / CHECKPOINTS)
        steps = self.processes.gather([-1.0 if path is None else float(path.name.removeprefix("step-"))])[:, 0]
        if not bool((steps == steps[0]).all()):
            raise EmulusError(
                f"the processes see different checkpoints under {self.run}; put --out on a disk that all of them share"
            )
        if path is None:
            return 0
        values = self.checkpoints.load(path, self._tensors())
        if values.get("fingerprint", "") not in ("", self.objective.fingerprint()):
            raise EmulusError(
                f"{path} was trained on other data (or ids that mean something else) than given now; "
                f"choose another --out, or delete {self.run} to start over"
            )
        self.watch.load_state(values["watch"])
        self.objective.load_reading_state(values["reading"])
        return int(values["step"])

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


def mix(seed: int, *numbers: int) -> int:
    """One seed out of several numbers, far apart for neighbours (the finaliser of splitmix64)."""
    value = seed
    for number in numbers:
        value = (value * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + 1) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value


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
    """Collect signals to stop, so that the step in flight ends and is saved. A second Ctrl-C stops at once."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)
        logger.info("stopping after this step; a checkpoint will be saved")

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
