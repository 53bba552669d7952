"""How many kernels a step of Emu3-8B launches, and how many bytes of weights they read: counted, not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from emulus.engine import runner as module
from emulus.engine.runner import Runner
from emulus.engine.step import Feed
from emulus.kernels import gpu
from emulus.kernels.gpu import launch
from emulus.model import Decoder, sized
from emulus.model.quantize import Quantization, make_room
from tests.kernels.test_gpu import needs_triton

pytestmark = needs_triton

META = torch.device("meta")
LAYER = {
    "rms_norm": 2,
    "linear": 4,  # queries, keys and values; output; gate and up; down
    "rotate_and_store": 1,
    "attend": 1,
}
"""Launches of a layer."""


class Launches:
    """Counts what would be launched."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.read = 0

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        self.names.append(kernel.fn.__name__)
        # Activations are small; weights are read once each, whole.
        self.read += sum(tensor.nbytes for tensor in flat(args) if tensor.numel() > 2**17)


def flat(args: Any) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple | list):
            yield from flat(arg)


@pytest.mark.parametrize(
    ("kind", "gigabytes"), [(None, 13.96), ("int8", 6.98), ("fp8", 6.98), ("int4", 3.49 + 13.96 / 32)]
)
def test_a_step_keeps_to_its_budget(
    monkeypatch: pytest.MonkeyPatch, kind: Quantization | None, gigabytes: float
) -> None:
    monkeypatch.setattr(module, "_kernels", lambda norm, width: gpu)
    config = sized("emu3-8b")
    with META:
        decoder = Decoder(config).to(torch.bfloat16)
    if kind is not None:
        make_room(decoder, kind)
    runner = Runner(decoder)
    lane = runner.new_lane(9000)
    launches = Launches()
    monkeypatch.setattr(launch, "run", launches)
    runner.forward([Feed(lane=lane, ids=[7]), Feed(lane=runner.new_lane(9000), ids=[7])])
    counted = Counter("linear" if name.startswith("linear") else name for name in launches.names)
    layers = config.num_hidden_layers
    # Beside the layers', one norm before the head.
    assert counted.pop("rms_norm") == LAYER["rms_norm"] * layers + 1
    assert counted == {name: count * layers for name, count in LAYER.items() if name != "rms_norm"}
    assert launches.read / 1e9 == pytest.approx(gigabytes, rel=0.01)
