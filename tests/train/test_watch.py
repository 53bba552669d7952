"""Outliers, spikes and stragglers are found; the state goes through JSON bit for bit."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.train.watch import LEAST_NORMS, MOST_IN_A_ROW, SPAN, Watch


def test_outlier_is_told_from_the_usual_norms() -> None:
    watch = Watch(4.0)
    assert not watch.outlier(100.0)  # nothing is known yet
    assert not any(watch.outlier(1.0 + 0.1 * (n % 5)) for n in range(LEAST_NORMS))
    assert watch.outlier(6.0)
    assert not watch.outlier(4.0)
    assert watch.skipped == 1


def test_what_was_skipped_is_not_usual() -> None:
    watch = Watch(4.0)
    assert not any(watch.outlier(1.0) for _ in range(LEAST_NORMS))
    for _ in range(5):
        assert all(watch.outlier(100.0) for _ in range(MOST_IN_A_ROW))
        assert not watch.outlier(1.0)


def test_a_norm_that_stays_high_is_learnt_anew() -> None:
    watch = Watch(4.0)
    assert not any(watch.outlier(1.0) for _ in range(LEAST_NORMS))
    found = [watch.outlier(100.0) for _ in range(100)]
    assert found == [True] * MOST_IN_A_ROW + [False] * (100 - MOST_IN_A_ROW)
    assert watch.outlier(1000.0)


@given(st.lists(st.floats(0, 1e30), max_size=100))
def test_without_a_threshold_only_what_is_not_finite_is_skipped(norms: list[float]) -> None:
    watch = Watch(0.0)
    assert not any(watch.outlier(norm) for norm in norms)
    assert watch.outlier(math.nan)
    assert watch.outlier(math.inf)
    assert watch.skipped == 2


def test_skipped_steps_are_told_of_when_they_begin_and_at_the_end() -> None:
    watch = Watch(0.0)
    assert watch.summary(10) is None
    notes = [
        watch.skip_note(step, norm)
        for step, norm in enumerate([math.nan, math.inf, 1.0, math.nan])
        if watch.outlier(norm)
    ]
    assert ["precision fp32" in note for note in notes] == [True, False, True]
    assert all("skipped" in note for note in notes)
    again = Watch(0.0)
    again.load_state(json.loads(json.dumps(watch.state())))
    for each in (watch, again):
        summary = each.summary(1000)
        assert summary is not None
        assert summary.startswith("3 of 1,000 steps")
        assert "3 with a NaN" in summary


def test_spike_is_noted_once_and_a_new_level_is_learnt() -> None:
    watch, draw = Watch(), np.random.default_rng(0)
    assert not any(watch.loss(step, float(3 + 0.1 * draw.standard_normal())) for step in range(200))
    note = watch.loss(200, 5.0)
    assert note is not None
    assert "step 200" in note
    assert "5" in note
    assert watch.loss(201, 3.0) is None
    found = [watch.loss(step, float(5 + 0.1 * draw.standard_normal())) for step in range(202, 500)]
    assert found[0] is not None
    assert not any(found[128:])
    assert watch.spikes == 1 + sum(note is not None for note in found)


def test_even_losses_have_no_spikes() -> None:
    watch = Watch()
    assert not any(watch.loss(step, 2.0 + 1e-6 * (step % 3 == 0)) for step in range(100))
    assert watch.loss(100, math.nan) == "step 100: the loss is nan"
    assert watch.loss(101, 2.0) is None
    assert watch.spikes == 1


@pytest.mark.parametrize("world", [2, 3, 8])
def test_straggler_is_named(world: int) -> None:
    watch = Watch()
    slow = [1.0] * (world - 1) + [2.0]
    notes = [watch.seconds(slow) for _ in range(2 * SPAN)]
    assert [note is not None for note in notes] == ([False] * (SPAN - 1) + [True]) * 2
    assert f"process {world - 1} is slow: 2 s where the median is 1 s" in notes


def test_one_slow_step_or_one_process_is_no_straggler() -> None:
    watch = Watch()
    assert not any(watch.seconds([1.0, 5.0 if n == 3 else 1.0, 1.0]) for n in range(4 * SPAN))
    # Another number of processes starts a new span.
    assert not any(watch.seconds([1.0]) for _ in range(4 * SPAN))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=150), st.lists(st.floats(0, 100), max_size=40), st.integers(0))
def test_state_decides_alike_after_json(before: list[float], after: list[float], cut: int) -> None:
    watch = Watch(3.0)
    for step, value in enumerate(before):
        watch.outlier(value)
        watch.loss(step, value)
    other = Watch(3.0)
    other.load_state(json.loads(json.dumps(watch.state())))
    assert other.state() == watch.state()
    for step, value in enumerate(after):
        assert other.outlier(value) == watch.outlier(value)
        assert other.loss(step, value) == watch.loss(step, value)
    assert json.dumps(other.state()) == json.dumps(watch.state())


@pytest.mark.parametrize("state", [{}, {"norms": 3}, {**Watch().state(), "losses": ["high"]}])
def test_damaged_state_is_refused(state: dict[str, object]) -> None:
    watch = Watch()
    watch.loss(1, 2.0)
    before = watch.state()
    with pytest.raises(EmulusError, match="damaged"):
        watch.load_state(state)
    assert watch.state() == before
