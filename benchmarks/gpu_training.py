"""How fast a large decoder trains on one GPU: ``python -m benchmarks.gpu_training --json``.

Emu3's shape cut to 1.5 B parameters, random weights, one row of 8,192 random ids. Ours is the training step of
:mod:`emulus.train.loop` (AdamW, clipping, bfloat16, compiled blocks), theirs transformers' own model and loss with the
same optimiser; both learn from the same row, one document, so nothing is padded. ``memory-…`` runs a few layers of
the whole 8 B width and compares what a step takes with what ``emulus pretrain --dry-run`` foretells.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.harness import Case, Options, case, interleave_measured, main, require
from emulus.errors import EmulusError
from emulus.model import Decoder, DecoderConfig, sized
from emulus.model.attention import Row
from emulus.model.transformer import fresh
from emulus.parallel.config import ParallelConfig
from emulus.parallel.processes import Processes
from emulus.parallel.spread import fill, spread
from emulus.tokenizer.vocabulary import Vocabulary
from emulus.train.config import TrainConfig
from emulus.train.flops import decoder_flops, peak_flops
from emulus.train.optimizer import clip_, make_optimizer, total_norm
from emulus.train.plan import memory_per_process

SETTINGS = {"steps": (6, "steps that are timed together"), "row": (8192, "ids in a row")}
TARGET_MFU = 0.5


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A row, and two ways of learning from it.

    Attributes:
        config: The model's shape.
        vocabulary: Its ids.
        ids: The row.
        lengths: Of its documents.
    """

    config: DecoderConfig
    vocabulary: Vocabulary
    ids: Tensor
    lengths: list[int]

    @property
    def device(self) -> torch.device:
        """Where all this happens."""
        return self.ids.device

    def model(self, sizes: ParallelConfig) -> Decoder:
        """Random weights, as a training run would have them."""
        with torch.device("meta"):
            model = Decoder(self.config)
        spread(model, Processes(device=self.device, sizes=sizes))
        draw = torch.Generator(self.device).manual_seed(0)
        fill(model, lambda name, shape: fresh(name, shape, self.config, draw), self.device)
        return model.train()

    def our_step(self, model: Decoder) -> Callable[[], Tensor]:
        """A training step of ours; it gives the loss."""
        parameters = list(model.parameters())
        optimizer = make_optimizer(model.named_parameters(), TrainConfig())
        for group in optimizer.param_groups:
            # As much work as any other rate, and the weights stay the same for both ways.
            group["lr"] = 0.0
        positions = torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)
        supervised = torch.arange(len(self.ids) - 1, device=self.device)
        weights = torch.full((len(supervised),), 1 / len(supervised), device=self.device)

        def step() -> Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                losses = model.losses(
                    self.ids,
                    positions,
                    Row.whole(self.lengths),
                    supervised=supervised,
                    targets=self.ids[1:],
                    weights=weights,
                )
            losses.total.backward()
            clip_(parameters, total_norm(parameters), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return losses.total.detach()

        return step

    def their_step(self, model: Decoder) -> Callable[[], Tensor]:
        """The same of transformers' model, on the very same weights."""
        theirs = reference.in_transformers(model, self.vocabulary).train()
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.0, betas=(0.9, 0.95), fused=True)

        def step() -> Tensor:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                loss: Tensor = theirs(input_ids=self.ids[None], labels=self.ids[None]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step


def bench(options: Options, layers: int | None = None) -> Bench:
    """Draw a row; the model has 1.5 B parameters, or so many layers of the whole width.

    Raises:
        EmulusError: There is no CUDA device, and it is no toy.
    """
    if not options.toy and not torch.cuda.is_available():
        raise EmulusError("there is no CUDA device here; --toy runs everything in tiny on a CPU")
    total = 128 if options.toy else options.settings["row"]
    free: dict[str, Any] = {"attention_dropout": 0.0, "max_position_embeddings": total}
    vocabulary = reference.small_vocabulary(512, 64) if options.toy else Vocabulary.emu3()
    if options.toy:
        free |= {"vocab_size": 512}
    elif layers is None:
        free |= {"hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 14}
        free |= {"num_attention_heads": 16, "num_key_value_heads": 4}
    else:
        free |= {"num_hidden_layers": layers}
    ids = torch.randint(vocabulary.size, (total,), generator=torch.Generator().manual_seed(0))
    return Bench(
        config=sized("tiny" if options.toy else "emu3-8b", **free),
        vocabulary=vocabulary,
        ids=ids.to("cpu" if options.toy else "cuda"),
        lengths=[total],
    )


def speed(kind: str, options: Options) -> Case:
    """Steps of a whole-row document, ours compiled (but for the toy), against transformers'."""
    shared, count = bench(options), 1 if options.toy else options.settings["steps"]
    model = shared.model(ParallelConfig(replicate=1, compile=not options.toy, float8=kind == "float8"))
    ours, theirs = shared.our_step(model), shared.their_step(model)
    losses = [float(step()) for step in (theirs, ours)]
    require(abs(losses[0] - losses[1]) < 0.02 * losses[0], f"losses {losses} are not the same")
    timings = interleave_measured(
        partial(_seconds, theirs, count, shared.device),
        partial(_seconds, ours, count, shared.device),
        pairs=options.pairs,
    )
    flops = decoder_flops(shared.config, shared.lengths, len(shared.ids) - 1)
    peak = peak_flops(shared.device, "bf16")
    seconds = {"ours": statistics.median(timings.ours), "theirs": statistics.median(timings.baseline)}
    about: dict[str, Any] = {
        f"{name}_tokens_per_second": round(len(shared.ids) / each) for name, each in seconds.items()
    }
    about |= {f"{name}_mfu": round(flops / each / peak, 4) for name, each in seconds.items()}
    about |= {"target_mfu": TARGET_MFU, "losses": losses, "row": len(shared.ids)}
    about |= {"parameters": sum(parameter.numel() for parameter in model.parameters()), "device": _device(shared)}
    return case(f"train-{kind}", timings, options, **about)


def documents(options: Options) -> Case:
    """The same number of ids as one document and as many short ones: what attention over documents saves."""
    shared, count = bench(options), 1 if options.toy else options.settings["steps"]
    model = shared.model(ParallelConfig(replicate=1, compile=not options.toy))
    total = len(shared.ids)
    short = Bench(config=shared.config, vocabulary=shared.vocabulary, ids=shared.ids, lengths=[total // 16] * 16)
    one, many = shared.our_step(model), short.our_step(model)
    for step in (one, many):
        step()
    timings = interleave_measured(
        partial(_seconds, one, count, shared.device), partial(_seconds, many, count, shared.device), pairs=options.pairs
    )
    return case("documents-16", timings, options, row=total, device=_device(shared))


def memory(layers: int, options: Options) -> Case:
    """Peak memory of a step of a few layers of Emu3's whole width, beside what the dry run foretells."""
    shared = bench(options, layers)
    sizes = ParallelConfig(replicate=1, recompute=True)
    step = shared.our_step(shared.model(sizes))
    step()
    on_gpu = shared.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = _seconds(step, 1, shared.device)
    taken = torch.cuda.max_memory_allocated() if on_gpu else 0
    plan = memory_per_process(shared.config, TrainConfig(ema_decay=0.0), sizes, row_tokens=len(shared.ids))
    ratio = taken / plan.total
    return Case(
        case=f"memory-{layers}-layers",
        ratio=ratio,
        spread=(ratio, ratio),
        conditions={
            "ratio_is": "measured over foretold",
            "measured_gib": round(taken / 2**30, 2),
            "foretold_gib": round(plan.total / 2**30, 2),
            "step_s": round(seconds, 4),
            "row": len(shared.ids),
            "device": _device(shared),
        },
    )


def _seconds(step: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of a step, by the wall: a GPU's work has no other clock."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    _wait(device)
    return (time.perf_counter() - start) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(shared: Bench) -> str:
    return torch.cuda.get_device_name() if shared.device.type == "cuda" else "cpu"


def _alone(run: Callable[[Options], Case], options: Options) -> Case:
    """Run a case and let go of what it took."""
    found = run(options)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


CASES: dict[str, Callable[[Options], Case]] = {
    "train-bf16": partial(_alone, partial(speed, "bf16")),
    "train-float8": partial(_alone, partial(speed, "float8")),
    "documents-16": partial(_alone, documents),
    **{f"memory-{layers}-layers": partial(_alone, partial(memory, layers)) for layers in (2, 4)},
}

if __name__ == "__main__":
    raise SystemExit(main(CASES, settings=SETTINGS))
