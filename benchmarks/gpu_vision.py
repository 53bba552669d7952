"""How fast the released vision tokenizer is on a GPU: ``python -m benchmarks.gpu_vision --json``.

One picture of 720 x 720 pixels to codes and back, random weights: in float32, in bfloat16 as PyTorch runs it, and in
bfloat16 with fused norms and channels last. The baseline is float32 on the same device. ``floor_ms`` is what
:mod:`benchmarks.vision_floor` adds up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Literal, get_args
from unittest.mock import patch

import torch

from benchmarks.harness import Case, Options, Timings, case, main
from benchmarks.vision import tokenizer
from benchmarks.vision_floor import Way, cost
from emulus.device import pick_device
from emulus.errors import EmulusError
from emulus.tokenizer.vision import VisionTokenizer, on_gpu

Half = Literal["encode", "decode"]

REPEATS = 5
SETTINGS = {"side": (720, "pixels of the picture's sides")}


def run(half: Half, way: Way, options: Options) -> Case:
    """Time one half of the tokenizer one way against float32.

    Raises:
        EmulusError: There is no CUDA device, and it is no toy.
    """
    if not options.toy and not torch.cuda.is_available():
        raise EmulusError("there is no CUDA device here; --toy runs everything in tiny on a CPU")
    device = pick_device("cpu" if options.toy else "cuda")
    side, repeats = (32, 1) if options.toy else (options.settings["side"], REPEATS)
    pixels = torch.rand(1, 3, side, side, device=device) * 2 - 1
    timings = Timings(
        baseline=_timed(half, "fp32", pixels, repeats, toy=options.toy),
        ours=_timed(half, way, pixels, repeats, toy=options.toy),
    )
    config = tokenizer("fp32", toy=options.toy).config
    return case(
        f"{half}-{way}",
        timings,
        replace(options, pairs=repeats, clock="wall"),
        device="cpu" if options.toy else torch.cuda.get_device_name(),
        side=side,
        ms=round(statistics.median(timings.ours) * 1000, 3),
        floor_ms=round(cost(config, half, way, height=side, width=side).seconds * 1000, 3),
    )


def _timed(half: Half, way: Way, pixels: torch.Tensor, repeats: int, *, toy: bool) -> list[float]:
    """Seconds of each call, once the size is recorded."""
    model: VisionTokenizer = tokenizer("fp32" if way == "fp32" else "bf16", toy=toy).to(pixels.device)
    plain = patch.multiple(on_gpu, usable=lambda x: False, laid_out=lambda x, *rest: x)
    work: Callable[[], object] = partial(model.encode, pixels)
    if half == "decode":
        work = partial(model.decode, model.encode(pixels).cpu())

    def once() -> float:
        start = time.perf_counter()
        work()
        if pixels.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with nullcontext() if way == "bf16-fused" else plain:
        for _ in range(1 if toy else 4):
            once()
        return [once() for _ in range(repeats)]


CASES: dict[str, Callable[[Options], Case]] = {
    f"{half}-{way}": partial(run, half, way) for half in get_args(Half) for way in get_args(Way)
}

if __name__ == "__main__":
    raise SystemExit(main(CASES, settings=SETTINGS))
