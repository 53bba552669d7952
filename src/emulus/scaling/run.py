"""a ladder of sizes, each trained on several numbers of tokens -> the law, and how far it is from a larger run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from emulus.config import read_yaml, to_dict
from emulus.data.loader import held_out
from emulus.data.mixture import Mixture, parse_part
from emulus.errors import EmulusError
from emulus.files import check_out, write_json
from emulus.log import logger
from emulus.model.config import sized
from emulus.parallel.processes import running
from emulus.scaling.fit import FEWEST_KINDS, Point, fit
from emulus.scaling.ladder import ALL, Findings, Foretold, Measured, Planned, ScalingConfig
from emulus.scaling.page import write_page
from emulus.scaling.rate import counted_parameters, rate_at_width
from emulus.sequence import modalities
from emulus.train.loop import check_run, hold_folder, train
from emulus.train.metrics import METRICS_FILE, read_metrics
from emulus.train.pretrain import MODALITIES, PretrainConfig, PretrainObjective

SCALING_FILE = "scaling.json"
PAGE_FILE = "scaling.html"
_SUFFIX = "_bits"
_LONGEST_WARMUP = 0.2
# What a run may be told about how to compute without becoming another run.
_FREE = {
    "device",
    "log_every",
    "save_every",
    "keep",
    "keep_every",
    "background_saves",
    "boards",
    "profile_steps",
    "parallel",
}


def run_scaling(config: ScalingConfig) -> Path:
    """Train what is not trained yet, fit, and write ``scaling.json`` and ``scaling.html``.

    Runs that are finished are not run again, and one that was stopped goes on, so the same command can be given until
    it is through. With several processes (``torchrun``) all of them train each run together.

    Returns:
        The page.

    Raises:
        EmulusError: A folder holds a run of other settings, or too few runs are finished to fit anything.
    """
    _check_out(config)
    planned = plan(config)
    ids = held_out_ids(config.base)
    with ExitStack() as held, running(config.base.train.parallel, config.base.train.device) as processes:
        if not config.fit_only:
            _check_ladder(planned)
            hold_folder(config.out, processes, held)
            # Decided before the first one starts, so that several processes decide alike.
            todo = [each.config for each in planned if measured(each, ids) is None]
            for number, run in enumerate(todo):
                logger.info(f"run {number + 1} of {len(todo)}: {run.out}")
                train(run.train, PretrainObjective(run, processes), run.out)
            processes.barrier()
        findings = analyse(config, planned, ids)
        page = config.out / PAGE_FILE
        if processes.first:
            write_json(config.out / SCALING_FILE, to_json(config, findings))
            write_page(config, findings, page)
            for line in summary(findings):
                logger.info(line)
    return page


def _check_out(config: ScalingConfig) -> None:
    """Refuse a folder that cannot be written, that is read, or that another process writes to."""
    if config.fit_only:
        check_out(config.out)  # also while the ladder is being trained
    else:
        check_run(config.out, config.base.init)
    for text in config.base.tokens:
        check_out(config.out, tokens_folder=parse_part(text).folder)
    for name in (SCALING_FILE, PAGE_FILE):
        if (config.out / name).is_dir():
            raise EmulusError(f"{config.out / name} is a folder; choose another --out or move it away")


def _check_ladder(planned: Sequence[Planned]) -> None:
    """Refuse, before anything is trained, what could not be fitted afterwards.

    Raises:
        EmulusError: The ladder is too small, or the held-out run is not larger.
    """
    *small, last = planned
    parameters = {each.size: counted_parameters(sized(each.size, vocab_size=1)) for each in planned}
    used = [each for each in small if parameters[each.size] < parameters[last.size]]
    sizes, steps = len({each.size for each in used}), len({each.config.train.steps for each in used})
    if min(sizes, steps) < FEWEST_KINDS:
        raise EmulusError(
            f"the law needs runs of at least {FEWEST_KINDS} sizes below {last.size} and of {FEWEST_KINDS} different "
            f"numbers of steps; these would be of {sizes} and {steps}: change --sizes and --token-counts"
        )


def plan(config: ScalingConfig) -> list[Planned]:
    """Every run, the small ones first and the held-out one last."""
    pairs = [(size, tokens) for tokens in sorted(config.token_counts) for size in config.sizes]
    held_out = (config.held_out_size, config.held_out_tokens)
    pairs = [pair for pair in dict.fromkeys(pairs) if pair != held_out]
    return [_planned(config, size, tokens) for size, tokens in [*pairs, held_out]]


def _planned(config: ScalingConfig, size: str, tokens: int) -> Planned:
    base, loop = config.base, config.base.train
    steps = max(round(tokens / (base.rows_per_step * base.row_tokens)), 1)
    share = steps / loop.steps
    width, of = (sized(name, vocab_size=1).hidden_size for name in (size, base.size))
    train = dataclasses.replace(
        loop,
        steps=steps,
        learning_rate=rate_at_width(loop.learning_rate, width, of=of, power=config.width_power),
        # A share of it would leave short runs a handful of steps, from which they do not recover.
        warmup_steps=min(loop.warmup_steps, round(_LONGEST_WARMUP * steps)),
        # The average reaches back the same share of the run.
        ema_decay=max(1 - (1 - loop.ema_decay) / share, 0.0) if loop.ema_decay else 0.0,
        evaluate_every=0,
    )
    return Planned(
        size=size,
        tokens=tokens,
        config=dataclasses.replace(base, out=config.out / f"{size}-{tokens}", size=size, train=train),
    )


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What all runs are measured on.

    Attributes:
        vocabulary: Ids in the vocabulary.
        counts: Held-out ids by modality; those that the grammar writes count as none.
    """

    vocabulary: int
    counts: Mapping[str, int]


