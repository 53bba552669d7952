"""Build the GPU's kernels for cards that are not there, and print what each needs.

    python -m scripts.build_kernels --arch sm_90 --tokens 2 16 --kernel linear

One line for each kernel that differs: registers of a thread, bytes of shared memory and of stack, instructions that
read or write that stack (spills), and instructions of one warp per 32 KiB of weights (or keys and values) in the inner
loop. Needs Triton, but no card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emulus.kernels import gpu
from emulus.kernels.where import Where
from emulus.model.config import DecoderConfig, sized
from scripts.built import ARCHITECTURES, Built, Usage, building, some, usage

MODELS = {
    "emu3-8b": sized("emu3-8b"),
    "emu3.5-34b": sized("emu3.5-34b"),
    "emoji-9m": sized("emoji-9m", vocab_size=6152),
}
"""The released ones and the shipped one."""
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
KINDS = ("bfloat16", "float32", "int8", "fp8", "int4")
_SHORT = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_VISUAL = 32768
_CONSTANTS = (
    *("TOKENS", "ROWS", "WIDTH", "PARTS", "KIND", "COUNT", "GATED", "ADDED", "SCALED", "EVEN"),
    *("BLOCK", "LANE", "READY", "SPLITS", "GUIDED", "FILTERED", "NOISY", "WHOLE", "PDL", "num_stages", "num_warps"),
)
"""Options that tell kernels apart, as far as a kernel has them."""

Case = tuple[str, Callable[[], object]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One kernel of the table.

    Attributes:
        kernel: Name of the Triton function.
        variant: Its constants.
        architecture: What it is built for.
        usage: What it needs.
        per_32_kib: Instructions of one warp for 32 KiB of weights; ``None`` where it has none.
        used_by: The first product that takes it.
    """

    kernel: str
    variant: str
    architecture: str
    usage: Usage
    per_32_kib: float | None
    used_by: str


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="of weights")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--kernel", default="", help="only kernels whose names begin so")
    parser.add_argument("--json", action="store_true", help="one object a line instead of a table")
    options = parser.parse_args()
    if not options.json:
        print("| arch | kernel | first used by | registers | shared | stack | spills | loop | per 32 KiB | variant |")
        print("|---|---|---|---|---|---|---|---|---|---|")
    for architecture in options.arch:
        for line in lines(architecture, options.model, options.kind, options.tokens, options.kernel):
            print(json.dumps(dataclasses.asdict(line)) if options.json else _row(line), flush=True)


def lines(architecture: str, models: list[str], kinds: list[str], tokens: list[int], kernel: str) -> Iterator[Line]:
    """Build every kernel of a step for one architecture.

    Args:
        architecture: One of :data:`scripts.built.ARCHITECTURES`.
        models: Keys of :data:`MODELS`.
        kinds: Types of weights, from :data:`KINDS`.
        tokens: How many a step has.
        kernel: What names of kernels begin with.

    Yields:
        Each kernel that differs from those before.
    """
    seen: set[str] = set()
    with tempfile.TemporaryDirectory() as folder, building(architecture, Path(folder), kernel) as launches:
        for model in models:
            for n in tokens:
                for name, launch in cases(MODELS[model], n, kinds):
                    if architecture == "sm_80" and "float8" in name:
                        continue  # these floats are known from sm_89 on
                    launches.clear()
                    launch()
                    for built in launches:
                        if built.kernel.hash not in seen:
                            seen.add(built.kernel.hash)
                            yield _line(built, architecture, f"{model} {name} n={n}")


def cases(config: DecoderConfig, n: int, kinds: list[str]) -> Iterator[Case]:
    """Every launch of a step of a decoder, with its name."""
    for kind in kinds:
        for name, product in _products(config, n, kind):
            yield f"{name} {kind}", product
    yield from _between(config, n)
    yield from _attention(config, n)
    yield from _choice(n)


def _products(config: DecoderConfig, n: int, kind: str) -> Iterator[Case]:
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_width
    heads, kv_heads = config.num_attention_heads * width, config.num_key_value_heads * width
    q, k, gate = (_weight(kind, rows, hidden) for rows in (heads, kv_heads, inner))
    yield "qkv", partial(gpu.linear_group, some(n, hidden), [q, k, k])
    yield "o", partial(_linear, some(n, heads), _weight(kind, hidden, heads), some(n, hidden))
    yield "gated", partial(gpu.gated, some(n, hidden), gate, gate)
    yield "down", partial(_linear, some(n, inner), _weight(kind, hidden, inner), some(n, hidden))
    if kind != "int4":  # the head never has so few bits
        yield "head", partial(_linear, some(n, hidden), _weight(kind, min(_VISUAL, config.vocab_size), hidden), None)


