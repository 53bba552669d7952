"""The shipped model's recipe on a GPU: in tiny on a CPU, from nothing to what is sent back."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path

import pytest

from emulus.cli import main
from emulus.train.metrics import read_metrics
from scripts.gpu_second import PARTS, STEPS_FILE, Plan, do


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("second")
    made = Plan(run=folder / "run", out=folder / "out", toy=True)
    for part in PARTS:
        do(part, made)
    return made


def test_what_is_sent_back(plan: Plan) -> None:
    names = {path.name for path in plan.out.iterdir()}
    assert names == {"training.html", "metrics.jsonl", "figures.json", "evaluation.html", "model.tar"}
    with tarfile.open(plan.out / "model.tar") as archive:
        members = archive.getnames()
    assert {"model/config.json", "model/model.safetensors"} <= {*members}
    assert not any("vision" in name for name in members)


def test_a_rerun_goes_on_with_the_steps_chosen_at_first(plan: Plan) -> None:
    chosen = (plan.run / STEPS_FILE).read_text()
    before = read_metrics(plan.run / "decoder")
    for part in ("tokens", "measure", "train"):
        do(part, dataclasses.replace(plan, seconds=1e9))
    assert (plan.run / STEPS_FILE).read_text() == chosen
    assert read_metrics(plan.run / "decoder") == before
    assert max(line["step"] for line in before) == json.loads(chosen)["steps"]


def test_tokens_made_before_are_taken(plan: Plan, tmp_path: Path) -> None:
    other = dataclasses.replace(plan, run=tmp_path / "run", made=plan.run)
    do("tokens", other)
    do("measure", other)
    assert (tmp_path / "run/measured/metrics.jsonl").exists()
    assert not (tmp_path / "run/tokens-16").exists()


def test_the_real_sizes_are_legal(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = dataclasses.replace(plan, toy=False, made=tmp_path)
    for size in real.sizes:
        (tmp_path / f"tokens-{size}").symlink_to(plan.tokens(16))
    words = [word for word in real.train(tmp_path / "run", 1000) if ":video=" not in word]
    words[words.index("cuda")] = "cpu"
    assert main([*words, "--dry-run"]) == 0
    assert "49,152" in capsys.readouterr().out
