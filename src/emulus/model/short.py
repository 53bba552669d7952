"""Causal attention of short documents in bfloat16 on CPUs, where PyTorch's own kernel is slow at training.

A row of training holds dozens of documents of some hundred ids. The library's kernel takes most of its time for what
does not depend on their length; plain products of small matrices, with the weights kept for the backward pass, are 1.7
to 2.5 times as fast (``benchmarks.attention``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import BFloat16, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_QUERIES = 192
"""Of a piece."""
LONGEST = 1536
"""Ids of a document."""


def suits(q: Tensor, lengths: Sequence[int], dropout: float) -> bool:
    """Whether :func:`attend_short` is the better way: bfloat16 on a CPU, with gradients and without dropout.

    For the backward pass it keeps a number for each pair of a document's ids, so long ones are not for it.
    """
    trains = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and not dropout
    return trains and max(lengths) <= LONGEST


def attend_short(
    q: BFloat16[Tensor, "1 heads tokens width"],
    k: BFloat16[Tensor, "1 kv_heads tokens width"],
    v: BFloat16[Tensor, "1 kv_heads tokens width"],
    lengths: Sequence[int],
) -> BFloat16[Tensor, "1 heads tokens width"]:
    """Causal attention inside each of the documents that make up a row.

    Args:
        q: Queries.
        k: Keys; each head serves ``heads / kv_heads`` heads of queries.
        v: Values.
        lengths: Ids of each document; their sum is ``tokens``.
    """
    # autograd's apply has no types of its own.
    mixed: Tensor = _ShortAttention.apply(q[0], k[0], v[0], tuple(lengths))
    return mixed[None]


class _ShortAttention(torch.autograd.Function):
    """Pieces one after the other; scores and their weights are float32 before they are rounded."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        q = q * q.shape[-1] ** -0.5
        out = torch.empty_like(q)
        weights = []
        for piece in _pieces(lengths):
            keys, values = k[:, piece.keys], v[:, piece.keys]
            queries = _grouped(q[:, piece.queries], len(keys))
            scores = torch.bmm(queries, keys.mT).float()
            # The queries are the last of the keys: each but the last must not look at some of these.
            rows = piece.rows
            scores.view(len(k), -1, rows, keys.shape[1])[..., -rows:] += _mask()[:rows, :rows]
            weight = scores.softmax(-1).to(q.dtype)
            into = out[:, piece.queries]
            into.copy_(torch.bmm(weight, values).view_as(into))
            weights.append(weight)
        ctx.lengths = lengths
        ctx.save_for_backward(q, k, v, out, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *weights = ctx.saved_tensors
        d_out = grads[0].to(q.dtype)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(each, dtype=torch.float32) for each in (k, v))
        # What all weights of a query gain together, which their sum of one does not let them have.
        common = (d_out.float() * out.float()).sum(-1, keepdim=True)
        for weight, piece in zip(weights, _pieces(ctx.lengths), strict=True):
            keys, values = k[:, piece.keys], v[:, piece.keys]
            queries, d_queries, level = (_grouped(each[:, piece.queries], len(k)) for each in (q, d_out, common))
            dv[:, piece.keys] += torch.bmm(weight.mT, d_queries)
            gained = torch.bmm(d_queries, values.mT).float()
            d_scores = gained.sub_(level).mul_(weight).to(q.dtype)
            into = dq[:, piece.queries]
            into.copy_(torch.bmm(d_scores, keys).view_as(into))
            dk[:, piece.keys] += torch.bmm(d_scores.mT, queries)
        return dq.mul_(q.shape[-1] ** -0.5), dk.to(k.dtype), dv.to(v.dtype), None


class _Piece(NamedTuple):
    """Some queries of a document, and the keys from its start to the last of them."""

    queries: slice
    keys: slice

    @property
    def rows(self) -> int:
        return self.queries.stop - self.queries.start


def _pieces(lengths: Sequence[int]) -> Iterator[_Piece]:
    """Long documents in pieces, so that little is computed that may not be seen."""
    start = 0
    for length in lengths:
        stop = start + length
        for first in range(start, stop, MOST_QUERIES):
            last = min(first + MOST_QUERIES, stop)
            yield _Piece(slice(first, last), slice(start, last))
        start = stop


def _grouped(x: Float[Tensor, "heads n width"], groups: int) -> Float[Tensor, "groups rows width"]:
    """The heads that share keys, below one another."""
    return x.reshape(groups, -1, x.shape[-1])


@lru_cache(maxsize=1)
def _mask() -> Float[Tensor, "queries keys"]:
    """Minus infinity above the diagonal."""
    return torch.full((MOST_QUERIES, MOST_QUERIES), -torch.inf).triu(1)
