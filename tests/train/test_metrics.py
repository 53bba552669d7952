"""Figures reach the file, the screen and the boards; a resumed run's file has each step once; profiles are written."""

from __future__ import annotations

import gzip
import json
import logging
import re
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from emulus.errors import EmulusError
from emulus.train.metrics import METRICS_FILE, TABLE_FILE, TRACE_FILE, MetricsLog, StepLine, profiled, read_metrics

CPU = torch.device("cpu")
BOARDS = ("tensorboard", "wandb", "trackio")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resumed_at=0)
    log.write(1, "train", {"loss": 0.1 + 0.2})
    log.write(1, "evaluation", {"visual_bits": 2.5})
    log.note(1, "step 1: loss spike")
    log.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "kind": "train", "loss": 0.1 + 0.2},
        {"step": 1, "kind": "evaluation", "visual_bits": 2.5},
        {"step": 1, "kind": "note", "text": "step 1: loss spike"},
    ]


def test_resuming_forgets_what_is_done_again(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, resumed_at=0)
    for step in range(1, 8):
        log.write(step, "train", {"loss": float(step)})
    again = MetricsLog(tmp_path, resumed_at=4)
    again.write(5, "train", {"loss": 5.5})
    lines = read_metrics(tmp_path)
    assert [line["loss"] for line in lines if line["kind"] == "train"] == [1.0, 2.0, 3.0, 4.0, 5.5]
    (restart,) = (line for line in lines if line["kind"] == "restart")
    assert (restart["step"], restart["again"]) == (4, 3)


@pytest.mark.parametrize(
    "damage", ['{"step": 3, "kind": "tr', "[1, 2]", '{"step": "x", "kind": "train"}', "\x00\x00", '"']
)
def test_damaged_lines_are_dropped(tmp_path: Path, damage: str) -> None:
    good = [{"step": 1, "kind": "train", "loss": 2.0}, {"step": 2, "kind": "train", "loss": 1.0}]
    text = "\n".join([json.dumps(good[0]), damage, json.dumps(good[1])])
    (tmp_path / METRICS_FILE).write_text(text)
    assert read_metrics(tmp_path) == good


def test_values_of_other_types_are_dropped_and_counted(tmp_path: Path) -> None:
    good = {"step": 1, "kind": "train", "loss": 2.0, "tokens": 5, "text": 1.5}
    wrong: dict[str, object] = {"visual": "2.0", "mfu": None, "wait": [1], "seconds": float("nan"), "frames": -1}
    lines = [
        json.dumps({**good, **wrong, "picture_psnr": "x"}),
        json.dumps({"step": 10**30, "kind": "train"}),
        json.dumps({"step": True, "kind": "train"}),
        json.dumps({"step": -1, "kind": "train"}),
        json.dumps({"step": 1, "kind": ["train"]}),
        json.dumps({"step": 1, "kind": "train", "text": "a text"}),
        "[" * 10_000,
        "9" * 10_000,
        json.dumps({"step": 2, "kind": "train", "loss": float("inf"), "grad_norm": float("nan")}),
        json.dumps({"step": 2, "kind": "note", "text": "a" * 2**20}),
        json.dumps({"step": 2, "kind": "note", "text": "b"}),
    ]
    (tmp_path / METRICS_FILE).write_text("\n".join(lines))
    damage = Counter[str]()
    first, second, third, note = read_metrics(tmp_path, damage)
    assert first == good
    assert second == {"step": 1, "kind": "train"}
    assert (third["loss"], note["text"]) == (float("inf"), "b")
    assert damage == {"values": 7, "lines": 8}
    # A resumed run keeps what is sound.
    MetricsLog(tmp_path, resumed_at=1)
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["train", "train", "restart"]


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).mkdir()
    with pytest.raises(EmulusError, match=r"metrics\.jsonl is not a file"):
        read_metrics(tmp_path)


def test_step_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0, 4.0, 4.0, 4.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    line = StepLine(2000, "tokens", CPU, flops_peak=1e12)
    monkeypatch.setattr(logging.getLogger("emulus"), "propagate", True)
    with caplog.at_level(logging.INFO, "emulus"):
        line.step(items=20_000, flops=1e12, wait=0.0)
        found = line.step(items=29_380, flops=0.648e12, wait=0.016)
        figures = {"loss": 3.21, "visual": 4.1, "grad_norm": 0.8, "learning_rate": 1e-3, "skipped": 0.0}
        line.show(120, figures)
    assert found["tokens"] == 29_380
    assert found["seconds"] == 2.0
    assert found["tokens_per_second"] == 14_690
    assert found["mfu"] == pytest.approx(0.324)
    assert found["wait"] == pytest.approx(0.008)
    assert found["memory"] > 0.01
    shown = re.sub(r"[\d.]+ GiB", "3.1 GiB", caplog.messages[0])
    assert shown == (
        "step 120/2000  loss 3.21  visual 4.1  grad_norm 0.8  lr 1.0e-3  12,345 tokens/s  MFU 41.2 %  wait 0.4 %  "
        "3.1 GiB  ETA 1:02:40"
    )


