"""place -> record: an endless order in which nothing is kept, so that any place of it is known at once.

Everything here is a function of its arguments alone and works on many places at a time. Grain's own shuffle does the
same one place at a time, for 5 to 40 microseconds of Python each and milliseconds where there are few records; here a
thousand places take less than a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Places = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_ROUNDS = 6
_SHARES = 1 << 20
"""Weights become whole numbers of about this sum, so that places up to 2^42 can be counted in 64 bits."""


def hashed(*words: int | Places | Hashes) -> Hashes:
    """A random-looking 64-bit number for each combination of whole numbers.

    Source: splitmix64, Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".
    """
    found = np.zeros(1, np.uint64)
    for word in words:
        # Overflow is meant.
        found = (found ^ np.asarray(word).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        found = found ^ (found >> np.uint64(31))
    return found


def uniform(*words: int | Places | Hashes) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each combination of whole numbers."""
    return (hashed(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled(places: Places, count: int, seed: int) -> Places:
    """Which of ``count`` records stands at each place: every one once in each epoch, each time in another order.

    Args:
        places: From 0 on; ``count`` of them are an epoch.
        count: How many records there are.
        seed: Of all epochs.

    Returns:
        As many numbers below ``count``.

    Source: a Feistel network with cycle walking, Black & Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    epoch, position = np.divmod(places, count)
    half = np.uint64(max((count - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = hashed(seed, epoch)
    found = position.astype(np.uint64)
    outside = np.arange(len(places))
    # The network permutes a power of four that is at least ``count``: who falls outside goes on until inside.
    while len(outside):
        left, right = found[outside] >> half, found[outside] & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (hashed(keys[outside], number, right) & mask)
        found[outside] = (left << half) | right
        outside = outside[found[outside] >= count]
    return found.astype(np.int64)


def mixed(places: Places, weights: Sequence[float]) -> tuple[Places, Places]:
    """Which of several sources stands at each place, and the how manieth of that source it is.

    At every place each source has come as often as its weight says, to within a place or two.

    Args:
        places: From 0 on.
        weights: Above 0, in any unit. Whole numbers of a sum up to 2^20 are kept exactly, others to a millionth.

    Returns:
        The source of each place, and the place within that source.
    """
    total = sum(weights)
    exact = total <= _SHARES and all(float(weight).is_integer() for weight in weights)
    shares = [int(weight) if exact else max(round(weight / total * _SHARES), 1) for weight in weights]
    rest = sum(shares)
    source = np.full(len(places), -1, np.int64)
    within = np.zeros(len(places), np.int64)
    # Of the places that are left, the first source takes its share, evenly; the next of what is then left, and so on.
    before, after = places, places + 1
    for number, share in enumerate(shares):
        left_before, left_after = before * (rest - share) // rest, after * (rest - share) // rest
        taken = (source < 0) & (after - left_after > before - left_before)
        source[taken] = number
        within[taken] = (before - left_before)[taken]
        before, after, rest = left_before, left_after, rest - share
    return source, within
