"""Folders as the hub and transformers have them: recognised, read back equal, and refused in one line when wrong."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from emulus.errors import EmulusError
from emulus.layouts import inspect_folder, read_text
from emulus.model import Decoder, load_decoder, save_decoder, sized
from emulus.presets import defaults_of
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision.weights import save_vision_tokenizer
from emulus.tokenizer.vocabulary import Vocabulary
from emulus.weights import Tensors, read_tensor


def edit(path: Path, change: Mapping[str, Any], *, drop: tuple[str, ...] = ()) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**values, **change}.items() if key not in drop}))


def equal(tensors: Tensors, state: Mapping[str, Tensor]) -> bool:
    assert tensors.keys() == state.keys()
    return all(
        torch.equal(read_tensor(stored).reshape(state[name].shape), state[name]) for name, stored in tensors.items()
    )


def test_released_decoder(emu3: Any, released: Path) -> None:
    found = inspect_folder(released)
    assert (found.layout, found.preset, found.image_area, found.vision) == ("released", "emu3", 262144, None)
    assert found.decoder == emu3.decoder.config
    assert found.vocabulary == emu3.vocabulary
    assert equal(found.decoder_tensors, emu3.decoder.state_dict())
    text = read_text(found)
    assert text is not None
    assert text.encode("a red apple 12") == emu3.text.encode("a red apple 12")
    edit(released / "config.json", {"max_position_embeddings": 5120})
    assert inspect_folder(released).preset == "emu3-base"
    assert found.generation["_from_model_config"]


def test_a_released_decoder_without_its_text_files(released: Path) -> None:
    (released / "emu3.tiktoken").unlink()
    (released / "emu3_vision_tokens.txt").unlink()
    found = inspect_folder(released)
    assert found.vocabulary is None
    assert read_text(found) is None
    assert found.special_ids["bos"] == 300 + 3 + 203


def test_released_vision_tokenizer(emu3: Any, released_vision: Path) -> None:
    found = inspect_folder(released_vision)
    assert (found.layout, found.decoder, found.vision) == ("released", None, emu3.vision.config)
    assert equal(found.vision_tensors, emu3.vision.state_dict())


def test_the_released_codes_own_folders(official: Path) -> None:
    found = inspect_folder(official / "language_model")
    assert (found.preset, found.image_area, found.vocabulary, found.special_ids["boi"]) == ("emu3", 518400, None, 94)
    assert inspect_folder(official / "vision_tokenizer").vision_tensors


def test_our_own(emu3: Any, tmp_path: Path) -> None:
    text = TextTokenizer.train(["a red apple"], size=260)
    vocabulary = Vocabulary.native(text_size=text.size, visual_size=64)
    decoder = Decoder(sized("tiny", vocab_size=vocabulary.size, num_hidden_layers=1))
    save_decoder(decoder, tmp_path)
    save_vision_tokenizer(emu3.vision, tmp_path / "vision")
    text.save(tmp_path)
    vocabulary.save(tmp_path / "vocabulary.json")
    found = inspect_folder(tmp_path)
    assert (found.layout, found.preset, found.vocabulary) == ("emulus", "native", vocabulary)
    assert equal(found.decoder_tensors, decoder.state_dict())
    assert equal(found.vision_tensors, emu3.vision.state_dict())
    (tmp_path / "generation_config.json").write_text('{"preset": "emu3", "height": 512}')
    assert inspect_folder(tmp_path).preset == "emu3"


def test_norms_of_queries_and_keys_are_found_in_the_tensors(released: Path, emu3: Any) -> None:
    decoder = Decoder(sized("tiny", **{**emu3.decoder.config.to_dict(), "qk_norm": True}))
    for shard in released.glob("model*"):
        shard.unlink()
    save_file(decoder.state_dict(), released / "model.safetensors")
    found = inspect_folder(released)
    assert found.decoder == decoder.config
    assert found.preset == "emu3.5"


@pytest.mark.parametrize("save_original_format", [False, True], ids=["newer keys", "older keys"])
def test_a_whole_model_that_transformers_saved(
    save_theirs: Callable[..., tuple[Path, Any]], emu3: Any, save_original_format: bool
) -> None:
    folder, theirs = save_theirs(max_shard_size="300KB", save_original_format=save_original_format)
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("text_model.lm_head.weight" in names) == save_original_format
    found = inspect_folder(folder)
    assert (found.layout, found.preset) == ("transformers", "emu3")
    assert found.vocabulary == emu3.vocabulary
    assert found.vision == emu3.vision.config
    state = {name.replace("model.text_model.", "model."): value for name, value in theirs.state_dict().items()}
    decoder = Decoder(found.decoder)
    vision = {name: read_tensor(stored) for name, stored in found.vision_tensors.items()}
    assert equal(found.decoder_tensors, {name: state[name] for name in decoder.state_dict()})
    # The vision names differ; that the values do not is seen in what they compute.
    emu3.vision.load_state_dict({n: vision[n].view(v.shape) for n, v in emu3.vision.state_dict().items()})
    pixels = torch.rand(2, 3, 32, 48) * 2 - 1
    codes = theirs.model.vqmodel.encode(pixels, torch.tensor([[32, 48]] * 2)).image_tokens
    assert torch.equal(torch.stack(list(codes)), emu3.vision.encode(pixels))


@pytest.mark.parametrize("kind", ["Emu3ForCausalLM", "Emu3VQVAE"])
def test_parts_that_transformers_saved(save_theirs: Callable[..., tuple[Path, Any]], kind: str) -> None:
    folder, theirs = save_theirs(kind)
    found = inspect_folder(folder)
    tensors = found.decoder_tensors or found.vision_tensors
    assert (found.decoder is None) == (kind == "Emu3VQVAE")
    assert len(tensors) == len(theirs.state_dict())


def test_what_an_old_config_leaves_out_is_the_default(save_theirs: Callable[..., tuple[Path, Any]]) -> None:
    folder, _ = save_theirs()
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text = {key: value for key, value in text.items() if key not in ("rope_parameters", "rms_norm_eps", "dtype")}
    old = {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default"}, "_attn_implementation_autoset": True}
    edit(folder / "config.json", {"text_config": {**text, **old}, "image_token_id": 303, "torch_dtype": "float32"})
    found = inspect_folder(folder)
    assert found.decoder is not None
    assert (found.decoder.rope_theta, found.decoder.rms_norm_eps) == (1e4, 1e-5)
    edit(folder / "config.json", {"text_config": {**text, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}})
    with pytest.raises(EmulusError, match="rope_scaling"):
        inspect_folder(folder)


def truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def misplace(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = files[index["weight_map"]["lm_head.weight"] == files[0]]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def add_lines(folder: Path, text: str) -> None:
    with (folder / "emu3_vision_tokens.txt").open("a") as file:
        file.write(text)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (truncate, "00002-of-00002.safetensors is damaged or truncated"),
        (misplace, "is not the index of the files beside it"),
        (pickle, "a pickle, which could run code"),
        (lambda f: (f / "model-00001-of-00002.safetensors").unlink(), "00001-of-00002.safetensors is missing"),
        (lambda f: edit(f / "config.json", {"model_type": "llama"}), "of a model of type 'llama'; Emulus reads"),
        (lambda f: edit(f / "config.json", {}, drop=("model_type",)), "of type None"),
        (lambda f: (f / "config.json").write_text("[]"), "holds a list, not fields"),
        (lambda f: edit(f / "config.json", {"hidden_size": 64}), "mis-shaped"),
        (lambda f: edit(f / "config.json", {"vocab_siz": 5}), "did you mean 'vocab_size'"),
        (lambda f: edit(f / "config.json", {"quantization_config": {}}), "quantization_config"),
        (lambda f: edit(f / "config.json", {"boi_token_id": 300}), "boi is 300 but the vocabulary says 509"),
        (lambda f: (f / "emu3_vision_tokens.txt").unlink(), "emu3_vision_tokens.txt is missing"),
        (lambda f: (f / "emu3.tiktoken").unlink(), "emu3.tiktoken is missing"),
        (lambda f: add_lines(f, "rubbish"), "emu3_vision_tokens.txt: line 68 is 'rubbish'"),
        (lambda f: add_lines(f, "<|visual token 000064|>\n"), "knows 575 ids but the vocabulary has 576"),
        (lambda f: (f / "emu3_vision_tokens.txt").write_bytes(b"\xff\xfe"), "is not text"),
        (lambda f: (f / "generation_config.json").write_text("[1]"), "generation_config.json holds a list"),
    ],
)
def test_every_fault_is_one_line(released: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(released)
    with pytest.raises(EmulusError, match=says) as caught:
        inspect_folder(released)
    assert "\n" not in str(caught.value)


def test_garbage_in_the_text_vocabulary(released: Path) -> None:
    path = released / "emu3.tiktoken"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], "no rank here"]))
    with pytest.raises(EmulusError, match=r"emu3\.tiktoken: line 300 is not"):
        read_text(inspect_folder(released))


def test_another_codebook(emu3: Any, released: Path, released_vision: Path) -> None:
    released_vision.rename(released / "vision")
    assert inspect_folder(released).vision == emu3.vision.config
    edit(released / "vision" / "config.json", {"codebook_size": 32})
    tensors = load_file(released / "vision" / "model.safetensors")
    tensors["quantize.embedding.weight"] = torch.zeros(32, 4)
    save_file(tensors, released / "vision" / "model.safetensors")
    with pytest.raises(EmulusError, match="has 32 codes but the vocabulary 64"):
        inspect_folder(released)


def drop_from_map(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    del values["vocabulary_map"]["<|extra_203|>"]
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (drop_from_map, r"config\.json, the vocabulary: its 574 ids are not"),
        (lambda f: edit(f / "config.json", {"vocabulary_map": [1]}), "not a table of names"),
        (lambda f: edit(f / "config.json", {"text_config": {}}), "mis-shaped"),
        (lambda f: edit(f / "config.json", {"quantization_config": {}}), "quantization_config"),
        (lambda f: edit(f / "config.json", {"vq_config": {"double_latent": True}}), "double_z"),
        (lambda f: edit(f / "config.json", {"vq_config": {"num_attention_heads": 2}}), "num_attention_heads is 2 but"),
        (lambda f: (f / "tokenizer.json").write_text('{"model": {"vocab": {}}}'), r"no <\|endoftext\|>"),
        (lambda f: (f / "tokenizer.json").write_text('{"added_tokens": [{"content": "x"}]}'), "whole numbers"),
        (lambda f: (f / "tokenizer.json").write_text("nonsense"), "not valid JSON"),
    ],
)
def test_every_fault_of_theirs_is_one_line(
    save_theirs: Callable[..., tuple[Path, Any]], spoil: Callable[[Path], object], says: str
) -> None:
    folder, _ = save_theirs()
    spoil(folder)
    with pytest.raises(EmulusError, match=says) as caught:
        read_text(inspect_folder(folder))
    assert "\n" not in str(caught.value)


def restore(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Write the tensors of a sharded folder again, as one file."""
    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("model*"):
        tensors |= load_file(shard) if shard.suffix == ".safetensors" else {}
        shard.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_stored_wave_lengths_are_passed_over(released: Path, emu3: Any) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
        tensors["model.rotary_emb.inv_freq"] = torch.rand(4)

    restore(released, add)
    assert equal(inspect_folder(released).decoder_tensors, emu3.decoder.state_dict())


