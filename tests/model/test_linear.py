"""Products with every kind of weights, by the kernels and without them."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from emulus.kernels import native
from emulus.model import Decoder, sized
from emulus.model.linear import GROUP, Quantization, linear
from emulus.model.quantize import quantize

KINDS: tuple[Quantization, ...] = get_args(Quantization)
WEIGHTS = (*KINDS, torch.float32, torch.bfloat16)


def layer_of(kind: Any, weight: Tensor) -> Tensor | nn.Module:
    return weight.to(kind) if isinstance(kind, torch.dtype) else quantize(weight, kind)


def whole(layer: Any) -> Tensor:
    return layer if isinstance(layer, Tensor) else layer.dequantize()


def moved(x: Tensor, layer: Any) -> Tensor:
    """How far the kernel for 4 bits may move each product, since it rounds inputs to 8 bits, 64 to a scale."""
    if getattr(layer, "kind", "") != "int4":
        return torch.zeros(1)
    inputs, weights = (nn.functional.pad(each.float(), (0, -each.shape[-1] % GROUP)) for each in (x, whole(layer)))
    off = inputs.unflatten(-1, (-1, GROUP)).abs().amax(-1) / 254
    return off @ weights.unflatten(-1, (-1, GROUP)).abs().sum(-1).T * 1.01


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without kernels, as on a machine that cannot build them."""
    monkeypatch.setattr(native, "available", lambda: False)
    return monkeypatch


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_product_is_that_with_the_weights_as_they_are_kept(kind: Any, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 100).to(dtype)
    layer = layer_of(kind, torch.randn(70, 100))
    exact = nn.functional.linear(x.double(), whole(layer).double())
    # In a short type a result is rounded to its digits, and on the way to it once or twice more.
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    result = linear(x, layer)
    assert result.dtype == dtype
    assert ((result - exact).abs() <= bound * (exact.abs() + exact.abs().max()) + moved(x, layer)).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@settings(deadline=None, max_examples=25)
@given(n=st.integers(0, 9), width=st.integers(1, 200), rows=st.integers(1, 90), seed=st.integers(0, 99))
def test_kernels_give_what_plain_pytorch_gives(kind: Any, n: int, width: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, layer = torch.randn(n, width), layer_of(kind, torch.randn(rows, width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        expected = linear(x, layer)
    # Numbers are of size width ** 0.5; the two sum up in float32, in different orders.
    bound = 1e-5 * (expected.abs() + width**0.5) + moved(x, layer)
    assert ((linear(x, layer) - expected).abs() <= bound).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@settings(deadline=None, max_examples=20)
@given(bounds=st.tuples(st.integers(0, 90), st.integers(0, 90)), kernels=st.booleans())
def test_rows_are_those_of_the_whole(kind: Any, bounds: tuple[int, int], kernels: bool) -> None:
    torch.manual_seed(0)
    start, stop = sorted(bounds)
    x, layer = torch.randn(3, 130), layer_of(kind, torch.randn(90, 130))
    with pytest.MonkeyPatch.context() as patch:
        if not kernels:
            patch.setattr(native, "available", lambda: False)
        part, all_rows = linear(x, layer, (start, stop)), linear(x, layer)
    assert part.shape == (3, stop - start)
    torch.testing.assert_close(part, all_rows[:, start:stop], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_many_rows_are_multiplied_in_parts(kind: Any, plain: pytest.MonkeyPatch) -> None:
    plain.setattr("emulus.model.linear._CHUNK", 3000)
    x, layer = torch.randn(2, 64), layer_of(kind, torch.randn(100, 64))
    torch.testing.assert_close(linear(x, layer), x @ whole(layer).float().T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_large_inputs_stay_finite_in_float16(kind: Quantization, plain: pytest.MonkeyPatch) -> None:
    x = torch.full((1, 256), 30.0).half()
    layer = quantize(torch.full((2, 256), 0.5), kind)
    torch.testing.assert_close(linear(x, layer).float(), torch.full((1, 2), 3840.0), rtol=0.01, atol=0)


def test_layers_are_multiplied_by_their_weight() -> None:
    layer, x = nn.Linear(8, 5, bias=False), torch.randn(2, 8)
    assert torch.equal(linear(x, layer), linear(x, layer.weight))
    torch.testing.assert_close(linear(x, layer, (1, 3)), layer(x)[:, 1:3])


def test_a_matrix_whose_rows_are_not_in_a_row() -> None:
    x, weight = torch.randn(3, 20), torch.randn(20, 30).T
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    torch.testing.assert_close(linear(torch.randn(20, 3).T, weight).shape, torch.Size((3, 30)))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_gradients_flow(kind: Any) -> None:
    x, layer = torch.randn(3, 64, requires_grad=True), layer_of(kind, torch.randn(5, 64))
    linear(x, layer).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, whole(layer).float().sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_the_head_learns_and_follows_autocast() -> None:
    model = Decoder(sized("tiny", vocab_size=50, num_hidden_layers=1))
    hidden = torch.randn(4, 128)
    model.head(hidden, (10, 20)).sum().backward()
    gradient = model.lm_head.weight.grad
    assert gradient is not None
    assert gradient[10:20].abs().sum() > 0 == gradient[:10].abs().sum()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model.head(hidden)
    assert torch.equal(logits, logits.bfloat16().float())
