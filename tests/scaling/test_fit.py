"""The law is found where it holds, and intervals hold what they should."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.scaling.fit import Fit, Law, Point, _Problem, _starts, fit

SIZES = (2.2e6, 5.2e6, 8.5e6, 2.4e7)
TOKENS = (5e5, 1e6, 2e6, 4e6)
LAW = Law(e=2.0, a=33.0, b=400.0, alpha=0.28, beta=0.45)


def runs(law: Law, noise: float = 0.0, seed: int = 0) -> list[Point]:
    draw = random.Random(seed)
    return [
        Point(parameters=size, tokens=tokens, loss=law.loss(size, tokens) * math.exp(draw.gauss(0, noise)))
        for size in SIZES
        for tokens in TOKENS
    ]


@settings(max_examples=15, deadline=None)
@given(
    e=st.floats(1.0, 4.0),
    low=st.floats(0.3, 2.0),
    few=st.floats(0.3, 2.0),
    alpha=st.floats(0.2, 0.9),
    beta=st.floats(0.2, 0.9),
)
def test_constants_are_found_from_exact_losses(e: float, low: float, few: float, alpha: float, beta: float) -> None:
    """``low`` and ``few`` are what the smallest size and the fewest ids lose."""
    law = Law(e=e, a=low * SIZES[0] ** alpha, b=few * TOKENS[0] ** beta, alpha=alpha, beta=beta)
    found = fit(runs(law), draws=1).law
    assert found.alpha == pytest.approx(alpha, rel=0.02)
    assert found.beta == pytest.approx(beta, rel=0.02)
    assert found.e == pytest.approx(e, rel=0.02)
    assert found.loss(6e7, 1e7) == pytest.approx(law.loss(6e7, 1e7), rel=1e-4)


def test_constants_are_found_from_noisy_losses() -> None:
    found = fit(runs(LAW, noise=1e-4), draws=1).law
    assert found.alpha == pytest.approx(LAW.alpha, rel=0.1)
    assert found.beta == pytest.approx(LAW.beta, rel=0.1)
    assert found.loss(6e7, 8e6) == pytest.approx(LAW.loss(6e7, 8e6), rel=1e-3)


def test_one_wild_run_moves_little() -> None:
    """That is what Huber's loss is for: with squares the same run moves the prediction ten times as far."""
    points = runs(LAW, noise=1e-4)
    wild = [*points[:5], Point(parameters=points[5].parameters, tokens=points[5].tokens, loss=5.0), *points[6:]]
    true = LAW.loss(6e7, 8e6)
    huber, squares = (abs(fit(wild, draws=1, delta=delta).law.loss(6e7, 8e6) - true) for delta in (1e-3, 1e3))
    assert huber < 0.01 * true
    assert squares > 10 * huber


def test_intervals_hold_what_they_say() -> None:
    """Of 12 ladders with 0.5 % of noise, most measure what was foretold."""
    size, tokens, inside, widths = 5.4e7, 4e6, 0, []
    for seed in range(12):
        expected = fit(runs(LAW, noise=0.005, seed=seed), draws=40, seed=seed).predict(size, tokens)
        loss = LAW.loss(size, tokens) * math.exp(random.Random(1000 + seed).gauss(0, 0.005))
        inside += expected.low <= loss <= expected.high
        widths.append((expected.high - expected.low) / loss)
    assert inside >= 8
    assert 0.01 < sorted(widths)[6] < 0.1


def test_intervals_of_constants_narrow_with_the_noise() -> None:
    wide, narrow = (fit(runs(LAW, noise=noise), draws=60).constants() for noise in (1e-2, 1e-4))
    for name in ("e", "alpha", "beta"):
        assert wide[name].low <= wide[name].value <= wide[name].high
        assert narrow[name].high - narrow[name].low < 0.2 * (wide[name].high - wide[name].low)
        assert narrow[name].low * 0.99 <= getattr(LAW, name) <= narrow[name].high * 1.01


def test_the_minimum_is_that_of_lbfgs() -> None:
    """Hoffmann et al. minimised by L-BFGS from a grid of starts: the lowest of theirs is not below ours."""
    points = runs(LAW, noise=0.005)
    sizes, tokens, losses = (
        torch.tensor([getattr(point, name) for point in points], dtype=torch.float64).log()
        for name in ("parameters", "tokens", "loss")
    )
    problem = _Problem(sizes=sizes - sizes.mean(), tokens=tokens - tokens.mean(), delta=1e-3)
    starts = _starts(problem, losses)
    ours = float(problem.minimise(starts, losses.expand(len(starts), -1))[1].min())
    heights = []
    for start in starts[::27]:
        values = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([values], max_iter=200, line_search_fn="strong_wolfe")

        def height(values: torch.Tensor = values, optimizer: torch.optim.LBFGS = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            reached = problem.height(values[None], losses[None]).sum()
            reached.backward()
            return reached

        optimizer.step(height)
        heights.append(float(problem.height(values.detach()[None], losses[None])))
    assert ours <= min(heights) * (1 + 1e-6)
    assert min(heights) <= ours * 1.01


def test_the_same_seed_gives_the_same() -> None:
    first, again, other = (fit(runs(LAW, noise=0.01), draws=20, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert isinstance(first, Fit)
    assert first.law == other.law
    assert first.predict(5e7, 4e6) == again.predict(5e7, 4e6) != other.predict(5e7, 4e6)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (runs(LAW)[:5], "5 runs cannot give five constants"),
        ([Point(parameters=1e6, tokens=float(count), loss=3.0) for count in range(1, 9)], "1 different sizes"),
        ([point for point in runs(LAW) if point.parameters < 6e6], "2 different sizes"),
        ([point for point in runs(LAW) if point.tokens < 2e6], "2 different numbers of tokens"),
        ([*runs(LAW), Point(parameters=1e6, tokens=1e6, loss=float("nan"))], "loss must be positive, got nan"),
        ([*runs(LAW), Point(parameters=0, tokens=1e6, loss=3.0)], "parameters must be positive"),
    ],
)
def test_what_cannot_be_fitted(points: list[Point], message: str) -> None:
    with pytest.raises(EmulusError, match=message):
        fit(points)


def test_losses_that_do_not_fall_give_a_flat_law() -> None:
    """Nothing to learn from is no error, but the law then says so: no size and no ids help."""
    flat = fit([Point(parameters=size, tokens=tokens, loss=3.0) for size in SIZES for tokens in TOKENS], draws=5)
    assert flat.predict(6e7, 8e6).value == pytest.approx(3.0, rel=1e-3)
