"""One model for everything beside one for each thing: each is trained on its share and measured alike."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from emulus.data.loader import CAPTION_FIRST, CAPTION_LAST
from emulus.parallel.config import ParallelConfig
from scripts.kill_run import prepare
from scripts.single_task import held_out_documents, shares, single_task, tasks_of


def test_every_task_gets_its_share_of_the_steps(tmp_path: Path) -> None:
    config = prepare(tmp_path, 10)
    reading = dataclasses.replace(config.reading, caption_first=0.7)
    train = dataclasses.replace(config.train, parallel=ParallelConfig())
    config = dataclasses.replace(config, reading=reading, train=train, out=tmp_path / "runs", evaluation_pictures=0)
    part_of = shares(config)
    assert part_of.keys() == {"drawing", "captioning"}
    assert sum(part_of.values()) == pytest.approx(1)
    assert part_of["drawing"] == pytest.approx(0.7, abs=0.05)

    rows = single_task(config, ["drawing", "captioning"])
    assert [row["steps"] for row in rows] == [round(10 * part_of[row["task"]]) for row in rows]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["together"] / row["alone"])
    for task, made in (("drawing", CAPTION_FIRST), ("captioning", CAPTION_LAST)):
        asked = dataclasses.replace(config, reading=tasks_of(reading)[task].reading, evaluation_documents=12)
        held, documents = held_out_documents(asked)
        assert set(documents.task.tolist()) == {made}
        assert len(documents.task) == 12
        assert held.split == "validation"
