"""Attention inside packed documents: every way of computing it sees the same, and none sees another document."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emulus.errors import EmulusError
from emulus.model import Decoder, attention, sized
from emulus.model.attention import Row, attend, causal, chunk_of

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def qkv(tokens: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((4, tokens), (2, tokens), (2, tokens))
    return [torch.randn(1, heads, n, 16, generator=draw).requires_grad_() for heads, n in shapes]


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """With a mask of the whole row."""
    place = torch.arange(sum(lengths))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document) & (place[:, None] >= place)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


@given(lengths=LENGTHS, cuts=st.lists(st.integers(0, 54), max_size=3))
@settings(max_examples=60, deadline=None)
def test_any_division_into_chunks_equals_a_mask_of_the_whole_row(lengths: list[int], cuts: list[int]) -> None:
    total = sum(lengths)
    edges = sorted({0, total, *(cut % total for cut in cuts)})
    chunks = tuple(chunk_of(lengths, start, stop) for start, stop in pairwise(edges))
    row = Row(lengths=tuple(lengths), chunks=chunks, gather=lambda x: x)
    q, k, v = qkv(total)
    torch.testing.assert_close(attend(q, k, v, row), reference(q, k, v, lengths), atol=2e-6, rtol=1e-5)


def test_gradients_equal_a_mask_of_the_whole_row() -> None:
    lengths = [5, 1, 7]
    parts = qkv(13)
    weight = torch.randn(1, 4, 13, 16)
    ours = torch.autograd.grad((attend(*parts, Row.whole(lengths)) * weight).sum(), parts)
    theirs = torch.autograd.grad((reference(*parts, lengths) * weight).sum(), parts)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)


@given(lengths=LENGTHS)
@settings(max_examples=5, deadline=None)
def test_flex_sees_what_sdpa_sees(lengths: list[int]) -> None:
    q, k, v = (tensor.detach() for tensor in qkv(sum(lengths)))
    flex, sdpa = (attend(q, k, v, Row.whole(lengths, backend)) for backend in ("flex", "sdpa"))  # type: ignore[arg-type]
    torch.testing.assert_close(flex, sdpa, atol=2e-6, rtol=1e-5)


def test_flex_sees_the_same_in_a_part_of_a_row() -> None:
    lengths, total = [6, 3, 8], 17
    q, k, v = (tensor.detach() for tensor in qkv(total))
    row = Row(lengths=tuple(lengths), chunks=(chunk_of(lengths, 4, 12),), gather=lambda x: x, backend="flex")
    torch.testing.assert_close(
        attend(q[:, :, 4:12], k, v, row), reference(q, k, v, lengths)[:, :, 4:12], atol=2e-6, rtol=1e-5
    )


def test_flex_refuses_dropout() -> None:
    with pytest.raises(EmulusError, match="no dropout"):
        attend(*qkv(3), Row.whole([3], "flex"), dropout=0.1)


@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=5), changed=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_a_changed_document_leaves_the_others_logits_as_they_were(lengths: list[int], changed: int) -> None:
    """To the bit, in the whole decoder."""
    changed %= len(lengths)
    torch.manual_seed(0)
    model = Decoder(sized("tiny", vocab_size=64, attention_dropout=0.0)).eval()
    ids = torch.randint(0, 64, (1, sum(lengths)))
    start = sum(lengths[:changed])
    other = ids.clone()
    other[:, start : start + lengths[changed]] += 1
    other %= 64
    with torch.no_grad():
        before, after = (model(each, document_lengths=lengths)[0].split(lengths) for each in (ids, other))
    for number, (one, two) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one, two) == (number != changed)


def test_a_part_outside_the_row_is_refused() -> None:
    with pytest.raises(EmulusError, match="not a part of a row of 5"):
        chunk_of([2, 3], 4, 6)


def test_recomputing_changes_nothing() -> None:
    torch.manual_seed(0)
    model = Decoder(sized("tiny", vocab_size=64, attention_dropout=0.1)).train()
    ids = torch.randint(0, 64, (1, 20))
    gradients = []
    for recompute in (False, True):
        for block in model.model.blocks:
            block.recompute = recompute
        torch.manual_seed(1)
        model.zero_grad()
        model(ids, document_lengths=[12, 8]).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_compiled_blocks_are_not_compiled_for_every_row() -> None:
    torch.manual_seed(0)
    model = Decoder(sized("tiny", vocab_size=64, attention_dropout=0.0)).train()
    ids = torch.randint(0, 64, (40,))
    rows = [[10, 30], [40], [1, 2, 37], [20, 20], *([start, 40 - start] for start in range(3, 9))]
    expected = [model.hidden(ids[None], document_lengths=lengths) for lengths in rows]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.model.blocks:
        block.add = torch.compile(block.add, backend="aot_eager")  # type: ignore[method-assign]
    for lengths, hidden in zip(rows, expected, strict=True):
        torch.testing.assert_close(model.hidden(ids[None], document_lengths=lengths), hidden)
    assert torch._dynamo.utils.counters["frames"]["total"] < 8


def test_compiled_blocks_are_not_compiled_for_every_number_of_documents() -> None:
    """torch 2.11 runs blocks uncompiled for good once they were compiled eight times."""
    torch.manual_seed(0)
    model = Decoder(sized("tiny", vocab_size=64, attention_dropout=0.0)).train()
    ids = torch.randint(0, 64, (1, 40))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in model.model.blocks:
        block.add = torch.compile(block.add, backend="eager")  # type: ignore[method-assign]
    for count in range(1, 13):
        model.hidden(ids, document_lengths=[3] * (count - 1) + [40 - 3 * (count - 1)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@pytest.mark.parametrize("kernel_shares", [False, True])
def test_varlen_shares_heads_by_itself_where_the_kernel_does_not(
    kernel_shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the flash kernel, of torch 2.11 and of later ones, on a CPU."""
    heads: list[tuple[int, int]] = []

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, starts_k: Tensor, *_: int, window_size: object
    ) -> Tensor:
        heads.append((q.shape[1], k.shape[1]))
        parts = zip(*(each.split(starts.diff().tolist()) for each in (q, k, v)), strict=True)
        each = [causal(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts]
        return torch.cat(each)

    def newer(*args: Any, window_size: object, enable_gqa: bool = False) -> Tensor:
        assert enable_gqa
        return kernel(*args, window_size=window_size)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", newer if kernel_shares else kernel)
    attention._shares_heads.cache_clear()
    q, k, v = (tensor.detach() for tensor in qkv(9))
    varlen, sdpa = (attend(q, k, v, Row.whole([4, 5], backend)) for backend in ("varlen", "sdpa"))  # type: ignore[arg-type]
    attention._shares_heads.cache_clear()
    torch.testing.assert_close(varlen, sdpa, atol=2e-6, rtol=1e-5)
    assert heads == [(4, 2 if kernel_shares else 4)]
