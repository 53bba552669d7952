"""The GPU's kernels against plain PyTorch.

Run with ``pytest -m gpu`` on a GPU; without one, tests/kernels/test_gpu.py runs them in Triton's interpreter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emulus.kernels import gpu
from emulus.kernels.where import Where
from emulus.model.linear import QuantizedLinear
from emulus.model.quantize import quantize
from emulus.model.transformer import RMSNorm, rotary, rotate
from emulus.sampling import SamplingParams, apply_guidance, sample

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BF16 = torch.bfloat16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not gpu.available(), reason="needs a GPU and Triton"),
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def draw(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Normal numbers that bfloat16 can say, whatever type they are in."""
    return torch.randn(*shape, device=DEVICE).to(BF16).to(dtype)


def close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    """Compare the error's norm with that of what float64 gives."""
    assert ours.shape == exact.shape
    assert ((ours.double() - exact).norm() / exact.norm()).item() < tolerance


bits = pytest.mark.skipif(INTERPRETED, reason="NumPy sums up in another order for another shape")
"""For what must be the same bit for bit."""

# Rows and columns in the middle of blocks, on their ends, and several blocks of each; tokens of each size of tile.
SIZES = [(1, 1024, 33), (13, 520, 40), (40, 96, 65)]


class TestProducts:
    @pytest.mark.parametrize(("n", "ins", "outs"), SIZES)
    @pytest.mark.parametrize("dtype", [BF16, torch.float32])
    def test_plain(self, n: int, ins: int, outs: int, dtype: torch.dtype) -> None:
        x, weight = draw(n, ins), draw(outs + 3, ins, dtype=dtype)[2 : 2 + outs]
        close(gpu.linear(x, weight), x.double() @ weight.double().T, 6e-3)

    @pytest.mark.parametrize(("n", "ins", "outs"), SIZES)
    @pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
    def test_quantised(self, n: int, ins: int, outs: int, kind: str) -> None:
        # Activations in float32 that bfloat16 can say: the result is not rounded, and shows what the sums are.
        x, layer = draw(n, ins, dtype=torch.float32), quantize(draw(outs, ins, dtype=torch.float32), kind)
        exact = x.double() @ layer.dequantize().double().T
        # In 4 bits the weights themselves are rounded to bfloat16, as in plain PyTorch (the interpreter cuts off).
        close(_product(x, layer), exact, 2e-6 if kind != "int4" else 6e-3 if INTERPRETED else 3e-3)
        rounded = _product(x.to(BF16), layer)
        assert rounded.dtype == BF16
        close(rounded, exact, 8e-3)

    @bits
    @pytest.mark.parametrize("kind", ["plain", "int8", "fp8", "int4"])
    def test_alone_as_together(self, kind: str) -> None:
        x, weight = draw(50, 1056), draw(80, 1056)
        layer = None if kind == "plain" else quantize(weight.float(), kind)
        whole = gpu.linear(x, weight) if layer is None else _product(x, layer)
        for rows in (slice(0, 1), slice(1, 6), slice(7, 20), slice(20, 45)):
            part = gpu.linear(x[rows], weight) if layer is None else _product(x[rows], layer)
            assert torch.equal(part, whole[rows])

    @pytest.mark.parametrize("kind", ["plain", "int8", "fp8", "int4"])
    @pytest.mark.parametrize("n", [2, 13, 40])
    def test_several_in_one_launch(self, kind: str, n: int) -> None:
        x, add = draw(n, 520), draw(n, 48)
        layers = [_stored(draw(outs, 520), kind) for outs in (48, 33, 33, 33)]
        apart = [_times(x, layer) for layer in layers]
        for ours, theirs in (
            (_times(x, layers[0], add=add), add + apart[0]),
            (gpu.linear_group(x, layers[:3]), torch.cat(apart[:3], dim=1)),
            (gpu.linear_group(x, layers[:1]), apart[0]),
            (gpu.gated(x, *layers[2:]), gpu.silu_mul(*apart[2:])),
        ):
            if INTERPRETED:
                # NumPy sums up in another order for another shape.
                torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.01)
            else:
                assert torch.equal(ours, theirs)

    def test_many_tokens(self) -> None:
        x, weight = draw(gpu.FEW + 1, 64), draw(32, 64, dtype=torch.float32)
        close(gpu.linear(x, weight), x.double() @ weight.double().T, 6e-3)
        assert gpu.linear(x.float(), weight.to(BF16)).dtype == torch.float32


