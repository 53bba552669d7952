"""batches -> weights: the one training loop, for one process or many."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from emulus.codec import as_mapping, decode_fields
from emulus.config import read_yaml, to_dict, write_yaml
from emulus.data.sources.walk import check_holds_no_data
from emulus.device import autocast
from emulus.errors import EmulusError
from emulus.files import check_not_running, check_out, only_run, read_json, write_file
from emulus.log import logger
from emulus.parallel.processes import Processes, peers
from emulus.train import checkpoint
from emulus.train.average import Average
from emulus.train.checkpoint import VALUES, Checkpoints, damaged, step_name
from emulus.train.config import TrainConfig
from emulus.train.flops import peak_flops
from emulus.train.metrics import MetricsLog, StepLine, profiled, scan_metrics
from emulus.train.objective import Evaluation, Objective, StepLoss
from emulus.train.optimizer import clip_, make_optimizer, total_norm
from emulus.train.schedule import learning_rate
from emulus.train.watch import MOST_NOT_FINITE, Watch

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
FOREIGN = {"manifest.jsonl": "tokens", "making.json": "tokens", "tokens.json": "tokens", "config.json": "a model"}
"""What a folder holds that has a file of such a name, and is no run."""
ONLY_AT_FIRST = ("init", "codebook_init")
"""Settings that decide first weights, and nothing later."""
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
    with peers(objective.processes), ExitStack() as held:
        loop = _Loop(config, objective, run)
        loop.check_folder()
        hold_folder(run, objective.processes, held)
        start = loop.resume()
        missing = loop.evaluation_is_missing(start)
        if start >= config.steps and not missing:
            logger.info(f"{run} is complete ({start} steps)")
            return loop.final_model()
        loop.begin(start)
        try:
            if missing:
                loop.evaluate(start)
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
                if summary := loop.watch.summary(config.steps):
                    loop.log.note(config.steps, summary)
                if bool(objective.processes.gather([float(bool(interrupts))]).any()):
                    # Whoever trains several models must not begin the next one.
                    raise Interrupted(f"{run} is finished, and was asked to stop")
        finally:
            # What is being written when something goes wrong is worth the wait.
            with suppress(EmulusError):
                loop.checkpoints.wait()
            loop.log.close()
            objective.close()
        return loop.final_model()


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """``trainer.json``: what a checkpoint says beside its tensors.

    Attributes:
        step: How many steps are behind it.
        watch: See :meth:`emulus.train.watch.Watch.state`.
        reading: See :meth:`emulus.train.objective.Objective.reading_state`.
        fingerprint: See :meth:`emulus.train.objective.Objective.fingerprint`; empty says nothing.
        seed: Of the run; None where an older version of Emulus wrote it.
    """

    step: int
    watch: dict[str, Any]
    reading: dict[str, Any]
    fingerprint: str = ""
    seed: int | None = None


def hold_folder(folder: Path, processes: Processes, held: ExitStack) -> None:
    """Keep other runs away from a folder. The first process does, for all of them, which must all call this.

    Args:
        folder: Made if it is not there.
        processes: Who trains.
        held: Lets go when it is closed.

    Raises:
        EmulusError: Another run writes to the folder.
    """
    error = None
    if processes.first:
        try:
            held.enter_context(only_run(folder))
        except EmulusError as found:
            error = found
    if bool(processes.gather([float(error is not None)]).any()):
        raise error or EmulusError(f"the first process cannot write to {folder}; it says why")


def check_run(run: Path, init: str = "") -> None:
    """Refuse a run's folder that cannot be written or that another run writes to, before data and models are read.

    Args:
        run: The folder.
        init: Where first weights come from: a folder or a name on the hub, or nothing.

    Raises:
        EmulusError: The folder cannot be used, or the first weights lie in it.
    """
    check_out(run, init=init)
    check_holds_no_data(run)
    check_not_running(run)
    if init and os.path.exists(init) and run.resolve() in Path(init).resolve().parents:
        raise EmulusError(f"--init {init} lies in --out {run}, which is that run; choose another --out")


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
        saves, evaluates = (_due(every, done, config.steps) for every in (config.save_every, config.evaluate_every))
        if saves or stop:
            self.save(done)
            self.line.restart()
        stop = stop and done < config.steps
        if evaluates and not stop:
            # Asked again, since an evaluation may take long; it is made up for when the run goes on.
            stop = done < config.steps and bool(self.processes.gather([float(bool(self.interrupts))]).any())
            if stop and not saves:
                self.save(done)
            if not stop:
                self.evaluate(done)
                self.line.restart()
        return stop

    def evaluation_is_missing(self, step: int) -> bool:
        """Whether a run that was stopped at this step still owes its evaluation. All processes must call it."""
        missing = False
        if self.processes.first and step and _due(self.config.evaluate_every, step, self.config.steps):
            found = (line["kind"] == "evaluation" and line["step"] == step for line in scan_metrics(self.run))
            missing = not any(found)
        return bool(self.processes.gather([float(missing)])[0, 0])

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
                clip_(self.parameters, size, config.clip_norm)
            self.optimizer.step()
        else:
            self.log.note(step + 1, self.watch.skip_note(step + 1, size))
            if self.watch.is_hopeless:
                raise EmulusError(
                    f"the gradient was not finite in {MOST_NOT_FINITE} steps in a row; go on from an older checkpoint "
                    f"of {self.run} (delete the newer ones) with a lower learning rate"
                )
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
                # Shards are added up after every batch, or each process would hold all gradients; copies only once.
                self.model.set_requires_all_reduce(place == len(batches) - 1)
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
        saving, failed = self.checkpoints.saving, self.checkpoints.failed
        asked = [float(saving), float(failed), float(bool(self.interrupts))]
        everyone = self.processes.gather([*totals, wait, busy, *asked])
        sums = everyone[:: self.processes.sizes.tensor].sum(0).tolist()
        figures = {"loss": sums[0]}
        for place, name in enumerate(names):
            total, weight = sums[1 + 2 * place : 3 + 2 * place]
            if weight:
                figures[name] = total / weight
        saving, failed, stop = (bool(each) for each in everyone[:, -3:].any(0))
        notes = [self.watch.loss(step + 1, sums[0])]
        # Writing takes processor time, too, of the first process most.
        notes += [] if saving else [self.watch.seconds(everyone[:, -4].tolist())]
        for note in notes:
            if note:
                self.log.note(step + 1, note)
        if failed:
            self.checkpoints.wait()
        counts = {"items": round(sums[-7]), "flops": sums[-6], "wait": float(everyone[:, -5].max())}
        return figures, counts, stop

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
            "seed": self.config.seed,
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
        # Settings that no run may change are looked at before weights are read.
        saved = self._read_saved(path)
        self._check_init()
        self.checkpoints.load(path, self._tensors())
        try:
            self.watch.load_state(saved.watch)
        except EmulusError as error:
            raise damaged(path, error) from None
        return saved.step

    def _read_saved(self, path: Path) -> _Saved:
        """What a checkpoint says beside its tensors; the objective goes on reading from there.

        Raises:
            EmulusError: It is damaged, or of a run that this one cannot go on with.
        """
        try:
            saved = decode_fields(_Saved, read_json(path / VALUES), VALUES)
        except EmulusError as error:
            raise damaged(path, error) from None
        if path.name != step_name(saved.step) or saved.reading.get("step", saved.step) != saved.step:
            raise damaged(path, f"{VALUES} is of step {saved.step}, or its reading of another")
        if saved.fingerprint not in ("", self.objective.fingerprint()):
            raise EmulusError(
                f"{path} was trained on other data (or ids that mean something else) than given now; "
                f"choose another --out, or delete {self.run} to start over"
            )
        seed = self._seed_of_old() if saved.seed is None else saved.seed
        if seed not in (None, self.config.seed):
            raise EmulusError(
                f"train.seed was {seed} in this run so far and cannot become {self.config.seed}: data would be read in "
                "another order, some of it twice and some not at all; keep it, or start a new run: another --out, with "
                "--init naming this one"
            )
        try:
            self.objective.load_reading_state(saved.reading)
        except EmulusError as error:
            raise EmulusError(f"{path}: {error}") from None
        return saved

    def _seed_of_old(self) -> int | None:
        """The seed of a run whose checkpoint does not say it, as of older versions of Emulus."""
        loop = (self._old_config() or {}).get("train")
        seed = loop.get("seed") if isinstance(loop, dict) else None
        return seed if isinstance(seed, int) else None

    def _check_init(self) -> None:
        """Refuse other first weights than the run began with: they would not be looked at."""
        init = getattr(self.objective.config, "init", "")
        before = (self._old_config() or {}).get("init", init)
        if init and init != before:
            raise EmulusError(
                f"{self.run} holds a run that has begun already, so --init {init} would change nothing; choose another "
                "--out to start from it, or leave it out to go on"
            )

    def _old_config(self) -> dict[str, Any] | None:
        """What ``config.yaml`` says of the run so far; None where there is none.

        Raises:
            EmulusError: It is damaged.
        """
        path = self.run / CONFIG
        if not path.exists():
            return None
        try:
            return as_mapping(read_yaml(path), str(path))
        except EmulusError as error:
            raise EmulusError(f"{error}; delete {path} to go on without what it says") from None

    def check_folder(self) -> None:
        """Refuse a folder that is something else's.

        Raises:
            EmulusError: It holds tokens, or the run of another stage.
        """
        for name, what in FOREIGN.items():
            if (self.run / name).exists():
                raise EmulusError(f"{self.run} holds {what}; choose another --out")
        old, new = self._old_config(), to_dict(self.objective.config)
        if old and 2 * len(old.keys() & new.keys()) < len(new):
            raise EmulusError(f"{self.run} is the run of another stage; choose another --out")

    def save_config(self) -> None:
        """Write ``config.yaml``, and say what differs from the run's so far."""
        old, new = self._old_config() or {}, to_dict(self.objective.config)
        began = {name: old[name] for name in ONLY_AT_FIRST if name in old and name in new}
        for name, before, value in _changes(old, new) if old else ():
            if name in began:
                logger.warning(f"{name} was {before} when this run began, and {value} changes nothing now")
            else:
                logger.warning(f"{name} was {before} in this run so far and is {value} from here on")
        write_yaml(self.run / CONFIG, {**new, **began})

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
