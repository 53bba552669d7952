"""Converting: transformers computes the same, there and back is the identity, and nothing is left by halves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import emulus.layouts.conversion as conversion
from emulus.errors import EmulusError
from emulus.layouts import Layout, convert, inspect_folder, read_text
from emulus.model import Decoder, load_decoder, save_decoder, sized
from emulus.presets import defaults_of
from emulus.shards import Planned, dtypes_of, same, save_sharded
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.weights import load_vision_tokenizer, save_vision_tokenizer
from emulus.tokenizer.vocabulary import Vocabulary
from emulus.weights import Tensors, find_tensors, read_tensor

LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def assert_equal(before: Tensors, after: Tensors) -> None:
    assert before.keys() == after.keys()
    for name, stored in before.items():
        again = read_tensor(after[name])
        value = read_tensor(stored)
        assert again.dtype == value.dtype
        assert torch.equal(again.view(value.shape), value), name


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 3, 32, 48) * 2 - 1, torch.tensor([[32, 48]] * 2)


@pytest.mark.parametrize("shard", [10**9, 200_000], ids=["one file", "shards"])
def test_transformers_computes_the_same(
    emu3: Any, released: Path, released_vision: Path, tmp_path: Path, shard: int
) -> None:
    transformers = pytest.importorskip("transformers")
    done = convert(released, tmp_path / "hf", to="transformers", vision=released_vision, max_shard_bytes=shard)
    assert done.tensors == len(emu3.decoder.state_dict()) + len(emu3.vision.state_dict())
    assert done.checked
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == (shard < 10**9)
    assert not (tmp_path / "hf" / "COMPLETE").exists()
    theirs, report = transformers.Emu3ForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.randint(0, emu3.vocabulary.size, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, emu3.decoder(ids), atol=1e-4, rtol=0)
    pixels, sizes = images()
    codes = emu3.vision.encode(pixels)
    assert torch.equal(torch.stack(list(theirs.model.vqmodel.encode(pixels, sizes).image_tokens)), codes)
    with torch.no_grad():
        painted = theirs.model.vqmodel.decode(codes)
    torch.testing.assert_close(painted, emu3.vision.decode(codes), atol=1e-4, rtol=0)
    assert theirs.generation_config.top_k == 2048
    assert theirs.generation_config.eos_token_id == emu3.vocabulary.eos
    rows = theirs.model.vocabulary_mapping.convert_img2bpe(codes[0])
    assert torch.equal(rows[:, :-1], codes[0] + emu3.vocabulary.visual_start)
    assert rows[:, -1].eq(emu3.vocabulary.eol).all()


def test_its_processor_is_transformers_own(emu3: Any, released: Path, released_vision: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    convert(released, tmp_path / "hf", to="transformers", vision=released_vision)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("a red apple, 2024", "It's un e\u0301te\u0301 à la\n\n plage  ", "数字 12<|"):
        assert tokenizer(text).input_ids == emu3.text.encode(text)
    names = emu3.vocabulary.special_names
    special = "a<|image start|>4*6<|image token|><|visual token 000003|><|extra_201|>"
    assert tokenizer(special).input_ids == emu3.text.encode(special, allow_special=names)
    processor = transformers.Emu3Processor.from_pretrained(tmp_path / "hf")
    drawing = processor(text="a red apple", return_for_image_generation=True, ratio="1:1", image_area=32 * 32)
    expected = "<|extra_203|>a red apple<|image start|>4*4<|image token|>"
    assert drawing["input_ids"][0] == emu3.text.encode(expected, allow_special=names)
    # Their pictures are at least 512 pixels square; here the file is asked for less.
    config = tmp_path / "hf" / "preprocessor_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "min_pixels": 64}))
    processor = transformers.Emu3Processor.from_pretrained(tmp_path / "hf")
    model = transformers.Emu3ForConditionalGeneration.from_pretrained(tmp_path / "hf")
    black = torch.zeros(32, 48, 3, dtype=torch.uint8).numpy()
    inputs = processor(text="<image>what is it?", images=black, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 48)
    assert inputs["pixel_values"].eq(-1).all()
    block = "<|extra_203|><|image start|>4*6<|image token|>{cells}<|extra_201|><|image end|>what is it?"
    codes = emu3.vision.encode(inputs["pixel_values"])[0].tolist()
    cells = "".join("".join(f"<|visual token {code:06d}|>" for code in row) + "<|extra_200|>" for row in codes)
    ours = emu3.text.encode(block.format(cells=cells), allow_special=names)
    with torch.no_grad():
        logits = emu3.decoder(torch.tensor([ours]))
        torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-4, rtol=0)


def test_a_question_as_the_released_processor_writes_it(released: Path, released_vision: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    convert(released, tmp_path / "hf", to="transformers", vision=released_vision)
    processor = transformers.Emu3Processor.from_pretrained(tmp_path / "hf")
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    asked = [{"role": "user", "content": parts}]
    first = "You are a helpful assistant. USER: <image>What is it?. ASSISTANT:"
    assert processor.apply_chat_template(asked, add_generation_prompt=True) == first
    more = [*asked, {"role": "assistant", "content": "An apple."}, {"role": "user", "content": "Red"}]
    later = f"{first} An apple. USER: Red. ASSISTANT:"
    assert processor.apply_chat_template(more, add_generation_prompt=True) == later


def test_the_parts_by_themselves(emu3: Any, released: Path, released_vision: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    convert(released, tmp_path / "lm", to="transformers")
    ids = torch.randint(0, emu3.vocabulary.size, (2, 20))
    with torch.no_grad():
        logits = transformers.Emu3ForCausalLM.from_pretrained(tmp_path / "lm")(ids).logits
    torch.testing.assert_close(logits, emu3.decoder(ids), atol=1e-4, rtol=0)
    assert inspect_folder(tmp_path / "lm").vocabulary == emu3.vocabulary
    convert(released_vision, tmp_path / "vq", to="transformers")
    pixels, sizes = images()
    vq = transformers.Emu3VQVAE.from_pretrained(tmp_path / "vq")
    assert torch.equal(torch.stack(list(vq.encode(pixels, sizes).image_tokens)), emu3.vision.encode(pixels))


def test_a_model_of_theirs_becomes_ours(save_theirs: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    folder, theirs = save_theirs(max_shard_size="300KB")
    convert(folder, tmp_path / "ours", to="emulus")
    ids = torch.randint(0, 500, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(load_decoder(tmp_path / "ours")(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    pixels, sizes = images()
    codes = torch.stack(list(theirs.model.vqmodel.encode(pixels, sizes).image_tokens))
    assert torch.equal(load_vision_tokenizer(tmp_path / "ours").encode(pixels), codes)


decoders = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([16, 32]),
        "intermediate_size": st.integers(1, 9),
        "num_hidden_layers": st.integers(1, 3),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
        "head_dim": st.sampled_from([None, 4]),
        "tie_word_embeddings": st.booleans(),
        "max_position_embeddings": st.sampled_from([5120, 9216]),
    }
)


@settings(max_examples=4, deadline=None)
@given(
    decoders,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.permutations(LAYOUTS),
    st.integers(60_000, 400_000),
)
def test_there_and_back_is_the_identity(
    emu3: Any,
    tmp_path_factory: pytest.TempPathFactory,
    values: dict[str, Any],
    dtype: torch.dtype,
    way: list[Layout],
    shard: int,
) -> None:
    if values["head_dim"] is not None and values["hidden_size"] != 16:
        values = {**values, "head_dim": None}
    start = tmp_path_factory.mktemp("start")
    vision = VisionTokenizer(VisionTokenizerConfig(ch=32, ch_mult=(1,), attn_resolutions=(), codebook_size=64))
    shape = sized("tiny", vocab_size=emu3.vocabulary.size, pad_token_id=emu3.vocabulary.pad, **values)
    save_decoder(Decoder(shape), start, dtype=dtype)
    save_vision_tokenizer(vision, start / "vision")
    emu3.text.save(start)
    emu3.vocabulary.save(start / "vocabulary.json")
    (start / "generation_config.json").write_text('{"preset": "emu3", "height": 512, "width": 512}')
    folders = [start]
    for step, layout in enumerate((*way, "emulus")):
        folders.append(start / f"step-{step}")
        convert(folders[-2], folders[-1], to=layout, max_shard_bytes=shard)
    first = inspect_folder(start)
    for folder, layout in zip(folders[1:], (*way, "emulus"), strict=True):
        now = inspect_folder(folder)
        assert (now.decoder, now.vision, now.vocabulary) == (first.decoder, first.vision, first.vocabulary)
        assert_equal(first.decoder_tensors, now.decoder_tensors)
        assert_equal(first.vision_tensors, now.vision_tensors)
        text = read_text(now)
        assert text is not None
        assert list(text.pieces) == list(emu3.text.pieces)
        assert now.layout == layout
    assert folders[-1].joinpath("config.json").read_text() == start.joinpath("config.json").read_text()


def test_a_converted_released_folder_is_like_the_hubs(released: Path, released_vision: Path, tmp_path: Path) -> None:
    convert(released, tmp_path / "ours", to="emulus", vision=released_vision)
    generation = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert generation == {"preset": "emu3", **dataclasses.asdict(defaults_of(inspect_folder(released)))}
    assert (generation["height"], generation["width"], generation["top_k"]) == (512, 512, 2048)
    convert(tmp_path / "ours", tmp_path / "again", to="released", max_shard_bytes=100_000)
    for name in ("emu3.tiktoken", "emu3_vision_tokens.txt"):
        assert (tmp_path / "again" / name).read_text() == (released / name).read_text()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (released, tmp_path / "again"))
    assert after.pop("auto_map")["AutoModelForCausalLM"] == "BAAI/Emu3-Gen--modeling_emu3.Emu3ForCausalLM"
    assert after == {key: before[key] for key in before if key not in ("auto_map", "transformers_version")}
    vision = json.loads((tmp_path / "again" / "vision" / "config.json").read_text())
    assert (vision["model_type"], vision["architectures"]) == ("Emu3VisionVQ", ["Emu3VisionVQModel"])


def test_another_type_of_number(emu3: Any, released: Path, released_vision: Path, tmp_path: Path) -> None:
    convert(released, tmp_path / "half", to="emulus", vision=released_vision, dtype=torch.bfloat16)
    found = inspect_folder(tmp_path / "half")
    assert set(dtypes_of(found.decoder_tensors).values()) == {torch.bfloat16}
    assert set(dtypes_of(found.vision_tensors).values()) == {torch.float32, torch.int64}
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(read_tensor(found.decoder_tensors[name]), emu3.decoder.state_dict()[name].bfloat16())


def test_norms_of_queries_and_keys(emu3: Any, tmp_path: Path) -> None:
    changes = {"qk_norm": True, "head_dim": 16, "tie_word_embeddings": False}
    shape = sized("tiny", **{**emu3.decoder.config.to_dict(), **changes})
    save_decoder(Decoder(shape), tmp_path / "ours")
    emu3.text.save(tmp_path / "ours")
    emu3.vocabulary.save(tmp_path / "ours" / "vocabulary.json")
    convert(tmp_path / "ours", tmp_path / "released", to="released")
    found = inspect_folder(tmp_path / "released")
    assert (found.decoder, found.preset) == (shape, "emu3.5")
    assert_equal(find_tensors(tmp_path / "ours"), found.decoder_tensors)
    with pytest.raises(EmulusError, match="no norms of queries and keys"):
        convert(tmp_path / "released", tmp_path / "theirs", to="transformers")


def native(folder: Path) -> Path:
    text = TextTokenizer.train(["a red apple"], size=260)
    vocabulary = Vocabulary.native(text_size=text.size, visual_size=64)
    save_decoder(Decoder(sized("tiny", vocab_size=vocabulary.size, num_hidden_layers=1)), folder)
    text.save(folder)
    vocabulary.save(folder / "vocabulary.json")
    return folder


def test_what_a_layout_cannot_say(emu3: Any, released: Path, released_vision: Path, tmp_path: Path) -> None:
    with_vision = {"vision": released_vision}
    cases: list[tuple[Path, Layout, dict[str, Any], str]] = [
        (native(tmp_path / "native"), "released", {}, "other special tokens than Emu3's"),
        (native(tmp_path / "native"), "transformers", {}, "other special tokens than Emu3's"),
        (released_vision, "emulus", with_vision, "holds no decoder"),
        (released, "emulus", {"vision": released}, "holds no vision tokenizer"),
        (released, "emulus", {"max_shard_bytes": 0}, "holds nothing"),
    ]
    narrow = Decoder(sized("tiny", **{**emu3.decoder.config.to_dict(), "head_dim": 4}))
    save_decoder(narrow, tmp_path / "nameless")
    cases.append((tmp_path / "nameless", "transformers", {}, "which id is pad"))
    save_decoder(narrow, tmp_path / "narrow")
    emu3.vocabulary.save(tmp_path / "narrow" / "vocabulary.json")
    cases.append((tmp_path / "narrow", "released", {}, "heads of width 4"))
    cases.append((tmp_path / "narrow", "transformers", with_vision, "no text vocabulary"))
    wide = VisionTokenizerConfig(ch=32, ch_mult=(1, 2), attn_resolutions=(0, 1), codebook_size=64)
    save_vision_tokenizer(VisionTokenizer(wide), tmp_path / "wide")
    cases.append((tmp_path / "wide", "transformers", {}, "attention only at levels as wide as the last"))
    for source, layout, options, says in cases:
        with pytest.raises(EmulusError, match=says) as caught:
            convert(source, tmp_path / "out", to=layout, **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_another_models_vision_tokenizer(released: Path, tmp_path: Path) -> None:
    other = VisionTokenizerConfig(ch=32, ch_mult=(1,), attn_resolutions=(), codebook_size=32)
    save_vision_tokenizer(VisionTokenizer(other), tmp_path / "other")
    with pytest.raises(EmulusError, match="32 codes but the vocabulary 64"):
        convert(released, tmp_path / "out", to="emulus", vision=tmp_path / "other")


def test_what_is_there_stays(released: Path, tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match="the source itself"):
        convert(released, released, to="emulus")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(EmulusError, match="not empty"):
        convert(released, tmp_path / "full", to="emulus")
    with pytest.raises(EmulusError, match="not a folder"):
        convert(released, tmp_path / "full" / "mine", to="emulus")
    (tmp_path / "empty").mkdir()
    convert(released, tmp_path / "empty", to="emulus")
    assert inspect_folder(tmp_path / "empty").decoder is not None


def test_a_source_damaged_within_leaves_nothing(released: Path, tmp_path: Path) -> None:
    path = released / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(EmulusError, match="damaged or truncated"):
        convert(released, tmp_path / "out", to="emulus")
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("emulus.layouts.write.write_json", full)
    with pytest.raises(EmulusError, match="the disk is full"):
        convert(released, tmp_path / "out", to="released")
    assert sorted(tmp_path.iterdir()) == before


def test_the_check_finds_a_flipped_bit(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk "fails" between the writing and the check."""
    write = conversion.write_folder

    def write_badly(contents: Any, folder: Path, *rest: Any, **options: Any) -> None:
        write(contents, folder, *rest, **options)
        path = folder / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)

    monkeypatch.setattr(conversion, "write_folder", write_badly)
    with pytest.raises(EmulusError, match="was not written as it was read"):
        convert(released, tmp_path / "out", to="emulus")
    assert not (tmp_path / "out").exists()
    assert not convert(released, tmp_path / "out", to="emulus", check=False).checked


