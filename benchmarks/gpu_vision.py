"""How fast the released vision tokenizer is on a GPU: ``python -m benchmarks.gpu_vision --json``.

One picture of 720 x 720 pixels to codes and back, random weights, in float32 and in bfloat16, and bfloat16 with
channels last. The baseline is the plain float32 way on the same device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.harness import Case, Options, Timings, case, main
from benchmarks.vision import Kind, tokenizer
from emulus.device import pick_device
from emulus.errors import EmulusError
from emulus.tokenizer.vision import VisionTokenizer

REPEATS = 5
SETTINGS = {"side": (720, "pixels of the picture's sides")}
WAYS: dict[str, tuple[Kind, torch.memory_format]] = {
    "fp32": ("fp32", torch.contiguous_format),
    "bf16": ("bf16", torch.contiguous_format),
    "bf16-channels-last": ("bf16", torch.channels_last),
}


def run(half: str, way: str, options: Options) -> Case:
    """Time one half of the tokenizer one way against float32.

    Raises:
        EmulusError: There is no CUDA device, and it is no toy.
    """
    if not options.toy and not torch.cuda.is_available():
        raise EmulusError("there is no CUDA device here; --toy runs everything in tiny on a CPU")
    device = pick_device("cpu" if options.toy else "cuda")
    side, repeats = (32, 1) if options.toy else (options.settings["side"], REPEATS)
    plain, ours = (_work(half, each, device, side, toy=options.toy) for each in ("fp32", way))
    timings = Timings(baseline=_timed(plain, repeats), ours=_timed(ours, repeats))
    return case(
        f"{half}-{way}",
        timings,
        Options(pairs=repeats, threads=options.threads, clock="wall", toy=options.toy),
        device="cpu" if options.toy else torch.cuda.get_device_name(),
        side=side,
        ms=round(statistics.median(timings.ours) * 1000, 3),
    )


def _work(half: str, way: str, device: torch.device, side: int, *, toy: bool) -> Callable[[], object]:
    kind, layout = WAYS[way]
    model: VisionTokenizer = tokenizer(kind, toy=toy).to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=layout)
    pixels = torch.rand(1, 3, side, side, device=device) * 2 - 1
    codes = model.encode(pixels)
    return partial(model.encode, pixels) if half == "encode" else partial(model.decode, codes)


def _timed(work: Callable[[], object], repeats: int) -> list[float]:
    def once() -> float:
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    return [once() for _ in range(repeats)]


CASES: dict[str, Callable[[Options], Case]] = {
    f"{half}-{way}": partial(run, half, way) for half in ("encode", "decode") for way in WAYS
}

if __name__ == "__main__":
    raise SystemExit(main(CASES, settings=SETTINGS))
