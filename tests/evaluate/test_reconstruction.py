"""Codecs keep to their budget; figures of reconstructions are those of the parts."""

from __future__ import annotations

import dataclasses
import math
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emulus.data.media_dataset import to_pixels
from emulus.data.source import open_source
from emulus.errors import EmulusError
from emulus.evaluate import perceptual
from emulus.evaluate.codecs import ClipCodec, Codec, best_clip_within, best_within, pixels_of
from emulus.evaluate.held_out import encode_examples
from emulus.evaluate.reconstruction import paint, reconstruct
from emulus.media import image_to_pixels
from emulus.pipeline import Emulus
from emulus.sequence import Video
from emulus.tokenizer.vision.metrics import psnr


def scene(side: int = 64) -> Image.Image:
    y, x = np.mgrid[:side, :side] / side
    bands = np.stack([x, y, (np.sin(20 * x) + np.cos(9 * y)) / 4 + 0.5], axis=-1)
    return Image.fromarray((bands.clip(0, 1) * 255).astype(np.uint8))


@pytest.mark.parametrize("codec", ["WebP", "JPEG"])
def test_best_file_is_within_its_budget_and_beats_a_plain_one(codec: Codec) -> None:
    image, budget = scene(), 900
    found = best_within(image, codec, budget)
    assert found.fits
    assert found.size <= budget
    plain: list[float] = []
    for quality in range(0, 100, 10):
        buffer = BytesIO()
        image.save(buffer, codec, quality=quality)
        if buffer.tell() <= budget:
            with Image.open(buffer) as shown:
                pixels = image_to_pixels(shown.convert("RGB"))
            plain.append(float(psnr(pixels[None], image_to_pixels(image)[None])))
    assert plain
    assert found.psnr >= max(plain) - 0.05
    assert found.psnr == pytest.approx(float(psnr(image_to_pixels(found.image)[None], image_to_pixels(image)[None])))


@pytest.mark.parametrize("codec", ["WebP", "JPEG"])
def test_more_bits_are_better(codec: Codec) -> None:
    scores = [best_within(scene(), codec, budget).psnr for budget in (700, 1000, 2000)]
    assert scores == sorted(scores)


@pytest.mark.parametrize("codec", ["WebP", "JPEG"])
def test_no_file_fits(codec: Codec) -> None:
    found = best_within(scene(), codec, 10)
    assert not found.fits
    assert found.size > 10
    assert found.image.size == (64, 64)
    assert found.size <= best_within(scene(), codec, 10_000).size


