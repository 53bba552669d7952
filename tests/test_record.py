"""The figures of a training that went on from a checkpoint, behind that checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from emulus.errors import EmulusError
from emulus.train.metrics import read_metrics
from scripts.record import CURVES_FILE, brief, record


def write(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def steps(count: int, loss: float) -> list[dict[str, Any]]:
    lines = [
        {"step": step, "kind": "train", "loss": loss / step, "visual": 2 / 3, "tokens": 100, "seconds": 1.0}
        for step in range(1, count + 1)
    ]
    return [*lines, {"step": count, "kind": "evaluation", "visual_bits": loss}]


def test_steps_count_on_and_tokens_add_up(tmp_path: Path) -> None:
    model = write(tmp_path / "model", brief(steps(20, 3.0)))
    run = write(tmp_path / "run", steps(35, 2.0))
    record(run, model)
    lines = read_metrics(model)
    assert [line["step"] for line in lines] == [10, 20, 20, 30, 40, 50, 55]
    assert [line["visual_bits"] for line in lines if line["kind"] == "evaluation"] == [3.0, 2.0]
    assert {line["tokens"] for line in lines if line["kind"] == "train"} == {1000}
    assert lines[0]["visual"] == 0.666667
    assert "seconds" not in lines[0]
    picture = ElementTree.parse(model / CURVES_FILE).getroot()
    assert "Visual ids, bits per id: line training, points held out" in list(picture.itertext())


def test_steps_that_were_done_again_count_once() -> None:
    lines = steps(20, 3.0)
    assert brief([*lines[:15], *lines[:20]]) == brief(lines[:20])


def test_nothing_and_twice_are_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "model", brief(steps(20, 3.0)))
    run = write(tmp_path / "run", steps(30, 2.0))
    with pytest.raises(EmulusError, match="has no figures"):
        record(tmp_path / "nowhere", model)
    record(run, model)
    (run / "metrics.jsonl").write_text((write(tmp_path / "longer", steps(40, 2.0)) / "metrics.jsonl").read_text())
    with pytest.raises(EmulusError, match="figures already"):
        record(run, model)
