"""How fast Emu3's own shape draws on a GPU: ``python -m benchmarks.gpu --json --only batch-1-bf16``.

Random weights, 720 x 720 pixels (90 x 90 cells, 8,193 tokens), guidance 3. A whole picture by transformers takes
minutes, so every way begins in the middle of one, where the context is as long as it is on average, a few hundred
tokens are timed there, and the seconds of a whole picture are those times 8,193: what a token takes grows with the
context by the same amount each time. ``--whole 1`` draws one of ours from beginning to end besides.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

from benchmarks import reference
from benchmarks.harness import Case, Options, Timings, case, interleave_measured, main, timed
from benchmarks.reference import Subject
from emulus.engine import Engine, Request, Token
from emulus.engine.runner import Runner
from emulus.errors import EmulusError
from emulus.model import Decoder, sized
from emulus.tokenizer.vocabulary import Vocabulary

SKIP = 8
"""Tokens after the prompt before time is taken."""

WORDS = (32, 32)
"""As many before the negative prompt's picture as before the other: the compiled path knows no padding."""

SLACK = 2.0
"""Both are rounded to bfloat16 here."""

TARGETS = {"batch-1-bf16": 45.0, "batch-1-int8": 25.0, "batch-1-int4": 18.0, "in-flight-16-bf16": 5.0}
"""Seconds per picture to be reached on an H200."""

