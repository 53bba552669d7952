"""Native CPU kernels: the same as plain PyTorch, and the same bits whatever stands beside a token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emulus.kernels import build, native
from emulus.kernels.where import Where
from emulus.model.quantize import quantize
from emulus.model.transformer import Rotary, rotary, rotate
from emulus.sampling import SamplingParams, apply_guidance, sample

pytestmark = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

MAPS = Path("/proc/self/maps")

# The same source for lesser machines: two registers of 8, and no intrinsics at all.
LEVELS = {"native": (), "avx2": ("EMULUS_AVX2",), "portable": ("EMULUS_PORTABLE",)}

few = settings(max_examples=25, deadline=None)
tokens = st.integers(1, 20)
seeds = st.integers(0, 2**32 - 1)
# In the middle of lines of 16, 32, 64 and 128 inputs, and on their ends.
widths = st.one_of(st.integers(1, 300), st.sampled_from([16, 32, 64, 128, 192, 256, 768]))
rows = st.one_of(st.integers(1, 70), st.just(300))


@pytest.fixture(params=LEVELS, autouse=True, scope="module")
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run every test with each way to compute."""
    usual = native._library
    macros = LEVELS[request.param]
    if macros:
        native._library = native.load(build.library(native.load, macros=macros))
    yield request.param
    native._library = usual


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    usual = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(usual)


def close(ours: Tensor, exact: Tensor, size: float) -> None:
    """Compare with what float64 gives; ``size`` is that of the terms that were added up."""
    assert ours.dtype is torch.float32
    assert ours.shape == exact.shape
    error = (ours.double() - exact.double()).abs()
    assert error.max().item() <= 4e-6 * size