def test_step_line_shows_what_there_is(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("emulus"), "propagate", True)
    line = StepLine(10, "frames", CPU)
    with caplog.at_level(logging.INFO, "emulus"):
        figures = line.step(items=5)
        # Whatever of it is given again is not shown twice.
        line.show(1, {"loss": 1.0, "skipped": 3.0, **figures})
    assert "mfu" not in figures
    assert "MFU" not in caplog.messages[0]
    assert "skipped 3" in caplog.messages[0]
    assert caplog.messages[0].count("frames") == 1
    assert "seconds" not in caplog.messages[0]


def test_restart_forgets_what_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 101.0, 102.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    line = StepLine(10, "tokens", CPU)
    assert line.step(items=10)["seconds"] == 1.0
    line.restart()
    assert line.step(items=10)["seconds"] == 1.0


def test_tensorboard_has_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, resumed_at=0, boards=("tensorboard",))
    for step in range(1, 6):
        log.write(step, "train", {"loss": 1.0 / step})
    log.close()
    # Files are read in the order of their names, which hold the second in which they were made.
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2)
    log = MetricsLog(tmp_path, resumed_at=3, boards=("tensorboard",))
    log.write(4, "train", {"loss": 9.0})
    log.write(4, "evaluation", {"text_bits": 2.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
        (4, 9.0),
    ]
    assert [event.value for event in events.Scalars("evaluation/text_bits")] == [2.0]


@pytest.mark.parametrize("board", ["wandb", "trackio"])
def test_other_boards_take_the_figures(tmp_path: Path, board: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    # Read when it is imported.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(board)
    (tmp_path / "config.yaml").write_text("size: tiny\n")
    log = MetricsLog(tmp_path, resumed_at=0, boards=(board,))
    log.write(1, "train", {"loss": 1.0})
    log.write(1, "evaluation", {"text_bits": 2.0})
    log.close()
    suffix = "*.wandb" if board == "wandb" else "*.db"
    (written,) = tmp_path.rglob(suffix)
    assert b"train/loss" in written.read_bytes()


@pytest.mark.parametrize("board", BOARDS)
def test_a_missing_package_is_named(tmp_path: Path, board: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "torch.utils.tensorboard" if board == "tensorboard" else board
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EmulusError, match=rf"{board} is not installed: pip install .*{board}"):
        MetricsLog(tmp_path, resumed_at=0, boards=(board,))


def test_an_unknown_board_is_named(tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match="did you mean 'wandb'"):
        MetricsLog(tmp_path, resumed_at=0, boards=("wandbs",))


def test_profile_is_of_the_steps_asked_for(tmp_path: Path) -> None:
    matrix = torch.ones(8, 8)
    with profiled(2, tmp_path / "profile") as profiler:
        for _ in range(15):
            matrix @ matrix
            profiler.step()
    trace = json.loads(gzip.decompress((tmp_path / "profile" / TRACE_FILE).read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert {name for name in names if name.startswith("ProfilerStep")} == {"ProfilerStep#9", "ProfilerStep#10"}
    assert names.count("aten::matmul") == 2
    assert "aten::mm" in (tmp_path / "profile" / TABLE_FILE).read_text()


def test_no_profile_is_made_unless_asked_for(tmp_path: Path) -> None:
    with profiled(0, tmp_path / "profile") as profiler:
        for _ in range(15):
            profiler.step()
    assert not (tmp_path / "profile").exists()


def _write_from(rank: int, store: Path, run: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # The second one would fail if it opened a board.
    log = MetricsLog(run, resumed_at=0, boards=("none such",) if rank else ())
    log.write(1, "train", {"rank": float(rank)})
    log.note(1, f"from {rank}")
    log.close()
    with profiled(1, run / str(rank)) as profiler:
        for _ in range(12):
            profiler.step()
    dist.barrier()
    dist.destroy_process_group()


def _second(_: int, store: Path, run: Path) -> None:
    _write_from(1, store, run)


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    second = mp.start_processes(_second, (tmp_path / "store", tmp_path), nprocs=1, join=False, start_method="spawn")
    _write_from(0, tmp_path / "store", tmp_path)
    second.join()
    assert [line.get("rank", line.get("text")) for line in read_metrics(tmp_path)] == [0.0, "from 0"]
    assert (tmp_path / "0").exists()
    assert not (tmp_path / "1").exists()
