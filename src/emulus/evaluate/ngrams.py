"""What can be foretold without a network: unigram and bigram models of the training ids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Bits = npt.NDArray[np.float64]
Probabilities = npt.NDArray[np.float64]

# Tried on the very ids that are scored, in favour of these models.
ADDED = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
STRENGTHS = tuple(2.0**power for power in range(-4, 17))


@dataclass(frozen=True, kw_only=True)
class NGrams:
    """Counts of ids and of pairs of neighbours.

    Attributes:
        start: First id of the modality.
        counts: How often each id of the modality occurs, ``(size,)``.
        contexts: How often each id of the whole vocabulary comes before one of the modality.
        keys: The pairs that occur, sorted: ``previous * size + id - start``.
        pairs: How often each of them occurs.
    """

    start: int
    counts: Ids
    contexts: Ids
    keys: Ids
    pairs: Ids

    @classmethod
    def fit(cls, previous: Ids, ids: Ids, id_range: tuple[int, int]) -> NGrams:
        """Count.

        Args:
            previous: The id before each of ``ids``, from anywhere in the vocabulary.
            ids: Ids of one modality.
            id_range: That modality's ids ``(start, stop)``.
        """
        start, stop = id_range
        keys, pairs = np.unique(previous * (stop - start) + ids - start, return_counts=True)
        return cls(
            start=start,
            counts=np.bincount(ids - start, minlength=stop - start),
            contexts=np.bincount(previous),
            keys=keys,
            pairs=pairs,
        )

    def unigram(self, ids: Ids, added: float) -> Probabilities:
        """Probability of each id: its count plus ``added``, over the sum of these."""
        return (self.counts[ids - self.start] + added) / (self.counts.sum() + added * len(self.counts))

    def bigram(self, previous: Ids, ids: Ids, added: float, strength: float) -> Probabilities:
        """Probability of each id after the previous one, interpolated with the unigram.

        A context that was seen ``n`` times counts ``n / (n + strength)``, the unigram the rest.

        Source: MacKay & Peto 1995, "A hierarchical Dirichlet language model".
        """
        seen = np.where(previous < len(self.contexts), self.contexts[previous % len(self.contexts)], 0)
        keys = previous * len(self.counts) + ids - self.start
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        together = np.where(self.keys[places] == keys, self.pairs[places], 0)
        return (together + strength * self.unigram(ids, added)) / (seen + strength)


def tuned_bits(model: NGrams, previous: Ids, ids: Ids) -> tuple[Bits, Bits]:
    """Bits of each id under the unigram and the bigram model.

    Both are smoothed as suits these very ids best, which flatters them a little.

    Args:
        model: Counts of training ids.
        previous: The id before each.
        ids: At least one.

    Returns:
        Bits per id of the unigram and of the bigram model, as long as ``ids``.
    """
    added = min(ADDED, key=lambda added: _mean_bits(model.unigram(ids, added)))
    strength = min(STRENGTHS, key=lambda strength: _mean_bits(model.bigram(previous, ids, added, strength)))
    return -np.log2(model.unigram(ids, added)), -np.log2(model.bigram(previous, ids, added, strength))


def _mean_bits(probabilities: Probabilities) -> float:
    return float(-np.log2(probabilities).mean())
