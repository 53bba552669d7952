"""The scripts for a GPU that was lent: parts under limits, in tiny on a CPU."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.pipeline import Emulus
from scripts import gpu_run
from scripts.gpu_report import report
from scripts.gpu_run import Part, first, pack, run_parts
from tests.kernels.test_gpu import needs_triton

REPOSITORY = Path(__file__).parents[2]


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


@needs_triton
def test_the_commands_of_the_page(tmp_path: Path) -> None:
    """As written, but for the one that needs a GPU."""
    build, whole, toy, again = commands()
    assert whole == ["OUT=out", "scripts/first_gpu_run.sh"]
    assert toy[:3] == [*whole, "--toy"]
    machine, vision = script("first_gpu_run.sh", *toy[3:], out=tmp_path / "out")
    assert machine["status"] == vision["status"] == "ok"
    assert machine["cases"][0]["device"] == "cpu"
    assert vision["cases"][0]["case"] == "encode-bf16"
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


def test_the_second_run(tiny: Emulus, shapes: Path, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    config = TokenizeConfig(sources=(shapes,), vision=tmp_path / "model", out=tmp_path / "tokens", size=16, views=1)
    tokenize(config)
    trained, packed = script("second_gpu_run.sh", "--tokens", str(config.out), out=tmp_path / "out")
    assert trained["status"] == packed["status"] == "ok"
    with tarfile.open(tmp_path / "out/run.tar.0") as archive:
        names = archive.getnames()
    assert "metrics.jsonl" in names
    assert any(name.endswith("model/config.json") for name in names)


def test_pieces_are_one_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "_PIECE", 3000)
    model = tmp_path / "run/checkpoints/step-00000002/model"
    model.mkdir(parents=True)
    (model / "weights").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "run/metrics.jsonl").write_text("{}\n")
    out = tmp_path / "out"
    out.mkdir()
    assert pack(tmp_path / "run", out)["bytes"] > 3000
    pieces = sorted(out.iterdir(), key=lambda path: int(path.suffix[1:]))
    with tarfile.open(fileobj=io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))) as whole:
        content = whole.extractfile("checkpoints/step-00000002/model/weights")
        assert content is not None
        assert content.read() == bytes(range(256)) * 20


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


def test_parts_that_no_longer_fit_are_skipped(tmp_path: Path) -> None:
    results = run_parts([python("late", "print(1)")], tmp_path, budget=5, toy=False, log=io.StringIO())
    assert results[0]["status"] == "skipped"