def _weight(kind: str, outs: int, ins: int) -> gpu.Weight:
    if kind == "int4":
        groups = -(-ins // 64)
        return some(outs, groups * 32, dtype=torch.uint8), some(outs, groups), some(outs, groups)
    if kind in _SHORT:
        return some(outs, ins, dtype=_SHORT[kind]), some(outs, 1, dtype=torch.float32), None
    return some(outs, ins, dtype=getattr(torch, kind))


def _linear(x: Tensor, weight: gpu.Weight, add: Tensor | None) -> Tensor:
    if isinstance(weight, Tensor):
        return gpu.linear(x, weight, add=add)
    q, scale, low = weight
    if low is not None:
        return gpu.linear_int4(x, q, scale, low, add=add)
    return (gpu.linear_int8 if q.dtype == torch.int8 else gpu.linear_fp8)(x, q, scale, add=add)


def _between(config: DecoderConfig, n: int) -> Iterator[Case]:
    hidden, inner = config.hidden_size, config.intermediate_size
    yield "norm", lambda: gpu.rms_norm(some(n, hidden), some(hidden), config.rms_norm_eps)
    yield "activation", lambda: gpu.silu_mul(some(n, inner), some(n, inner))


def _attention(config: DecoderConfig, n: int) -> Iterator[Case]:
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_width
    numbers, angles = some(n, dtype=torch.int64), some(n, width, dtype=torch.float32)
    q, kv = some(n, heads, width), some(n, kv_heads, width)
    for lane in (torch.bfloat16, torch.float8_e4m3fn):
        for ready in (None, numbers):
            where = Where(
                base=numbers,
                capacity=numbers,
                position=numbers,
                dtype=lane,
                kv_heads=kv_heads,
                head_dim=width,
                ready=ready,
            )
            name = f"{str(lane)[6:]}{'' if ready is None else ' ready'}"
            if ready is None:
                yield f"rotate {name}", partial(gpu.rotate_and_store, q, kv, kv, angles, angles, where, 3)
            yield f"attend {name}", partial(gpu.attend, q, where, 3)


def _choice(n: int) -> Iterator[Case]:
    numbers, logits = some(n, dtype=torch.int64), some(n, _VISUAL, dtype=torch.float32)
    for name, null, temperature, k in (
        ("guided", logits, 1.0, 2048),
        ("filtered", None, 1.0, 2048),
        ("noisy", None, 1.0, 0),
        ("largest", None, 0.0, 0),
    ):
        rest: dict[str, Any] = {"seeds": numbers, "positions": numbers, "first_id": 151854}
        yield f"choose {name}", partial(gpu.choose, logits, null, scale=3.0, temperature=temperature, k=k, **rest)


def _line(built: Built, architecture: str, used_by: str) -> Line:
    needs, weights = usage(built.kernel), _bytes_of_a_round(built)
    return Line(
        kernel=built.name,
        variant=" ".join(f"{name}={built.options[name]}" for name in _CONSTANTS if name in built.options),
        architecture=architecture,
        usage=needs,
        per_32_kib=needs.loop * 32768 / weights if weights and needs.loop else None,
        used_by=used_by,
    )


def _bytes_of_a_round(built: Built) -> int:
    """Bytes of weights, or of keys and values, that a program takes in one round of its loop."""
    options = built.options
    if built.name == "linear_int4":
        return options["PARTS"] * options["ROWS"] * 32
    if built.name == "linear":
        weights = built.args[1][0]
        return options["PARTS"] * options["ROWS"] * options["WIDTH"] * weights.element_size()
    if built.name == "attend":
        return 2 * options["BLOCK"] * options["WIDTH"] * options["LANE"].primitive_bitwidth // 8
    return 0


def _row(line: Line) -> str:
    needs, per = line.usage, "" if line.per_32_kib is None else f"{line.per_32_kib:.0f}"
    figures = (needs.registers, needs.shared, needs.stack, needs.spills, needs.loop, per)
    return (
        f"| {line.architecture} | {line.kernel} | {line.used_by} | {' | '.join(map(str, figures))} | {line.variant} |"
    )


if __name__ == "__main__":
    main()
