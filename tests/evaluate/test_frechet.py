"""The Fréchet distance of sets whose distance is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.evaluate.frechet import frechet_distance


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 20), st.integers(0, 5))
def test_it_is_symmetric_and_zero_for_equal_sets(count: int, other: int, width: int, seed: int) -> None:
    first, second = rows(count, width, seed), rows(other, width, seed + 1) * 2 + 1
    assert frechet_distance(first, first.flip(0)) == pytest.approx(0, abs=1e-9)
    there, back = frechet_distance(first, second), frechet_distance(second, first)
    assert there == pytest.approx(back, rel=1e-9)
    assert there > 0


def test_a_shift_counts_its_square() -> None:
    # Fewer samples than features: the covariance has no inverse, and the shift is all the same.
    few = rows(10, 64)
    assert frechet_distance(few, few + 3) == pytest.approx(64 * 9, rel=1e-9)


def test_known_gaussians() -> None:
    # Exactly white rows, scaled: the distance of two diagonal covariances is the sum of squared differences of spreads.
    white = torch.linalg.qr(rows(100, 5) - rows(100, 5).mean(0)).Q * 99**0.5
    one, two = torch.tensor([1.0, 2, 3, 4, 5]).double(), torch.tensor([2.0, 2, 1, 0, 5]).double()
    assert frechet_distance(white * one, white.flip(0) * two) == pytest.approx(1 + 0 + 4 + 16 + 0, rel=1e-9)


def test_it_is_the_formula_with_a_matrix_root() -> None:
    first, second = rows(60, 7) @ rows(7, 7, 5), rows(50, 7, 1) @ rows(7, 7, 6) + 1
    c1, c2 = torch.cov(first.T), torch.cov(second.T)
    root = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()
    formula = (first.mean(0) - second.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * root
    assert frechet_distance(first, second) == pytest.approx(float(formula), rel=1e-8)


def test_few_samples_make_it_larger() -> None:
    means = [
        sum(frechet_distance(rows(n, 32, seed), rows(n, 32, seed + 100)) for seed in range(5)) for n in (16, 64, 256)
    ]
    assert means[0] > means[1] > means[2] > 0


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(EmulusError, match="two pictures on each side"):
        frechet_distance(rows(1, 3), rows(5, 3))
    with pytest.raises(EmulusError, match="finite"):
        frechet_distance(rows(3, 3), torch.full((3, 3), float("nan")))