def held_out_ids(base: PretrainConfig) -> HeldOut:
    """Count what the runs' evaluations measure."""
    mixture = Mixture.open(base.tokens)
    counts = dict.fromkeys(MODALITIES, 0)
    for row in held_out(mixture, base.evaluation_documents, base.reading, row_tokens=base.row_tokens):
        masks = modalities(row.targets.numpy(), mixture.vocabulary)
        for name in counts:
            counts[name] += int((torch.from_numpy(masks[name]) & (row.loss_weights > 0)).sum())
    return HeldOut(vocabulary=mixture.vocabulary.size, counts=counts)


def measured(planned: Planned, held: HeldOut) -> Measured | None:
    """What a run reached, if it is finished.

    Raises:
        EmulusError: The folder holds a run of other settings.
    """
    run, steps = planned.config.out, planned.config.train.steps
    lines = read_metrics(run)
    losses = {
        name: float(line[f"{name}{_SUFFIX}"])
        for line in lines
        if line["kind"] == "evaluation" and line["step"] == steps
        for name in held.counts
        if f"{name}{_SUFFIX}" in line
    }
    if not losses:
        return None
    count = sum(held.counts[name] for name in losses)
    tokens = sum(round(line.get("tokens", 0)) for line in lines if line["kind"] == "train")
    if not (count and tokens and all(map(isfinite, losses.values()))):
        raise EmulusError(
            f"{run / METRICS_FILE} has no finite losses or no tokens of this run; delete {run} to train it again"
        )
    losses[ALL] = sum(held.counts[name] * loss for name, loss in losses.items()) / count
    changed = list(_differences(read_yaml(run / "config.yaml"), to_dict(planned.config)))
    if changed:
        raise EmulusError(f"{run} was trained with another {', '.join(changed)}; choose another --out or delete it")
    return Measured(
        name=run.name,
        size=planned.size,
        parameters=_parameters(planned.size, held),
        tokens=tokens,
        losses=losses,
    )


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """Names of settings that are not the same and matter."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new} - _FREE):
            yield from _differences(old.get(name), new.get(name), f"{where}.{name}" if where else str(name))
    elif old != new:
        yield where


def _parameters(size: str, held: HeldOut) -> int:
    return counted_parameters(sized(size, vocab_size=held.vocabulary))


def analyse(config: ScalingConfig, planned: Sequence[Planned], held: HeldOut) -> Findings:
    """Fit the finished runs that are smaller than the held-out one, for each modality.

    Raises:
        EmulusError: Too few of them are finished.
    """
    *small, last = planned
    found = {each.config.out.name: measured(each, held) for each in planned}
    missing = tuple(name for name, result in found.items() if result is None)
    held_out = found[last.config.out.name] or Measured(
        name=last.config.out.name,
        size=last.size,
        parameters=_parameters(last.size, held),
        tokens=last.tokens,
        losses={},
    )
    finished = [found[each.config.out.name] for each in small]
    fitted = tuple(run for run in finished if run is not None and run.parameters < held_out.parameters)
    if not fitted:
        raise EmulusError(
            f"{config.out} has no finished run smaller than {held_out.size}; run the same command without --fit-only"
        )
    foretold = {}
    for modality in fitted[0].losses:
        points = [Point(parameters=run.parameters, tokens=run.tokens, loss=run.losses[modality]) for run in fitted]
        law = fit(points, delta=config.delta, draws=config.draws, level=config.level, seed=config.base.train.seed)
        foretold[modality] = Foretold(
            fit=law,
            predicted=law.predict(held_out.parameters, held_out.tokens),
            measured=held_out.losses.get(modality),
        )
    return Findings(fitted=fitted, held_out=held_out, missing=missing, foretold=foretold)


def summary(findings: Findings) -> list[str]:
    """What was found, a line for each modality, and what is missing."""
    lines = []
    for modality, found in findings.foretold.items():
        law, expected = found.fit.law, found.predicted
        lines.append(
            f"{modality}: {law.e:.3f} + {law.a:.4g} / N^{law.alpha:.3f} + {law.b:.4g} / D^{law.beta:.3f} bits; "
            f"{findings.held_out.name} foretold {expected.value:.3f} [{expected.low:.3f}, {expected.high:.3f}], "
            + ("not measured yet" if found.measured is None else f"measured {found.measured:.3f}")
        )
    if findings.missing:
        lines.append(f"{len(findings.missing)} runs are missing: {', '.join(findings.missing)}")
    return lines


def to_json(config: ScalingConfig, findings: Findings) -> dict[str, Any]:
    """The findings as JSON values."""
    return {
        "law": "L(N, D) = e + a / N^alpha + b / D^beta, in bits per held-out id",
        "parameters": "N counts the blocks' matrices and the output head, not the input table or norms",
        "tokens": "D counts the ids seen in training, repeats included",
        "level": config.level,
        "draws": config.draws,
        "delta": config.delta,
        "fitted": [dataclasses.asdict(run) for run in findings.fitted],
        "held_out": dataclasses.asdict(findings.held_out),
        "missing": list(findings.missing),
        "modalities": {
            modality: {
                "constants": {name: dataclasses.asdict(value) for name, value in found.fit.constants().items()},
                "predicted": dataclasses.asdict(found.predicted),
                "measured": found.measured,
                "inside": found.inside,
                "error": None if found.measured is None else found.predicted.value / found.measured - 1,
            }
            for modality, found in findings.foretold.items()
        },
    }
