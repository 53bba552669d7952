"""Shared fixtures: the released code's inputs and outputs, and two tiny models made from nothing: ours and an Emu3."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from emulus.bundle import Bundle, save_bundle
from emulus.layouts import convert
from emulus.layouts.vocabulary import from_lines
from emulus.media import Clip, write_image, write_video
from emulus.model import Decoder, DecoderConfig, sized
from emulus.pipeline import Emulus
from emulus.presets import GenerationDefaults
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vocabulary import Vocabulary, token_name
from tests import unwritten

if unwritten.FILL:
    unwritten.fill_from_now_on()

REPOSITORY = Path(__file__).parents[1]

TEXTS = ["a red apple", "You are a helpful assistant. USER: what is it? ASSISTANT:", "un été à la plage"] * 3
VISION = VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 1, 2), num_res_blocks=1, codebook_size=64)
LINES = ["<|image token|>", "<|image start|>", "<|image end|>"] + [f"<|visual token {code:06d}|>" for code in range(64)]


@pytest.fixture(scope="session")
def official() -> Path:
    """Inputs and outputs of the released code on small random weights; tests of them are skipped where they are not.

    They lie beside the repository, or where ``EMULUS_OFFICIAL_FIXTURES`` says.
    """
    folder = Path(os.environ.get("EMULUS_OFFICIAL_FIXTURES", REPOSITORY.parent / "shared/fixtures/official"))
    if not folder.is_dir():
        pytest.skip("the released code's fixtures are not here")
    return folder


@pytest.fixture(scope="session")
def tiny() -> Emulus:
    """A whole model with random weights: 16-pixel pictures of 4x4 codes, clips of 8 frames."""
    torch.manual_seed(0)
    vision = VisionTokenizer(
        VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(), codebook_size=64)
    ).eval()
    vision.quantize.embedding.weight.data.normal_()
    text = TextTokenizer.train(["a red apple", "a flat drawing of a blue bird", "ein roter Apfel"], size=300)
    vocabulary = Vocabulary.native(text_size=text.size, visual_size=64)
    shape = sized("tiny", vocab_size=vocabulary.size, max_position_embeddings=256, pad_token_id=vocabulary.pad)
    defaults = GenerationDefaults(height=16, width=16, num_frames=8, fps=8.0, max_text_tokens=12)
    return Emulus(
        Bundle(decoder=Decoder(shape).eval(), vision=vision, text=text, vocabulary=vocabulary, defaults=defaults)
    )


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in a folder: coloured squares on white, still and moving, in all three splits."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    colours = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 230), "black": (0, 0, 0)}
    for number, (name, colour) in enumerate([*colours.items()] * 6):
        split = ("train", "train", "train", "train", "validation", "test")[number // 4]
        frames = [PIL.Image.new("RGB", (16, 16), "white") for _ in range(8)]
        for step, frame in enumerate(frames):
            frame.paste(colour, (number % 5 + step, 4, number % 5 + step + 5, 10))
        write_image(frames[0], folder / f"{number}.png")
        write_video(Clip(tuple(frames), 8.0), folder / f"{number}.webp")
        rows.append({"file": f"{number}.png", "caption": f"a {name} square", "split": split})
        rows.append({"file": f"{number}.webp", "caption": f"a {name} square moves", "split": split})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """The parts of a model built like Emu3, in the smallest size."""

    decoder: Decoder
    vision: VisionTokenizer
    text: TextTokenizer
    vocabulary: Vocabulary


@pytest.fixture(scope="session")
def emu3() -> Tiny:
    """Random weights, lively batch norms, text ids 0 to 299, and Emu3's specials after them."""
    torch.manual_seed(0)
    vision = VisionTokenizer(VISION).eval()
    for name, buffer in vision.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            buffer.uniform_(-0.5, 0.5)
        else:
            buffer.fill_(7)
    vision.quantize.embedding.weight.data.normal_()
    pieces = TextTokenizer.train(TEXTS, size=300).pieces
    text = TextTokenizer.from_pieces(pieces)
    vocabulary = from_lines(text.size, LINES)
    assert text.size == 300
    return Tiny(decoder=Decoder(config_for(vocabulary)).eval(), vision=vision, text=text, vocabulary=vocabulary)


def config_for(vocabulary: Vocabulary, **changes: Any) -> DecoderConfig:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.2}
    return sized("tiny", vocab_size=vocabulary.size, pad_token_id=vocabulary.pad, **{**small, **changes})


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


