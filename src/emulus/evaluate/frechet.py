"""How far two sets of pictures are apart as sets: the Fréchet distance of Gaussians fitted to their features."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from emulus.errors import EmulusError


def frechet_distance(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> float:
    """The squared Fréchet distance of two Gaussians that have the sets' means and covariances.

    It is ``|m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))``. The last trace is computed as the sum of the singular
    values of ``A B^T``, where ``A^T A = C1`` and ``B^T B = C2``: no matrix root is taken, so it is exact to rounding
    also for fewer samples than features, whose covariances have no inverse. Everything is in float64.

    Few samples make it too large, by much where they are fewer than the features. So only figures of equally many
    samples can be compared, and only beside the distance of two sets of real pictures of that size, which would be zero
    for endless ones.

    Args:
        first: Features of one set, a row each.
        second: Features of the other.

    Raises:
        EmulusError: A set has fewer than two pictures, or not all features are finite numbers.

    Source: Dowson & Landau 1982, "The Fréchet distance between multivariate normal distributions"; as a measure of
    generated pictures: Heusel et al. 2017 (arXiv:1706.08500), with another network's features.
    """
    if min(len(first), len(second)) < 2:
        raise EmulusError(f"a Fréchet distance needs two pictures on each side, got {len(first)} and {len(second)}")
    if not (first.isfinite().all() and second.isfinite().all()):
        raise EmulusError("a Fréchet distance needs finite features; the network that made them overflowed")
    (mean, root), (other_mean, other_root) = _gaussian(first), _gaussian(second)
    together = torch.linalg.svdvals(root @ other_root.T).sum()
    spread = root.square().sum() + other_root.square().sum() - 2 * together
    return float((mean - other_mean).square().sum() + spread.clamp(min=0))


def _gaussian(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and a matrix ``A`` with ``A^T A`` the covariance, of no more rows than it needs."""
    exact = rows.double()
    mean = exact.mean(0)
    root = (exact - mean) / (len(rows) - 1) ** 0.5
    return mean, torch.linalg.qr(root, mode="r").R if len(root) > root.shape[1] else root
