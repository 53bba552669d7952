"""The scripts for a first run on a GPU: parts under time limits, in tiny on a CPU."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu_report import report
from scripts.gpu_run import Part, first, run_parts, second
from scripts.gpu_second import PARTS
from tests.kernels.test_gpu import needs_triton

REPOSITORY = Path(__file__).parents[2]
MACHINE = {"device": "a GPU", "copy_gb_s": 4300.0, "product_tflops": 790.0}


def script(name: str, *arguments: str, out: Path) -> list[dict[str, Any]]:
    """Run a script in tiny; the results."""
    done = subprocess.run(
        [REPOSITORY / "scripts" / name, "--toy", *arguments],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(out), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "report.md").read_text() in done.stdout
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def commands() -> list[list[str]]:
    """Those of docs/gpu.md."""
    blocks = re.findall(r"```\n(.*?)```", (REPOSITORY / "docs/gpu.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("which", ["first", "second"])
def test_nothing_needs_to_be_installed(which: str, tmp_path: Path) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "$PYTHONPATH" "$PWD" "$@"\n')
    stand_in.chmod(0o755)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [REPOSITORY / f"scripts/{which}_gpu_run.sh", "--toy"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**variables, "PYTHON": str(stand_in)}, capture_output=True, text=True
    )
    assert done.stdout.split() == f"{REPOSITORY}/src {REPOSITORY} -m scripts.gpu_run {which} --toy".split()


@needs_triton
def test_the_commands_of_the_page(tmp_path: Path) -> None:
    """As written, but for the two that need a GPU."""
    build, whole, toy, again, train = commands()
    # Part of it runs below.
    assert train == ["OUT=out", "scripts/second_gpu_run.sh"]
    assert whole == ["OUT=out", "scripts/first_gpu_run.sh"]
    assert toy[:3] == [*whole, "--toy"]
    machine, vision = script("first_gpu_run.sh", *toy[3:], out=tmp_path / "out")
    assert machine["status"] == vision["status"] == "ok"
    assert machine["cases"][0]["device"] == "cpu"
    assert vision["cases"][0]["case"] == "encode-bf16-fused"
    for command, folder in ((build, REPOSITORY), (again, tmp_path)):
        assert command[0] == "python"
        environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}"}
        done = subprocess.run(
            [sys.executable, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n|") > 3
    assert done.stdout.strip() == (tmp_path / "out/report.md").read_text().strip()


@needs_triton
@pytest.mark.slow
def test_the_first_run(tmp_path: Path) -> None:
    found = {result["part"]: result["status"] for result in script("first_gpu_run.sh", out=tmp_path)}
    assert {*found} == {part.name for part in first()}
    assert [name for name, status in found.items() if status == "skipped"] == [
        part.name for part in first() if part.toy is None
    ]


def test_the_second_run_in_part(tmp_path: Path) -> None:
    (made,) = script("second_gpu_run.sh", "--only", "tokens", out=tmp_path)
    assert (made["part"], made["status"]) == ("tokens", "ok")
    assert (tmp_path / "run/tokens-16/tokens.json").exists()


def test_the_second_run_has_every_part(tmp_path: Path) -> None:
    parts = second(tmp_path, tmp_path / "run", ["--data", "mine"])
    assert [part.name for part in parts] == [*PARTS]
    assert sum(part.limit + part.grace for part in parts) > 580 > max(part.limit + part.grace for part in parts)
    assert all("mine" in part.command for part in parts)


def python(name: str, code: str, limit: float = 60) -> Part:
    command = [sys.executable, "-c", code]
    return Part(name=name, limit=limit, command=command, toy=None)


def test_no_part_stops_the_next(tmp_path: Path) -> None:
    parts = [
        python("fails", "print('about to fail'); raise SystemExit(3)"),
        # It starts another process, which must not go on either.
        python("hangs", "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '600'])", limit=2),
        Part(name="missing", limit=60, command=["no-such-program"], toy=None),
        python("works", 'print(\'{"case": "x"\'); print(\'{"some": "object"}\'); print("done")'),
    ]
    log = io.StringIO()
    results = run_parts(parts, tmp_path, budget=1000, toy=False, log=log)
    statuses = [result["status"] for result in results]
    assert statuses == ["failed (3)", "too slow", "not started", "ok"]
    assert [result["said"] for result in results][:2] == ["about to fail", "begun"]
    # What only looks like an object is passed over.
    assert results[-1]["cases"] == [{"some": "object"}]
    assert "about to fail" in log.getvalue()
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == results
    assert report(results).count("\n| ") == 5


def test_training_may_save_what_it_has(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit('saved')); print('on'); time.sleep(60)"
    part = dataclasses.replace(python("trains", code, limit=2), grace=20.0)
    (result,) = run_parts([part], tmp_path, budget=1000, toy=False, log=io.StringIO())
    assert (result["status"], result["said"]) == ("too slow", "saved")
    assert "| trains | too slow |" in (tmp_path / "report.md").read_text()


def test_parts_that_no_longer_fit_are_skipped(tmp_path: Path) -> None:
    results = run_parts([python("late", "print(1)")], tmp_path, budget=5, toy=False, log=io.StringIO())
    assert results[0]["status"] == "skipped"


def test_the_short_table_comes_last() -> None:
    kernel = {"us": 29.0, "floor_us": 27.3, "gb_s": 4050.0}
    found = [{"case": name, "ratio": 0.94, "spread": [0.9, 0.95], "conditions": kernel} for name in ("a", "b")]
    parts = [
        {"part": "machine", "status": "ok", "seconds": 3.0, "said": "", "cases": [MACHINE]},
        {"part": "kernels", "status": "too slow", "seconds": 100.0, "said": "{", "cases": found},
        {"part": "tests", "status": "failed (1)", "seconds": 9.0, "said": "2 failed", "cases": []},
    ]
    short = report(parts).strip().splitlines()[-3:]
    assert short == [
        "| machine | ok | 3.0 | 4300.0 GB/s copied, 790.0 TFLOP/s |  |  |",
        "| kernels | too slow | 100.0 | a: 29.0 µs | 27.3 µs | 0.94 (0.90 to 0.95) |",
        "| tests | failed (1) | 9.0 | 2 failed |  |  |",
    ]
