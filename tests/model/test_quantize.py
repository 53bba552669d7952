"""Projections in few bits: exact to their definition, small, and only where they belong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emulus.errors import EmulusError
from emulus.kernels import native
from emulus.model import Decoder, load_config, load_decoder, save_decoder, sized
from emulus.model.linear import GROUP, Quantization, QuantizedLinear
from emulus.model.quantize import (
    dequantize_decoder,
    is_quantized,
    put_rows,
    quantization_of,
    quantize,
    quantize_decoder,
    quantized_bytes,
)

KINDS: tuple[Quantization, ...] = ("int8", "int4", "fp8")
EVEN: tuple[Quantization, ...] = ("int8", "int4")


def scale_of_each_weight(layer: QuantizedLinear) -> Tensor:
    wide = layer.scale.double().repeat_interleave(layer.in_features if layer.low is None else GROUP, dim=1)
    return wide[:, : layer.in_features]


@pytest.mark.parametrize("kind", EVEN)
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


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 4), width=st.integers(1, 150), size=st.integers(-33, 30), seed=st.integers(0, 999))
def test_short_floats_are_the_nearest(rows: int, width: int, size: int, seed: int) -> None:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 10.0**size
    layer = quantize(weight, "fp8")
    exact = weight.double() / layer.scale.double()
    # Half of the last of 3 digits, or half of the smallest number there is.
    bound = (exact.abs() * 2**-4).clamp(min=2**-10) * 1.001
    assert bool(((layer.q.double() - exact).abs() <= bound).all())
    torch.testing.assert_close(layer.q.float().abs().amax(1), torch.full((rows,), 448.0))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_put_in_pieces(kind: Quantization) -> None:
    weight = torch.randn(10, 70)
    layer = QuantizedLinear(70, 10, kind)
    for start in (0, 4, 8):
        put_rows(layer, start, weight[start : start + 4])
    assert torch.equal(layer.dequantize(), quantize(weight, kind).dequantize())
    assert torch.equal(layer.dequantize(3, 5), layer.dequantize()[3:5])


def test_size_in_memory() -> None:
    shape = (1024, 4096)
    assert quantized_bytes(shape, "int8") == 1024 * 4096 + 4 * 1024
    assert quantized_bytes(shape, "fp8") == quantized_bytes(shape, "int8")
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


CLOSE = {"int8": 0.03, "int4": 0.3, "fp8": 0.1}
SHAPE = sized("tiny", vocab_size=50, num_hidden_layers=2, qk_norm=True)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_decoder(Decoder(dataclasses.replace(SHAPE, tie_word_embeddings=request.param)), tmp_path)
    return tmp_path


def quantized_layers(decoder: Decoder) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in decoder.named_modules() if isinstance(module, QuantizedLinear)}


def same(left: Decoder, right: Decoder) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    raw = {name: (ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours}
    return ours.keys() == theirs.keys() and all(torch.equal(*pair) for pair in raw.values())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_decoder_quantised_as_it_is_read(folder: Path, kind: Quantization, monkeypatch: pytest.MonkeyPatch) -> None:
    # A kernel may round inputs too.
    monkeypatch.setattr(native, "available", lambda: False)
    plain, small = load_decoder(folder), load_decoder(folder, quantize=kind)
    matrices = quantized_layers(small)
    assert len(matrices) == 7 * 2 + 1
    assert {layer.kind for name, layer in matrices.items() if name != "lm_head"} == {kind}
    assert matrices["lm_head"].kind == ("fp8" if kind == "fp8" else "int8")
    ids = torch.randint(50, (2, 12))
    logits = small(ids)
    assert (logits - plain(ids)).std() < CLOSE[kind] * plain(ids).std()
    torch.testing.assert_close(small(ids, vocab_range=(7, 19)), logits[..., 7:19])
    # It is the plain decoder with rounded weights, nothing else.
    assert torch.equal(small.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    plain.lm_head.weight = nn.Parameter(plain.lm_head.weight.clone())
    for name, layer in matrices.items():
        plain.get_submodule(name).weight.copy_(layer.dequantize())
    torch.testing.assert_close(logits, plain(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_quantised_in_memory_shares_the_rest(folder: Path, kind: Quantization) -> None:
    plain = load_decoder(folder).train()
    small = quantize_decoder(plain, kind)
    assert same(small, load_decoder(folder, quantize=kind))
    assert small.model.embed_tokens.weight is plain.model.embed_tokens.weight
    assert not small.training
    assert plain.training
    assert not is_quantized(plain)
    with pytest.raises(EmulusError, match="quantised already"):
        quantize_decoder(small, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_again(folder: Path, kind: Quantization) -> None:
    small = quantize_decoder(load_decoder(folder), kind)
    whole = dequantize_decoder(small)
    assert not is_quantized(whole)
    assert is_quantized(small)
    assert whole.model.embed_tokens.weight is small.model.embed_tokens.weight
    ids = torch.arange(20)[None]
    torch.testing.assert_close(whole(ids), small(ids), atol=1e-2, rtol=1e-2)
    # What is on the grid of the few bits stays there.
    again = quantize_decoder(whole, kind)
    torch.testing.assert_close(again(ids), small(ids), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_decoder_computes_in_its_dtype(folder: Path, kind: Quantization) -> None:
    small = load_decoder(folder, torch.bfloat16, quantize=kind)
    assert is_quantized(small)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert small.hidden(torch.randint(50, (1, 5))).dtype == torch.bfloat16
    assert small(torch.randint(50, (1, 5))).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(folder: Path, tmp_path: Path, kind: Quantization) -> None:
    small = load_decoder(folder, torch.bfloat16, quantize=kind)
    save_decoder(small, tmp_path / "small")
    again = load_decoder(tmp_path / "small")
    assert same(again, small)
    assert quantization_of(again) == kind
    assert load_config(tmp_path / "small") == small.config
    assert (tmp_path / "small/model.safetensors").stat().st_size < (folder / "model.safetensors").stat().st_size / 2
    # What is computed in is chosen as for any decoder; what is quantised stays.
    wide = load_decoder(tmp_path / "small", torch.float32, quantize=kind)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert all(
        torch.equal(layer.scale, quantized_layers(wide)[name].scale) for name, layer in quantized_layers(again).items()
    )
    save_decoder(wide, tmp_path / "again", torch.bfloat16)
    assert same(load_decoder(tmp_path / "again"), small)


def test_what_is_quantised_is_not_quantised_otherwise(folder: Path, tmp_path: Path) -> None:
    save_decoder(load_decoder(folder, quantize="int8"), tmp_path / "small")
    with pytest.raises(EmulusError, match="is quantised already, in int8, so it cannot be int4"):
        load_decoder(tmp_path / "small", quantize="int4")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "int5"}, r"config\.json: unknown quantisation 'int5'"),
        ({"group": 32}, r"'group': 32.* is not of the sort that is read here, .*'group': 64"),
        ({"kind": None}, "names no kind"),
        ({"kind": "int8", "head": "int8"}, r"mis-shaped \(model\.layers\.0"),
    ],
)
def test_a_config_that_says_otherwise(folder: Path, changes: dict[str, Any], match: str) -> None:
    save_decoder(load_decoder(folder, quantize="int4"), folder)
    values = json.loads((folder / "config.json").read_text())
    values["quantization"] |= changes
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(EmulusError, match=match):
        load_decoder(folder)


def test_a_config_that_does_not_say(folder: Path) -> None:
    save_decoder(load_decoder(folder, quantize="int8"), folder)
    values = json.loads((folder / "config.json").read_text())
    del values["quantization"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(EmulusError, match=r"unexpected \(.*\.q"):
        load_decoder(folder)


def test_numbers_of_another_type_are_refused(folder: Path) -> None:
    save_decoder(load_decoder(folder, quantize="int8"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.q"] = tensors["lm_head.q"].float()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(EmulusError, match=r"lm_head\.q is of torch\.float32 and not torch\.int8"):
        load_decoder(folder)


def test_a_broken_weight_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(EmulusError, match=r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight holds a weight"):
        load_decoder(folder, quantize="int4")
    with pytest.raises(EmulusError, match="unknown quantisation 'fp9'; did you mean 'fp8'"):
        load_decoder(folder, quantize="fp9")  # type: ignore[arg-type]
