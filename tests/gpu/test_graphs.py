"""A recorded step gives what the step gives: run with ``pytest -m gpu``."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from emulus.kernels import gpu
from emulus.kernels.graphs import Graphs
from emulus.kernels.where import Where

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not gpu.available(), reason="needs a GPU and Triton")]

BF16 = torch.bfloat16
CAPACITY = 300


class Step:
    """One layer's worth of kernels, over lanes of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.lanes = [torch.zeros(1, 2, 2, CAPACITY, 32, dtype=BF16, device="cuda") for _ in range(3)]
        self.weight = torch.randn(64, 256, device="cuda").to(BF16)
        self.norm = torch.ones(256, dtype=BF16, device="cuda")
        self.calls = 0

    def __call__(self, x: Tensor, base: Tensor, position: Tensor, ready: Tensor | None) -> Tensor:
        self.calls += 1
        n = len(x)
        q, k, v = gpu.rms_norm(x, self.norm, 1e-5).view(n, 8, 32).split((4, 2, 2), 1)
        table = torch.ones(n, 32, device="cuda") * position[:, None]
        where = Where(
            base=base,
            capacity=torch.full_like(base, CAPACITY),
            position=position,
            dtype=BF16,
            kv_heads=2,
            head_dim=32,
            ready=ready,
        )
        turned = gpu.rotate_and_store(q, k, v, table.cos(), table.sin(), where, 0)
        mixed = gpu.attend(turned, where, 0)
        return gpu.silu_mul(gpu.linear(mixed.repeat(1, 2), self.weight), gpu.linear(x, self.weight))

    def inputs(self, n: int, at: int) -> tuple[Tensor, Tensor, Tensor]:
        addresses = [self.lanes[token % 3].data_ptr() for token in range(n)]
        positions = [at + token // 3 for token in range(n)]
        x = torch.randn(n, 256, device="cuda").to(BF16)
        return x, torch.tensor(addresses, device="cuda"), torch.tensor(positions, device="cuda")


def test_replays_what_the_step_gives() -> None:
    step = Step()
    graphs = Graphs(step)
    kept: list[tuple[Tensor, Tensor]] = []
    for at in range(0, 200, 40):
        for n in (1, 2, 9):
            inputs = step.inputs(n, at)
            expected = step(*inputs, None)
            kept.append((graphs(*inputs, None), expected))
            assert torch.equal(*kept[-1])
    assert len(graphs) == 3
    # Later replays, of other graphs in the same memory too, left earlier results alone.
    assert all(torch.equal(ours, expected) for ours, expected in kept)
    # Twice to warm up and once to record, for each number of tokens; else called by this test alone.
    assert step.calls == len(kept) + 3 * 3


def test_maps_are_another_recording() -> None:
    step = Step()
    graphs = Graphs(step)
    maps = [torch.ones(CAPACITY, dtype=torch.uint8, device="cuda") for _ in range(3)]
    maps[0][:5] = 0
    for at in (10, 11, 12):
        inputs = step.inputs(3, at)
        ready = torch.tensor([map.data_ptr() for map in maps], device="cuda")
        assert torch.equal(graphs(*inputs, ready), step(*inputs, ready))
        assert torch.equal(graphs(*inputs, None), step(*inputs, None))
    assert len(graphs) == 2


def test_many_rows_are_not_recorded() -> None:
    graphs = Graphs(lambda x: x + 1, most=4)
    assert graphs(torch.zeros(5, device="cuda")).sum().item() == 5
    assert len(graphs) == 0


def test_goes_on_where_nothing_can_be_recorded(caplog: pytest.LogCaptureFixture) -> None:
    graphs = Graphs(lambda x: x * x.sum().item())
    stream = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING, logger="emulus"):
        for value in (2.0, 3.0):
            assert graphs(torch.full((1,), value, device="cuda")).item() == value * value
    assert all("cannot be recorded" in message for message in caplog.messages)
    assert len(caplog.messages) == 1
    assert torch.cuda.current_stream() == stream
    assert len(graphs) == 0
