"""Steps of the runner against whole sequences of the decoder."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emulus.engine import cache
from emulus.engine import runner as module
from emulus.engine.cache import CacheLayout, Lane
from emulus.engine.runner import Runner
from emulus.engine.step import Feed
from emulus.errors import EmulusError
from emulus.kernels import native
from emulus.model import Decoder, DecoderConfig
from emulus.model.attention import Row
from emulus.model.quantize import quantize_decoder

VOCAB = 61


def small(*, qk_norm: bool = False, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        initializer_range=0.2,
        qk_norm=qk_norm,
    )
    return Decoder(config).eval().to(dtype)


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def whole(decoder: Decoder, ids: list[int]) -> Tensor:
    return decoder(torch.tensor([ids]))[0]


def step(runner: Runner, lanes: list[Lane], pieces: list[list[int]]) -> list[Tensor]:
    """Feed a piece to each lane for good; logits of every token."""
    feeds = [Feed(lane=lane, ids=ids, wanted=range(len(ids))) for lane, ids in zip(lanes, pieces, strict=True)]
    hidden = runner.forward(feeds)
    for lane, ids in zip(lanes, pieces, strict=True):
        lane.length += len(ids)
    return list(runner.logits(hidden, [(0, VOCAB)]).split([len(ids) for ids in pieces]))


@settings(deadline=None, max_examples=25)
@given(
    pieces=st.lists(st.lists(st.integers(1, 9) | st.just(40), min_size=1, max_size=4), min_size=1, max_size=4),
    kv_heads=st.sampled_from([1, 2, 6]),
    qk_norm=st.booleans(),
)
def test_steps_of_any_size_equal_the_whole(pieces: list[list[int]], kv_heads: int, qk_norm: bool) -> None:
    decoder = small(qk_norm=qk_norm, kv_heads=kv_heads)
    runner = Runner(decoder)
    ids = [random_ids(sum(sizes), seed) for seed, sizes in enumerate(pieces)]
    lanes = [runner.new_lane(len(row)) for row in ids]
    logits: list[list[Tensor]] = [[] for _ in ids]
    for turn in range(max(map(len, pieces))):
        going = [n for n, sizes in enumerate(pieces) if turn < len(sizes)]
        starts = [lanes[n].length for n in going]
        parts = [ids[n][start : start + pieces[n][turn]] for n, start in zip(going, starts, strict=True)]
        for n, new in zip(going, step(runner, [lanes[n] for n in going], parts), strict=True):
            logits[n].append(new)
    for row, parts in zip(ids, logits, strict=True):
        torch.testing.assert_close(torch.cat(parts), whole(decoder, row), atol=3e-5, rtol=1e-5)


@pytest.mark.skipif(not native.available(), reason="needs the native kernels")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_all_blocks_in_one_call_are_the_same_to_the_bit(kind: str, qk_norm: bool) -> None:
    decoder = small(qk_norm=qk_norm, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if kind in ("int8", "int4"):
        decoder = quantize_decoder(decoder, kind)  # type: ignore[arg-type]
    together, apart = Runner(decoder), Runner(decoder)
    assert together._table is not None
    apart._table = None
    for runner in (together, apart):
        lanes = [runner.new_lane(12) for _ in range(2)]
        first = step(runner, lanes, [random_ids(9, 1), random_ids(3, 2)])
        then = step(runner, lanes, [random_ids(1, 3), random_ids(2, 4)])
        if runner is together:
            expected = [*first, *then]
    assert all(torch.equal(one, other) for one, other in zip(expected, [*first, *then], strict=True))


def test_prompts_without_a_mask_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, here with PyTorch's attention on a CPU: pieces of prompts, but no tokens out of order."""
    decoder, ids = small(), random_ids(300, 1)
    found, rows = [], []
    usual = module.attend

    def seen(q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        rows.append(row)
        return usual(q, k, v, row)

    monkeypatch.setattr(module, "attend", seen)
    monkeypatch.setattr(module, "_kernels", lambda norm, width: None)
    for unmasked in (False, True):
        monkeypatch.setattr(module, "_has_unmasked", lambda q, unmasked=unmasked: unmasked)
        runner = Runner(decoder)
        lane = runner.new_lane(300)
        logits = [step(runner, [lane], [piece])[0] for piece in (ids[:150], ids[150:290])]
        # Out of order: the last of the slots is not the last token.
        feed = Feed(lane=lane, ids=ids[290:292], positions=[291, 290], wanted=[0, 1])
        logits.append(runner.logits(runner.forward([feed]), [(0, VOCAB)]))
        found.append(torch.cat(logits))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1][:290], whole(decoder, ids[:290]), atol=3e-5, rtol=1e-5)
    # Two pieces in three layers.
    assert [row.lengths for row in rows] == [(150,)] * 3 + [(290,)] * 3


def test_marks_on_a_lane_are_copied_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[list[int]] = []
    usual = cache.numbers
    monkeypatch.setattr(cache, "numbers", lambda values, device: (copied.append([*values]), usual(values, device))[1])
    lane = Runner(small()).new_lane(8)
    lane.length = 2
    lane.watch()
    lane.mark([3, 5])
    assert lane.ready is not None
    assert [ready.tolist() for ready in lane.ready.values()] == [[1, 1, 0, 1, 0, 1, 0, 0]]
    assert copied == [[3, 5]]


def test_bfloat16_is_near() -> None:
    """On a CPU only weights, and keys and values where there are kernels, are bfloat16: nearer than the decoder's."""
    runner, ids = Runner(small(dtype=torch.bfloat16)), random_ids(20, 1)
    (logits,) = step(runner, [runner.new_lane(20)], [ids])
    exact = whole(small(dtype=torch.bfloat16).float(), ids)
    assert logits.dtype == torch.float32
    assert (logits - exact).norm() / exact.norm() < 0.02


