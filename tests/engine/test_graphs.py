"""Recording a step, as far as it can be seen without a GPU (the rest is in tests/gpu/test_graphs.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from emulus.engine.graphs import Graphs


def test_calls_straight_through_on_a_cpu() -> None:
    calls: list[tuple[Tensor | None, ...]] = []

    def step(ids: Tensor, positions: Tensor | None) -> Tensor:
        calls.append((ids, positions))
        return ids * 2 if positions is None else ids + positions

    graphs = Graphs(step, most=4)
    for n in (1, 2, 2, 5):
        ids, positions = torch.arange(n), torch.ones(n)
        assert torch.equal(graphs(ids, positions), ids + 1)
        assert calls[-1][0] is ids
        assert calls[-1][1] is positions
        assert torch.equal(graphs(ids, None), ids * 2)
    assert len(calls) == 8
    assert len(graphs) == 0
