"""queries, keys, values -> mixed values: causal attention inside each document of a packed row.

A row holds documents end to end. A process may hold the whole row, or (context parallel) some chunks of it; then each
layer's keys and values are gathered from the others. Either way a query sees its document from the start to itself,
and no mask of the whole row ever exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

from emulus.device import numbers
from emulus.errors import EmulusError
from emulus.model.short import attend_short, suits

Backend = Literal["auto", "sdpa", "varlen", "flex"]


class Piece(NamedTuple):
    """The part of one document that lies in a chunk: its queries are the last of its keys."""

    queries: int
    keys: int


class Chunk(NamedTuple):
    """A run of a row's ids, ``start`` to ``stop``; what they may see begins at ``first_key`` and ends with them."""

    start: int
    stop: int
    first_key: int
    pieces: tuple[Piece, ...]


@dataclass(kw_only=True)
class Row:
    """How the ids that are here attend; never changed once made.

    Not frozen: torch.compile (2.11) guards on the contents of frozen dataclasses, so that compiled blocks would be
    compiled again for each number of documents.

    Attributes:
        lengths: Ids of each document of the whole row.
        chunks: The parts of the row that are here, in the order in which they are here.
        gather: From the keys or values ``(batch, heads, here, width)`` of these chunks to those of the whole row; None
            where the whole row is here.
        backend: ``sdpa`` goes document by document; ``varlen`` (GPUs, 16 bits) and ``flex`` (GPUs) take all documents
            in one call; ``auto`` picks.
    """

    lengths: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    gather: Callable[[Tensor], Tensor] | None = None
    backend: Backend = "auto"
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def whole(cls, lengths: Sequence[int], backend: Backend = "auto") -> Row:
        """A row of which all is here."""
        return cls(lengths=tuple(lengths), chunks=(chunk_of(lengths, 0, sum(lengths)),), backend=backend)

    def cumulative(
        self, chunk: Chunk, device: torch.device
    ) -> tuple[Int32[Tensor, " pieces"], Int32[Tensor, " pieces"]]:
        """Where a chunk's pieces begin among its queries and among its keys, and where the last ends."""
        key = (chunk, device)
        if key not in self._cache:
            ends = [[0, *accumulate(lengths)] for lengths in zip(*chunk.pieces, strict=True)]
            # A GPU gets them without being waited for.
            self._cache[key] = tuple(numbers(end, device).to(torch.int32) for end in ends)
        found: tuple[Tensor, Tensor] = self._cache[key]
        return found


def chunk_of(lengths: Sequence[int], start: int, stop: int) -> Chunk:
    """The ids ``start`` to ``stop`` of a row of documents of these lengths.

    Raises:
        EmulusError: They are not a part of the row.
    """
    if not 0 <= start < stop <= sum(lengths):
        raise EmulusError(f"ids {start} to {stop} are not a part of a row of {sum(lengths)}")
    pieces, first_key = [], None
    begin = 0
    for length in lengths:
        end = begin + length
        if begin < stop and end > start:
            first_key = begin if first_key is None else first_key
            pieces.append(Piece(queries=min(end, stop) - max(begin, start), keys=min(end, stop) - begin))
        begin = end
    assert first_key is not None, "the ids lie in some document"
    return Chunk(start=start, stop=stop, first_key=first_key, pieces=tuple(pieces))


# Compiled code would be compiled again for every row, whose documents have other lengths each.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend(
    q: Float[Tensor, "batch heads here width"],
    k: Float[Tensor, "batch kv_heads here width"],
    v: Float[Tensor, "batch kv_heads here width"],
    row: Row,
    *,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads here width"]:
    """Mix the values that each query may see.

    Args:
        q: Queries of the ids that are here, rotated.
        k: Their keys, rotated; each head serves ``heads / kv_heads`` heads of queries.
        v: Their values.
        row: What may see what.
        dropout: Share of the attention weights that are dropped.
    """
    if row.gather is not None:
        k, v = row.gather(k), row.gather(v)
    backend = _backend(row.backend, q, dropout)
    parts = []
    for part, chunk in zip(q.split([chunk.stop - chunk.start for chunk in row.chunks], dim=2), row.chunks, strict=True):
        keys, values = (tensor[:, :, chunk.first_key : chunk.stop] for tensor in (k, v))
        parts.append(backend(part, keys, values, row, chunk, dropout))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


