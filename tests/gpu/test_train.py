"""Training's parts on a GPU: run with ``pytest -m gpu``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from emulus.model.attention import Backend, Row, attend, chunk_of
from tests.ranks import run_ranks
from tests.train.sharded import train_sharded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("backend", ["varlen", "flex", "auto"])
@pytest.mark.parametrize("part", [None, (100, 300)])
def test_gpu_backends_equal_sdpa(backend: Backend, part: tuple[int, int] | None) -> None:
    lengths, total = [130, 1, 250, 67], 448
    options = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = (torch.randn(1, heads, total, 16, **options) for heads in (4, 2, 2))
    start, stop = part or (0, total)
    row = Row(lengths=tuple(lengths), chunks=(chunk_of(lengths, start, stop),), gather=lambda x: x, backend=backend)
    outs, gradients = [], []
    weight = torch.randn(1, 4, stop - start, 16, device="cuda", dtype=torch.bfloat16)
    for each in (row, dataclasses.replace(row, backend="sdpa")):
        out = attend(q[:, :, start:stop], k, v, each)
        outs.append(out)
        gradients.append(torch.autograd.grad((out * weight).sum(), (q, k, v)))
    torch.testing.assert_close(outs[0], outs[1], atol=2e-2, rtol=2e-2)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_model_trains_as_a_plain_one_over_nccl(optimizer: str, tmp_path: Path) -> None:
    ((sharded, plain),) = run_ranks(1, train_sharded, "cuda", optimizer, tmp_path)
    assert sharded == pytest.approx(plain, rel=5e-2)