def test_files_are_as_the_library_writes_them(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).half(),
        "nan": torch.tensor([float("nan"), 1.0]),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 4),
        "rows": torch.randn(7, 3),
        "flags": torch.tensor([True, False]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = find_tensors(tmp_path)
    planned = {n: Planned(stored=s, shape=s.shape, dtype=dtypes_of(found)[n]) for n, s in found.items()}
    written: list[int] = []
    (tmp_path / "new").mkdir()
    save_sharded(planned, tmp_path / "new", most_bytes=10**6, moved=written.append)
    again = load_file(tmp_path / "new" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(
        again[n].dtype == t.dtype and torch.equal(again[n].nan_to_num(), t.nan_to_num()) for n, t in tensors.items()
    )
    assert sum(written) == sum(planned[name].bytes for name in planned)
    (tmp_path / "shards").mkdir()
    save_sharded(planned, tmp_path / "shards", most_bytes=30)
    shards = find_tensors(tmp_path / "shards")
    assert len({stored.file for stored in shards.values()}) > 2
    assert all(same(found[name], shards[name], planned[name].dtype) for name in found)
    assert not same(found["rows"], found["half"], torch.float32)


def test_quantised_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4).to(torch.float8_e5m2)}, tmp_path / "model.safetensors")
    with pytest.raises(EmulusError, match="a as F8_E5M2, which is not read"):
        dtypes_of(find_tensors(tmp_path))
    shutil.rmtree(tmp_path)
    with pytest.raises(EmulusError, match="there is no folder"):
        inspect_folder(tmp_path)