@pytest.fixture
def released(emu3: Tiny, tmp_path: Path) -> Path:
    """A decoder's folder as the hub has it: two shards and an index."""
    folder = tmp_path / "released"
    folder.mkdir()
    tensors = emu3.decoder.state_dict()
    weight_map = {}
    for number, names in enumerate([list(tensors)[::2], list(tensors)[1::2]], start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
    ranks = (f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(emu3.text.pieces))
    (folder / "emu3.tiktoken").write_text("".join(ranks))
    (folder / "emu3_vision_tokens.txt").write_text("".join(f"{line}\n" for line in LINES))
    ids = {f"{role}_token_id": emu3.vocabulary.specials[role] for role in emu3.vocabulary.specials}
    write_json(folder / "generation_config.json", {"_from_model_config": True, "eos_token_id": emu3.vocabulary.eos})
    shape = emu3.decoder.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps", "initializer_range")
    write_json(
        folder / "config.json",
        {
            "architectures": ["Emu3ForCausalLM"],
            "attention_dropout": 0.1,
            "auto_map": {"AutoConfig": "configuration_emu3.Emu3Config"},
            **{name: getattr(shape, name) for name in names},
            **ids,
            "hidden_act": "silu",
            "image_area": 262144,
            "model_type": "Emu3",
            "pretraining_tp": 1,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "transformers_version": "4.44.0",
            "use_cache": True,
        },
    )
    return folder


@pytest.fixture
def released_vision(emu3: Tiny, tmp_path: Path) -> Path:
    """A vision tokenizer's folder as the hub has it."""
    folder = tmp_path / "released-vision"
    folder.mkdir()
    save_file(emu3.vision.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(
        folder / "config.json",
        {
            "architectures": ["Emu3VisionVQModel"],
            "auto_map": {"AutoModel": "modeling_emu3visionvq.Emu3VisionVQModel"},
            "torch_dtype": "float32",
            "transformers_version": "4.44.0",
            **VISION.to_dict(),
        },
    )
    return folder


@pytest.fixture
def save_theirs(emu3: Tiny, tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """Saves a random model of transformers' own making, of the tiny shape, and gives its folder and itself."""
    transformers = pytest.importorskip("transformers")

    def save(kind: str = "Emu3ForConditionalGeneration", **options: Any) -> tuple[Path, Any]:
        torch.manual_seed(1)
        shape, vocabulary = emu3.decoder.config, emu3.vocabulary
        text = transformers.Emu3TextConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            max_position_embeddings=shape.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            initializer_range=0.2,
            pad_token_id=vocabulary.pad,
            bos_token_id=vocabulary.bos,
            eos_token_id=vocabulary.eos,
        )
        vq = transformers.Emu3VQVAEConfig(
            codebook_size=VISION.codebook_size,
            base_channels=VISION.ch,
            channel_multiplier=list(VISION.ch_mult),
            num_res_blocks=VISION.num_res_blocks,
            hidden_size=64,
        )
        letters = {byte: letter for letter, byte in _their_letters().items()}
        names = ["".join(letters[byte] for byte in piece) for piece in emu3.text.pieces]
        names += [emu3.vocabulary.surface(id) for id in range(emu3.text.size, vocabulary.size)]
        names[names.index("<|extra_0|>")] = "<image>"
        vocabulary_map = {name: id for id, name in enumerate(names)}
        config = {
            "Emu3ForConditionalGeneration": transformers.Emu3Config(
                text_config=text.to_dict(), vq_config=vq.to_dict(), vocabulary_map=vocabulary_map
            ),
            "Emu3ForCausalLM": text,
            "Emu3VQVAE": vq,
        }[kind]
        model = getattr(transformers, kind)(config).eval()
        folder = tmp_path / "theirs"
        model.save_pretrained(folder, **options)
        return folder, model

    return save


def _their_letters() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    torch.manual_seed(0)


@pytest.fixture
def published(published_once: Path, tmp_path: Path) -> Path:
    """``BAAI/Emu3-Gen`` and its like in a test's own folder, by links: to be read only, or unlinked."""
    hub = tmp_path / "BAAI"
    hub.mkdir()
    for folder in published_once.iterdir():
        (hub / folder.name).symlink_to(folder)
    return hub


@pytest.fixture(scope="session")
def published_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders called as on the hub, with tiny random models in the released and the transformers layout.

    They draw pictures of 32 pixels and are shown pictures of half a thousand, as the real ones are.
    """
    torch.manual_seed(0)
    shape = VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, attn_resolutions=())
    vision = VisionTokenizer(shape).eval()
    vision.quantize.embedding.weight.data.normal_()
    pieces = TextTokenizer.train(["You are a helpful assistant. USER: what is it? ASSISTANT:"], size=300).pieces
    text = TextTokenizer.from_pieces(pieces)
    names = ["<|image token|>", "<|image start|>", "<|image end|>"]
    vocabulary = from_lines(text.size, [*names, *(token_name("visual", code) for code in range(shape.codebook_size))])
    tmp_path = tmp_path_factory.mktemp("published")
    hub = tmp_path / "BAAI"
    for name, context in {"Emu3-Gen": 9216, "Emu3-Chat": 131_072, "Emu3-Stage1": 5120}.items():
        config = sized(
            "tiny", vocab_size=vocabulary.size, hidden_size=32, num_hidden_layers=1, max_position_embeddings=context
        )
        bundle = Bundle(decoder=Decoder(config).eval(), vision=vision, text=text, vocabulary=vocabulary)
        defaults = GenerationDefaults(height=32, width=32)
        preset = "emu3-base" if name == "Emu3-Stage1" else "emu3"
        save_bundle(dataclasses.replace(bundle, preset=preset, defaults=defaults), tmp_path / name)
        convert(tmp_path / name, hub / f"{name}-hf", to="transformers")
        convert(tmp_path / name, hub / name, to="released")
        shutil.rmtree(hub / "Emu3-VisionTokenizer", ignore_errors=True)
        (hub / name / "vision").rename(hub / "Emu3-VisionTokenizer")
    return hub