class TestLinear:
    @few
    @given(tokens, widths, rows, seeds, st.sampled_from([torch.float32, torch.bfloat16]))
    def test_is_the_product(self, n: int, width: int, out: int, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, width, generator=generator)
        weight = torch.randn(out + 3, width, generator=generator).to(dtype)[2 : 2 + out]
        close(native.linear(x, weight), x.double() @ weight.double().T, width**0.5 * 4)

    @few
    @given(tokens, widths, rows, seeds)
    def test_int8_is_the_product(self, n: int, width: int, out: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, layer = torch.randn(n, width, generator=generator), quantize(torch.randn(out, width), "int8")
        exact = x.double() @ layer.dequantize().double().T
        close(native.linear_int8(x, layer.q, layer.scale), exact, width**0.5 * 4)

    @few
    @given(tokens, widths, rows, seeds)
    def test_int4_is_the_product(self, n: int, width: int, out: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, layer = torch.randn(n, width, generator=generator), quantize(torch.randn(out, width), "int4")
        assert layer.low is not None
        exact = x.double() @ layer.dequantize().double().T
        close(native.linear_int4(x, layer.q, layer.scale, layer.low), exact, width**0.5 * 16)

    @few
    @given(tokens, widths, rows, seeds)
    def test_rounded_activations_are_near(self, n: int, width: int, out: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, layer = torch.randn(n, width, generator=generator), quantize(torch.randn(out, width), "int4")
        assert layer.low is not None
        # What 64 neighbours are rounded to: whole multiples of a 127th of the largest of them.
        groups = F.pad(x, (0, -width % 64)).view(n, -1, 64)
        step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        rounded = ((groups / step).round() * step).flatten(1)[:, :width]
        exact = rounded.double() @ layer.dequantize().double().T
        ours = native.linear_int4(x, layer.q, layer.scale, layer.low, rounded=True)
        # A tie may be rounded either way, which moves one term by a step.
        close(ours, exact, width**0.5 * 16 + 0.05 * layer.dequantize().abs().max().item() / 4e-6)

    def test_rounded_activations_cost_little(self) -> None:
        x, layer = torch.randn(8, 768), quantize(torch.randn(512, 768), "int4")
        assert layer.low is not None
        exact = x @ layer.dequantize().T
        error = native.linear_int4(x, layer.q, layer.scale, layer.low, rounded=True) - exact
        assert error.norm() / exact.norm() < 0.008

    def test_zeros_and_what_is_not_finite(self) -> None:
        layer = quantize(torch.randn(5, 128), "int4")
        assert layer.low is not None
        x = torch.zeros(3, 128)
        x[1, 3], x[2, 100] = torch.inf, torch.nan
        for rounded in (False, True):
            ours = native.linear_int4(x, layer.q, layer.scale, layer.low, rounded=rounded)
            assert torch.equal(ours[0], torch.zeros(5))
            assert not ours[1:].isfinite().any()

    @few
    @given(st.integers(2, 60), widths, rows, seeds, st.data())
    def test_a_token_is_the_same_alone_and_among_others(
        self, n: int, width: int, out: int, seed: int, data: st.DataObject
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, weight = torch.randn(n, width, generator=generator), torch.randn(out, width, generator=generator)
        start = data.draw(st.integers(0, n - 1))
        stop = data.draw(st.integers(start + 1, n))
        for product in products(weight):
            whole = product(x)
            assert torch.equal(product(x[start:stop]), whole[start:stop])
            assert torch.equal(product(x[start : start + 1]), whole[start : start + 1])

    def test_does_not_depend_on_threads(self) -> None:
        x, weight = torch.randn(9, 330), torch.randn(1001, 330)
        for product in products(weight):
            assert_same_for_threads(lambda product=product: product(x))

    def test_rows_do_not_depend_on_their_matrix(self) -> None:
        x, weight = torch.randn(3, 330), torch.randn(101, 330)
        assert torch.equal(native.linear(x, weight)[:, 37:90], native.linear(x, weight[37:90]))

    def test_takes_columns_of_a_wider_tensor(self) -> None:
        wide, weight = torch.randn(5, 100), torch.randn(7, 40)
        assert torch.equal(native.linear(wide[:, 20:60], weight), native.linear(wide[:, 20:60].contiguous(), weight))

    def test_no_tokens_and_no_rows(self) -> None:
        assert native.linear(torch.randn(0, 8), torch.randn(3, 8)).shape == (0, 3)
        assert native.linear(torch.randn(2, 8), torch.randn(0, 8)).shape == (2, 0)
        assert torch.equal(native.linear(torch.randn(2, 0), torch.randn(3, 0)), torch.zeros(2, 3))

    @pytest.mark.parametrize(
        ("x", "weight"),
        [
            (torch.zeros(2, 8), torch.zeros(3, 7)),
            (torch.zeros(2, 8), torch.zeros(8, 3).T),
            (torch.zeros(2, 8), torch.zeros(3, 8).half()),
            (torch.zeros(2, 8).double(), torch.zeros(3, 8)),
            (torch.zeros(8, 2).T, torch.zeros(3, 8)),
            (torch.zeros(2, 8), torch.zeros(3, 8, device="meta")),
        ],
    )
    def test_refuses_what_does_not_fit(self, x: Tensor, weight: Tensor) -> None:
        with pytest.raises(ValueError):
            native.linear(x, weight)

    def test_refuses_parts_that_do_not_fit(self) -> None:
        x, eight, four = (
            torch.zeros(2, 100),
            quantize(torch.randn(3, 100), "int8"),
            quantize(torch.randn(3, 100), "int4"),
        )
        assert four.low is not None
        with pytest.raises(ValueError):
            native.linear_int8(x, eight.q, eight.scale.view(-1))
        with pytest.raises(ValueError):
            native.linear_int8(x[:, :99].contiguous(), eight.q, eight.scale)
        with pytest.raises(ValueError):
            native.linear_int4(x, four.q, four.scale[:, :1].contiguous(), four.low)
        with pytest.raises(ValueError):
            native.linear_int4(x, four.q.view(torch.int8), four.scale, four.low)
        with pytest.raises(ValueError):
            native.linear_int4(x, four.q, four.scale.float(), four.low)


class TestNormAndActivation:
    @few
    @given(tokens, widths, seeds, st.sampled_from([torch.float32, torch.bfloat16]))
    def test_rms_norm(self, n: int, size: int, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, weight = torch.randn(n, size, generator=generator) * 3, torch.randn(size, generator=generator).to(dtype)
        exact = weight.double() * F.rms_norm(x.double(), (size,), eps=1e-5)
        ours = native.rms_norm(x, weight, 1e-5)
        assert torch.allclose(ours.double(), exact, rtol=2e-6, atol=0)
        assert torch.equal(native.rms_norm(x[n // 2 : n // 2 + 1], weight, 1e-5)[0], ours[n // 2])

    @few
    @given(tokens, widths, seeds)
    def test_silu_mul(self, n: int, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        both = torch.randn(n, 2 * size, generator=generator) * 20
        gate, up = both.chunk(2, dim=1)
        ours = native.silu_mul(gate, up)
        assert torch.allclose(ours.double(), F.silu(gate.double()) * up.double(), rtol=1e-6, atol=1e-30)
        assert torch.equal(native.silu_mul(gate[:1], up[:1]), ours[:1])

    def test_silu_of_very_large_and_small(self) -> None:
        gate = torch.tensor([[200.0, -200.0, 1e30, -1e30, 0.0, 88.5, -88.5]])
        ours = native.silu_mul(gate, torch.ones_like(gate))
        assert torch.allclose(ours, F.silu(gate), atol=1e-6)


class Lanes:
    """Two or more sequences' keys and values, filled at random, and not a number where nothing was written."""

    def __init__(
        self, lengths: list[int], *, kv_heads: int, width: int, dtype: torch.dtype, layers: int = 2, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kv_heads, self.width, self.dtype = kv_heads, width, dtype
        self.memory, self.ready = [], []
        for number, length in enumerate(lengths):
            memory = torch.full((layers, 2, kv_heads, length + number, width), torch.nan, dtype=dtype)
            shape = (layers, 2, kv_heads, length, width)
            memory[..., :length, :] = torch.randn(shape, generator=generator).to(dtype)
            self.memory.append(memory)
            self.ready.append((torch.rand(length + number, generator=generator) < 0.7).to(torch.uint8))

    def where(self, lanes: list[int], positions: list[int], *, ready: bool = False) -> Where:
        return Where(
            base=torch.tensor([self.memory[lane].data_ptr() for lane in lanes]),
            capacity=torch.tensor([self.memory[lane].shape[3] for lane in lanes]),
            position=torch.tensor(positions),
            dtype=self.dtype,
            kv_heads=self.kv_heads,
            head_dim=self.width,
            ready=torch.tensor([self.ready[lane].data_ptr() for lane in lanes]) if ready else None,
        )

    def exact(self, q: Tensor, lanes: list[int], positions: list[int], layer: int, *, ready: bool) -> Tensor:
        """What plain PyTorch gives in float64, one token after the other."""
        results = []
        for token, (lane, position) in enumerate(zip(lanes, positions, strict=True)):
            seen = torch.ones(position + 1, dtype=torch.bool)
            if ready:
                seen = self.ready[lane][: position + 1].bool()
                seen[position] = True
            keys, values = (self.memory[lane][layer, kind, :, : position + 1][:, seen].double() for kind in (0, 1))
            mixed = F.scaled_dot_product_attention(q[token].double()[:, None], keys, values, enable_gqa=True)
            results.append(mixed.reshape(-1))
        return torch.stack(results)


class TestAttend:
    @few
    @given(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99)), min_size=1, max_size=6),
        st.sampled_from([1, 2, 3]),
        st.sampled_from([1, 2, 4, 9]),
        st.sampled_from([2, 16, 24, 64, 128]),
        st.sampled_from([torch.float32, torch.bfloat16]),
        st.booleans(),
        seeds,
    )
    def test_is_attention(
        self,
        places: list[tuple[int, int]],
        kv_heads: int,
        shared: int,
        width: int,
        dtype: torch.dtype,
        ready: bool,
        seed: int,
    ) -> None:
        lanes = Lanes([100, 100, 100], kv_heads=kv_heads, width=width, dtype=dtype, seed=seed)
        which, positions = [lane for lane, _ in places], [position for _, position in places]
        q = torch.randn(len(places), kv_heads * shared, width, generator=torch.Generator().manual_seed(seed))
        ours = native.attend(q, lanes.where(which, positions, ready=ready), 1)
        close(ours, lanes.exact(q, which, positions, 1, ready=ready), 2)

    @pytest.mark.parametrize("ready", [False, True])
    @pytest.mark.parametrize("width", [24, 64])
    def test_long_lanes(self, width: int, ready: bool, threads: int) -> None:
        lanes = Lanes([1600, 700], kv_heads=2, width=width, dtype=torch.float32)
        lanes.ready[0][300:1300] = 0  # nothing to be seen in a whole span
        which, positions = [0, 1, 0, 0, 0], [1599, 600, 511, 512, 1030]
        q = torch.randn(5, 6, width) * 2
        ours = native.attend(q, lanes.where(which, positions, ready=ready), 0)
        close(ours, lanes.exact(q, which, positions, 0, ready=ready), 4)

    def test_a_token_is_the_same_alone_and_among_others(self, threads: int) -> None:
        lanes = Lanes([1600, 700], kv_heads=2, width=64, dtype=torch.bfloat16)
        which, positions = [0, 1, 0, 0] * 5, [1599, 600, 511, 512] * 5
        q = torch.randn(20, 4, 64)
        whole = native.attend(q, lanes.where(which, positions), 0)
        for token in range(20):
            alone = native.attend(q[token : token + 1], lanes.where([which[token]], [positions[token]]), 0)
            assert torch.equal(alone[0], whole[token])

    def test_does_not_depend_on_threads(self) -> None:
        lanes = Lanes([2000], kv_heads=1, width=64, dtype=torch.float32)
        q = torch.randn(2, 3, 64)
        assert_same_for_threads(lambda: native.attend(q, lanes.where([0, 0], [1999, 900]), 1))

    def test_what_may_not_be_seen_may_be_anything(self) -> None:
        lanes = Lanes([100], kv_heads=1, width=64, dtype=torch.float32)
        q, where = torch.randn(1, 2, 64), lanes.where([0], [90], ready=True)
        before = native.attend(q, where, 0)
        hidden = lanes.ready[0] == 0
        hidden[90] = False
        lanes.memory[0][:, :, :, hidden] = torch.nan
        assert torch.equal(native.attend(q, where, 0), before)

    def test_some_lanes_have_maps_and_some_have_none(self) -> None:
        lanes = Lanes([700, 700], kv_heads=2, width=64, dtype=torch.float32)
        q, which, positions = torch.randn(2, 2, 64), [0, 1], [650, 640]
        mapped, unmapped = lanes.where(which, positions, ready=True), lanes.where(which, positions)
        assert mapped.ready is not None
        mapped.ready[1] = 0
        ours = native.attend(q, mapped, 0)
        close(ours[:1], lanes.exact(q[:1], which[:1], positions[:1], 0, ready=True), 4)
        assert torch.equal(ours[1], native.attend(q, unmapped, 0)[1])

    def test_refuses_what_does_not_fit(self) -> None:
        lanes = Lanes([10], kv_heads=2, width=16, dtype=torch.float32)
        for q in (torch.zeros(1, 3, 16), torch.zeros(1, 2, 8), torch.zeros(2, 2, 16), torch.zeros(1, 16, 2).mT):
            with pytest.raises(ValueError):
                native.attend(q, lanes.where([0], [3]), 0)


class TestRotateAndStore:
    @few
    @given(tokens, st.sampled_from([(4, 2), (3, 3), (8, 1)]), st.sampled_from([2, 6, 16, 64]), st.booleans(), seeds)
    def test_is_what_the_decoder_does(
        self, n: int, heads: tuple[int, int], width: int, narrow: bool, seed: int
    ) -> None:
        many, kv_heads = heads
        dtype = torch.bfloat16 if narrow else torch.float32
        lanes = Lanes([30, 30], kv_heads=kv_heads, width=width, dtype=dtype, seed=seed)
        before = [memory.clone() for memory in lanes.memory]
        # Parts of one wider tensor, as one product of the three matrices gives them.
        wide = torch.randn(n, many + 2 * kv_heads, width, generator=torch.Generator().manual_seed(seed))
        q, k, v = wide.split([many, kv_heads, kv_heads], dim=1)
        which, positions = [token % 2 for token in range(n)], [token // 2 + 5 for token in range(n)]
        table = rotary(torch.tensor([positions]), width, 10_000.0)
        ours = native.rotate_and_store(
            q, k, v, table.cos[0, 0], table.sin[0, 0], lanes.where(which, positions), layer=1
        )
        by_token = Rotary(table.cos[0, 0, :, None], table.sin[0, 0, :, None])
        assert torch.equal(ours, rotate(q, by_token))
        keys = rotate(k, by_token).to(dtype)
        for token, (lane, position) in enumerate(zip(which, positions, strict=True)):
            before[lane][1, 0, :, position] = keys[token]
            before[lane][1, 1, :, position] = v[token].to(dtype)
        for memory, expected in zip(lanes.memory, before, strict=True):
            assert torch.equal(memory.nan_to_num(7), expected.nan_to_num(7))

    def test_refuses_what_does_not_fit(self) -> None:
        lanes = Lanes([10], kv_heads=2, width=16, dtype=torch.float32)
        q, angles = torch.zeros(1, 4, 16), torch.zeros(1, 16)
        with pytest.raises(ValueError):
            native.rotate_and_store(q, q, q, angles, angles, lanes.where([0], [3]), 0)


class TestChoose:
    @few
    @given(
        st.integers(1, 5),
        st.one_of(st.integers(1, 700), st.just(5000)),
        st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        st.sampled_from([0, 1, 2, 50, 300]),
        st.sampled_from([None, 1.0, 3.0, 0.0]),
        st.booleans(),
        seeds,
    )
    def test_draws_what_the_sampler_draws(
        self, n: int, ids: int, temperature: float, k: int, scale: float | None, ties: bool, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(2 * n, ids, generator=generator) * 2
        if ties:
            logits = logits.round()
        cond, null = logits[0::2], logits[1::2] if scale is not None else None
        keys = torch.randint(0, 2**62, (n,), generator=generator)
        places = torch.randint(0, 10_000, (n,), generator=generator)
        ours = native.choose(
            cond, null, scale=scale or 0.0, temperature=temperature, k=k, seeds=keys, positions=places, first_id=1234
        )
        guided = cond if null is None else apply_guidance(cond, null, scale or 0.0)
        params = [SamplingParams(temperature=temperature, top_k=k, top_p=1.0, seed=int(key)) for key in keys]
        expected = sample(guided, torch.arange(1234, 1234 + ids), params, places.tolist())
        assert (ours + 1234).tolist() == expected.tolist()

    def test_true_size(self) -> None:
        logits = torch.randn(40, 32_768, generator=torch.Generator().manual_seed(0)) * 3
        keys, places = torch.arange(20), torch.arange(20) * 7
        ours = native.choose(
            logits[:20], logits[20:], scale=3.0, temperature=1.0, k=2048, seeds=keys, positions=places, first_id=0
        )
        params = [SamplingParams(temperature=1.0, top_k=2048, top_p=1.0, seed=seed) for seed in range(20)]
        guided = apply_guidance(logits[:20], logits[20:], 3.0)
        assert ours.tolist() == sample(guided, torch.arange(32_768), params, places.tolist()).tolist()

    def test_does_not_depend_on_threads_or_rows(self) -> None:
        logits, keys = torch.randn(6, 999), torch.arange(6)
        settings: dict[str, Any] = {"scale": 1.0, "temperature": 1.0, "k": 100, "first_id": 5}
        whole = native.choose(logits, None, seeds=keys, positions=keys, **settings)
        assert_same_for_threads(lambda: native.choose(logits, None, seeds=keys, positions=keys, **settings))
        for row in range(6):
            part = slice(row, row + 1)
            alone = native.choose(logits[part], None, seeds=keys[part], positions=keys[part], **settings)
            assert alone.item() == whole[row].item()

    def test_the_first_of_equals(self) -> None:
        logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [-torch.inf, -torch.inf, 0.0, 0.0]])
        none = torch.zeros(2, dtype=torch.int64)
        greedy = native.choose(logits, None, scale=1.0, temperature=0.0, k=0, seeds=none, positions=none, first_id=0)
        assert greedy.tolist() == [1, 2]

    def test_ids_ruled_out_are_never_drawn(self) -> None:
        logits = torch.full((500, 90), -torch.inf)
        logits[:, 40:44] = 0
        keys = torch.arange(500)
        for k in (0, 3, 60):
            drawn = native.choose(logits, None, scale=1.0, temperature=1.0, k=k, seeds=keys, positions=keys, first_id=0)
            assert set(drawn.tolist()) == {40, 41, 42, 43}

    def test_refuses_what_does_not_fit(self) -> None:
        logits, none = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)
        with pytest.raises(ValueError):
            native.choose(logits, None, scale=1.0, temperature=1.0, k=0, seeds=none[:1], positions=none, first_id=0)
        with pytest.raises(ValueError):
            native.choose(logits, logits[:1], scale=2.0, temperature=1.0, k=0, seeds=none, positions=none, first_id=0)
        with pytest.raises(ValueError):
            native.choose(logits, None, scale=1.0, temperature=-1.0, k=0, seeds=none, positions=none, first_id=0)


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux tells")
def test_one_thread_pool_is_shared_with_pytorch() -> None:
    """Two would fight for the processors."""
    runtimes = {line.split()[-1] for line in MAPS.read_text().splitlines() if "libgomp" in line or "libomp" in line}
    assert len(runtimes) == 1


def products(weight: Tensor) -> list[Any]:
    """Every kind of product with this matrix."""
    narrow, eight, four = weight.bfloat16(), quantize(weight, "int8"), quantize(weight, "int4")
    return [
        lambda x: native.linear(x, weight),
        lambda x: native.linear(x, narrow),
        lambda x: native.linear_int8(x, eight.q, eight.scale),
        lambda x: native.linear_int4(x, four.q, four.scale, four.low),
        lambda x: native.linear_int4(x, four.q, four.scale, four.low, rounded=True),
    ]


def assert_same_for_threads(run: Any) -> None:
    usual = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(usual)
    assert all(torch.equal(results[0], other) for other in results[1:])
