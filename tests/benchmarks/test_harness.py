"""The harness: turns taken, numbers right, failures told."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import (
    Case,
    Options,
    Timings,
    Unequal,
    case,
    conditions,
    interleave,
    interleave_measured,
    main,
    require,
    timed,
)
from emulus.errors import EmulusError


def test_ways_take_turns() -> None:
    calls: list[str] = []
    timings = interleave(lambda: calls.append("a"), lambda: calls.append("b"), pairs=3)
    assert calls == ["a", "b"] * 3
    assert len(timings.baseline) == len(timings.ours) == 3
    assert timings.ratio > 0


def test_the_ratio_is_the_median_of_the_pairs() -> None:
    timings = Timings(baseline=[2.0, 9.0, 8.0], ours=[1.0, 3.0, 2.0])
    assert timings.ratios == [2, 3, 4]
    assert (timings.ratio, timings.spread) == (3, (2, 4))


def test_ways_may_measure_themselves() -> None:
    before, after = iter([6.0, 8.0]), iter([2.0, 2.0])
    timings = interleave_measured(lambda: next(before), lambda: next(after), pairs=2)
    assert (timings.ratio, timings.spread) == (3.5, (3, 4))


@pytest.mark.parametrize("pairs", [0, -1])
def test_no_pairs(pairs: int) -> None:
    with pytest.raises(EmulusError, match="at least 1"):
        interleave(list, list, pairs=pairs)


def test_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, cpu = iter([1.0, 4.0, 7.0, 7.0]), iter([5.0, 5.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(time, "process_time", lambda: next(cpu))
    assert timed(list, "wall") == 3
    assert timed(list, "cpu") == 0.5
    assert 0 < timed(list, "wall") < 1e-6, "no call is infinitely fast"


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not say what others do")
def test_other_work_is_noted() -> None:
    timings = interleave(list, list, pairs=1)
    assert timings.others is not None
    assert timings.others >= 0


def test_a_case_says_what_it_holds_for() -> None:
    timings = Timings(baseline=[2.0, 4.0], ours=[1.0, 1.0], others=0.25)
    found = case("some", timings, Options(pairs=2, clock="wall"), rows=7)
    assert (found.case, found.ratio, found.spread) == ("some", 3, (2, 4))
    expected = {"rows": 7, "baseline_s": 3, "ours_s": 1, "others": 0.25, "clock": "wall", "pairs": 2, "threads": 1}
    assert expected.items() <= found.conditions.items()
    assert found.conditions["torch"] == torch.__version__
    assert "CPUs" in found.conditions["machine"]


def test_what_is_not_equal_is_refused() -> None:
    require(True, "fine")
    with pytest.raises(Unequal, match="far apart"):
        require(False, "far apart")


def doubled(options: Options) -> Case:
    rows = options.settings["rows"]
    return Case(case="doubled", ratio=2.0 * rows, spread=(1.0, 3.0), conditions=conditions(options))


def broken(_: Options) -> Case:
    raise Unequal("nothing is equal")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    status = main({"broken": broken, "doubled": doubled}, ["--json", *arguments], settings={"rows": (5, "rows")})
    printed = capsys.readouterr()
    return status, [json.loads(line) for line in printed.out.splitlines()], printed.err


def test_a_broken_case_does_not_hide_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    status, found, errors = run(capsys)
    assert status == 1
    assert errors == "broken: nothing is equal\n"
    assert [(each["case"], each["ratio"], each["spread"]) for each in found] == [("doubled", 10, [1, 3])]


def test_cases_and_settings_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["--only", "doubled", "--rows", "2", "--pairs", "9", "--threads", "2", "--clock", "wall", "--toy"]
    status, (found,), errors = run(capsys, *arguments)
    assert (status, errors, found["ratio"]) == (0, "", 4)
    expected = {"pairs": 9, "threads": 2, "clock": "wall", "toy": True}
    assert expected.items() <= found["conditions"].items()
    assert torch.get_num_threads() == threads


def test_a_table_without_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main({"doubled": doubled}, [], settings={"rows": (5, "rows")}) == 0
    assert capsys.readouterr().out.split() == ["doubled", "10.00x", "[1.00", "to", "3.00]"]


def test_an_unknown_case(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(capsys, "--only", "tripled")
    assert "doubled" in capsys.readouterr().err
