"""When a step is recorded, replayed or called (that CUDA graphs replay rightly is in tests/gpu/test_graphs.py)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from emulus.kernels import graphs as module
from emulus.kernels.graphs import CudaRecorder, Graphs

CPU = torch.device("cpu")


class Recording:
    """Records by remembering the work: a replay does it again on the same memory, as a graph does."""

    def __init__(self, *failures: Exception | None) -> None:
        self.failures = list(failures)
        self.tried = self.replayed = 0

    def suits(self, device: torch.device) -> bool:
        return device == CPU

    def record(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        self.tried += 1
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        output = work()

        def replay() -> None:
            self.replayed += 1
            # Other threads run meanwhile, as they do while a device is given work.
            time.sleep(0)
            output.copy_(work())
            time.sleep(0)

        return replay, output


def doubled(x: Tensor, y: Tensor | None = None) -> Tensor:
    return x * 2 if y is None else x + y


def test_calls_straight_through_where_nothing_is_recorded() -> None:
    calls: list[tuple[Tensor | None, ...]] = []

    def step(ids: Tensor, positions: Tensor | None) -> Tensor:
        calls.append((ids, positions))
        return doubled(ids, positions)

    graphs = Graphs(step, most=4)
    for n in (1, 2, 2, 5):
        ids, positions = torch.arange(n), torch.ones(n)
        assert torch.equal(graphs(ids, positions), ids + 1)
        assert calls[-1][0] is ids
        assert calls[-1][1] is positions
        assert torch.equal(graphs(ids, None), ids * 2)
    assert len(calls) == 8
    assert len(graphs) == 0
    assert not CudaRecorder().suits(CPU)


def test_each_shape_is_recorded_once_and_no_result_is_written_over() -> None:
    recorder = Recording()
    graphs = Graphs(doubled, most=4, recorder=recorder)
    given = [(torch.arange(n) + start, start) for start in range(3) for n in (1, 2, 4, 5)]
    found = [graphs(x, torch.full_like(x, start)) for x, start in given]
    assert all(torch.equal(result, x + start) for result, (x, start) in zip(found, given, strict=True))
    # Five rows are too many.
    assert len(graphs) == recorder.tried == 3
    assert recorder.replayed == 9
    graphs(torch.arange(2), None)
    assert len(graphs) == 4


def test_a_step_that_cannot_be_recorded_is_called_and_others_are_recorded(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recording(RuntimeError("not permitted when stream is capturing\nmore"))
    graphs = Graphs(doubled, recorder=recorder)
    with caplog.at_level(logging.WARNING, logger="emulus"):
        for _ in range(3):
            assert torch.equal(graphs(torch.arange(2)), torch.arange(2) * 2)
        graphs(torch.arange(3))
    assert len(graphs) == 1
    assert recorder.tried == 2
    (said,) = caplog.messages
    assert "cannot be recorded (not permitted when stream is capturing);" in said


def test_short_memory_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE", 4)
    full = torch.OutOfMemoryError("CUDA out of memory")
    recorder = Recording(full, full)
    graphs = Graphs(doubled, recorder=recorder)
    tried = []
    for _ in range(16):
        assert torch.equal(graphs(torch.arange(2)), torch.arange(2) * 2)
        tried.append(recorder.tried)
    # After 4 calls, then after 8 more.
    assert tried == [1] * 5 + [2] * 9 + [3] * 2
    assert len(graphs) == 1


def test_a_step_that_fails_by_itself_is_not_blamed_on_recording(caplog: pytest.LogCaptureFixture) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("an illegal memory access")

    graphs = Graphs(broken, recorder=Recording())
    with caplog.at_level(logging.WARNING, logger="emulus"), pytest.raises(RuntimeError, match="illegal"):
        graphs(torch.arange(2))
    assert not caplog.messages


def test_threads_that_share_a_graph_get_their_own_results() -> None:
    graphs = Graphs(doubled, recorder=Recording())
    wrong: list[Tensor] = []

    def use(number: int) -> None:
        for _ in range(200):
            given = torch.full((3,), float(number))
            found = graphs(given)
            if not torch.equal(found, given * 2):
                wrong.append(found)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(graphs) == 1
