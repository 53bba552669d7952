"""The learning rate over a run."""

from __future__ import annotations

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


@pytest.mark.parametrize("change", [{"steps": 0}, {"learning_rate": -1.0}, {"ema_decay": 1.0}, {"keep": 0}])
def test_impossible_settings(change: dict[str, float]) -> None:
    with pytest.raises(EmulusError, match=next(iter(change))):
        TrainConfig(**change)  # type: ignore[arg-type]