_Call = Callable[..., Any]
_Attend = Callable[[Tensor, Tensor, Tensor, Row, Chunk, float], Tensor]


def _backend(name: Backend, q: Tensor, dropout: float) -> _Attend:
    if name == "auto":
        fits = q.is_cuda and not dropout and q.dtype in (torch.bfloat16, torch.float16)
        name = "varlen" if fits else "sdpa"
    return {"sdpa": _by_document, "varlen": _varlen, "flex": _flex}[name]


def causal(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Plain causal attention; the queries are the last of the keys."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=True)
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=True)


def _by_document(q: Tensor, k: Tensor, v: Tensor, row: Row, chunk: Chunk, dropout: float) -> Tensor:
    """Each document by itself, so that none can see another."""
    queries, keys = (list(lengths) for lengths in zip(*chunk.pieces, strict=True))
    if queries == keys and suits(q, keys, dropout):
        return attend_short(q, k, v, keys)
    if len(chunk.pieces) == 1:
        return causal(q, k, v, dropout)
    parts = zip(q.split(queries, dim=2), k.split(keys, dim=2), v.split(keys, dim=2), strict=True)
    return torch.cat([causal(*part, dropout) for part in parts], dim=2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, row: Row, chunk: Chunk, dropout: float) -> Tensor:
    """All documents in one call of the flash kernel, which lines queries up with the last of their keys."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"enable_gqa": True} if _shares_heads() else {}
    if not options:
        k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], dim=1) for tensor in (k, v))
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (q, k, v))
    starts = row.cumulative(chunk, q.device)
    longest = (max(piece.queries for piece in chunk.pieces), max(piece.keys for piece in chunk.pieces))
    out = varlen_attn(q, k, v, *starts, *longest, window_size=(-1, 0), **options)
    assert isinstance(out, Tensor), "no other results were asked for"
    return out.transpose(0, 1)[None]


@lru_cache(maxsize=1)
def _shares_heads() -> bool:
    """Whether the flash kernel lets each head of keys serve several of queries, as from torch 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _flex(q: Tensor, k: Tensor, v: Tensor, row: Row, chunk: Chunk, dropout: float) -> Tensor:
    """All documents in one call, by a mask of blocks."""
    from torch.nn.attention.flex_attention import flex_attention

    if dropout:
        raise EmulusError("flex attention has no dropout; set dropout to 0 or use the sdpa backend")
    out = (_compiled_flex() if q.is_cuda else cast("_Call", flex_attention))(
        q, k, v, block_mask=_block_mask(row, chunk, q.device), enable_gqa=True
    )
    assert isinstance(out, Tensor), "no other results were asked for"
    return out


@lru_cache(maxsize=1)
def _compiled_flex() -> _Call:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled, flex attention makes the whole matrix of scores.
    compiled: _Call = torch.compile(flex_attention, dynamic=False)
    return compiled


def _block_mask(row: Row, chunk: Chunk, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    key = ("flex", chunk, device)
    if key not in row._cache:
        queries, keys = row.cumulative(chunk, device)
        total_q, total_k = int(queries[-1]), int(keys[-1])
        document_q, document_k = (
            torch.searchsorted(ends[1:], torch.arange(total, device=device), right=True)
            for ends, total in ((queries, total_q), (keys, total_k))
        )
        # Place among the chunk's keys of each query: counted from its document's end.
        place = torch.arange(total_q, device=device) + (keys[1:] - queries[1:])[document_q]

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (document_q[query] == document_k[key]) & (key <= place[query])

        row._cache[key] = create_block_mask(visible, None, None, total_q, total_k, device=device)
    return row._cache[key]
