"""Shared fixtures: the released code's inputs and outputs, and one tiny model made from nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch

from emulus.bundle import Bundle, GenerationDefaults, save_bundle
from emulus.layouts import convert
from emulus.layouts.vocabulary import from_lines
from emulus.media import Clip, write_image, write_video
from emulus.model import Decoder, sized
from emulus.pipeline import Emulus
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vocabulary import Vocabulary, token_name

REPOSITORY = Path(__file__).parents[1]


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


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    torch.manual_seed(0)


@pytest.fixture
def published(tmp_path: Path) -> Path:
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
    hub = tmp_path / "BAAI"
    for name, context in {"Emu3-Gen": 9216, "Emu3-Chat": 131_072, "Emu3-Stage1": 5120}.items():
        config = sized("tiny", vocab_size=vocabulary.size, num_hidden_layers=1, max_position_embeddings=context)
        bundle = Bundle(decoder=Decoder(config).eval(), vision=vision, text=text, vocabulary=vocabulary)
        defaults = GenerationDefaults(height=32, width=32)
        save_bundle(dataclasses.replace(bundle, preset="emu3", defaults=defaults), tmp_path / name)
        convert(tmp_path / name, hub / f"{name}-hf", to="transformers")
        convert(tmp_path / name, hub / name, to="released")
        shutil.rmtree(hub / "Emu3-VisionTokenizer", ignore_errors=True)
        (hub / name / "vision").rename(hub / "Emu3-VisionTokenizer")
    return hub
