"""The CPU's own attention of short documents, beside PyTorch's in float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from emulus.model import short
from emulus.model.attention import Row, attend, causal, chunk_of
from emulus.model.short import attend_short, suits

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=5)


def drawn(tokens: int, seed: int, *, heads: int = 4, groups: int = 2) -> list[Tensor]:
    """Queries, keys and values as the projections leave them, not contiguous."""
    torch.manual_seed(seed)
    return [
        torch.randn(1, tokens, count, 16, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for count in (heads, groups, groups)
    ]


def by_document(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    parts = zip(*(each.split(lengths, dim=2) for each in (q, k, v)), strict=True)
    return torch.cat([causal(*part) for part in parts], dim=2)


def with_gradients(out: Tensor, inputs: list[Tensor], towards: Tensor) -> list[Tensor]:
    grads = torch.autograd.grad(out, inputs, towards.to(out.dtype))
    return [each.float() for each in (out.detach(), *grads)]


@given(LENGTHS, st.integers(0, 99), st.sampled_from([(4, 2), (2, 2), (3, 1)]), st.sampled_from([7, 32, 192]))
@settings(max_examples=30, deadline=None)
def test_values_and_gradients_are_those_of_the_library(
    lengths: list[int], seed: int, heads: tuple[int, int], piece: int
) -> None:
    inputs = drawn(sum(lengths), seed, heads=heads[0], groups=heads[1])
    wide = [each.detach().float().requires_grad_() for each in inputs]
    towards = torch.randn(1, heads[0], sum(lengths), 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(short, "MOST_QUERIES", piece)
        short._mask.cache_clear()
        ours = with_gradients(attend_short(*inputs, lengths), inputs, towards)
    theirs = with_gradients(by_document(*wide, lengths), wide, towards)
    for mine, other in zip(ours, theirs, strict=True):
        # bfloat16 keeps eight bits; what should cancel to nothing, as with a single id, keeps that much of its parts.
        assert float((mine - other).norm()) <= 0.02 * float(other.norm()) + 0.01 * other.numel() ** 0.5


@pytest.fixture(autouse=True)
def own_mask() -> Iterator[None]:
    """The mask that a test cut to another size goes with it."""
    yield
    short._mask.cache_clear()


def test_no_document_sees_another() -> None:
    q, k, v = drawn(50, 1)
    before = attend_short(q, k, v, [20, 30])
    with torch.no_grad():
        k[:, :, :20] += 1
        v[:, :, :20] += 1
    after = attend_short(q, k, v, [20, 30])
    assert torch.equal(before[:, :, 20:], after[:, :, 20:])
    assert not torch.equal(before[:, :, :20], after[:, :, :20])


def test_it_is_taken_for_training_in_bfloat16_without_dropout() -> None:
    q, k, v = drawn(40, 2)
    row = Row.whole([10, 30])
    lengths = [10, 30]
    assert suits(q, lengths, 0.0)
    assert torch.equal(attend(q, k, v, row), attend_short(q, k, v, lengths))
    assert not suits(q, lengths, 0.1)
    assert not suits(q.float(), lengths, 0.0)
    assert not suits(q.detach(), lengths, 0.0)
    assert not suits(q, [short.LONGEST + 1], 0.0)


def test_a_part_of_a_row_is_left_to_the_library() -> None:
    """Where processes share a row, queries of one meet keys of others."""
    q, k, v = drawn(40, 3)
    row = Row(lengths=(10, 30), chunks=(chunk_of((10, 30), 20, 40),), gather=lambda tensor: tensor)
    part = attend(q[:, :, 20:], k, v, row)
    whole = attend(q.float(), k.float(), v.float(), Row.whole([10, 30]))[:, :, 20:]
    assert torch.allclose(part.float(), whole, atol=0.03)


def test_computing_again_gives_the_same_gradients() -> None:
    inputs, towards = drawn(40, 4), torch.randn(1, 4, 40, 16).bfloat16()
    plain = attend_short(*inputs, [10, 30])
    again = checkpoint(attend_short, *inputs, [10, 30], use_reentrant=False)
    for mine, other in zip(
        torch.autograd.grad(plain, inputs, towards), torch.autograd.grad(again, inputs, towards), strict=True
    ):
        assert torch.equal(mine, other)


def test_second_derivatives_are_refused() -> None:
    q, k, v = drawn(12, 5)
    (slope,) = torch.autograd.grad(attend_short(q, k, v, [12]).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="grad"):
        slope.sum().backward()
