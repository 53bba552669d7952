"""The way of a step through a GPU's kernels, on a CPU: kernels stand in for them that give the same, and a recorder
that replays by computing again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emulus.engine import Engine
from emulus.engine import runner as module
from emulus.engine.cache import Lane
from emulus.engine.runner import Runner
from emulus.engine.schedule import Jacobi, Schedule, Sequential, Zipar
from emulus.engine.step import Feed
from emulus.kernels import gpu, native
from emulus.kernels.where import Where
from emulus.model.quantize import quantize_decoder
from emulus.model.transformer import rms_norm
from tests.engine.tiny import GRAMMAR, make_decoder, requests_of_every_kind
from tests.kernels.test_graphs import Recording

pytestmark = pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")

BF16 = torch.bfloat16
Weight = Tensor | tuple[Tensor, Tensor, Tensor | None]


def product(x: Tensor, weight: Weight, add: Tensor | None = None) -> Tensor:
    """As :func:`emulus.kernels.gpu.linear` gives it, whatever the weights are, with sums that no company changes."""
    wide = x.float()
    if isinstance(weight, Tensor):
        out = native.linear(wide, weight)
    elif weight[2] is None:
        out = native.linear_int8(wide, *weight[:2])
    else:
        out = native.linear_int4(wide, *weight, rounded=True)
    return out.to(x.dtype) if add is None else add + out.to(x.dtype)


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm(x, weight, eps).to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, where: Where, layer: int,
    *, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 0.0,
) -> Tensor:  # fmt: skip
    if q_norm is not None and k_norm is not None:
        q, k = normed(q, q_norm, eps), normed(k, k_norm, eps)
    parts = (part.float().contiguous() for part in (q, k, v))
    return native.rotate_and_store(*parts, cos, sin, where, layer).to(q.dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are called, in order; all runners take the GPU's way meanwhile."""
    names: list[str] = []

    def stand_in(name: str, function: Callable[..., Any]) -> None:
        def counted(*args: Any, **options: Any) -> Any:
            names.append(name)
            return function(*args, **options)

        monkeypatch.setattr(gpu, name, counted)

    stand_in("linear", product)
    stand_in("linear_int8", lambda x, q, scale, add=None: product(x, (q, scale, None), add))
    stand_in("linear_int4", lambda x, q, scale, low, add=None: product(x, (q, scale, low), add))
    stand_in("linear_group", lambda x, weights: torch.cat([product(x, weight) for weight in weights], dim=1))
    stand_in("gated", lambda x, gate, up: silu_mul(product(x, gate), product(x, up)))
    stand_in("silu_mul", silu_mul)
    stand_in("rms_norm", normed)
    stand_in("rotate_and_store", rotate_and_store)
    stand_in("attend", lambda q, where, layer: native.attend(q.float(), where, layer).to(q.dtype))
    monkeypatch.setattr(module, "_kernels", lambda norm, width: gpu)
    monkeypatch.setattr(module, "_activations", lambda weight: weight.dtype)
    return names


def made(
    kind: str | None = None, *, record: bool = True, fused: bool = True, **changes: Any
) -> tuple[Runner, Recording]:
    decoder = make_decoder(**changes).to(BF16)
    if kind is not None:
        decoder = quantize_decoder(decoder, kind)
    runner = Runner(decoder, record=record)
    if not fused:
        runner._layers = tuple(module.replace(layer, fused=None) for layer in runner._layers)
    recorder = Recording()
    runner._graphs._recorder = recorder
    return runner, recorder


def lanes(runner: Runner, *lengths: int) -> list[Lane]:
    """Lanes with something in them."""
    filled = []
    for seed, length in enumerate(lengths):
        lane = runner.new_lane(64)
        ids = torch.randint(GRAMMAR.vocabulary.size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        runner.forward([Feed(lane=lane, ids=ids, wanted=[])])
        lane.length = length
        filled.append(lane)
    return filled


@pytest.mark.parametrize("kind", [None, "int8", "int4"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_few_launches_give_the_same_bits(calls: list[str], kind: str | None, qk_norm: bool) -> None:
    results = []
    for fused in (True, False):
        runner, _ = made(kind, record=False, fused=fused, qk_norm=qk_norm)
        held = lanes(runner, 5, 9)
        calls.clear()
        results.append(runner.forward([Feed(lane=held[0], ids=[7]), Feed(lane=held[1], ids=[8, 9], wanted=[0, 1])]))
        one = "linear" if kind is None else f"linear_{kind}"
        layer = ["rms_norm", "linear_group", "rotate_and_store", "attend", one, "rms_norm", "gated", one]
        assert not fused or calls == [*layer * runner.config.num_hidden_layers, "rms_norm"]
    assert torch.equal(*results)


def test_steps_are_filled_up_to_few_sizes(calls: list[str]) -> None:
    runner, recorder = made()
    plain, _ = made(record=False)
    for count in range(1, 18):
        held, others = (lanes(each, *[3 + n % 5 for n in range(count)]) for each in (runner, plain))
        given, alone = ([Feed(lane=lane, ids=[n]) for n, lane in enumerate(some)] for some in (held, others))
        together = runner.forward(given)
        assert together.shape == (count, runner.config.hidden_size)
        # Neither company nor what fills the step up changes a bit.
        assert torch.equal(together, torch.cat([plain.forward([feed]) for feed in alone]))
        for lane, other in zip(held, others, strict=True):
            assert torch.equal(lane.memory[runner.device], other.memory[runner.device])
    # 1, 2, 4, 8, 16 and 24 tokens; no piece of a prompt.
    assert len(runner._graphs) == recorder.tried == 6


def test_more_tokens_than_the_products_take_are_computed_in_parts(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = made(record=False)
    feeds = [Feed(lane=lane, ids=[n, 5], wanted=[0, 1]) for n, lane in enumerate(lanes(whole, 3, 4, 5, 6, 7))]
    chosen, firsts = torch.tensor([11, 12, 13]), [0, 1, 2, 1, 0]
    expected = whole.forward(feeds, chosen=chosen, firsts=firsts)
    monkeypatch.setattr(gpu, "FEW", 4)
    parted, recorder = made()
    feeds = [Feed(lane=lane, ids=[n, 5], wanted=[0, 1]) for n, lane in enumerate(lanes(parted, 3, 4, 5, 6, 7))]
    hidden = parted.forward(feeds, chosen=chosen, firsts=firsts)
    assert torch.equal(hidden, expected)
    # Twice four tokens, then two.
    assert recorder.tried == 2
    assert recorder.replayed == 3
    ranges = [(0, GRAMMAR.vocabulary.size)]
    assert torch.equal(parted.logits(hidden, ranges), torch.cat([parted.logits(row[None], ranges) for row in hidden]))


@pytest.mark.parametrize("schedule", [Sequential(), Jacobi(window=4), Zipar(window=4)])
def test_ids_are_those_of_plain_steps(calls: list[str], schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = requests_of_every_kind()
    found = []
    for record, ahead in ((False, 0), (True, 24)):
        decoder = make_decoder().to(BF16)
        engine = Engine(decoder, GRAMMAR, schedule=schedule)
        engine._runner = Runner(decoder, record=record)
        engine._runner._graphs._recorder = Recording()
        scheduler = engine.scheduler(4, ahead=ahead)
        for request in requests:
            scheduler.submit(request)
        events = []
        while scheduler.busy:
            events += scheduler.step()
        found.append(sorted((event.request, event.result.ids) for event in events if hasattr(event, "result")))
        assert bool(len(engine._runner._graphs)) == record
    assert found[0] == found[1]
    assert len(found[0]) == len(requests)
