"""Decoders on disk: there and back, shards, and every way a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emulus.errors import EmulusError
from emulus.model import Decoder, load_decoder, save_decoder, sized


def tiny(**overrides: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(sized("tiny", vocab_size=50, num_hidden_layers=2, hidden_size=32, **overrides))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_decoder(tiny(), tmp_path)
    return tmp_path


def edit(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.update({name: tensor for name, tensor in change.items() if tensor is not None})
    kept = {name: tensor for name, tensor in tensors.items() if name not in change or change[name] is not None}
    save_file(kept, folder / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path: Path, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied, qk_norm=tied)
    save_decoder(model, tmp_path)
    again = load_decoder(tmp_path)
    assert not again.training
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_dtype_at_save_and_at_load(tmp_path: Path) -> None:
    save_decoder(tiny(), tmp_path, torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in load_decoder(tmp_path).parameters()} == {torch.bfloat16}
    model = load_decoder(tmp_path, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, tiny().lm_head.weight.bfloat16().float())


def test_a_loaded_model_trains_without_touching_the_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model = load_decoder(folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for part, names in enumerate([list(tensors)[::2], list(tensors)[1::2]]):
        file = f"model-{part + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(folder: Path) -> None:
    shard(folder)
    assert torch.equal(load_decoder(folder).lm_head.weight, tiny().lm_head.weight)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(EmulusError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_decoder(folder)


@pytest.mark.parametrize("target", ["../elsewhere.safetensors", "/tmp/x.safetensors", "weights.bin"])
def test_index_may_not_point_elsewhere(folder: Path, target: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": target}}))
    with pytest.raises(EmulusError, match=r"not a \.safetensors file beside it"):
        load_decoder(folder)


def test_differences_are_listed(folder: Path) -> None:
    norms = {f"model.layers.{i}.{n}_layernorm.weight": None for i in (0, 1) for n in ("input", "post_attention")}
    edit(folder, {**norms, "extra": torch.zeros(1), "lm_head.weight": torch.zeros(3, 3)})
    with pytest.raises(EmulusError) as caught:
        load_decoder(folder)
    message = str(caught.value)
    assert "4 missing (model.layers.0.input_layernorm.weight" in message
    assert "and 1 more" in message
    assert "1 unexpected (extra)" in message
    assert "1 mis-shaped (lm_head.weight (3, 3) for (50, 32))" in message
    assert "\n" not in message


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_truncated_file(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(EmulusError, match="damaged or truncated") as caught:
        load_decoder(folder)
    assert "\n" not in str(caught.value)


def test_other_vocabulary(folder: Path) -> None:
    with pytest.raises(EmulusError, match="knows 50 ids but the vocabulary has 51"):
        load_decoder(folder, vocab_size=51)
    assert load_decoder(folder, vocab_size=50).config.vocab_size == 50


def test_pickles_and_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(EmulusError, match=r"holds no model\.safetensors"):
        load_decoder(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(EmulusError, match=r"pytorch_model\.bin, a pickle.*convert it to safetensors"):
        load_decoder(folder)
    (folder / "config.json").write_text('{"vocab_size": 5')
    with pytest.raises(EmulusError, match="not valid JSON"):
        load_decoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(EmulusError, match=r"config\.json is missing"):
        load_decoder(folder)


def test_a_huge_config_allocates_nothing(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2**23, "intermediate_size": 2**23}))
    with pytest.raises(EmulusError, match="mis-shaped"):
        load_decoder(folder)
