"""One image of the shipped model on a machine that is busy with other work, and on a quiet one.

``python -m benchmarks.busy --clock wall --json``: processes that use all of PyTorch's threads and wait as OpenMP does
by default, in turn with ours (:mod:`emulus.threads`), beside 0, 1, 2 and 12 processes that only count. Each way has a
process of its own, since OpenMP reads its settings when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from benchmarks.harness import Case, Options, Timings, case, main, require, timed
from emulus import threads
from emulus.errors import EmulusError

Way = Literal["openmp", "ours"]

MODEL = Path(__file__).parents[1] / "checkpoints/emoji"
BUSY = (0, 1, 2, 12)
"""Other processes."""
# GNU OpenMP's and LLVM's defaults.
OPENMP = {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
SETTINGS = {"images": (3, "images that each process makes"), "cpu-threads": (0, "threads; 0: as many as CPUs")}


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that do nothing but count."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def image(count: int, options: Options) -> Case:
    """How many times faster an image is beside so many busy processes."""
    seconds: dict[Way, list[float]] = {"openmp": [], "ours": []}
    digests = set()
    with busy(count):
        for _ in range(options.pairs):
            for way in seconds:
                found = _in_a_process(way, options)
                seconds[way].append(statistics.median(found["seconds"]))
                digests.add(found["ids"])
    require(len(digests) == 1, "the ids of the images differ")
    timings = Timings(baseline=seconds["openmp"], ours=seconds["ours"])
    return case(f"busy-{count}", timings, options, busy=count, spin_count=threads.SPIN_COUNT, cpus=os.cpu_count())


def _in_a_process(way: Way, options: Options) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    # At toy size the other way is run as well, but must not take its minutes.
    environment |= OPENMP if way == "openmp" and not options.toy else {}
    if options.settings.get("cpu-threads"):
        environment["OMP_NUM_THREADS"] = str(options.settings["cpu-threads"])
    count = 1 if options.toy else options.settings["images"]
    command = [sys.executable, "-m", "benchmarks.busy", "child", way, str(count), options.clock, str(int(options.toy))]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=MODEL.parents[1], env=environment, check=False)
    if ran.returncode:
        raise EmulusError(f"a process that makes images failed: {ran.stderr.strip()[-300:]}")
    return cast("dict[str, Any]", json.loads(ran.stdout.splitlines()[-1]))


def child(way: Way, count: int, options: Options) -> None:
    """Make images and print what each took, and a digest of their ids."""
    import emulus
    from emulus.tokenizer.vision import model as vision

    if way == "openmp":
        threads.CpuLoad.spare = lambda self, most: most  # type: ignore[method-assign]
        vision.ONE_THREAD_PIXELS = 0
    model = emulus.load(MODEL, device="cpu")
    size = {"height": 16, "width": 16} if options.toy else {}
    ids: list[str] = []
    paint = model._paint

    def painted(codes: Any) -> Any:
        ids.append(str(codes.tolist()))
        return paint(codes)

    model._paint = painted  # type: ignore[method-assign]
    make = partial(model.generate_image, "a flat drawing of a cat", best_of=1, **size)
    make(seed=0)
    seconds = [timed(partial(make, seed=seed), options.clock) for seed in range(1, count + 1)]
    print(json.dumps({"seconds": seconds, "ids": hashlib.sha256("".join(ids).encode()).hexdigest()}))


CASES: dict[str, Callable[[Options], Case]] = {f"busy-{count}": partial(image, count) for count in BUSY}

if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        way, count, clock, toy = sys.argv[2:]
        child(cast(Way, way), int(count), Options(clock=cast(Any, clock), toy=toy == "1"))
        raise SystemExit(0)
    raise SystemExit(main(CASES, settings=SETTINGS))
