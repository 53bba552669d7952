"""Which ids may be drawn: temperature, top-k, top-p. Ids ruled out get -inf."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def apply_temperature(logits: Float[Tensor, "batch vocab"], temperature: float) -> Float[Tensor, "batch vocab"]:
    """Divide logits by the temperature, in float32.

    Args:
        logits: Scores of ids.
        temperature: Above 0; below 1 sharpens, above 1 flattens.
    """
    return logits.float() / temperature


def top_k(logits: Float[Tensor, "batch vocab"], k: int) -> Float[Tensor, "batch vocab"]:
    """Keep each row's ``k`` largest logits (and what ties with the last of them).

    Args:
        logits: Scores of ids.
        k: How many to keep; 0 keeps all.
    """
    if k == 0 or k >= logits.shape[-1]:
        return logits
    last = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < last, float("-inf"))


def top_p(logits: Float[Tensor, "batch vocab"], p: float) -> Float[Tensor, "batch vocab"]:
    """Keep each row's likeliest ids, up to and with the one that brings their probability to ``p``.

    Args:
        logits: Scores of ids.
        p: In (0, 1]; 1 keeps all.
    """
    if p >= 1:
        return logits
    probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    drop = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= p)
    return logits.masked_fill(drop, float("-inf"))
