"""Pictures that counting alone can draw: the baseline that every drawing must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from emulus.data.tokens import TokenizedItem
from emulus.errors import EmulusError
from emulus.evaluate.ngrams import NGrams
from emulus.sequence import Image

Codes = npt.NDArray[np.int64]


def doodles(training: Sequence[TokenizedItem], count: int, codebook_size: int, *, seed: int = 0) -> list[Image]:
    """Draw pictures code by code, row by row, each code by how often it followed the one before it in training.

    Args:
        training: What is counted; its pictures all have as many rows and columns. Clips are not looked at.
        count: How many pictures.
        codebook_size: Codes there are.
        seed: Of the draws.

    Raises:
        EmulusError: There are no training pictures, or they differ in size.
    """
    grids = [item.media.codes.numpy() for item in training if isinstance(item.media, Image)]
    if len({grid.shape for grid in grids}) != 1:
        raise EmulusError("drawing by counts needs training pictures of one size; tokenize them at one")
    codes = np.stack(grids).reshape(len(grids), -1)
    # A code that no picture has stands before the first one of each.
    previous = np.concatenate([np.full((len(codes), 1), codebook_size), codes[:, :-1]], axis=1)
    counts = NGrams.fit(previous.ravel(), codes.ravel(), (0, codebook_size))
    drawn = _sample(counts, count, codes.shape[1], codebook_size, np.random.default_rng(seed))
    return [Image(torch.from_numpy(row.reshape(grids[0].shape))) for row in drawn]


def _sample(counts: NGrams, rows: int, length: int, start: int, draw: np.random.Generator) -> Codes:
    """Rows of codes, all drawn in step. A code that never had a follower is followed by any, as often as it occurs."""
    size = len(counts.counts)
    ends, singles = np.cumsum(counts.pairs), np.cumsum(counts.counts)
    # Pairs of one first code stand together: where those of each code begin among the cumulated counts.
    bounds = np.concatenate([[0], ends])[np.searchsorted(counts.keys, np.arange(size + 2) * size)]
    result = np.empty((rows, length), dtype=np.int64)
    last = np.full(rows, start)
    for place in range(length):
        low, high = bounds[last], bounds[last + 1]
        chance = draw.random(rows)
        pair = np.searchsorted(ends, low + np.floor(chance * (high - low)).astype(np.int64), side="right")
        single = np.searchsorted(singles, np.floor(chance * singles[-1]).astype(np.int64), side="right")
        known = high > low
        last = np.where(known, counts.keys[np.minimum(pair, len(ends) - 1)] % size, single)
        result[:, place] = last
    return result
