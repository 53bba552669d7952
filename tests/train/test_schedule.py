"""The learning rate over a run."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.train.config import TrainConfig
from emulus.train.schedule import learning_rate


@given(
    st.integers(1, 300),
    st.integers(0, 100),
    st.sampled_from(["cosine", "wsd"]),
    st.floats(0, 1),
)
def test_never_above_the_peak_nor_negative(steps: int, warmup: int, schedule: str, floor: float) -> None:
    config = TrainConfig(
        steps=steps, warmup_steps=warmup, schedule=schedule, final_learning_rate=floor, learning_rate=0.5
    )
    rates = [learning_rate(config, step) for step in range(steps)]
    assert all(0 <= rate <= 0.5 + 1e-12 for rate in rates)


def test_shapes() -> None:
    cosine = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    assert learning_rate(cosine, 0) == pytest.approx(0.1)
    assert learning_rate(cosine, 9) == pytest.approx(1.0)
    assert learning_rate(cosine, 54) == pytest.approx(0.5)
    assert learning_rate(cosine, 99) == pytest.approx(0.0)
    wsd = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0, schedule="wsd", decay_share=0.2)
    assert [learning_rate(wsd, step) for step in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert learning_rate(wsd, 90) == pytest.approx(0.5)
    assert learning_rate(wsd, 99) == pytest.approx(0.05)


@given(
    st.integers(1, 200),
    st.integers(0, 60),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.floats(0, 1),
)
def test_rates_are_those_of_the_definition(steps: int, warmup: int, decay: float, floor: float) -> None:
    """Warm-up to the peak, then along the schedule to ``final_learning_rate`` of it, step by step."""
    both = {
        schedule: TrainConfig(
            steps=steps,
            warmup_steps=warmup,
            schedule=schedule,  # type: ignore[arg-type]
            decay_share=decay,
            final_learning_rate=floor,
            learning_rate=2.0,
        )
        for schedule in ("cosine", "wsd")
    }
    for step in range(steps):
        rise = 1.0 if step >= warmup else (step + 1) / warmup
        turn = 0.0 if step < warmup else math.pi * (step + 1 - warmup) / max(steps - warmup, 1)
        cosine = floor + (1 - floor) * (0.5 + 0.5 * math.cos(turn))
        falling = max(steps * decay, 1)
        wsd = 1.0 if steps - step >= falling else floor + (1 - floor) * (steps - step) / falling
        assert learning_rate(both["cosine"], step) == pytest.approx(2 * rise * cosine, abs=1e-9)
        assert learning_rate(both["wsd"], step) == pytest.approx(2 * rise * wsd, abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_floor_is_a_share_of_the_peak(schedule: Literal["cosine", "wsd"]) -> None:
    config = TrainConfig(steps=1000, warmup_steps=10, schedule=schedule, learning_rate=0.5, final_learning_rate=0.3)
    assert learning_rate(config, 999) == pytest.approx(0.15, abs=0.002)
    level = dataclasses.replace(config, final_learning_rate=1.0)
    assert {learning_rate(level, step) for step in range(10, 1000)} == {0.5}


@pytest.mark.parametrize("change", [{"steps": 0}, {"learning_rate": -1.0}, {"ema_decay": 1.0}, {"keep": 0}])
def test_impossible_settings(change: dict[str, float]) -> None:
    with pytest.raises(EmulusError, match=next(iter(change))):
        TrainConfig(**change)  # type: ignore[arg-type]
