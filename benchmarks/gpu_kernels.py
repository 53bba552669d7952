"""How near each GPU kernel comes to the memory's speed: ``python -m benchmarks.gpu_kernels --json``.

The kernels of a step of Emu3-8B, each by itself: a CUDA graph of 20 calls over several sets of weights (more than the
L2 cache holds), replayed; then all 32 layers of a step as the engine runs them. The baseline is the floor: the bytes
that must be read and written, at the rate of a plain copy, so the ratio is the fraction of the copy's bandwidth that is
reached. Nothing is timed on zeros.

Without a GPU ``TRITON_INTERPRET=1 python -m benchmarks.gpu_kernels --toy`` computes everything in tiny.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import copied
from benchmarks.harness import Case, Options, Timings, case, main
from emulus.engine.runner import Runner
from emulus.engine.step import Feed
from emulus.errors import EmulusError
from emulus.kernels import gpu
from emulus.kernels.where import Where
from emulus.model import Decoder, DecoderConfig, sized
from emulus.model.quantize import check_kind, quantize

CALLS, REPLAYS = 20, 20
CACHED = 128 * 2**20
"""Bytes of weights that calls take turns over: more than twice the L2 cache of an H200."""
BF16 = torch.bfloat16
KINDS = ("bf16", "int8", "fp8", "int4")
TOKENS = (2, 4, 32)
CONTEXTS = (512, 4096, 9000)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and at which sizes kernels are timed.

    Attributes:
        device: A GPU, or a CPU with Triton's interpreter.
        config: Emu3-8B's shape, or a tiny one.
        copied: Bytes per second that a plain copy reads and writes together.
    """

    device: torch.device
    config: DecoderConfig
    copied: float

    @property
    def toy(self) -> bool:
        """Whether everything is tiny."""
        return self.device.type == "cpu"

    def normal(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        """Random numbers."""
        return torch.randn(shape, device=self.device, dtype=dtype)


@cache
def bench(toy: bool) -> Bench:
    """Find the device.

    Raises:
        EmulusError: There is no CUDA device, and it is no toy in Triton's interpreter.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if toy and interpreted:
        small: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
        config = sized("tiny", vocab_size=400, num_attention_heads=4, num_key_value_heads=2, **small)
        return Bench(device=torch.device("cpu"), config=config, copied=copied("cpu", 2**20))
    if toy or not torch.cuda.is_available() or not gpu.available():
        raise EmulusError(
            "there is no CUDA device with Triton here; TRITON_INTERPRET=1 and --toy compute everything in tiny on a CPU"
        )
    return Bench(device=torch.device("cuda"), config=sized("emu3-8b"), copied=copied("cuda", 2**31))


# --- One kernel


@dataclass(frozen=True, kw_only=True)
class Work:
    """Calls of one kernel that do the same on other memory each.

    Attributes:
        calls: The calls.
        bytes: What one of them must read and write.
    """

    calls: Sequence[Callable[[], object]]
    bytes: int


def product(which: str, kind: str, n: int, made: Bench) -> Work:
    """One of a layer's products, with what is computed in the same launch."""
    config = made.config
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_width
    heads, kv = config.num_attention_heads * width, config.num_key_value_heads * width
    outs, ins = {
        "qkv": ((heads, kv, kv), hidden),
        "o": ((hidden,), heads),
        "gated": ((inner, inner), hidden),
        "down": ((hidden,), inner),
    }[which]
    x, add = made.normal(n, ins), made.normal(n, outs[0])
    size = sum(outs) * ins * {"bf16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5625}[kind]
    sets = [[_weight(made, kind, rows, ins) for rows in outs] for _ in range(_sets(size, made))]
    call: dict[str, Callable[..., object]] = {
        "qkv": lambda *weights: gpu.linear_group(x, weights),
        "gated": lambda gate, up: gpu.gated(x, gate, up),
        "o": lambda weight: _linear(x, weight, add),
        "down": lambda weight: _linear(x, weight, add),
    }
    return Work(calls=[partial(call[which], *weights) for weights in sets], bytes=int(size))


def _weight(made: Bench, kind: str, outs: int, ins: int) -> gpu.Weight:
    weight = made.normal(outs, ins)
    return weight if kind == "bf16" else quantize(weight.float(), check_kind(kind)).packed()


def _linear(x: Tensor, weight: gpu.Weight, add: Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return gpu.linear(x, weight, add=add)
    q, scale, low = weight
    if low is not None:
        return gpu.linear_int4(x, q, scale, low, add=add)
    return (gpu.linear_int8 if q.dtype == torch.int8 else gpu.linear_fp8)(x, q, scale, add=add)


def attention(context: int, made: Bench) -> Work:
    """A token of each of two sequences, after ``context`` tokens."""
    config, context = made.config, 40 if made.toy else context
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_width
    size = 2 * 2 * kv * context * width * 2
    q = made.normal(2, heads, width)
    layers = _sets(size, made)
    lanes = [made.normal(layers, 2, kv, context + 1, width) for _ in range(2)]
    where = Where(
        base=torch.tensor([lane.data_ptr() for lane in lanes], device=made.device),
        capacity=torch.full((2,), context + 1, device=made.device),
        position=torch.full((2,), context, device=made.device),
        dtype=BF16,
        kv_heads=kv,
        head_dim=width,
    )

    def call(layer: int, held: Sequence[Tensor]) -> Tensor:
        return gpu.attend(q, where, layer)

    return Work(calls=[partial(call, layer, lanes) for layer in range(layers)], bytes=size)


def rotation(made: Bench) -> Work:
    """Queries and keys of two tokens turned, keys and values stored."""
    config = made.config
    heads, kv, width = config.num_attention_heads, config.num_key_value_heads, config.head_width
    joined, lane = made.normal(2, heads + 2 * kv, width), made.normal(1, 2, kv, 8, width)
    q, k, v = joined.split((heads, kv, kv), dim=1)
    angles = made.normal(2, width, dtype=torch.float32)
    where = Where(
        base=torch.full((2,), lane.data_ptr(), device=made.device),
        capacity=torch.full((2,), 8, device=made.device),
        position=torch.arange(2, device=made.device),
        dtype=BF16,
        kv_heads=kv,
        head_dim=width,
    )

    def call(held: Tensor) -> Tensor:
        return gpu.rotate_and_store(q, k, v, angles, angles, where, 0)

    return Work(calls=[partial(call, lane)], bytes=2 * joined.nbytes + 2 * angles.nbytes)


def norm(made: Bench) -> Work:
    """The norm of two tokens."""
    x, weight = made.normal(2, made.config.hidden_size), made.normal(made.config.hidden_size)
    return Work(calls=[lambda: gpu.rms_norm(x, weight, 1e-5)], bytes=2 * x.nbytes + weight.nbytes)


def choice(made: Bench) -> Work:
    """The choice of one guided id."""
    ids = 96 if made.toy else 32768
    cond, null = made.normal(2, 1, ids, dtype=torch.float32)
    ints = torch.tensor([7], device=made.device)
    options: dict[str, Any] = {"scale": 3.0, "temperature": 1.0, "k": ids // 16, "seeds": ints, "positions": ints}
    return Work(calls=[lambda: gpu.choose(cond, null, **options, first_id=0)], bytes=2 * cond.nbytes)


def _sets(size: float, made: Bench) -> int:
    return 2 if made.toy else max(2, -(-CACHED // int(size)))


def kernel(name: str, make: Callable[[Bench], Work], options: Options) -> Case:
    """Time one kernel against its floor."""
    made = bench(options.toy)
    work = make(made)
    seconds = _replayed(work) if not made.toy else _called(work)
    floor = work.bytes / made.copied
    timings = Timings(baseline=[floor] * len(seconds), ours=seconds)
    middle = statistics.median(seconds)
    return case(
        name,
        timings,
        _by_wall(options),
        device=_device(made),
        bytes=work.bytes,
        us=round(middle * 1e6, 2),
        floor_us=round(floor * 1e6, 2),
        gb_s=round(work.bytes / middle / 1e9, 1),
        copy_gb_s=round(made.copied / 1e9, 1),
    )


def _replayed(work: Work) -> list[float]:
    """Seconds of a call, in graphs of several."""
    graph = torch.cuda.CUDAGraph()
    for call in work.calls:
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            work.calls[index % len(work.calls)]()
    graph.replay()
    seconds = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000 / CALLS)
    return seconds


def _called(work: Work) -> list[float]:
    seconds = []
    for call in work.calls:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


# --- All layers of a step


def step(n: int, options: Options) -> Case:
    """A step of ``n`` tokens after 4,096 each: recorded, against the same called from Python."""
    made = bench(options.toy)
    decoder = _decoder(made.toy)
    context, repeats = (16, 2) if made.toy else (4096, 20)
    ways = {}
    for name, record in (("eager", False), ("recorded", True)):
        runner = Runner(decoder, record=record)
        feeds = [Feed(lane=_filled(runner, context, made), ids=[7 + index]) for index in range(n)]
        ways[name] = partial(runner.forward, feeds)
        ways[name]()
    eager, recorded = ([_waited(way, made) for _ in range(repeats)] for way in ways.values())
    return case(
        f"step-{n}",
        Timings(baseline=eager, ours=recorded),
        _by_wall(options),
        device=_device(made),
        context=context,
        layers=decoder.config.num_hidden_layers,
        ms=round(statistics.median(recorded) * 1000, 4),
        eager_ms=round(statistics.median(eager) * 1000, 4),
        **_profile(ways["recorded"], made),
    )


@cache
def _decoder(toy: bool) -> Decoder:
    made = bench(toy)
    with torch.device("meta"):
        decoder = Decoder(made.config)
    decoder = decoder.to(BF16).to_empty(device=made.device)
    decoder.reset_parameters(torch.Generator(made.device).manual_seed(0))
    return decoder.eval()


def _filled(runner: Runner, context: int, made: Bench) -> Any:
    lane = runner.new_lane(context + 8)
    for memory in lane.memory.values():
        memory.normal_()
    lane.length = context
    return lane


def _waited(way: Callable[[], object], made: Bench) -> float:
    start = time.perf_counter()
    way()
    if not made.toy:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _profile(way: Callable[[], object], made: Bench) -> dict[str, Any]:
    """What one call spends its time on, by kernel, and how long the device does nothing in between."""
    if made.toy:
        return {"kernels_us": {}, "gaps_us": 0.0}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        way()
        torch.cuda.synchronize()
    spans = sorted(_spans(profiler))
    spent: dict[str, float] = {}
    for begin, end, name in spans:
        spent[name] = spent.get(name, 0.0) + end - begin
    busy, until = 0.0, 0.0
    for begin, end, _ in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    most = sorted(spent.items(), key=lambda item: -item[1])[:12]
    return {
        "kernels_us": {name[:40]: round(us, 1) for name, us in most},
        "gaps_us": round(until - spans[0][0] - busy, 1) if spans else None,
    }


def _spans(profiler: Any) -> Iterator[tuple[float, float, str]]:
    """Begin and end of each kernel in microseconds, and its name."""
    for event in profiler.events():
        if "CUDA" in str(event.device_type):
            yield event.time_range.start, event.time_range.end, event.name


def _device(made: Bench) -> str:
    return "cpu" if made.toy else torch.cuda.get_device_name()


def _by_wall(options: Options) -> Options:
    return Options(
        pairs=options.pairs, threads=options.threads, clock="wall", toy=options.toy, settings=options.settings
    )


WORKS: dict[str, Callable[[Bench], Work]] = {
    **{
        f"{which}-{kind}-{n}": partial(product, which, kind, n)
        for n in TOKENS
        for kind in KINDS
        for which in ("qkv", "o", "gated", "down")
    },
    **{f"attend-{context}": partial(attention, context) for context in CONTEXTS},
    "rotate": rotation,
    "norm": norm,
    "choose": choice,
}
CASES: dict[str, Callable[[Options], Case]] = {
    **{name: partial(kernel, name, make) for name, make in WORKS.items()},
    **{f"step-{n}": partial(step, n) for n in (2, 4)},
}

if __name__ == "__main__":
    raise SystemExit(main(CASES))
