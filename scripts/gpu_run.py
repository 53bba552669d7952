"""Run everything that a GPU is wanted for, part by part under a time limit, and keep what each part found.

``scripts/first_gpu_run.sh`` and ``scripts/second_gpu_run.sh`` call this. A part that fails, hangs or no longer fits
into the time does not stop the next one. Written to the output folder, while the run goes on:

- ``results.jsonl``: a line for each part (status, seconds, and the objects that it printed as JSON);
- ``log.txt``: all output;
- ``report.md``: the table printed last, made by :mod:`scripts.gpu_report`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from scripts.gpu_report import report

REPOSITORY = Path(__file__).parents[1]
PYTHON = sys.executable
_LEAST = 10.0
"""Seconds under which a part is not begun."""
_TOY_LIMIT = 300.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One command.

    Attributes:
        name: What the table calls it.
        limit: Seconds that it may take.
        command: Program and arguments.
        toy: The same in tiny on a CPU; None if it needs a GPU.
        environment: Variables beside those of this process in tiny.
        grace: Seconds that it is given to end by itself after its limit.
    """

    name: str
    limit: float
    command: Sequence[str]
    toy: Sequence[str] | None
    environment: Mapping[str, str] = field(default_factory=dict)
    grace: float = 0.0


def tests(*paths: str, workers: int, limit: int) -> list[str]:
    """The command that runs GPU tests with the plugins that are installed."""
    command = [PYTHON, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *paths]
    command += ["-n", str(workers)] if find_spec("xdist") else []
    return command + (["--timeout", str(limit)] if find_spec("pytest_timeout") else [])


def benchmark(name: str, *cases: str, options: Sequence[str] = ()) -> list[str]:
    """The command that runs cases of a benchmark, or all of them."""
    only = [part for case in cases for part in ("--only", case)]
    return [PYTHON, "-m", f"benchmarks.{name}", "--json", *options, *only]


def first() -> list[Part]:
    """What a GPU is asked first: is it right, how fast are kernels, steps, pictures, training, the tokenizer."""
    interpreted = {"TRITON_INTERPRET": "1"}
    pictures = ("batch-1-bf16", "batch-1-int8", "batch-1-int4", "batch-1-fp8")
    training = ("train-bf16", "documents-16", "memory-2-layers")
    checker = [shutil.which("compute-sanitizer") or "compute-sanitizer", "--tool", "memcheck"]
    checked = [*tests("tests/gpu/test_kernels.py", workers=0, limit=100), "-k", "test_as_plain and True-2"]
    once = ["--pairs", "1"]
    return [
        Part(name="machine", limit=30, command=[PYTHON, "-m", "scripts.gpu_run", "machine"], toy=_machine_toy()),
        Part(
            name="tests-of-kernels",
            limit=120,
            command=tests("tests/gpu/test_kernels.py", "tests/gpu/test_graphs.py", workers=6, limit=60),
            toy=[*tests("tests/gpu/test_kernels.py", workers=1, limit=60), "-k", "silu or rms_norm"],
            environment=interpreted,
        ),
        Part(
            name="kernels",
            limit=100,
            command=benchmark("gpu_kernels", *_kernels()),
            toy=[*benchmark("gpu_kernels", "norm", "qkv-int4-2"), "--toy"],
            environment=interpreted,
        ),
        Part(
            name="step",
            limit=60,
            command=benchmark("gpu_kernels", "step-2", "step-4"),
            toy=[*benchmark("gpu_kernels", "step-2"), "--toy"],
            environment=interpreted,
        ),
        Part(
            name="pictures",
            limit=180,
            command=benchmark("gpu", *pictures, options=[*once, "--clock", "wall"]),
            toy=benchmark("gpu", "batch-1-int8", options=[*once, "--toy"]),
        ),
        Part(
            name="tests-of-the-rest",
            limit=75,
            command=[*tests("tests/gpu", workers=3, limit=70), "--deselect", "tests/gpu/test_kernels.py"],
            toy=[*tests("tests/gpu/test_placement.py", workers=1, limit=60), "--collect-only"],
        ),
        Part(
            name="training",
            limit=100,
            command=benchmark("gpu_training", *training, options=[*once, "--steps", "3"]),
            toy=benchmark("gpu_training", "train-bf16", options=[*once, "--toy"]),
        ),
        Part(
            name="vision",
            limit=40,
            command=benchmark("gpu_vision", options=once),
            toy=benchmark("gpu_vision", "encode-bf16-fused", options=[*once, "--toy"]),
        ),
        Part(
            name="pictures-together",
            limit=90,
            command=benchmark("gpu", "in-flight-16-bf16", options=[*once, "--clock", "wall"]),
            toy=None,
        ),
        Part(
            name="training-in-float8",
            limit=60,
            command=benchmark("gpu_training", "train-float8", options=[*once, "--steps", "3"]),
            toy=None,
        ),
        Part(
            name="memory-check",
            limit=60,
            command=[*checker, *checked],
            toy=None,
        ),
    ]


def _kernels() -> Sequence[str]:
    """Cases of single kernels; none if they cannot be imported, which the part itself then tells."""
    try:
        from benchmarks.gpu_kernels import WORKS
    except Exception:
        return ()
    return tuple(WORKS)


