"""Our training loop beside transformers' Trainer, which pads each document: ``python -m benchmarks.training --json``.

The same documents, drawn from a tokens folder of the emoji data (``emulus tokenize emoji-64 --views 1 --out
runs/emoji-64-v2/tokens``, or where ``EMULUS_BENCHMARK_TOKENS`` says), the same weights to begin with, AdamW, clipping,
one process. Both are first checked to give the same loss.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from benchmarks.emoji import small_tokens
from benchmarks.harness import Case, Options, case, conditions, held, interleave_measured, main, require
from emulus.data.loader import ReadingConfig
from emulus.device import autocast
from emulus.errors import EmulusError
from emulus.log import logger
from emulus.model import Decoder, DecoderConfig
from emulus.sequence import Batch, collate
from emulus.train.config import TrainConfig
from emulus.train.loop import train
from emulus.train.metrics import read_metrics
from emulus.train.optimizer import make_optimizer
from emulus.train.pretrain import PretrainConfig, PretrainObjective
from emulus.train.schedule import learning_rate

Kind = Literal["fp32", "bf16"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Padding = Literal["batch", "all", "grouped"]
Way = Literal["theirs", "ours"]

HOME = Path(__file__).parents[1]
EMU3 = 184_622
DOCUMENTS = 16
"""Documents in a step of theirs; ours packs as many into its rows, on average."""
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
"""Relative, between the first losses of the two."""
BARS = {"useful": 2.0, "memory": 8.0, "overhead": 0.97, "wait": 0.02}
MEMORY_LIMIT = 0.5e9
"""What a step at Emu3's vocabulary and 2,048 ids may take above weights and the optimiser's state."""

SETTINGS = {"steps": (4, "steps that are timed together"), "warm": (2, "steps before them")}


class Marked(PretrainObjective):
    """Notes when each step begins, and what it sees."""

    def __init__(self, config: PretrainConfig, clock: Callable[[], float], at_step: Callable[[int], None]) -> None:
        """Make the model.

        Args:
            config: Of the run.
            clock: Gives seconds.
            at_step: Called before each step.
        """
        super().__init__(config)
        self.clock, self.at_step = clock, at_step
        self.marks: list[float] = []
        self.ids: list[int] = []

    def batches(self, step: int) -> Sequence[Batch]:
        """The step's rows."""
        self.at_step(step)
        self.marks.append(self.clock())
        rows = super().batches(step)
        self.ids.append(sum(len(row.input_ids) for row in rows))
        return rows


class Wide(Marked):
    """The same with Emu3's vocabulary, of which the data have a few thousand ids."""

    ids_in_all = EMU3

    def shape(self) -> DecoderConfig:
        """The decoder's."""
        return dataclasses.replace(super().shape(), vocab_size=self.ids_in_all)


def config_of(tokens: str, out: Path, kind: Kind, steps: int, **free: Any) -> PretrainConfig:
    """The run that is timed: ``emoji-64``'s decoder, rows and rates; every id weighs the same, as with transformers."""
    values: dict[str, Any] = {"size": "emoji-6m", "context": 1280, "row_tokens": 3072, "rows_per_step": 2} | free
    return PretrainConfig(
        tokens=(tokens,),
        out=out,
        dropout=0.0,
        reading=ReadingConfig(visual_weight=1.0),
        evaluation_documents=1,
        evaluation_pictures=0,
        train=TrainConfig(
            steps=steps,
            learning_rate=1e-3,
            warmup_steps=0,
            ema_decay=0.0,
            evaluate_every=0,
            save_every=steps,
            log_every=steps,
            precision=kind,
            device="cpu",
        ),
        **values,
    )


TOY: dict[str, Any] = {"size": "tiny", "context": 256, "row_tokens": 512}


@contextmanager
def workplace(options: Options) -> Iterator[tuple[str, Path]]:
    """A tokens folder and an empty one.

    Raises:
        EmulusError: There are no tokens, and it is no toy.
    """
    level = logger.level
    logger.setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = small_tokens(folder / "toy") if options.toy else _real_tokens()
        yield str(tokens), folder
    logger.setLevel(level)


def _real_tokens() -> Path:
    tokens = Path(os.environ.get("EMULUS_BENCHMARK_TOKENS", HOME / "runs/emoji-64-v2/tokens"))
    if not tokens.is_dir():
        raise EmulusError(
            f"there are no tokens in {tokens}; make them: emulus tokenize emoji-64 --views 1 --out {tokens}"
        )
    return tokens


