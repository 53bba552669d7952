"""How fast ids are drawn on a CPU: ``python -m benchmarks.decode --json``.

``draw-*`` is measured against transformers' Emu3 (see :mod:`benchmarks.reference`), the others against the engine
itself. Whole 32 x 32 pictures take hours in all; ``--rows 2`` looks quickly.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import emulus
from benchmarks import reference
from benchmarks.harness import Case, Options, Timings, case, interleave, interleave_all, main, require, timed
from benchmarks.reference import Subject
from emulus.data.source import even, open_source
from emulus.engine import Engine, Event, Jacobi, Request, Result, Schedule, Sequential, Token, Zipar
from emulus.errors import EmulusError
from emulus.model import Decoder, DecoderConfig
from emulus.sampling import SamplingParams
from emulus.sampling.guidance import apply_guidance
from emulus.sequence import templates
from emulus.tokenizer.vocabulary import Vocabulary

Shape = Literal["small", "truevocab"]

SHAPES: dict[Shape, tuple[int, int, int, int, int]] = {
    "small": (768, 2048, 12, 12, 4),
    "truevocab": (256, 704, 8, 4, 2),
}
"""Hidden size, size within the MLP, layers, heads, heads of keys and values: 152 and 101 million parameters."""

TOY: tuple[int, int, int, int, int] = (64, 96, 2, 2, 1)

SHORT, LONG, BOUND = 256, 4096, 1.5
"""Contexts to compare, and how much slower a token may be at the longer."""

WINDOWS = (2, 4, 8, 16, 32, 64)

HOME = Path(__file__).parents[1]

SETTINGS = {
    "rows": (32, "rows of 32 cells in a picture of the draw cases"),
    "batch-rows": (4, "rows of 32 cells in each of 8 pictures drawn together"),
    "checked-rows": (2, "rows of 32 cells over which logits and ids are compared first"),
    "prompts": (6, "held-out captions of the jacobi and zipar cases"),
    "window": (16, "ids chosen at once in the jacobi cases; in jacobi-auto the engine decides"),
    "columns": (4, "columns that a row must be ahead of the next by zipar"),
}


@cache
def subject(shape: Shape, toy: bool) -> Subject:
    """A model of random weights in float32, as Emu3's are drawn."""
    vocabulary = Vocabulary.emu3() if shape == "truevocab" else reference.small_vocabulary(50_000, 32_768)
    if toy:
        vocabulary = reference.small_vocabulary(400, 64)
    hidden, inner, layers, heads, kv_heads = TOY if toy else SHAPES[shape]

    def config(vocabulary: Vocabulary) -> DecoderConfig:
        return DecoderConfig(
            vocab_size=vocabulary.size,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            pad_token_id=vocabulary.pad,
        )

    return reference.make_subject(config, vocabulary)


def draw(shape: Shape, kinds: Sequence[str], options: Options) -> list[Case]:
    """One guided picture by the engine, with weights of every kind, and by transformers' recipe."""
    model, width = subject(shape, options.toy), 4 if options.toy else 32
    rows, checked = (2, 2) if options.toy else (options.settings["rows"], options.settings["checked-rows"])
    vocabulary = model.grammar.vocabulary
    theirs = reference.in_transformers(model.decoder, vocabulary)
    checks, engines = {}, {}
    for kind in kinds:
        decoder = reference.variant(model.decoder, kind)
        request, cells = model.request(checked, width), model.cells(checked, width)
        checks[kind] = reference.check_logits(decoder, kind, theirs, request, cells, model.visual)
        engines[kind] = Engine(decoder, model.grammar)
    check_greedy(engines["fp32"], model, theirs, checked, width)
    request = model.request(rows, width)

    def draw_by(engine: Engine) -> float:
        return timed(lambda: engine.generate([request]), options.clock)

    timings = interleave_all(
        lambda: timed(lambda: reference.draw(theirs, request, vocabulary, rows, width), options.clock),
        {kind: partial(draw_by, engine) for kind, engine in engines.items()},
        pairs=options.pairs,
    )
    tokens = rows * (width + 1) + 3
    about = {"rows": rows, "columns": width, "checked_rows": checked, **_about(model, shape)}
    return [
        case(
            f"draw-{shape}-{kind}",
            timings[kind],
            options,
            **{"weights": kind, **about, **checks[kind], **_per_token(timings[kind], tokens)},
        )
        for kind in kinds
    ]


def check_greedy(engine: Engine, model: Subject, theirs: Any, rows: int, columns: int) -> None:
    """See that both draw the same when the likeliest id is taken.

    Raises:
        Unequal: They do not.
    """
    request = model.request(rows, columns, greedy=True)
    expected = reference.draw(theirs, request, model.grammar.vocabulary, rows, columns)
    (result,) = engine.generate([request])
    require(list(result.ids) == expected, f"{_same(result.ids, expected)} ids are transformers'")


