"""Host memory for a checkpoint's copies."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from emulus.model import Decoder, sized
from emulus.train import slab
from emulus.train.parts import HostCopy
from emulus.train.slab import Slab, cut


@given(sizes=st.lists(st.integers(0, 1000)))
def test_pieces_are_aligned_and_apart(sizes: list[int]) -> None:
    places, total = cut(sizes)
    assert all(place % 64 == 0 for place in places)
    assert all(place + size <= after for size, (place, after) in zip(sizes, pairwise([*places, total]), strict=True))
    assert total <= sum(sizes) + 63 * len(sizes)


def test_the_state_of_a_large_model_takes_hardly_more_than_its_bytes() -> None:
    with torch.device("meta"):
        parameters = list(Decoder(sized("emu3-8b")).parameters())
    sizes = [size for parameter in parameters for size in (*[4 * parameter.numel()] * 3, 4)]
    assert sum(sizes) <= cut(sizes)[1] <= 1.02 * sum(sizes)


def some(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "matrix": torch.randn(5, 7, generator=draw),
        "turned": torch.randn(4, 3, generator=draw).T,
        "half": torch.randn(3, generator=draw).bfloat16(),
        "step": torch.tensor(seed, dtype=torch.int64),
        "flag": torch.tensor([True, False]),
        "none": torch.zeros(0, 3),
    }


def test_copies_are_equal_and_in_the_same_memory_every_time() -> None:
    copy = HostCopy()
    for seed in (1, 2):
        copy.take(some(seed))
        kept = copy.buffers if seed == 1 else kept
        for name, tensor in some(seed).items():
            assert torch.equal(copy.buffers[name], tensor)
            assert copy.buffers[name].dtype == tensor.dtype
            assert copy.buffers[name] is kept[name]
    assert len({buffer.untyped_storage().data_ptr() for buffer in copy.buffers.values()}) == 1


def test_other_tensors_get_other_memory() -> None:
    copy = HostCopy()
    copy.take(some())
    copy.take({"matrix": torch.ones(5, 8)})
    assert list(copy.buffers) == ["matrix"]
    assert torch.equal(copy.buffers["matrix"], torch.ones(5, 8))


@dataclass
class Runtime:
    """As much of CUDA's as pinning asks for."""

    error: int = 0
    pinned: dict[int, int] = field(default_factory=dict)

    def cudaHostRegister(self, place: int, size: int, flags: int) -> int:
        if not self.error:
            self.pinned[place] = size
        return self.error

    def cudaHostUnregister(self, place: int) -> None:
        del self.pinned[place]


class OnGpu(Tensor):
    is_cuda = True  # type: ignore[assignment]


def test_memory_for_a_gpu_is_pinned_until_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    made = Slab({"a": torch.zeros(100).as_subclass(OnGpu), "b": torch.zeros(3)})
    assert runtime.pinned == {made.buffers["a"].data_ptr(): 448 + 64}
    del made
    gc.collect()
    assert runtime.pinned == {}


def test_memory_that_cannot_be_pinned_is_used_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(error=2))
    monkeypatch.setattr(slab.logger, "propagate", True)
    made = Slab({"a": torch.zeros(100).as_subclass(OnGpu)})
    assert made.buffers["a"].shape == (100,)
    assert "cannot be pinned (CUDA error 2)" in caplog.text
