"""What the vision tokenizer is trained to minimise, term by term.

A term is a function of pixels and their reconstruction; :func:`reconstruction_loss` weighs and sums those whose weight
is not zero. The commitment term belongs to the codebook (``codebook.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Weight of each term; the field names are the terms' names."""

    l2: float = 1.0
    l1: float = 0.0


TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": F.mse_loss, "l1": F.l1_loss}


def reconstruction_loss(
    painted: Tensor, pixels: Tensor, config: ReconstructionConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the reconstruction terms.

    Args:
        painted: Reconstruction, any shape.
        pixels: What it should be, the same shape, in [-1, 1].
        config: Weights.

    Returns:
        The sum, and each term unweighted by name.
    """
    weights = {name: float(getattr(config, name)) for name in TERMS}
    terms = {name: TERMS[name](painted.float(), pixels) for name, weight in weights.items() if weight}
    total = sum((weights[name] * term for name, term in terms.items()), start=painted.new_zeros((), dtype=pixels.dtype))
    return total, {name: term.detach() for name, term in terms.items()}
