"""Shared fixtures: the released code's inputs and outputs, and one tiny model made from nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from emulus.bundle import Bundle, GenerationDefaults
from emulus.model import Decoder, sized
from emulus.pipeline import Emulus
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vocabulary import Vocabulary

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


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    torch.manual_seed(0)