def _clock(options: Options) -> Callable[[], float]:
    return time.process_time if options.clock == "cpu" else time.perf_counter


# useful ids a second


def useful(kind: Kind, padding: Padding, options: Options) -> Case:
    """Useful ids a second: ours packs documents, theirs pads them to the longest of the batch, or of all.

    ``grouped`` gives theirs documents of like lengths together, as its Trainer can: the least padding there is, though
    batches are then no longer drawn at random.
    """
    warm, count = _steps(options)
    with workplace(options) as (tokens, folder):
        config = config_of(tokens, folder / "run", kind, warm + count + 1, **(TOY if options.toy else {}))
        clock = _clock(options)
        objective = Marked(config, clock, lambda step: None)
        documents = [ids for step in range(warm, warm + count) for ids in _documents(objective.batches(step))]
        random.Random(0).shuffle(documents)
        start = copy.deepcopy(objective.model)
        losses = _first_losses(objective.model, objective, documents[:DOCUMENTS], kind)
        if padding == "grouped":
            documents.sort(key=len)
        most = max(map(len, documents)) if padding == "all" else 0
        total = sum(map(len, documents))
        numbers = iter(range(10**6))

        def ours() -> float:
            run = dataclasses.replace(config, out=folder / f"run-{next(numbers)}")
            mine = Marked(run, clock, lambda step: None)
            train(run.train, mine, run.out)
            mine.loader.close()
            assert sum(mine.ids[warm : warm + count]) == total, "the loader gives the same steps every time"
            return mine.marks[warm + count] - mine.marks[warm]

        def theirs() -> float:
            model = _in_transformers(copy.deepcopy(start), objective)
            return _trainer(model, documents, objective.vocabulary.pad, config, most, clock, folder)

        timings = interleave_measured(theirs, ours, pairs=options.pairs)
    batches = [documents[first : first + DOCUMENTS] for first in range(0, len(documents), DOCUMENTS)]
    padded = sum(len(batch) * (most or max(map(len, batch))) for batch in batches)
    seconds = {"ours": timings.ours, "theirs": timings.baseline}
    about: dict[str, Any] = {
        f"{name}_useful_ids_per_second": round(total / sorted(each)[len(each) // 2]) for name, each in seconds.items()
    }
    about |= {"bar": BARS["useful"], "documents": len(documents), "ids": total, "ids_with_padding": padded}
    about |= {"parameters": sum(parameter.numel() for parameter in start.parameters()), **losses}
    return case(f"useful-{padding}-{kind}", timings, options, **about)


def _steps(options: Options) -> tuple[int, int]:
    return (1, 1) if options.toy else (options.settings["warm"], options.settings["steps"])


def _documents(rows: Sequence[Batch]) -> list[Tensor]:
    return [ids for row in rows for ids in row.input_ids.split(row.document_lengths)]


def _in_transformers(model: Decoder, objective: PretrainObjective) -> Any:
    """transformers' Emu3 on the model's own tensors, to be trained without dropout."""
    # Not for the process whose memory is measured.
    from benchmarks.reference import in_transformers

    theirs = in_transformers(model, objective.vocabulary)
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return theirs.train()


def _collate(documents: Sequence[Tensor], pad: int, most: int = 0) -> dict[str, Tensor]:
    """Documents padded to the longest, or to ``most``."""
    longest = most or max(map(len, documents))
    ids = torch.full((len(documents), longest), pad)
    labels = torch.full((len(documents), longest), -100)
    for place, document in enumerate(documents):
        ids[place, : len(document)] = document
        labels[place, : len(document)] = document
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels >= 0).long()}


def _first_losses(
    model: Decoder, objective: PretrainObjective, documents: Sequence[Tensor], kind: Kind
) -> dict[str, float]:
    """Mean losses of some documents in either way; refuses to go on if they differ."""
    before = copy.deepcopy(model.state_dict())
    # Fresh weights give every id nearly the same chance, whatever is wrong with what they see.
    for weights in model.parameters():
        weights.data *= 4 if weights.ndim == 2 else 1
    row = collate([document.tolist() for document in documents], objective.vocabulary, visual_weight=1.0)
    theirs = _in_transformers(model, objective)
    with torch.no_grad(), autocast(torch.device("cpu"), kind):
        expected = float(theirs(**_collate(documents, objective.vocabulary.pad)).loss)
        losses, _, _ = objective._losses(row)
    model.load_state_dict(before)
    found = float(losses.total) / objective.weight(row)
    difference = abs(found - expected) / expected
    most = LOSS_TOLERANCE[kind]
    require(difference < most, f"the losses {found} and {expected} differ by {difference:.1e}, more than {most:.0e}")
    return {"loss": found, "losses_differ": difference}