def second(out: Path, run: Path, options: Sequence[str]) -> list[Part]:
    """The shipped model's recipe on a GPU, see :mod:`scripts.gpu_second`.

    Args:
        out: Folder of the results.
        run: Folder that a rerun goes on from; the toy takes one in ``out``.
        options: Further arguments of every part.
    """

    def part(name: str, limit: float, *, grace: float = 0.0) -> Part:
        command = [PYTHON, "-m", "scripts.gpu_second", name, "--out", str(out), *options, "--run"]
        toy = [*command, str(out / "run"), "--toy"]
        return Part(name=name, limit=limit, command=[*command, str(run)], toy=toy, grace=grace)

    # Training saves a checkpoint when it is told to stop.
    return [
        part("tokens", 120),
        part("measure", 100),
        part("train", 400, grace=20),
        part("evaluate", 60),
        part("keep", 40),
    ]


def run_parts(parts: Sequence[Part], out: Path, *, budget: float, toy: bool, log: TextIO) -> list[dict[str, Any]]:
    """Run parts one after another.

    Args:
        parts: What to run.
        out: Folder of the results.
        budget: Seconds that all may take together.
        toy: Whether to run each in tiny; those that cannot are skipped.
        log: Where all output goes, beside the screen.

    Returns:
        What each part came to, as written to ``results.jsonl``.
    """
    began = time.monotonic()
    results = []
    for part in parts:
        command = part.toy if toy else part.command
        limit = min(_TOY_LIMIT if toy else part.limit, budget - (time.monotonic() - began))
        if command is None or limit < min(_LEAST, part.limit):
            result = {"part": part.name, "status": "skipped", "seconds": 0.0, "said": "", "cases": []}
        else:
            result = {"part": part.name, **_run(part, command, limit, toy=toy, log=log)}
        results.append(result)
        with (out / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        (out / "report.md").write_text(report(results))
    return results


def _run(part: Part, command: Sequence[str], limit: float, *, toy: bool, log: TextIO) -> dict[str, Any]:
    """Run one command in a process group of its own, so that nothing of it outlives its limit."""
    _tell(f"\n$ {' '.join(command)}\n", log)
    paths = os.pathsep.join([str(REPOSITORY / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths, **(part.environment if toy else {})}
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        _tell(f"{error}\n", log)
        return {"status": "not started", "seconds": 0.0, "said": str(error), "cases": []}
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            lines.append(line)
            _tell(line, log)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        status = "ok" if process.wait(limit) == 0 else f"failed ({process.returncode})"
    except subprocess.TimeoutExpired:
        status = "too slow"
        _ask(process, part.grace)
    _end(process)
    reader.join(5)
    seconds = round(time.monotonic() - began, 1)
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return {"status": status, "seconds": seconds, "said": said[:200], "cases": _objects(lines)}


def _ask(process: subprocess.Popen[str], grace: float) -> None:
    """Tell a process to stop, and give it so many seconds."""
    if grace:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)


def _end(process: subprocess.Popen[str]) -> None:
    """End whatever is left of a process group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _objects(lines: Sequence[str]) -> list[dict[str, Any]]:
    """What was printed as one JSON object a line."""
    found = []
    for line in lines:
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def _tell(text: str, log: TextIO) -> None:
    print(text, end="", flush=True)
    log.write(text)
    log.flush()


def _machine_toy() -> list[str]:
    return [PYTHON, "-m", "scripts.gpu_run", "machine", "--toy"]


def machine(toy: bool) -> dict[str, Any]:
    """What the device is, and how fast it copies and multiplies: the two ceilings of everything else."""
    import torch

    from benchmarks.gpu import copied

    device = "cpu" if toy else "cuda"
    size = 256 if toy else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        torch.mm(a, b)
        if not toy:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {
        "device": "cpu" if toy else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton") or _triton(), "__version__", None),
        "cudnn": None if toy else torch.backends.cudnn.version(),
        "c_compiler": next((found for name in ("gcc", "cc", "clang") if (found := shutil.which(name))), None),
        "copy_gb_s": round(copied(device, 2**20 if toy else 2**31) / 1e9, 1),
        "product_tflops": round(2 * size**3 / min(seconds) / 1e12, 3),
    }


def _triton() -> Any:
    import importlib

    return importlib.import_module("triton") if find_spec("triton") else None


def main() -> int:
    """Run a list of parts, or print what the machine is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["first", "second", "machine"])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder of the results")
    parser.add_argument("--run", type=Path, default=REPOSITORY / "runs/gpu", help="what a rerun goes on from (second)")
    parser.add_argument("--data", help="data set in place of data/emoji (second)")
    parser.add_argument("--tokens", help="folder of tokens-64, tokens-32 and tokens-16 made before (second)")
    parser.add_argument("--budget", type=float, help="seconds for everything")
    parser.add_argument("--only", action="append", metavar="PART", help="run this part, and others so named")
    parser.add_argument("--toy", action="store_true", help="everything in tiny, on a CPU")
    given = parser.parse_args()
    if given.which == "machine":
        print(json.dumps(machine(given.toy)))
        return 0
    given.out.mkdir(parents=True, exist_ok=True)
    asked = {"--data": given.data, "--tokens": given.tokens}
    options = [word for name, value in asked.items() if value for word in (name, value)]
    parts = first() if given.which == "first" else second(given.out, given.run, options)
    if unknown := {*(given.only or [])} - {part.name for part in parts}:
        parser.error(f"no part is called {sorted(unknown)[0]}; there are {', '.join(part.name for part in parts)}")
    parts = [part for part in parts if not given.only or part.name in given.only]
    budget = given.budget or (660.0 if given.which == "first" else 580.0)
    with (given.out / "log.txt").open("a") as log:
        results = run_parts(parts, given.out, budget=budget, toy=given.toy, log=log)
    print("\n" + report(results))
    return 0 if all(result["status"] in ("ok", "skipped") for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
