"""The vision tokenizer against the released code, against transformers, and against itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emulus.errors import EmulusError
from emulus.layouts.names import shape_in_transformers, vision_to_transformers
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.weights import load_vision_tokenizer, save_vision_tokenizer

SMALL = VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(2,), codebook_size=64)


@pytest.fixture(scope="module")
def small() -> VisionTokenizer:
    """A small tokenizer with lively batch norms and a codebook as wide as its latents."""
    torch.manual_seed(0)
    model = VisionTokenizer(SMALL)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    model.quantize.embedding.weight.data.normal_()
    return model.eval()


def test_released_outputs(official: Path) -> None:
    folder = official / "vision_tokenizer"
    model = load_vision_tokenizer(folder)
    expected = load_file(folder / "expected.safetensors")
    latents = model.latents(expected["image"]).transpose(1, 2)
    torch.testing.assert_close(latents, expected["image_latent"], atol=1e-5, rtol=0)
    assert torch.equal(model.encode(expected["image"]), expected["image_codes"])
    assert torch.equal(model.encode(expected["video"]), expected["video_codes"])
    torch.testing.assert_close(model.decode(expected["image_codes"]), expected["image_decoded"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode(expected["video_codes"]), expected["video_decoded"], atol=1e-4, rtol=0)


def test_transformers_agrees(small: VisionTokenizer) -> None:
    emu3 = pytest.importorskip("transformers.models.emu3.modeling_emu3")
    from transformers import Emu3VQVAEConfig

    config = Emu3VQVAEConfig(
        codebook_size=SMALL.codebook_size,
        embed_dim=4,
        latent_channels=4,
        base_channels=SMALL.ch,
        channel_multiplier=list(SMALL.ch_mult),
        num_res_blocks=SMALL.num_res_blocks,
        attn_resolutions=list(SMALL.attn_resolutions),
        hidden_size=SMALL.ch * SMALL.ch_mult[-1],
        num_attention_heads=1,
    )
    theirs = emu3.Emu3VQVAE(config).eval()
    state = {
        vision_to_transformers(name): value.view(shape_in_transformers(name, tuple(value.shape)))
        for name, value in small.state_dict().items()
    }
    theirs.load_state_dict(state)
    clip = torch.rand(2, 8, 3, 24, 16) * 2 - 1
    image = clip[:, 0]
    for pixels in (image, clip):
        # They cut codes to these sizes along the first two axes, which for clips are the wrong ones: cut nothing.
        sizes = torch.tensor([[24 * 4, 16 * 4]] * 2)
        codes = torch.stack(list(theirs.encode(pixels, sizes).image_tokens))
        assert torch.equal(small.encode(pixels), codes.reshape(small.encode(pixels).shape))
        with torch.no_grad():
            painted = theirs.decode(codes)
        torch.testing.assert_close(small.decode(codes), painted, atol=1e-4, rtol=0)


def test_released_size() -> None:
    with torch.device("meta"):
        model = VisionTokenizer(VisionTokenizerConfig())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["encoder"] == 109_488_252
    assert counts["decoder"] == 161_120_859
    assert sum(counts.values()) == 270_740_287


def test_a_picture_is_a_still_clip(small: VisionTokenizer) -> None:
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    still = image[:, None].expand(-1, 4, -1, -1, -1)
    assert torch.equal(small.encode(image), small.encode(still)[:, 0])
    codes = small.encode(image)
    torch.testing.assert_close(small.decode(codes), small.decode(codes[:, None])[:, 0], atol=1e-5, rtol=0)


def test_the_future_is_not_seen(small: VisionTokenizer) -> None:
    clip = torch.rand(1, 12, 3, 8, 8) * 2 - 1
    other = torch.cat([clip[:, :8], torch.rand(1, 4, 3, 8, 8)], dim=1)
    torch.testing.assert_close(small.latents(clip)[:, :, :2], small.latents(other)[:, :, :2], atol=1e-6, rtol=0)


def test_neighbours_in_a_batch_do_not_matter(small: VisionTokenizer) -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    assert torch.equal(small.encode(images)[1:2], small.encode(images[1:2]))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 14, 16), "multiples of 4"),
        ((1, 3, 6, 16), "multiples of 4"),
        ((1, 5, 3, 16, 16), "multiple of 4, got 5"),
        ((1, 1, 16, 16), "pixels must be"),
        ((3, 16, 16), "pixels must be"),
    ],
)
def test_wrong_shapes(small: VisionTokenizer, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(EmulusError, match=message):
        small.encode(torch.zeros(shape))


def test_foreign_codes(small: VisionTokenizer) -> None:
    with pytest.raises(EmulusError, match=r"0\.\.63"):
        small.decode(torch.full((1, 2, 2), 64))
    with pytest.raises(EmulusError, match="shape"):
        small.decode(torch.zeros(2, 2, dtype=torch.int64))


def test_save_and_load(small: VisionTokenizer, tmp_path: Path) -> None:
    save_vision_tokenizer(small, tmp_path)
    again = load_vision_tokenizer(tmp_path)
    assert again.config == small.config
    assert all(torch.equal(again.state_dict()[name], value) for name, value in small.state_dict().items())


def test_damaged_files(small: VisionTokenizer, tmp_path: Path) -> None:
    save_vision_tokenizer(small, tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EmulusError, match=r"model\.safetensors"):
        load_vision_tokenizer(tmp_path)
    weights.write_bytes(whole)
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "ch": 64}))
    with pytest.raises(EmulusError, match="shape"):
        load_vision_tokenizer(tmp_path)
    config.write_text(json.dumps({**values, "codebok_size": 64}))
    with pytest.raises(EmulusError, match="did you mean 'codebook_size'"):
        load_vision_tokenizer(tmp_path)
    config.write_text(json.dumps({**values, "model_type": "llama"}))
    with pytest.raises(EmulusError, match="not a vision tokenizer"):
        load_vision_tokenizer(tmp_path)
    weights.unlink()
    config.write_text(json.dumps(values))
    with pytest.raises(EmulusError, match=r"model\.safetensors"):
        load_vision_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change", [{"ch": 48}, {"codebook_size": 1}, {"temporal_downsample_factor": 3}, {"ch_mult": ()}]
)
def test_impossible_configs(change: dict[str, object]) -> None:
    with pytest.raises(EmulusError):
        VisionTokenizerConfig(**change)  # type: ignore[arg-type]