SETTINGS = {
    "tokens": (182, "tokens that are timed, from the middle of a picture on"),
    "whole": (0, "1 to draw one whole picture of ours besides"),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all cases share.

    Attributes:
        model: Random weights in bfloat16, made where they lie.
        theirs: transformers' model of the very same tensors.
        side: Cells in a row, and rows.
        copied: Bytes per second that a plain copy on the device reads and writes.
    """

    model: Subject
    theirs: Any
    side: int
    copied: float

    @property
    def tokens(self) -> int:
        """Of a whole picture."""
        return self.side * (self.side + 1) + 3

    def request(self, seed: int = 0, *, whole: bool = False) -> Request:
        """A picture, its first half drawn."""
        drawn = 0 if whole else self.side // 2 * self.side
        return self.model.request(self.side, self.side, drawn=drawn, words=WORDS, seed=seed)


@cache
def bench(toy: bool) -> Bench:
    """Make the model.

    Raises:
        EmulusError: There is no CUDA device, and it is no toy.
    """
    if not toy and not torch.cuda.is_available():
        raise EmulusError("there is no CUDA device here; --toy runs everything in tiny on a CPU")
    device = "cpu" if toy else "cuda"
    vocabulary = reference.small_vocabulary(400, 64) if toy else Vocabulary.emu3()
    small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 400}
    shape = sized("tiny" if toy else "emu3-8b", **(small if toy else {}))
    model = reference.make_subject(lambda _: shape, vocabulary, device=device, bf16=True)
    return Bench(
        model=model,
        theirs=reference.in_transformers(model.decoder, vocabulary),
        side=6 if toy else 90,
        copied=copied(device, 2**20 if toy else 2**31),
    )


def copied(device: str, size: int) -> float:
    """Bytes per second that a copy reads and writes together."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        _wait()

    copy()
    return 2 * size / statistics.median(timed(copy, "wall") for _ in range(10))


def one(kind: str, options: Options) -> Case:
    """A picture by itself, against the README's recipe."""
    return _measured(f"batch-1-{kind}", kind, 1, options)


def in_flight(kind: str, options: Options) -> Case:
    """Sixteen pictures together, per picture, against the README's recipe, which draws them one by one."""
    return _measured(f"in-flight-16-{kind}", kind, 16, options)


def against_compiled(kind: str, options: Options) -> Case:
    """A picture by itself, against transformers with a static cache and a compiled step."""
    return _measured(f"compiled-{kind}", kind, 1, options, compiled=True)


def _measured(name: str, kind: str, requests: int, options: Options, *, compiled: bool = False) -> Case:
    shared, count = bench(options.toy), 8 if options.toy else options.settings["tokens"]
    decoder = reference.variant(shared.model.decoder, kind)
    apart = _check(shared, decoder, kind, options)
    engine = Engine(decoder, shared.model.grammar)
    asked = [shared.request(seed) for seed in range(requests)]
    if compiled:
        static = Static(shared.theirs, len(asked[0].prompt_ids) + SKIP + count + 1, toy=options.toy)
        checked, cells = shared.model.request(2, 4, words=WORDS), shared.model.cells(2, 4)
        visual = shared.model.visual
        found = static.logits(checked, cells, visual)
        reference.compare(reference.their_logits(shared.theirs, checked, cells, visual), found, "bf16", slack=SLACK)
    theirs = partial(static.picture_seconds if compiled else recipe_seconds, shared, asked[0], count)
    ours = partial(our_seconds, shared, engine, asked, count)
    ours()  # whatever is compiled, captured or tuned at first use
    if compiled:
        theirs()
    timings = interleave_measured(theirs, ours, pairs=options.pairs)
    about = {**apart, **_bandwidth(shared, decoder, timings, requests), "target_s": TARGETS.get(name)}
    if options.settings.get("whole") and requests == 1:
        about["whole_picture_s"] = timed(lambda: engine.generate([shared.request(whole=True)]), "wall")
    del engine, decoder
    gc.collect()
    if not options.toy:
        about["device"] = torch.cuda.get_device_name()
        torch.cuda.empty_cache()
    # The clock of a GPU's work is the wall's, whatever was asked for.
    return case(
        name,
        timings,
        replace(options, clock="wall"),
        weights=kind,
        in_flight=requests,
        **_sizes(shared, asked, count),
        **about,
    )


def our_seconds(shared: Bench, engine: Engine, requests: Sequence[Request], count: int) -> float:
    """Seconds per picture of the engine, from ``count`` tokens of each request."""
    seen = [0] * len(requests)
    started, begun_at = 0.0, 0
    events = engine.events(requests, batch_size=len(requests))
    for event in events:
        if not isinstance(event, Token):
            continue
        seen[event.request] += 1
        if not started and min(seen) >= SKIP:
            started, begun_at = time.perf_counter(), sum(seen)
        elif started and sum(seen) - begun_at >= count * len(requests):
            break
    elapsed = time.perf_counter() - started
    del events  # what is still running is forgotten
    return elapsed / (sum(seen) - begun_at) * shared.tokens


def recipe_seconds(shared: Bench, request: Request, count: int) -> float:
    """Seconds per picture of the README's recipe, from ``count`` tokens."""
    clock = _Clock()
    vocabulary, side = shared.model.grammar.vocabulary, shared.side
    reference.draw(shared.theirs, request, vocabulary, side, side, tokens=SKIP + count, streamer=clock)
    return (clock.times[-1] - clock.times[SKIP - 1]) / count * shared.tokens


class _Clock(BaseStreamer):
    """Notes when each id comes."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:
            self._prompt = False
        else:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Static:
    """transformers as its own documentation makes it fast: a static cache, and a compiled step of both rows at once."""

    def __init__(self, model: Any, capacity: int, *, toy: bool = False) -> None:
        """Allocate.

        Args:
            model: transformers'.
            capacity: Longest sequence.
            toy: Do not generate code.
        """
        how: dict[str, Any] = {"backend": "eager"} if toy else {"mode": "reduce-overhead"}
        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=capacity)
        self._step = torch.compile(model.__call__, **how)

    @torch.no_grad()
    def logits(
        self, request: Request, cells: Sequence[int], visual: tuple[int, int]
    ) -> Float[Tensor, "rows cells ids"]:
        """Logits where cells are drawn, given the cells before (see :func:`benchmarks.reference.their_logits`)."""
        found, last = [], self._begin(request)
        for id in cells:
            if visual[0] <= id < visual[1]:
                found.append(last[:, slice(*visual)].float().clone())
            last = self._next(torch.tensor([[id]] * 2, device=self._model.device))
        return torch.stack(found, dim=1)

    @torch.no_grad()
    def picture_seconds(self, shared: Bench, request: Request, count: int) -> float:
        """Seconds per picture, from ``count`` tokens."""
        v, params = shared.model.grammar.vocabulary, request.params
        row_end = torch.tensor([[v.eol]] * 2, device=self._model.device)
        last = self._begin(request)
        started = 0.0
        for index in range(SKIP + count):
            if index == SKIP:
                _wait()
                started = time.perf_counter()
            if index % (shared.side + 1) == shared.side:
                chosen = row_end
            else:
                cond, null = last.float().log_softmax(-1)[:, slice(*v.visual_range)]
                kept = (null + params.guidance_scale * (cond - null)).topk(min(params.top_k, v.visual_size))
                drawn = kept.indices[torch.multinomial(kept.values.softmax(-1), 1)] + v.visual_start
                chosen = drawn.expand(2, 1).contiguous()
            last = self._next(chosen)
        _wait()
        return (time.perf_counter() - started) / count * shared.tokens

    def _begin(self, request: Request) -> Tensor:
        self._cache.reset()
        prompts = torch.tensor([request.prompt_ids, request.null_ids], device=self._model.device)
        return self._model(prompts, past_key_values=self._cache, logits_to_keep=1).logits[:, -1]

    def _next(self, ids: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self._step(ids, past_key_values=self._cache).logits[:, -1]


def _check(shared: Bench, decoder: Decoder, kind: str, options: Options) -> dict[str, float]:
    model, side = shared.model, 4 if options.toy else 8
    asked, cells = model.request(2, side, words=WORDS), model.cells(2, side)
    return reference.check_logits(decoder, kind, shared.theirs, asked, cells, model.visual, slack=SLACK)


def _bandwidth(shared: Bench, decoder: Decoder, timings: Timings, requests: int) -> dict[str, Any]:
    """How much of what a copy reaches is reached by what must be read: weights, head's slice, keys and values."""
    tensors = [*decoder.model.layers.parameters(), *decoder.model.layers.buffers()]
    weights = sum(tensor.nbytes for tensor in tensors)
    head = sum(tensor.nbytes for tensor in [*decoder.lm_head.parameters(), *decoder.lm_head.buffers()])
    slice_of_head = head * shared.model.grammar.vocabulary.visual_size // decoder.config.vocab_size
    context = len(shared.request().prompt_ids)
    seen = 2 * requests * sum(Runner(decoder).layout.bytes(context).values())
    # A row's end is computed together with its last cell, so a picture takes a step per cell.
    step = statistics.median(timings.ours) * requests / shared.side**2
    reached = (weights + slice_of_head + seen) / step
    return {
        "bytes_per_step": {"weights": weights, "head": slice_of_head, "keys_and_values": seen},
        "ms_per_step": round(step * 1000, 4),
        "bandwidth_gb_s": round(reached / 1e9, 3),
        "copy_gb_s": round(shared.copied / 1e9, 3),
        "bandwidth_fraction": round(reached / shared.copied, 4),
    }


def _sizes(shared: Bench, requests: Sequence[Request], count: int) -> dict[str, Any]:
    config = shared.model.decoder.config
    return {
        "seconds_are": f"per picture of {shared.tokens} tokens, extrapolated from {count} in its middle",
        "cells": [shared.side, shared.side],
        "context": len(requests[0].prompt_ids),
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "guidance": 3.0,
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


KINDS = ("bf16", "int8", "int4", "fp8")

CASES: dict[str, Callable[[Options], Case]] = {
    **{f"batch-1-{kind}": partial(one, kind) for kind in KINDS},
    **{f"in-flight-16-{kind}": partial(in_flight, kind) for kind in ("bf16", "fp8")},
    "compiled-bf16": partial(against_compiled, "bf16"),
}

if __name__ == "__main__":
    raise SystemExit(main(CASES, settings=SETTINGS))