def test_a_draft_taken_back_leaves_no_trace() -> None:
    runner, ids = Runner(small()), random_ids(8, 1)
    lane = runner.new_lane(8)
    step(runner, [lane], [ids[:6]])
    right = runner.forward([Feed(lane=lane, ids=ids[6:])])
    runner.forward([Feed(lane=lane, ids=[(id + 1) % VOCAB for id in ids[6:]])])
    assert torch.equal(runner.forward([Feed(lane=lane, ids=ids[6:])]), right)


def test_a_token_sees_only_what_is_ready() -> None:
    """Positions 3 and 4 are left out; what is computed at 5 sees 0 to 2 and itself, each where it stands."""
    decoder, ids = small(), random_ids(6, 2)
    runner = Runner(decoder)
    lane = runner.new_lane(6)
    step(runner, [lane], [ids[:3]])
    lane.watch()
    lane.mark([5])
    hidden = runner.forward([Feed(lane=lane, ids=[ids[5]], positions=[5])])
    with torch.no_grad():
        seen = decoder(torch.tensor([[*ids[:3], ids[5]]]), position_ids=torch.tensor([[0, 1, 2, 5]]))
    torch.testing.assert_close(runner.logits(hidden, [(0, VOCAB)])[0], seen[0, -1], atol=3e-5, rtol=1e-5)
    # Filled up later, it is the whole sequence that the next token sees.
    lane.mark([3, 4])
    runner.forward([Feed(lane=lane, ids=ids[3:5], positions=[3, 4])])
    lane.ready = None
    again = runner.forward([Feed(lane=lane, ids=[ids[5]], positions=[5])])
    torch.testing.assert_close(runner.logits(again, [(0, VOCAB)])[0], whole(decoder, ids)[-1], atol=3e-5, rtol=1e-5)


def test_what_is_wanted() -> None:
    runner, ids = Runner(small()), random_ids(5, 3)
    lanes = [runner.new_lane(5) for _ in range(2)]
    every = runner.forward([Feed(lane=lane, ids=ids, wanted=range(5)) for lane in lanes])
    some = runner.forward([Feed(lane=lanes[0], ids=ids), Feed(lane=lanes[1], ids=ids, wanted=[1, 3])])
    assert torch.equal(some, every[[4, 6, 8]])
    assert runner.forward([Feed(lane=lanes[0], ids=ids, wanted=[])]).shape == (0, 48)


def test_legal_logits_are_a_part_of_all() -> None:
    runner = Runner(small())
    hidden = torch.randn(3, 48)
    every = runner.logits(hidden, [(0, VOCAB)])
    torch.testing.assert_close(runner.logits(hidden, [(3, 7), (20, 21)]), every[:, [3, 4, 5, 6, 20]])


def test_beyond_the_lane() -> None:
    runner = Runner(small())
    with pytest.raises(EmulusError, match="5 tokens does not fit a key/value cache of 4"):
        runner.forward([Feed(lane=runner.new_lane(4), ids=[1] * 5)])


def test_memory_that_is_not_there() -> None:
    layout = CacheLayout.of(small().config, [torch.device("cpu")] * 3, torch.float32)
    with pytest.raises(EmulusError, match=r"no memory for the keys and values of 4\d* tokens"):
        Lane(layout, 2**42)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_of_another_type(dtype: torch.dtype) -> None:
    runner, ids = Runner(small(), kv_dtype=dtype), random_ids(20, 1)
    lane = runner.new_lane(20)
    assert next(iter(lane.memory.values())).dtype == dtype
    (logits,) = step(runner, [lane], [ids])
    error = (logits - whole(small(), ids)).norm() / logits.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.01)
    with pytest.raises(EmulusError, match=r"cannot be torch\.float8_e4m3fn on cpu"):
        Runner(small(), kv_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantised_decoder_that_is_cast_means_the_same(kind: str, dtype: torch.dtype) -> None:
    decoder, ids = quantize_decoder(small(), kind), random_ids(6, 1)  # type: ignore[arg-type]
    (expected,) = step(runner := Runner(decoder), [runner.new_lane(6)], [ids])
    decoder = decoder.to(dtype)
    assert runner.stale
    (logits,) = step(runner := Runner(decoder), [runner.new_lane(6)], [ids])
    # Embedding, norms and activations are rounded now, and so is what is rounded after them.
    assert (logits - expected).norm() / expected.norm() < 0.08


def test_norms_of_several_types() -> None:
    decoder, ids = small(), random_ids(6, 1)
    decoder.model.layers[1].post_attention_layernorm.to(torch.bfloat16)
    (logits,) = step(runner := Runner(decoder), [runner.new_lane(6)], [ids])
    assert not runner.steady
    torch.testing.assert_close(logits, whole(small(), ids), atol=1e-4, rtol=1e-4)


def test_whatever_the_default_type_is() -> None:
    decoder, ids = small(), random_ids(6, 1)
    (expected,) = step(runner := Runner(decoder), [runner.new_lane(6)], [ids])
    torch.set_default_dtype(torch.float64)
    try:
        (logits,) = step(runner := Runner(decoder), [runner.new_lane(6)], [ids])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits, expected)


def test_a_runner_lets_go_of_the_weights() -> None:
    """At once, not at the next collection: a large model's place is needed for the next."""
    decoder = small()
    runner = Runner(decoder)
    watched = weakref.ref(decoder.model.embed_tokens.weight)
    gc.disable()
    try:
        del decoder, runner
        assert watched() is None
    finally:
        gc.enable()