def _trainer(
    model: Any,
    documents: Sequence[Tensor],
    pad: int,
    config: PretrainConfig,
    most: int,
    clock: Callable[[], float],
    folder: Path,
    *,
    batch: int = DOCUMENTS,
    at_step: Callable[[int], None] = lambda step: None,
) -> float:
    """Train transformers' model on the documents; seconds of all steps but the first, which sees some twice."""
    import transformers

    marks: list[float] = []

    class Marks(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            at_step(len(marks))
            marks.append(clock())

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step == state.max_steps:
                marks.append(clock())

    loop = config.train
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "theirs"),
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        learning_rate=loop.learning_rate,
        lr_scheduler_type="cosine",
        weight_decay=loop.weight_decay,
        adam_beta1=loop.beta1,
        adam_beta2=loop.beta2,
        adam_epsilon=loop.epsilon,
        max_grad_norm=loop.clip_norm,
        optim="adamw_torch_fused",
        bf16=loop.precision == "bf16",
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    # The first step warms up, on as many documents as any.
    warm = [documents[place % len(documents)] for place in range(batch)]
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=cast(Any, [*warm, *documents]),
        data_collator=lambda batch: _collate(batch, pad, most),
        callbacks=[Marks()],
    )
    # It prints its own summary.
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return marks[-1] - marks[1]


# memory of a step


def memory(options: Options) -> Case:
    """Peak memory of a step of 2,048 ids with Emu3's vocabulary, above weights and the optimiser's state."""
    with workplace(options) as (tokens, _):
        peaks = {way: _peak_in_a_process(tokens, way, options) for way in get_args(Way)}
    require(
        abs(peaks["ours"]["loss"] - peaks["theirs"]["loss"]) < 1e-4 * peaks["theirs"]["loss"],
        f"losses are not the same: {peaks}",
    )
    bytes_ = {way: round(found["bytes"]) for way, found in peaks.items()}
    ratio = bytes_["theirs"] / bytes_["ours"]
    about = {
        "bar": BARS["memory"],
        "baseline_bytes": bytes_["theirs"],
        "ours_bytes": bytes_["ours"],
        "limit_bytes": int(MEMORY_LIMIT),
        "loss": peaks["ours"]["loss"],
        "ids": round(peaks["ours"]["ids"]),
        "ids_with_padding": round(peaks["theirs"]["ids"]),
        "vocabulary": 20_000 if options.toy else EMU3,
        "size": "tiny" if options.toy else "emoji-3m",
        **conditions(options),
    }
    return Case(case="memory-184622", ratio=ratio, spread=(ratio, ratio), conditions=about)


def _peak_in_a_process(tokens: str, way: Way, options: Options) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.training", "peak", tokens, way, str(options.threads)]
    ran = subprocess.run(
        [*command, "toy" if options.toy else "whole"], capture_output=True, text=True, cwd=HOME, check=False
    )
    if ran.returncode:
        raise EmulusError(f"a step in a process of its own failed: {ran.stderr.strip()[-300:]}")
    return cast("dict[str, float]", json.loads(ran.stdout.splitlines()[-1]))