def test_a_stored_head_beside_a_tied_embedding(released: Path) -> None:
    """It is passed over where it says the same, and refused where it does not, with a remedy that works."""
    edit(released / "config.json", {"tie_word_embeddings": True})

    def tie(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def differ(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] += 1e-3

    restore(released, tie)
    found = inspect_folder(released)
    assert "lm_head.weight" not in found.decoder_tensors
    decoder = load_decoder(released)
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    restore(released, differ)
    for read in (inspect_folder, load_decoder):
        with pytest.raises(EmulusError, match="set tie_word_embeddings to false"):
            read(released)
    edit(released / "config.json", {"tie_word_embeddings": False})
    assert "lm_head.weight" in inspect_folder(released).decoder_tensors


def test_files_saved_by_windows_editors(released: Path, emu3: Any) -> None:
    """With a byte order mark, and lines that end in CRLF."""
    for path in (released / "config.json", released / "generation_config.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    for path in (released / "emu3.tiktoken", released / "emu3_vision_tokens.txt"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    found = inspect_folder(released)
    assert found.vocabulary == emu3.vocabulary
    assert read_text(found) is not None


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "emu3.tiktoken",
        "emu3_vision_tokens.txt",
        "model-00001-of-00002.safetensors",
    ],
)
@pytest.mark.parametrize("spoil", ["pointer", "folder", "pipe", "brackets", "digits", "huge"])
def test_files_that_are_something_else(released: Path, name: str, spoil: str) -> None:
    path = released / name
    path.unlink()
    if spoil == "folder":
        path.mkdir()
    elif spoil == "pipe":
        os.mkfifo(path)
    elif spoil == "huge":
        with path.open("wb") as file:
            file.truncate(2**40)  # takes no room
    else:
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
        path.write_text({"pointer": pointer, "brackets": "[" * 100_000, "digits": "9" * 5000}[spoil])
    # Of one line of rubbish as the text vocabulary it is first seen that there are too few ids.
    says = "different models" if name == "emu3.tiktoken" and spoil in ("brackets", "digits") else re.escape(name)
    with pytest.raises(EmulusError, match=says) as caught:
        read_text(inspect_folder(released))
    assert ("Git LFS pointer" in str(caught.value)) == (spoil == "pointer")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"do_sample": "yes"},
        {"top_k": 2.5},
        {"top_k": [1]},
        {"top_p": "x"},
        {"temperature": True},
        {"temperature": 10**400},
    ],
)
def test_a_wrong_generation_config_is_one_line(released: Path, change: dict[str, Any]) -> None:
    edit(released / "generation_config.json", {"do_sample": True, **change})
    with pytest.raises(EmulusError, match=rf"generation_config\.json: {next(iter(change))} must be"):
        defaults_of(inspect_folder(released))


