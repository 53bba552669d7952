"""Projections in few bits: exact to their definition, small, and only where they belong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emulus.errors import EmulusError
from emulus.model import Decoder, load_decoder, save_decoder, sized
from emulus.model.quantize import GROUP, Quantization, QuantizedLinear, is_quantized, quantize, quantized_bytes

KINDS: tuple[Quantization, ...] = ("int8", "int4")


def scale_of_each_weight(layer: QuantizedLinear) -> Tensor:
    wide = layer.scale.double().repeat_interleave(layer.in_features if layer.low is None else GROUP, dim=1)
    return wide[:, : layer.in_features]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 4),
    width=st.integers(1, 150),
    size=st.integers(-40, 30),
    offset=st.sampled_from([0.0, 0.0, 3.0, -100.0]),
    spread=st.sampled_from([0.0, 1.0, 1.0]),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_no_weight_is_further_away_than_half_a_scale(
    kind: Quantization,
    rows: int,
    width: int,
    size: int,
    offset: float,
    spread: float,
    seed: int,
    dtype: torch.dtype,
) -> None:
    noise = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    weight = ((noise * spread + offset) * 10.0**size).to(dtype)
    layer = quantize(weight, kind)
    away = (layer.dequantize().double() - weight.double()).abs()
    assert bool((away <= scale_of_each_weight(layer) * 0.5001).all())
    assert bool((layer.dequantize()[weight == 0] == 0).all()) or kind == "int4"


def test_scales_are_as_small_as_they_can_be() -> None:
    weight = torch.randn(8, 2 * GROUP)
    eight, four = quantize(weight, "int8"), quantize(weight, "int4")
    torch.testing.assert_close(eight.scale[:, 0], weight.abs().amax(1) / 127)
    groups = weight.view(8, 2, GROUP)
    torch.testing.assert_close(four.scale.float(), (groups.amax(-1) - groups.amin(-1)) / 15, rtol=0.02, atol=0)


def test_two_values_lie_in_a_byte() -> None:
    # Whole multiples of a power of two come back exactly.
    values = torch.arange(GROUP) % 16
    layer = quantize((values / 8)[None], "int4")
    assert layer.q.shape == (1, GROUP // 2)
    assert layer.q[0, :3].tolist() == [0x10, 0x32, 0x54]
    assert torch.equal(layer.dequantize()[0] * 8, values.float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_that_with_the_rounded_weights(kind: Quantization, dtype: torch.dtype) -> None:
    weight, x = torch.randn(70, 100), torch.randn(2, 3, 100, dtype=dtype)
    layer = quantize(weight, kind)
    exact = nn.functional.linear(x.double(), layer.dequantize().double())
    # In bfloat16 a result is rounded to eight bits, and on the way to it once or twice more.
    bound = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(layer(x).double(), exact, rtol=bound, atol=bound * exact.abs().max().item())
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_are_multiplied_in_parts(kind: Quantization) -> None:
    weight, x = torch.randn(2100, 4096), torch.randn(1, 4096)
    layer = quantize(weight, kind)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().T, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_put_in_pieces(kind: Quantization) -> None:
    weight = torch.randn(10, 70)
    layer = QuantizedLinear(70, 10, kind)
    for start in (0, 4, 8):
        layer.put(start, weight[start : start + 4])
    assert torch.equal(layer.dequantize(), quantize(weight, kind).dequantize())
    assert torch.equal(layer.dequantize(3, 5), layer.dequantize()[3:5])


def test_size_in_memory() -> None:
    shape = (1024, 4096)
    assert quantized_bytes(shape, "int8") == 1024 * 4096 + 4 * 1024
    assert quantized_bytes(shape, "int4") == 1024 * 4096 // 2 + 4 * 1024 * 4096 // GROUP
    for kind in KINDS:
        layer = quantize(torch.randn(shape), kind)
        assert sum(buffer.untyped_storage().nbytes() for buffer in layer.buffers()) == quantized_bytes(shape, kind)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_refused(kind: Quantization, value: float) -> None:
    with pytest.raises(EmulusError, match="not a number, or too large"):
        quantize(torch.tensor([[1.0, value]]), kind)


def test_unknown_kind() -> None:
    with pytest.raises(EmulusError, match="unknown quantisation 'int5'; did you mean"):
        quantize(torch.ones(2, 2), "int5")  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_decoder(Decoder(sized("tiny", vocab_size=50, num_hidden_layers=2, qk_norm=True)), tmp_path)
    return tmp_path


@pytest.mark.parametrize(("kind", "close"), [("int8", 0.03), ("int4", 0.3)])
@torch.no_grad()
def test_a_decoder_quantised_as_it_is_read(folder: Path, kind: Quantization, close: float) -> None:
    plain, small = load_decoder(folder), load_decoder(folder, quantize=kind)
    matrices = {name: module for name, module in small.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(matrices) == 7 * 2
    assert {type(module) for name, module in small.named_modules() if name == "lm_head"} == {nn.Linear}
    ids = torch.randint(50, (2, 12))
    logits = small(ids)
    assert (logits - plain(ids)).std() < close * plain(ids).std()
    # It is the plain decoder with rounded weights, nothing else.
    for name, layer in matrices.items():
        plain.get_submodule(name).weight.copy_(layer.dequantize())
    torch.testing.assert_close(logits, plain(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_decoder_computes_in_its_dtype_and_is_not_saved(folder: Path, kind: Quantization) -> None:
    small = load_decoder(folder, torch.bfloat16, quantize=kind)
    assert is_quantized(small)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert small.hidden(torch.randint(50, (1, 5))).dtype == torch.bfloat16
    with pytest.raises(EmulusError, match="save the original"):
        save_decoder(small, folder / "again")
    assert not (folder / "again").exists()


def test_a_broken_weight_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(EmulusError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds a weight"):
        load_decoder(folder, quantize="int4")
    with pytest.raises(EmulusError, match="unknown quantisation 'fp8'"):
        load_decoder(folder, quantize="fp8")  # type: ignore[arg-type]