def peak(tokens: str, way: str, threads: str, size: str) -> None:
    """Train for two steps, and print how much more than before the second one the process held at most.

    The data are pictures, which are of one length but for their captions, so that padding hardly counts.
    """
    torch.set_num_threads(int(threads))
    logger.setLevel(logging.ERROR)
    shape = {"size": "tiny", "context": 256, "row_tokens": 256} if size == "toy" else {"size": "emoji-3m"}
    Wide.ids_in_all = 20_000 if size == "toy" else EMU3
    found: dict[str, float] = {}

    def at_step(step: int) -> None:
        if step == 1:
            found["before"] = _start_measuring()
        if step == 2:
            found["bytes"] = held("VmHWM") - found["before"]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = config_of(
            f"{tokens}:image", folder / "run", "fp32", 3, **{"row_tokens": 2048, "rows_per_step": 1} | shape
        )
        objective = Wide(config, time.process_time, at_step)
        (row,) = objective.loader.read(1).rows
        documents = _documents([row])
        with torch.no_grad():
            found["loss"] = float(objective._losses(row)[0].total) / objective.weight(row)
        if way == "ours":
            train(config.train, objective, config.out)
            found["ids"] = objective.ids[1]
        else:
            theirs = _in_transformers(objective.model, objective)
            padded = _collate(documents, objective.vocabulary.pad)
            with torch.no_grad():
                found["loss"] = float(theirs(**padded).loss)
            found["ids"] = padded["input_ids"].numel()
            # The same batch three times: to make the state, to be measured, and to end the measuring.
            _trainer(
                theirs,
                2 * documents,
                objective.vocabulary.pad,
                config,
                0,
                time.process_time,
                folder,
                batch=len(documents),
                at_step=at_step,
            )
    print(json.dumps(found))


def _start_measuring() -> int:
    """Forget the highest memory so far; what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return held("VmRSS")


# what the loop costs


def overhead(kind: Kind, options: Options) -> list[Case]:
    """The whole loop beside a bare forward, backward, clipping and step on the same rows; and its waiting for data."""
    warm, count = _steps(options)
    with workplace(options) as (tokens, folder):
        free = TOY if options.toy else {"size": "emoji-3m"}
        config = config_of(tokens, folder / "run", kind, warm + count + 1, **free)
        clock = _clock(options)
        reading = PretrainObjective(config)
        rows = [reading.loader.read(step).rows for step in range(warm + count)]
        numbers = iter(range(10**6))
        last: dict[str, float] = {}
        waits: list[float] = []

        def bare() -> float:
            objective = PretrainObjective(config)
            seconds, last["bare"] = _bare(objective, rows, warm, clock)
            return seconds

        def ours() -> float:
            run = dataclasses.replace(config, out=folder / f"run-{next(numbers)}")
            mine = Marked(run, clock, lambda step: None)
            train(run.train, mine, run.out)
            mine.loader.close()
            lines = [line for line in read_metrics(run.out) if line["kind"] == "train"]
            last["ours"] = lines[warm + count - 1]["loss"]
            timed = lines[warm : warm + count]
            waits.append(sum(line["wait"] * line["seconds"] for line in timed) / sum(line["seconds"] for line in timed))
            return mine.marks[warm + count] - mine.marks[warm]

        timings = interleave_measured(bare, ours, pairs=options.pairs)
    difference = abs(last["ours"] - last["bare"]) / last["bare"]
    require(difference < LOSS_TOLERANCE[kind], f"the losses of the last step differ by {difference:.1e}")
    about = {"loss": last["ours"], "losses_differ": difference, "row_tokens": config.row_tokens, "size": config.size}
    ratios = [BARS["wait"] / max(wait, 1e-9) for wait in waits]
    return [
        case(f"overhead-{kind}", timings, options, bar=BARS["overhead"], **about),
        Case(
            case=f"wait-{kind}",
            ratio=sorted(ratios)[len(ratios) // 2],
            spread=(min(ratios), max(ratios)),
            conditions={
                "ratio_is": "2 % of the time over the share of it that was waited for data, by the wall's clock",
                "shares": waits,
                **conditions(options),
            },
        ),
    ]


def _bare(
    objective: PretrainObjective, rows: Sequence[Sequence[Batch]], warm: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """The least that training takes; its seconds but for the first steps, and the last step's loss."""
    config, model = objective.config.train, objective.model.train()
    optimizer = make_optimizer(model.named_parameters(), config)
    start = total = math.nan
    for step, batches in enumerate(rows):
        if step == warm:
            start = clock()
        weight = sum(objective.weight(batch) for batch in batches)
        losses = []
        for batch in batches:
            with autocast(objective.device, config.precision):
                loss = objective.loss(batch, weight).total
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = float(sum(losses))
    return clock() - start, total


CASES: dict[str, Callable[[Options], Case | Sequence[Case]]] = {
    **{f"useful-{padding}-{kind}": partial(useful, kind, padding) for kind in KINDS for padding in get_args(Padding)},
    "memory-184622": memory,
    **{f"overhead-{kind}": partial(overhead, kind) for kind in KINDS},
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(*sys.argv[2:])
    else:
        raise SystemExit(main(CASES, settings=SETTINGS))
