"""Unigram and bigram models against counts made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulus.evaluate.ngrams import ADDED, STRENGTHS, NGrams, tuned_bits

# Ids 10 to 12 are counted; 1 and 2 are other ids before them.
PREVIOUS = np.array([1, 10, 10, 11, 2])
IDS = np.array([10, 10, 11, 10, 12])


@pytest.fixture
def counts() -> NGrams:
    return NGrams.fit(PREVIOUS, IDS, (10, 13))


def test_unigram_by_hand(counts: NGrams) -> None:
    # 10 occurs three times, 11 and 12 once each; with one added to each of the three ids that is 4, 2 and 2 of 8.
    assert counts.unigram(np.array([10, 11, 12]), 1.0) == pytest.approx([4 / 8, 2 / 8, 2 / 8])


def test_bigram_by_hand(counts: NGrams) -> None:
    # After 10 came 10 once and 11 once; with strength 2 the unigram weighs as much as the two.
    found = counts.bigram(np.array([10, 10, 10]), np.array([10, 11, 12]), 1.0, 2.0)
    assert found == pytest.approx([(1 + 2 * 4 / 8) / 4, (1 + 2 * 2 / 8) / 4, (0 + 2 * 2 / 8) / 4])


def test_unseen_context_is_the_unigram(counts: NGrams) -> None:
    ids = np.array([10, 11, 12])
    for unseen in (5, 12, 999):
        assert counts.bigram(np.full(3, unseen), ids, 0.5, 3.0) == pytest.approx(counts.unigram(ids, 0.5))


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(4, 9)), min_size=1, max_size=60),
    st.integers(0, 25),
    st.floats(0.01, 10),
    st.floats(0.1, 1000),
)
def test_probabilities_sum_to_one(pairs: list[tuple[int, int]], context: int, added: float, strength: float) -> None:
    previous, ids = np.array(pairs).T
    counts, every = NGrams.fit(previous, ids, (4, 10)), np.arange(4, 10)
    assert counts.unigram(every, added).sum() == pytest.approx(1)
    assert counts.bigram(np.full(6, context), every, added, strength).sum() == pytest.approx(1)


def test_tuned_bits_of_a_chain() -> None:
    """Ids that follow one another in a ring: nothing to be learned from counts, everything from pairs."""
    ring = np.tile(np.arange(8), 500)
    counts = NGrams.fit(ring[:-1], ring[1:], (0, 8))
    unigram, bigram = tuned_bits(counts, ring[:99], ring[1:100])
    assert unigram.mean() == pytest.approx(3, abs=0.01)
    assert bigram.mean() < 0.01


def test_tuning_takes_the_best_smoothing(counts: NGrams) -> None:
    previous, ids = np.array([10, 11]), np.array([12, 12])
    _, bigram = tuned_bits(counts, previous, ids)
    assert bigram.mean() <= -math.log2(float(counts.bigram(previous, ids, 1.0, 1.0).prod())) / 2


@pytest.mark.parametrize("name", ["unigram", "bigram"])
def test_no_other_smoothing_is_better(counts: NGrams, name: str) -> None:
    previous, ids = np.array([10, 11, 1, 10, 2]), np.array([12, 12, 10, 10, 11])
    unigram, bigram = tuned_bits(counts, previous, ids)
    if name == "unigram":
        found, others = unigram, [counts.unigram(ids, added) for added in ADDED]
    else:
        best = min(ADDED, key=lambda added: -np.log2(counts.unigram(ids, added)).mean())
        found, others = bigram, [counts.bigram(previous, ids, best, strength) for strength in STRENGTHS]
    bits = [-np.log2(other).mean() for other in others]
    assert found.mean() == pytest.approx(min(bits))
    assert min(bits) < max(bits)


def test_three_million_ids_take_seconds() -> None:
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 3000, size=3_000_000)
    counts = NGrams.fit(ids[:-1], ids[1:], (0, 3000))
    assert counts.pairs.sum() == len(ids) - 1
    unigram, _ = tuned_bits(counts, ids[:1000], ids[1:1001])
    assert unigram.mean() == pytest.approx(math.log2(3000), abs=0.05)