def _stored(weight: Tensor, kind: str) -> gpu.Weight:
    return weight if kind == "plain" else quantize(weight.float(), kind).packed()


def _times(x: Tensor, weight: gpu.Weight, **options: Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return gpu.linear(x, weight, **options)
    q, scale, low = weight
    if low is not None:
        return gpu.linear_int4(x, q, scale, low, **options)
    return (gpu.linear_int8 if q.dtype == torch.int8 else gpu.linear_fp8)(x, q, scale, **options)


def _product(x: Tensor, layer: QuantizedLinear) -> Tensor:
    if layer.low is not None:
        return gpu.linear_int4(x, layer.q, layer.scale, layer.low)
    return (gpu.linear_int8 if layer.kind == "int8" else gpu.linear_fp8)(x, layer.q, layer.scale)


class TestBetween:
    @pytest.mark.parametrize(("n", "size"), [(1, 16), (3, 100), (2, 4096)])
    def test_rms_norm(self, n: int, size: int) -> None:
        x, norm = draw(n, size + 8)[:, :size], RMSNorm(size, 1e-5).to(DEVICE, BF16)
        norm.weight.data = draw(size)
        with torch.no_grad():
            torch.testing.assert_close(gpu.rms_norm(x, norm.weight, 1e-5), norm(x), atol=1e-2, rtol=1.6e-2)
            plain = gpu.rms_norm(x.float(), norm.weight.float(), 1e-5)
            torch.testing.assert_close(plain, norm.float()(x.float()), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(("n", "size"), [(1, 16), (3, 1100)])
    def test_silu_mul(self, n: int, size: int) -> None:
        gate, up = draw(n, 2 * size).split(size, -1)
        exact = F.silu(gate.double()) * up.double()
        torch.testing.assert_close(gpu.silu_mul(gate, up).double(), exact, atol=1e-2, rtol=1e-2)
        plain = gpu.silu_mul(gate.float(), up.float())
        torch.testing.assert_close(plain.double(), exact, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """Tokens of several lanes, in no order, one lane seen only in part."""

    memory: list[Tensor]
    ready: list[Tensor | None]
    of: list[int]
    positions: list[int]
    where: Where

    def visible(self, token: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values of a token's lane up to its position, and which of them it may see."""
        lane, position = self.of[token], self.positions[token]
        ready = self.ready[lane]
        see = torch.ones(position + 1, dtype=torch.bool, device=DEVICE)
        if ready is not None:
            see = ready[: position + 1].bool()
            see[position] = True
        keys, values = self.memory[lane][layer, :, :, : position + 1].double()
        return keys, values, see


def lanes(dtype: torch.dtype, kv_heads: int, width: int, *, watched: bool = False) -> Lanes:
    """Two lanes in the middle of decoding; past their last tokens stands what must not be seen."""
    of, positions, capacities = [0, 1, 0, 0, 1], [3, 203, 17, 5, 140], (64, 300)
    memory = []
    for lane, capacity in enumerate(capacities):
        last = max(p for p, o in zip(positions, of, strict=True) if o == lane)
        room = torch.full((2, 2, kv_heads, capacity, width), 1e4 if watched else float("nan"), device=DEVICE)
        room[:, :, :, : last + 1] = draw(2, 2, kv_heads, last + 1, width, dtype=torch.float32)
        memory.append(room.to(dtype))
    ready: list[Tensor | None] = [None, None]
    if watched:
        ready[1] = (torch.rand(capacities[1], device=DEVICE) < 0.5).byte()
        ready[1][64:128] = 0

    def numbers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=DEVICE)

    maps = [0 if map is None else map.data_ptr() for map in ready]
    where = Where(
        base=numbers([memory[lane].data_ptr() for lane in of]),
        capacity=numbers([capacities[lane] for lane in of]),
        position=numbers(positions),
        dtype=dtype,
        kv_heads=kv_heads,
        head_dim=width,
        ready=numbers([maps[lane] for lane in of]) if watched else None,
    )
    return Lanes(memory=memory, ready=ready, of=of, positions=positions, where=where)


def attended(q: Tensor, room: Lanes, layer: int) -> Tensor:
    """Attention in float64, token by token."""
    rows = []
    for token, heads in enumerate(q.double()):
        keys, values, see = room.visible(token, layer)
        group = len(heads) // len(keys)
        scores = torch.einsum("hd,hsd->hs", heads, keys.repeat_interleave(group, 0)) * q.shape[-1] ** -0.5
        shares = scores.masked_fill(~see, float("-inf")).softmax(-1)
        rows.append(torch.einsum("hs,hsd->hd", shares, values.repeat_interleave(group, 0)).flatten())
    return torch.stack(rows)


def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter run the programs of each grid from the last to the first."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx

    def turned(*index: int) -> None:
        place(*(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", turned)


class TestAttention:
    @pytest.mark.parametrize(
        ("dtype", "lane", "heads", "kv_heads", "width", "tolerance"),
        [
            (BF16, BF16, 8, 2, 32, 1e-2),
            (BF16, torch.float32, 4, 1, 128, 1e-2),
            (BF16, torch.float8_e4m3fn, 4, 2, 32, 1e-2),
            (torch.float16, torch.float16, 4, 2, 32, 5e-3),
            (torch.float32, torch.float32, 3, 3, 24, 1e-5),
            (torch.float32, BF16, 6, 1, 32, 1e-2),
        ],
    )
    @pytest.mark.parametrize(("watched", "splits"), [(False, 2), (True, 2), (True, 16)])
    def test_as_plain(
        self,
        dtype: torch.dtype,
        lane: torch.dtype,
        heads: int,
        kv_heads: int,
        width: int,
        tolerance: float,
        watched: bool,
        splits: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if INTERPRETED and splits > 2 and lane != BF16:
            pytest.skip("slow, and much as before")
        # Fewer than blocks of slots, and more.
        monkeypatch.setattr(gpu.attention, "_SPLITS", splits)
        room = lanes(lane, kv_heads, width, watched=watched)
        q = draw(len(room.of), heads + 1, width, dtype=dtype)[:, :heads]
        close(gpu.attend(q, room.where, 1), attended(q, room, 1), tolerance)

    @bits
    def test_alone_as_together(self) -> None:
        room = lanes(BF16, 2, 32)
        q = draw(len(room.of), 8, 32)
        together = gpu.attend(q, room.where, 0)
        for token in (0, 1, 4):
            here = slice(token, token + 1)
            where = Where(
                base=room.where.base[here],
                capacity=room.where.capacity[here],
                position=room.where.position[here],
                dtype=BF16,
                kv_heads=2,
                head_dim=32,
            )
            assert torch.equal(gpu.attend(q[here], where, 0), together[here])

    def test_whichever_part_ends_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        room = lanes(BF16, 2, 32)
        q = draw(len(room.of), 8, 32)
        first = gpu.attend(q, room.where, 1)
        assert not room.where.finished.any()
        if INTERPRETED:
            backwards(monkeypatch)
        # With the counters that the first left behind.
        assert torch.equal(gpu.attend(q, room.where, 1), first)
        assert not room.where.finished.any()

    def test_in_one_launch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        room, run = lanes(BF16, 2, 32), gpu.attention.launch.run
        launched: list[str] = []

        def counted(kernel: Any, *args: Any, **options: Any) -> None:
            launched.append(kernel.fn.__name__)
            run(kernel, *args, **options)

        monkeypatch.setattr(gpu.attention.launch, "run", counted)
        gpu.attend(draw(len(room.of), 8, 32), room.where, 1)
        assert launched == ["attend"]

    def test_norms_with_the_rotation(self) -> None:
        """The same as one after the other, out of one tensor of queries, keys and values."""
        width, heads, kv_heads = 24, 4, 2
        apart, together = lanes(BF16, kv_heads, width), lanes(BF16, kv_heads, width)
        n = len(apart.of)
        both = draw(n, (heads + 2 * kv_heads) * width)
        q, k, v = both.view(n, -1, width).split((heads, kv_heads, kv_heads), 1)
        q_norm, k_norm = draw(2, width)
        table = rotary(torch.tensor([apart.positions], device=DEVICE), width, 1e4)
        angles = table.cos[0, 0], table.sin[0, 0]

        def normed(x: Tensor, weight: Tensor) -> Tensor:
            return gpu.rms_norm(x.reshape(-1, width), weight, 1e-5).view(x.shape)

        expected = gpu.rotate_and_store(normed(q, q_norm), normed(k, k_norm), v, *angles, apart.where, 1)
        turned = gpu.rotate_and_store(q, k, v, *angles, together.where, 1, q_norm=q_norm, k_norm=k_norm, eps=1e-5)
        assert not torch.equal(turned, gpu.rotate_and_store(q, k, v, *angles, lanes(BF16, kv_heads, width).where, 1))
        # On a GPU the mean square may be divided with another rounding.
        step = 0 if INTERPRETED else 2**-7
        torch.testing.assert_close(turned, expected, atol=step, rtol=step)
        for token, (of, position) in enumerate(zip(apart.of, apart.positions, strict=True)):
            one, other = (room.memory[of][1, :, :, position] for room in (apart, together))
            torch.testing.assert_close(other, one, atol=step, rtol=step)
            assert torch.equal(other[1], v[token])

    @pytest.mark.parametrize(
        ("dtype", "lane"),
        [
            (BF16, BF16),
            (torch.float32, torch.float32),
            pytest.param(
                BF16,
                torch.float8_e4m3fn,
                marks=pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter rounds 1.97 to 1 in float8"),
            ),
        ],
    )
    def test_rotates_and_stores(self, dtype: torch.dtype, lane: torch.dtype) -> None:
        room = lanes(lane, 2, 24)
        before = [memory.clone() for memory in room.memory]
        n = len(room.of)
        q, k, v = draw(n, 8, 24, dtype=dtype).split((4, 2, 2), 1)
        table = rotary(torch.tensor([room.positions], device=DEVICE), 24, 1e4)
        turned = gpu.rotate_and_store(q, k, v, table.cos[0, 0], table.sin[0, 0], room.where, 1)
        # A value between two that can be said may become either.
        step = {BF16: 2**-7, torch.float32: 1e-6, torch.float8_e4m3fn: 2**-3}
        expected = rotate(q.transpose(0, 1)[None], table)[0].transpose(0, 1)
        torch.testing.assert_close(turned, expected, atol=step[dtype], rtol=step[dtype])
        keys = rotate(k.transpose(0, 1)[None], table)[0].transpose(0, 1)
        for token, (of, position) in enumerate(zip(room.of, room.positions, strict=True)):
            stored = room.memory[of][1, :, :, position].float()
            for ours, theirs in zip(stored, (keys[token], v[token]), strict=True):
                torch.testing.assert_close(ours, theirs.to(lane).float(), atol=step[lane], rtol=step[lane])
            before[of][1, :, :, position] = room.memory[of][1, :, :, position]
        for old, new in zip(before, room.memory, strict=True):
            assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


class TestChoice:
    @pytest.mark.parametrize(
        ("ids", "temperature", "k", "guided"),
        [
            *((7, 1.0, 5, True), (7, 1.3, 1, False), (600, 0.7, 0, True), (600, 0.0, 3, True), (600, 1.0, 900, True)),
            *((5000, 1.0, 50, True), (5000, 1.0, 50, False), (5000, 1.0, 4999, True), (32768, 1.0, 2048, True)),
        ],
    )
    def test_as_plain(self, ids: int, temperature: float, k: int, guided: bool) -> None:
        cond, null = torch.randn(2, 3, ids, device=DEVICE) * 3
        self._compare(cond, null if guided else None, temperature, k)

    def test_a_whole_vocabulary(self) -> None:
        self._compare(torch.randn(1, 184622, device=DEVICE) * 3, None, 1.0, 1024)

    @pytest.mark.parametrize("k", [1, 40, 300, 2999])
    def test_in_bfloat16(self, k: int) -> None:
        cond, null = draw(2, 3, 3000)
        self._compare(cond, null, 1.0, k)

    @pytest.mark.parametrize("k", [1, 2500])
    @pytest.mark.parametrize("spread", [8, 0])
    def test_more_than_fits_registers(self, k: int, spread: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu.choice, "_LIST", 512)
        # Many equal logits, among them both zeros.
        cond = (torch.randn(3, 5000, device=DEVICE) * spread).round()
        self._compare(cond, None, 1.0, k)

    def test_whichever_part_ends_last(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if INTERPRETED:
            backwards(monkeypatch)
        cond, null = torch.randn(2, 3, 5000, device=DEVICE) * 3
        self._compare(cond, null, 1.0, 50)

    def test_ties(self) -> None:
        logits = torch.zeros(2, 9000, device=DEVICE)
        logits[0, 50:53] = logits[1, 7000:7003] = 1
        assert self._chosen(logits, temperature=0).tolist() == [50, 7000]
        for chosen, first in zip(self._chosen(logits, temperature=1, k=2).tolist(), (50, 7000), strict=True):
            assert chosen in range(first, first + 3)

    @pytest.mark.parametrize("temperature", [0, 1])
    def test_what_is_not_a_number_is_never_chosen(self, temperature: float) -> None:
        nan, logits = float("nan"), torch.randn(3, 4000, device=DEVICE)
        logits[1, :2500] = nan
        logits[2] = nan
        smallest = logits.nan_to_num(float("-inf"))
        for k in (0, 10, 3000):
            chosen = self._chosen(logits, temperature=temperature, k=k)
            assert torch.equal(chosen, self._chosen(smallest, temperature=temperature, k=k))
            assert chosen[1] >= 2500
            assert chosen[2] == 0

    def _chosen(self, logits: Tensor, *, temperature: float, k: int = 0) -> Tensor:
        rows = torch.arange(len(logits), device=DEVICE)
        rest = {"seeds": rows, "positions": rows, "first_id": 0}
        return gpu.choose(logits, None, scale=1, temperature=temperature, k=k, **rest)

    def _compare(self, cond: Tensor, null: Tensor | None, temperature: float, k: int) -> None:
        n, ids = cond.shape
        seeds, positions = [0, 2**62 + 5, 77][:n], [1, 4096, 9][:n]
        ours = gpu.choose(
            cond,
            null,
            scale=3.0,
            temperature=temperature,
            k=k,
            seeds=torch.tensor(seeds, device=DEVICE),
            positions=torch.tensor(positions, device=DEVICE),
            first_id=1000,
        )
        params = [SamplingParams(temperature=temperature, top_k=k, seed=seed) for seed in seeds]
        names = torch.arange(1000, 1000 + ids, device=DEVICE)
        logits = cond.float() if null is None else apply_guidance(cond, null, 3.0)
        assert torch.equal(ours + 1000, sample(logits, names, params, positions))
