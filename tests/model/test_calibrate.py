"""Rounding that looks at inputs: closer than without, on inputs that go together, and in the same layouts."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from emulus.errors import EmulusError
from emulus.model import Decoder, load_decoder, save_decoder, sized
from emulus.model.calibrate import (
    calibrate_decoder,
    calibrate_stored,
    order_and_factor,
    round_by_inputs,
    second_moments,
)
from emulus.model.linear import Quantization, QuantizedLinear, linear
from emulus.model.quantize import quantize, quantize_decoder
from emulus.weights import find_tensors

KINDS: tuple[Quantization, ...] = get_args(Quantization)


def calibrated(weight: Tensor, x: Tensor, kind: Quantization) -> QuantizedLinear:
    layer = quantize(weight, kind)
    layer.q = round_by_inputs(weight, layer.packed(), *order_and_factor(second_moments(x)), kind)
    return layer


def correlated(n: int, width: int, rank: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.rand(width, generator=draw) * 3
    shared = torch.randn(n, rank, generator=draw) @ torch.randn(rank, width, generator=draw)
    return (shared + 0.1 * torch.randn(n, width, generator=draw)) * sizes


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(width=st.integers(40, 150), rank=st.integers(1, 12), seed=st.integers(0, 999))
def test_products_are_closer_where_inputs_go_together(kind: Quantization, width: int, rank: int, seed: int) -> None:
    weight = torch.randn(32, width, generator=torch.Generator().manual_seed(seed))
    seen, others = correlated(400, width, rank, seed).split(200)
    plain, layer = quantize(weight, kind), calibrated(weight, seen, kind)
    for x in (seen, others):
        errors = [(linear(x, it) - x @ weight.T).norm() for it in (plain, layer)]
        assert errors[1] < 0.8 * errors[0]
    assert (layer.dequantize() - weight).norm() >= (plain.dequantize() - weight).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_independent_inputs_of_one_size_round_to_the_nearest(kind: Quantization) -> None:
    weight = torch.randn(8, 100)
    layer = quantize(weight, kind)
    order, factor = order_and_factor(torch.eye(100, dtype=torch.float64))
    assert torch.equal(
        round_by_inputs(weight, layer.packed(), order, factor, kind)[:, :48].view(torch.uint8),
        layer.q[:, :48].view(torch.uint8),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_always_zero(kind: Quantization) -> None:
    x = torch.randn(50, 70)
    x[:, 10:30] = 0
    for inputs in (x, torch.zeros(50, 70)):
        weight = torch.randn(4, 70)
        away = (calibrated(weight, inputs, kind).dequantize() - weight).abs()
        assert away.max() < 1
        assert (away[:, 10:30] <= (quantize(weight, kind).dequantize() - weight).abs()[:, 10:30] + 1e-6).all()


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    config = sized("tiny", vocab_size=60, num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.1)
    decoder = Decoder(config).eval()
    # Embeddings of a trained model lie in few directions, with some much larger than others.
    with torch.no_grad():
        decoder.model.embed_tokens.weight.copy_(correlated(60, 128, 8, 0))
    return decoder


def documents(count: int, seed: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(60, (40,), generator=draw).tolist() for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_of_a_calibrated_decoder_are_closer(model: Decoder, kind: Quantization) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    better = calibrate_decoder(model, documents(24, 1), kind)
    plain = quantize_decoder(model, kind)
    assert better.state_dict().keys() == plain.state_dict().keys()
    layers = zip(better.buffers(), plain.buffers(), strict=True)
    assert all(ours.dtype == theirs.dtype and ours.shape == theirs.shape for ours, theirs in layers)
    ids = torch.tensor(documents(8, 2))
    errors = [(decoder(ids) - model(ids)).norm() for decoder in (better, plain)]
    assert errors[0] < 0.8 * errors[1]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_read_layer_by_layer_it_is_the_same(tmp_path: Path, tied: bool) -> None:
    config = sized("tiny", vocab_size=60, num_hidden_layers=2, hidden_size=64, tie_word_embeddings=tied, qk_norm=True)
    save_decoder(Decoder(config), tmp_path)
    seen = documents(4, 1)
    whole = calibrate_decoder(load_decoder(tmp_path), seen, "int4")
    pieces = calibrate_stored(config, find_tensors(tmp_path), seen, "int4", folder=tmp_path)
    assert whole.state_dict().keys() == pieces.state_dict().keys()
    assert all(torch.equal(tensor, pieces.state_dict()[name]) for name, tensor in whole.state_dict().items())
    save_decoder(pieces, tmp_path / "small")
    ids = torch.tensor(seen)
    assert torch.equal(load_decoder(tmp_path / "small")(ids), pieces(ids))


@pytest.mark.parametrize(
    ("given_documents", "match"),
    [
        ([], "there are no documents"),
        ([[1], []], "document 1 has 0 ids, the decoder takes 1 to 64"),
        ([[1] * 65], "document 0 has 65 ids, the decoder takes 1 to 64"),
        ([[1], [3, 60]], "document 1 has ids that the decoder, of 60, does not know"),
        ([[-1]], "does not know"),
    ],
)
def test_documents_of_another_model(model: Decoder, given_documents: list[list[int]], match: str) -> None:
    with pytest.raises(EmulusError, match=match):
        calibrate_decoder(model, given_documents, "int4")


def test_unknown_kind_and_quantised_already(model: Decoder) -> None:
    with pytest.raises(EmulusError, match="unknown quantisation 'int5'"):
        calibrate_decoder(model, [[1]], "int5")  # type: ignore[arg-type]
    with pytest.raises(EmulusError, match="quantised already"):
        calibrate_decoder(quantize_decoder(model, "int8"), [[1]], "int8")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"model\.layers\.1\.mlp\.up_proj\.weight holds a weight that is not"),
        ("lm_head.weight", r"lm_head\.weight holds a weight that is not"),
        ("model.embed_tokens.weight", "computes what is not a number"),
    ],
)
def test_a_damaged_decoder(model: Decoder, tmp_path: Path, name: str, match: str) -> None:
    save_decoder(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][3, 3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(EmulusError, match=match):
        calibrate_stored(model.config, find_tensors(tmp_path), [[1, 2, 3]], "int4", folder=tmp_path)