def walk(side: int = 48, frames: int = 8) -> list[Image.Image]:
    """A speckled scene that moves to the left."""
    speckles = np.random.default_rng(0).integers(0, 256, (side // 3, side // 3, 3), dtype=np.uint8)
    wide = Image.fromarray(speckles).resize((2 * side, 2 * side), Image.Resampling.BICUBIC)
    return [wide.crop((2 * step, 0, 2 * step + side, side)) for step in range(frames)]


@pytest.mark.parametrize("codec", ["WebP", "JPEG", "VP9"])
def test_best_clip_is_within_its_budget(codec: ClipCodec) -> None:
    frames = walk()
    found = [best_clip_within(frames, codec, budget) for budget in (1000, 2000, 8000)]
    assert all(each.fits and each.size <= budget for each, budget in zip(found, (1000, 2000, 8000), strict=True))
    scores = [each.psnr for each in found]
    assert scores == sorted(scores)
    assert [frame.size for frame in found[0].frames] == [(48, 48)] * 8
    pixels, shown = pixels_of(frames), pixels_of(found[1].frames)
    assert found[1].psnr == pytest.approx(float(psnr(shown, pixels).mean()), abs=1e-4)


def test_a_clip_codec_uses_that_frames_are_alike() -> None:
    frames = walk()
    moving, pictures = (best_clip_within(frames, codec, 1500).psnr for codec in ("VP9", "JPEG"))
    assert moving > pictures + 1
    # Equal frames cost next to nothing, so that the one there is can be better.
    still = best_clip_within(frames[:1] * 8, "WebP", 1500)
    assert still.psnr > best_clip_within(frames, "WebP", 1500).psnr + 1
    assert len(still.frames) == 8


@pytest.mark.parametrize("codec", ["WebP", "JPEG", "VP9"])
def test_clips_of_odd_sides_and_no_room(codec: ClipCodec) -> None:
    frames = [frame.resize((15, 11)) for frame in walk(frames=3)]
    found = best_clip_within(frames, codec, 5)
    assert not found.fits
    assert [frame.size for frame in found.frames] == [(15, 11)] * 3
    assert best_clip_within(frames, codec, 20_000).fits


def test_reconstruction_figures(model: Emulus, data: Path) -> None:
    items = [item for item in open_source(data) if item.split == "validation"]
    examples = encode_examples(model, items)
    assert len(examples) == len(items)
    clips = [example for example in examples if isinstance(example.media, Video)]
    # Nine frames are cut to the model's own eight.
    assert [tuple(clip.frames.shape) for clip in clips] == [(8, 3, 16, 16)]
    found = reconstruct(model.vision, examples)
    assert found.pictures is not None
    assert found.clips is not None
    assert (found.pictures.count, found.clips.count) == (8, 1)
    assert (found.pictures.codes, found.pictures.bits) == (64, 64 * 6)
    assert found.clips.codes == 128
    every = [float(psnr(paint(model.vision, e), to_pixels(e.frames)).mean()) for e in examples if e not in clips]
    assert found.pictures.psnr == pytest.approx(np.mean(every))
    assert found.pictures.psnr_median == pytest.approx(np.median(every))
    codes = torch.cat([example.media.codes.flatten() for example in examples])
    assert found.codebook["usage"] == len(codes.unique()) / 64
    # 48 bytes hold no JPEG's headers.
    assert found.codecs["JPEG"].fits == 0
    assert found.codecs["JPEG"].bytes > 48
    assert all(math.isfinite(codec.psnr) for codec in (found.codecs | found.clip_codecs).values())
    assert set(found.clip_codecs) == {"WebP", "JPEG", "VP9"}
    assert (found.codecs["WebP"].count, found.clip_codecs["VP9"].count) == (8, 1)
    assert reconstruct(model.vision, examples, codecs=False).clip_codecs == {}


def test_perceptual_figures(model: Emulus, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = encode_examples(model, [item for item in open_source(data) if item.split == "validation"])
    if perceptual.available():
        found = reconstruct(model.vision, examples)
        assert found.pictures is not None
        first = examples[0]
        distances = [
            float(perceptual.stlpips(paint(model.vision, e), to_pixels(e.frames)).mean())
            for e in examples
            if isinstance(e.media, type(first.media))
        ]
        assert found.pictures.stlpips == pytest.approx(np.mean(distances), abs=1e-5)
        assert found.codecs["WebP"].stlpips is not None
    monkeypatch.setattr(perceptual, "available", lambda: False)
    without = reconstruct(model.vision, examples, codecs=False)
    assert without.pictures is not None
    assert without.pictures.stlpips is None
    assert without.pictures.psnr > 0


def test_codes_are_those_of_the_pipeline(model: Emulus, data: Path) -> None:
    items = [item for item in open_source(data) if item.split == "test"]
    for example in encode_examples(model, items):
        media = model.encode(example.original)
        assert type(media) is type(example.media)
        assert torch.equal(media.codes, example.media.codes)


def test_unreadable_items_are_left_out(model: Emulus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")
    scene(16).save(tmp_path / "good.png")
    (tmp_path / "captions.jsonl").write_text(
        '{"file": "bad.png", "caption": "a"}\n{"file": "good.png", "caption": "b"}'
    )
    with caplog.at_level("WARNING"):
        examples = encode_examples(model, open_source(tmp_path))
    assert [example.caption for example in examples] == ["b"]
    assert "bad.png" in caplog.text


def test_a_model_that_is_not_square(model: Emulus) -> None:
    wide = dataclasses.replace(model.bundle, defaults=dataclasses.replace(model.defaults, width=32))
    with pytest.raises(EmulusError, match="square"):
        encode_examples(Emulus(wide), [])
