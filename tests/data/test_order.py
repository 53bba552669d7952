"""The endless order: every record once per epoch, shares kept, nothing remembered."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulus.data.order import hashed, mixed, shuffled, uniform


@given(st.integers(1, 700), st.integers(0, 2**64 - 1), st.integers(0, 2**30))
def test_every_record_stands_once_in_an_epoch(count: int, seed: int, epoch: int) -> None:
    found = shuffled(np.arange(epoch * count, (epoch + 1) * count), count, seed)
    assert sorted(found.tolist()) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [shuffled(np.arange(start, start + 100), 100, seed) for start in (0, 100, 200) for seed in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 6
    # The mean distance of two random orders of n is n / 3.
    distances = [np.abs(a - b).mean() for a, b in pairwise(orders)]
    assert 25 < min(distances) <= max(distances) < 42


def test_all_orders_of_a_few_come_about_equally_often() -> None:
    orders, counts = np.unique([shuffled(np.arange(4), 4, seed) for seed in range(4800)], axis=0, return_counts=True)
    assert len(orders) == 24
    assert 140 < counts.min() <= counts.max() < 265


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20), st.integers(1, 10**11), st.integers(0, 99))
def test_places_are_found_one_by_one_as_together(places: list[int], count: int, seed: int) -> None:
    together = shuffled(np.array(places), count, seed)
    alone = [int(shuffled(np.array([place]), count, seed)[0]) for place in places]
    assert together.tolist() == alone
    assert all(0 <= number < count for number in alone)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 10**11))
def test_shares_are_kept_at_every_place(weights: list[float], start: int) -> None:
    source, within = mixed(np.arange(start, start + 300), weights)
    shares = np.array(weights) / sum(weights)
    for number, share in enumerate(shares):
        here = within[source == number]
        # Counting is without gaps, and never far from the share; shares are rounded to a millionth.
        assert (np.diff(here) == 1).all()
        if len(here):
            assert abs(here[0] - share * start) < len(weights) + 2 + start * 2e-6
        assert abs(len(here) - 300 * share) <= len(weights) + 1


def test_whole_weights_are_kept_exactly() -> None:
    source, _ = mixed(np.arange(10 * 1000), [1, 899, 100])
    assert all(np.bincount(part).tolist() == [1, 899, 100] for part in np.split(source, 10))


@pytest.mark.parametrize("start", [0, 10**12])
def test_numbers_are_spread_evenly(start: int) -> None:
    found = uniform(7, np.arange(start, start + 20_000)[:, None], np.arange(4))
    assert found.shape == (20_000, 4)
    assert 0 <= found.min() < 0.001
    assert 0.999 < found.max() < 1
    assert np.allclose(found.mean(0), 0.5, atol=0.01)
    assert np.abs(np.corrcoef(found.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(found[1:, 0], found[:-1, 0])[0, 1]) < 0.03


def test_words_are_hashed_in_order() -> None:
    assert len({int(hashed(*words)[0]) for words in [(1, 2), (2, 1), (1, 2, 0), (1,), (0, 1, 2)]}) == 5
