"""Recording a step, as far as it can be seen without a GPU (the rest is in tests/gpu/test_graphs.py)."""

from __future__ import annotations

import threading
import time
from typing import Any, cast

import torch
from torch import Tensor

from emulus.engine.graphs import Graphs, _Recorded


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


class _Slow:
    """Computes as a recorded graph does, from fixed inputs to a fixed output, but lets other threads run meanwhile."""

    def __init__(self, inputs: Tensor, output: Tensor) -> None:
        self.inputs, self.output = inputs, output

    def replay(self) -> None:
        given = self.inputs.clone()
        time.sleep(0)
        self.output.copy_(given * 2)
        time.sleep(0)


def test_threads_that_share_a_graph_get_their_own_results() -> None:
    graphs = Graphs(lambda x: x * 2)
    kept, output = torch.zeros(3), torch.zeros(3)
    recorded = _Recorded(graph=cast(Any, _Slow(kept, output)), inputs=(kept,), output=output)
    wrong: list[Tensor] = []

    def use(number: int) -> None:
        for _ in range(200):
            given = torch.full((3,), float(number))
            found = graphs._replay(recorded, (given,))
            if not torch.equal(found, given * 2):
                wrong.append(found)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