def test_keys_of_others_in_our_own_generation_config(tiny: Any, tmp_path: Path) -> None:
    tiny.save(tmp_path / "it")
    path = tmp_path / "it" / "generation_config.json"
    edit(path, {"_from_model_config": True, "transformers_version": "5", "max_length": 20, "bos_token_id": 1})
    assert defaults_of(inspect_folder(tmp_path / "it")) == tiny.defaults
    edit(path, {"hieght": 3})
    with pytest.raises(EmulusError, match="did you mean 'height'"):
        defaults_of(inspect_folder(tmp_path / "it"))
    edit(path, {"preset": ["emu3"]}, drop=("hieght",))
    with pytest.raises(EmulusError, match=r"generation_config\.json: preset must be a text"):
        inspect_folder(tmp_path / "it")


@pytest.mark.parametrize("kind", ["Emu3ForConditionalGeneration", "Emu3ForCausalLM", "Emu3VQVAE"])
def test_every_key_that_transformers_can_write(save_theirs: Callable[..., tuple[Path, Any]], kind: str) -> None:
    folder, theirs = save_theirs(kind)
    before = inspect_folder(folder)
    written = json.loads((folder / "config.json").read_text())
    whole = json.loads(theirs.config.to_json_string(use_diff=False))
    for part in ("text_config", "vq_config"):
        if part in written:
            written[part] |= {key: value for key, value in whole[part].items() if key not in written[part]}
    (folder / "config.json").write_text(json.dumps(whole | written))
    assert inspect_folder(folder) == before


@pytest.mark.parametrize("part", ["text_config", "vq_config", None])
def test_keys_that_change_the_maths_are_refused_wherever_they_are(
    save_theirs: Callable[..., tuple[Path, Any]], part: str | None
) -> None:
    folder, _ = save_theirs()
    values = json.loads((folder / "config.json").read_text())
    (values[part] if part else values)["sliding_window"] = 7
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(EmulusError, match="sliding_window is 7"):
        inspect_folder(folder)
