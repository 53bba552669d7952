"""The tokenizer in bfloat16: what is rounded, what is not, and how much it moves."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from emulus.errors import EmulusError
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.metrics import code_flip_rate, psnr
from emulus.tokenizer.vision.weights import load_vision_tokenizer, save_vision_tokenizer

CHECKPOINT = Path(__file__).parents[3] / "checkpoints/emoji/vision"


def random_tokenizer(ch: int) -> VisionTokenizer:
    torch.manual_seed(0)
    config = VisionTokenizerConfig(ch=ch, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(1,), codebook_size=64)
    model = VisionTokenizer(config)
    model.quantize.embedding.weight.data.normal_()
    return model.eval()


@pytest.mark.parametrize("ch", [32, 64])
def test_only_the_decoder_unless_asked(ch: int) -> None:
    """32 channels take the plain layers, 64 the bands."""
    model, pixels = random_tokenizer(ch), torch.rand(2, 3, 32, 48) * 2 - 1
    rounded = copy.deepcopy(model).to_bfloat16()
    codes = model.encode(pixels)
    assert torch.equal(rounded.encode(pixels), codes)
    expected, found = model.decode(codes), rounded.decode(codes)
    assert found.dtype == torch.float32
    relative = float((found - expected).std() / expected.std())
    assert 1e-4 < relative < 0.03
    both = copy.deepcopy(model).to_bfloat16(encoder=True)
    assert code_flip_rate(model, both, pixels) < 0.1
    assert code_flip_rate(model, rounded, pixels) == 0


def test_what_is_rounded() -> None:
    model = random_tokenizer(64)
    before = model.state_dict()
    after = copy.deepcopy(model).to_bfloat16(encoder=True).state_dict()
    assert before.keys() == after.keys()
    rounded = [name for name, value in after.items() if value.dtype == torch.bfloat16]
    share = sum(before[name].numel() for name in rounded) / sum(value.numel() for value in before.values())
    assert share > 0.98
    for name in rounded:
        assert name.startswith(("encoder.down.", "encoder.mid.", "decoder.mid.", "decoder.up."))
        assert torch.equal(after[name], before[name].bfloat16())
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - rounded)


def test_a_trained_tokenizer_hardly_moves() -> None:
    """The rule for rounding an encoder: codes that move are few, and their pictures as good."""
    model = load_vision_tokenizer(CHECKPOINT)
    rounded = load_vision_tokenizer(CHECKPOINT, dtype=torch.bfloat16, encoder_dtype=torch.bfloat16)
    side = torch.linspace(-1, 1, 64)
    shapes = [side[None] + side[:, None], side[None] ** 2 + side[:, None] ** 2, (side[None] * 9).sin() * side[:, None]]
    pixels = torch.stack([torch.stack([one, two, -one]).clamp(-1, 1) for one in shapes for two in shapes])
    assert code_flip_rate(model, rounded, pixels) < 0.1
    quality, other = (float(psnr(each.decode(each.encode(pixels)), pixels).mean()) for each in (model, rounded))
    assert other > quality - 0.1


def test_loading_rounds_as_the_method_does(tmp_path: Path) -> None:
    model = random_tokenizer(32)
    save_vision_tokenizer(model, tmp_path)
    for encoder in (False, True):
        kind = torch.bfloat16 if encoder else torch.float32
        loaded = load_vision_tokenizer(tmp_path, dtype=torch.bfloat16, encoder_dtype=kind)
        expected = copy.deepcopy(model).to_bfloat16(encoder=encoder).state_dict()
        found = loaded.state_dict()
        assert all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items()
        )


def test_refused(tmp_path: Path) -> None:
    model = random_tokenizer(32)
    save_vision_tokenizer(model, tmp_path)
    with pytest.raises(EmulusError, match="float16"):
        load_vision_tokenizer(tmp_path, dtype=torch.float16)
    with pytest.raises(EmulusError, match="not saved"):
        save_vision_tokenizer(model.to_bfloat16(), tmp_path)