def batch(kind: str, options: Options) -> Case:
    """Eight guided pictures together, against the same one by one."""
    model, width = subject("small", options.toy), 4 if options.toy else 32
    rows = 2 if options.toy else options.settings["batch-rows"]
    engine = Engine(reference.variant(model.decoder, kind), model.grammar)
    # Prompts of different lengths, as users have.
    requests = [model.request(rows, width, words=(8 + 3 * n, 40 - n), seed=n) for n in range(8)]

    def one_by_one() -> list[Result]:
        return [engine.generate([request])[0] for request in requests]

    def together() -> list[Result]:
        return engine.generate(requests, batch_size=8)

    require(one_by_one() == together(), "ids depend on what is drawn beside them")
    timings = interleave(one_by_one, together, pairs=options.pairs, clock=options.clock)
    tokens = 8 * (rows * (width + 1) + 3)
    speeds = {
        name: round(tokens / statistics.median(seconds), 2)
        for name, seconds in (("baseline_tokens_per_s", timings.baseline), ("ours_tokens_per_s", timings.ours))
    }
    about = {"rows": rows, "columns": width, "weights": kind, "requests": 8, **_about(model, "small"), **speeds}
    return case(f"batch-8-{kind}", timings, options, **about)


def context(kind: str, options: Options) -> Case:
    """A row of cells after a short and after a long context; a ratio of 1 is no slower at all."""
    model, width = subject("small", options.toy), 4 if options.toy else 32
    engine = Engine(reference.variant(model.decoder, kind), model.grammar)
    short, long = (32, 96) if options.toy else (SHORT, LONG)
    rows, streams, starts = options.pairs + 2, [], []
    for length in (short, long):
        # Half of what is timed lies before the length that the case is named after, half behind it.
        words = length - len(model.request(rows, width, words=(0, 0)).prompt_ids) - rows * (width + 1) // 2
        if words < 0:
            raise EmulusError(f"{options.pairs} pairs do not fit a context of {length}; ask for fewer")
        request = model.request(rows, width, words=(words, words), greedy=True)
        check_continuation(engine, model.decoder, request, 2 if kind == "fp32" else 0)
        streams.append(_tokens(engine.stream(request)))
        starts.append(len(request.prompt_ids) + width + 1)
    for stream in streams:
        _take(stream, width + 1)  # with the prompt
    timings = interleave(
        *(partial(_take, stream, width + 1) for stream in streams), pairs=options.pairs, clock=options.clock
    )
    ends = [start + options.pairs * (width + 1) for start in starts]
    about = {"contexts": [*zip(starts, ends, strict=True)], "weights": kind, "bound": round(1 / BOUND, 3)}
    return case(
        f"context-{LONG}-{kind}", timings, options, **about, **_about(model, "small"), **_per_token(timings, width + 1)
    )


@torch.inference_mode()
def check_continuation(engine: Engine, decoder: Decoder, request: Request, count: int) -> None:
    """See that greedy ids after a prompt are those that whole passes over it give.

    Raises:
        Unequal: They are not.
    """
    if not count:
        return
    stream = _tokens(engine.stream(request))
    ids = [token.id for token in islice(stream, count)]
    visual = engine.grammar.vocabulary.visual_range
    cond, null = (
        decoder.head(decoder.hidden(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1], visual)
        for prompt in (request.prompt_ids, request.null_ids or ())
    )
    expected = apply_guidance(cond, null, request.params.guidance_scale).argmax(-1) + visual[0]
    require(ids == expected.tolist(), f"{_same(ids, expected.tolist())} ids are those of whole passes")


def ahead(name: Literal["jacobi", "jacobi-auto", "zipar"], kind: Literal["picture", "clip"], options: Options) -> Case:
    """Fewer steps on a trained model: the committed checkpoint and held-out captions, one request at a time."""
    grammar, decoder, requests = trained(kind, 1 if options.toy else options.settings["prompts"], toy=options.toy)
    schedules: dict[str, Schedule] = {
        "jacobi": Jacobi(window=options.settings["window"]),
        "jacobi-auto": Jacobi(),
        "zipar": Zipar(window=options.settings["columns"]),
    }
    schedule = schedules[name]
    lossy = not schedule.exact
    sequential = Engine(decoder, grammar, schedule=Sequential())
    expected, steps = counted(sequential, requests)
    ours = Engine(decoder, grammar, schedule=schedule)
    found, fewer = counted(ours, requests)
    if lossy:
        check_whole(ours, requests, found)
    else:
        require(found == expected, "the schedule changed what is drawn")
    saved = [before / after for before, after in zip(steps, fewer, strict=True)]
    timings = interleave(
        lambda: sequential.generate(requests, batch_size=1),
        lambda: ours.generate(requests, batch_size=1),
        pairs=options.pairs,
        clock=options.clock,
    )
    pairs_of_ids = [pair for a, b in zip(expected, found, strict=True) for pair in zip(a, b, strict=True)]
    about = {
        "schedule": repr(schedule),
        "lossy": lossy,
        "same_ids": round(sum(a == b for a, b in pairs_of_ids) / len(pairs_of_ids), 4),
        "ratio_is": "steps of the model that are saved; the spread is over captions",
        "steps": [sum(steps), sum(fewer)],
        "time_ratio": timings.ratio,
        "time_spread": timings.spread,
        "captions": len(requests),
        "model": "checkpoints/emoji",
    }
    if name == "jacobi" and not options.toy:
        engines = {window: Engine(decoder, grammar, schedule=Jacobi(window=window)) for window in WINDOWS}
        about["steps_saved_by_window"] = {
            window: round(sum(steps) / sum(counted(engine, requests)[1]), 3) for window, engine in engines.items()
        }
    timed = case("", timings, options, **about)
    ratio, spread = sum(steps) / sum(fewer), (min(saved), max(saved))
    return Case(case=f"{name}-{kind}s", ratio=ratio, spread=spread, conditions=timed.conditions)


