"""``emulus quantize`` as it is typed: a folder that is loaded like any other, and everything that can be wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from emulus.bundle import Bundle, load_bundle, save_bundle
from emulus.cli import main
from emulus.commands.quantize import quantize_folder
from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.data.tokens import Tokens, vision_digest
from emulus.errors import EmulusError
from emulus.layouts import convert, inspect_folder
from emulus.model import Decoder, load_decoder, sized
from emulus.model.quantize import Quantization, quantization_of, quantize_decoder
from emulus.pipeline import Emulus
from emulus.tokenizer.vision import VisionTokenizer

KINDS: tuple[Quantization, ...] = get_args(Quantization)


@pytest.fixture(scope="module")
def folder(tiny: Emulus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny.save(path)
    return path


@pytest.fixture(scope="module")
def tokens(folder: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes of the coloured squares by the tiny model's vision tokenizer, with the text vocabulary they give."""
    out = tmp_path_factory.mktemp("tokens") / "tokens"
    return tokenize(
        TokenizeConfig(sources=(shapes,), vision=folder / "vision", out=out, size=16, views=1, shift=0, text_size=300)
    )


@pytest.fixture(scope="module")
def trained(tokens: Path, tiny: Emulus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of the tokens' vocabulary, as if it had been trained on them."""
    opened = Tokens.open(tokens)
    decoder = Decoder(sized("tiny", vocab_size=opened.vocabulary.size, max_position_embeddings=256))
    path = tmp_path_factory.mktemp("trained") / "model"
    whole = dataclasses.replace(tiny.bundle, decoder=decoder, text=opened.text, vocabulary=opened.vocabulary)
    save_bundle(whole, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_quantised_is_loaded_as_it_is(
    folder: Path, tmp_path: Path, kind: Quantization, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    assert main(["quantize", str(folder), str(out), "--to", kind]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert f"decoder in {kind}, rounded" in printed
    small, at_load = load_bundle(out, device="cpu"), load_bundle(folder, device="cpu", quantize=kind)
    assert_alike(small, at_load)
    assert small.loading == at_load.loading
    assert small.loading["quantize"] == kind
    assert not (out / "COMPLETE").exists()


def assert_alike(small: Bundle, other: Bundle) -> None:
    decoder, vision, text = small.decoder, small.vision, small.text
    their_decoder, their_vision, their_text = other.decoder, other.vision, other.text
    assert vision is not None
    assert their_vision is not None
    assert decoder is not None
    assert their_decoder is not None
    assert text is not None
    assert their_text is not None
    ids = torch.randint(decoder.config.vocab_size, (1, 20))
    assert torch.equal(decoder(ids), their_decoder(ids))
    for name, tensor in their_vision.state_dict().items():
        assert torch.equal(vision.state_dict()[name], tensor)
    assert list(text.pieces) == list(their_text.pieces)
    assert (small.vocabulary, small.defaults, small.preset) == (other.vocabulary, other.defaults, other.preset)


def test_info_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize_folder(folder, tmp_path / "small", "int4")
    found = {}
    for path in (folder, tmp_path / "small"):
        assert main(["info", str(path), "--json"]) == 0
        found[path.name] = json.loads(capsys.readouterr().out)["decoder"]
    assert found["tiny"]["quantized"] == "no"
    assert found["small"]["quantized"] == "int4"
    assert set(found["small"]["memory"]) == {"int4"}
    assert found["small"]["parameters"] == found["tiny"]["parameters"]


def test_calibrated(trained: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(trained), str(tmp_path / "small"), "--to", "int4"]
    assert main([*words, "--calibrate", str(tokens), "--documents", "12"]) == 0
    assert "int4, calibrated" in capsys.readouterr().out
    noted = json.loads((tmp_path / "small/config.json").read_text())["quantization"]
    assert noted["calibrated"]["documents"] == 12
    assert noted["calibrated"]["ids"] > 12 * 16
    small, plain = load_decoder(tmp_path / "small"), load_decoder(trained)
    assert quantization_of(small) == "int4"
    ids = torch.arange(40)[None]
    assert not torch.equal(small(ids), quantize_decoder(plain, "int4")(ids))
    assert (small(ids) - plain(ids)).std() < 0.3 * plain(ids).std()


def test_what_stays_whole_keeps_its_type(folder: Path, tmp_path: Path) -> None:
    quantize_folder(folder, tmp_path / "short", "int8", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in load_decoder(tmp_path / "short").parameters()} == {torch.bfloat16}
    quantize_folder(folder, tmp_path / "small", "int8")
    assert {parameter.dtype for parameter in load_decoder(tmp_path / "small").parameters()} == {torch.float32}


def test_half_of_the_vision_tokenizer_rounded(trained: Path, tokens: Path, tmp_path: Path) -> None:
    words = ["quantize", str(trained), str(tmp_path / "small"), "--to", "int8", "--vision-dtype", "bfloat16"]
    # The codes are the same, so the tokens are still this model's.
    assert main([*words, "--calibrate", str(tokens), "--documents", "2"]) == 0
    before, after = (load_bundle(path, device="cpu").vision for path in (trained, tmp_path / "small"))
    assert before is not None
    assert after is not None
    assert vision_digest(before) == vision_digest(after)
    assert {tensor.dtype for tensor in after.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    for name, tensor in before.decoder.state_dict().items():
        stored = tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor
        assert torch.equal(after.decoder.state_dict()[name], stored)
    sizes = [(path / "vision/model.safetensors").stat().st_size for path in (trained, tmp_path / "small")]
    assert sizes[1] < 0.85 * sizes[0]


def test_a_released_model(released: Path, released_vision: Path, tmp_path: Path) -> None:
    contents = quantize_folder(released, tmp_path / "small", "int4", vision=released_vision)
    assert contents.preset == inspect_folder(released).preset == "emu3"
    assert contents.vision is not None
    small = load_bundle(tmp_path / "small", device="cpu")
    assert_alike(small, load_bundle(released, vision=released_vision, device="cpu", quantize="int4"))


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    with pytest.raises(EmulusError, match="is not empty and is not overwritten"):
        quantize_folder(folder, tmp_path / "there", "int8")
    with pytest.raises(EmulusError, match="is the source itself"):
        quantize_folder(folder, folder, "int8")


def test_what_cannot_be_quantised(folder: Path, released_vision: Path, tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match="unknown quantisation 'int5'"):
        quantize_folder(folder, tmp_path / "out", "int5")  # type: ignore[arg-type]
    with pytest.raises(EmulusError, match="holds no decoder"):
        quantize_folder(released_vision, tmp_path / "out", "int8")
    quantize_folder(folder, tmp_path / "small", "int8")
    with pytest.raises(EmulusError, match=r"is quantised already \(int8\)"):
        quantize_folder(tmp_path / "small", tmp_path / "out", "int8")
    with pytest.raises(EmulusError, match="is quantised already, in int8, so it cannot be int4"):
        load_bundle(tmp_path / "small", quantize="int4")
    with pytest.raises(EmulusError, match=r"is quantised \(int8\) and is not converted"):
        convert(tmp_path / "small", tmp_path / "out", to="emulus")
    assert not (tmp_path / "out").exists()


def test_tokens_of_another_model(folder: Path, trained: Path, tokens: Path, tmp_path: Path) -> None:
    def refused(model: Path, match: str, **options: Any) -> None:
        with pytest.raises(EmulusError, match=match):
            quantize_folder(model, tmp_path / "out", "int4", **{"tokens": tokens, **options})
        assert not (tmp_path / "out").exists()

    refused(folder, "has another vocabulary than the model")
    refused(trained, "holds no tokens", tokens=tmp_path)
    refused(trained, "documents must be at least 1", documents=0)
    model = load_bundle(trained, device="cpu")
    assert model.vision is not None
    other = VisionTokenizer(model.vision.config).eval()
    save_bundle(dataclasses.replace(model, vision=other), tmp_path / "other")
    refused(tmp_path / "other", "made by another vision tokenizer")
    short = tmp_path / "short"
    save_bundle(model, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    refused(short, "no training items of at most 8 ids")


def test_damaged_tokens(trained: Path, tokens: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tokens"
    copy.mkdir()
    for file in tokens.iterdir():
        (copy / file.name).symlink_to(file)
    shard = copy / "train-image-00000.arrayrecord"
    shard.unlink()
    shard.write_bytes(b"x" * (tokens / shard.name).stat().st_size)
    with pytest.raises(EmulusError, match=r"train-image-00000\.arrayrecord is cut off, damaged"):
        quantize_folder(trained, tmp_path / "out", "int4", tokens=copy)
    assert not (tmp_path / "out").exists()