def trained(kind: Literal["picture", "clip"], count: int, *, toy: bool = False) -> tuple[Any, Decoder, list[Request]]:
    """The committed checkpoint's grammar and decoder, and requests by captions that it has not seen."""
    model = _checkpoint()
    wanted = "image" if kind == "picture" else "video"
    items = [item for item in open_source(HOME / "data/emoji") if item.split == "test" and item.kind == wanted]
    side, settings = model.defaults.height // model.vision.config.spatial_factor, model.defaults
    frames = settings.num_frames // model.vision.config.temporal_factor
    side, frames = (4, 2) if toy else (side, frames)
    requests = []
    for seed, item in enumerate(even(items, count)):
        caption, wording = item.captions[0], model.preset.wording
        if kind == "picture":
            prompt = templates.draw(model.grammar, caption, side, side, wording=wording)
        else:
            prompt = templates.animate(model.grammar, caption, frames, side, side, settings.fps, wording=wording)
        params = SamplingParams(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            guidance_scale=settings.guidance_scale,
            seed=seed,
        )
        requests.append(Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids, may=prompt.may, params=params))
    return model.grammar, model.decoder, requests


@cache
def _checkpoint() -> emulus.Emulus:
    return emulus.load(HOME / "checkpoints/emoji", device="cpu")


def counted(engine: Engine, requests: Sequence[Request]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Generate one by one: ids of each, and how many steps of the model each took."""
    ids, steps = [], []
    for request in requests:
        before = engine.counts.forwards
        ids.append(engine.generate([request])[0].ids)
        steps.append(engine.counts.forwards - before)
    return ids, steps


def check_whole(engine: Engine, requests: Sequence[Request], found: Sequence[Sequence[int]]) -> None:
    """See that what a lossy schedule drew is at least a whole document.

    Raises:
        Unequal: It is not.
    """
    for request, ids in zip(requests, found, strict=True):
        require(engine.grammar.parse([*request.prompt_ids, *ids]).complete, "a picture is not whole")


def _tokens(events: Iterator[Event]) -> Iterator[Token]:
    return (event for event in events if isinstance(event, Token))


def _take(stream: Iterator[Token], count: int) -> None:
    for _ in islice(stream, count):
        pass


def _same(ids: Sequence[int], expected: Sequence[int]) -> str:
    return f"{sum(a == b for a, b in zip(ids, expected, strict=False))} of {len(expected)}"


def _per_token(timings: Timings, tokens: int) -> dict[str, float]:
    before, after = (statistics.median(seconds) / tokens * 1000 for seconds in (timings.baseline, timings.ours))
    return {"tokens": tokens, "baseline_ms_per_token": round(before, 3), "ours_ms_per_token": round(after, 3)}


def _about(model: Subject, shape: str) -> dict[str, Any]:
    config = model.decoder.config
    size: Callable[[Tensor], int] = Tensor.numel
    return {
        "shape": shape,
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "visual": model.grammar.vocabulary.visual_size,
        "parameters": sum(map(size, model.decoder.parameters())),
        "guidance": 3.0,
    }


CASES: dict[str, Callable[[Options], Case | Sequence[Case]]] = {
    "draw-small": partial(draw, "small", ("fp32", "bf16", "int8", "int4")),
    "draw-truevocab": partial(draw, "truevocab", ("fp32", "bf16", "int4")),
    **{f"batch-8-{kind}": partial(batch, kind) for kind in ("fp32", "bf16")},
    **{f"context-{LONG}-{kind}": partial(context, kind) for kind in ("fp32", "bf16")},
    **{
        f"{name}-{kind}s": partial(ahead, name, kind)
        for name in ("jacobi", "jacobi-auto", "zipar")
        for kind in ("picture", "clip")
    },
}

if __name__ == "__main__":
    raise SystemExit(main(CASES, settings=SETTINGS))
