"""pixels -> codes -> pixels: what is lost, how many bits it takes, and what WebP and JPEG do with as many."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

import PIL.Image
import torch
from torch import Tensor

from emulus.data.media_dataset import to_pixels
from emulus.evaluate.codecs import Codec, Coded, best_within
from emulus.evaluate.held_out import Example
from emulus.log import progress
from emulus.media import pixels_to_image
from emulus.sequence import Image
from emulus.tokenizer.vision import VisionTokenizer
from emulus.tokenizer.vision.metrics import codebook_usage, psnr, ssim


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of some pictures or clips; a clip's figure is the mean over its frames.

    Attributes:
        count: How many pictures or clips.
        psnr: Mean, in dB.
        psnr_median: Median, in dB.
        ssim: Mean, at most 1.
        ssim_median: Median.
        codes: Codes of each, on average.
        bits: Bits of each, on average: codes times the binary logarithm of the codebook's size.
    """

    count: int
    psnr: float
    psnr_median: float
    ssim: float
    ssim_median: float
    codes: float
    bits: float


@dataclass(frozen=True, kw_only=True)
class CodecQuality:
    """Of the same pictures through a codec, in files of at most as many bits as their codes.

    Attributes:
        fits: Share of the pictures of which a file within the bits exists. Of the others the smallest file counts,
            which has more bits.
        bytes: Mean size of the files.
        psnr: Mean, in dB.
        psnr_median: Median, in dB.
        ssim: Mean, at most 1.
        ssim_median: Median.
    """

    fits: float
    bytes: float
    psnr: float
    psnr_median: float
    ssim: float
    ssim_median: float


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What the vision tokenizer keeps.

    Attributes:
        pictures: Of held-out pictures; ``None`` without any.
        clips: Of held-out clips; ``None`` without any.
        codecs: By name, of the pictures.
        codebook_size: Codes there are.
        codebook: Usage, perplexity, dead codes and entropy over pictures and clips together (see
            :func:`emulus.tokenizer.vision.metrics.codebook_usage`).
    """

    pictures: Quality | None
    clips: Quality | None
    codecs: dict[str, CodecQuality] = field(default_factory=dict)
    codebook_size: int
    codebook: dict[str, float]


def reconstruct(vision: VisionTokenizer, examples: Sequence[Example], *, codecs: bool = True) -> Reconstruction:
    """Measure the reconstructions of held-out pictures and clips, in float32.

    Args:
        vision: The tokenizer that made the examples' codes.
        examples: At least one.
        codecs: Whether to look for WebP and JPEG files of equal bits, which takes about a tenth of a second each.
    """
    size = vision.config.codebook_size
    pictures = [example for example in examples if isinstance(example.media, Image)]
    clips = [example for example in examples if not isinstance(example.media, Image)]
    return Reconstruction(
        pictures=_quality(vision, pictures),
        clips=_quality(vision, clips),
        codecs={codec: _codec_quality(codec, pictures, size) for codec in get_args(Codec) if codecs and pictures},
        codebook_size=size,
        codebook=codebook_usage(torch.cat([example.media.codes.flatten() for example in examples]), size),
    )


def bits_of(codes: Tensor, codebook_size: int) -> float:
    """Bits that codes take when each takes the same."""
    return codes.numel() * math.log2(codebook_size)


def paint(vision: VisionTokenizer, example: Example) -> Tensor:
    """Frames ``(T, 3, H, W)`` of an example's codes; values may leave [-1, 1] a little."""
    painted = vision.decode(example.media.codes[None].to(vision.device))
    return painted.float().cpu().reshape(example.frames.shape)


def _quality(vision: VisionTokenizer, examples: Sequence[Example]) -> Quality | None:
    if not examples:
        return None
    scores: dict[str, list[float]] = {"psnr": [], "ssim": []}
    for example in progress(examples, what="reconstructing"):
        painted, pixels = paint(vision, example), to_pixels(example.frames)
        scores["psnr"].append(float(psnr(painted, pixels).mean()))
        scores["ssim"].append(float(ssim(painted, pixels).mean()))
    return Quality(
        count=len(examples),
        codes=statistics.fmean(example.media.codes.numel() for example in examples),
        bits=statistics.fmean(bits_of(example.media.codes, vision.config.codebook_size) for example in examples),
        **_summary(scores),
    )


def _codec_quality(codec: Codec, examples: Sequence[Example], codebook_size: int) -> CodecQuality:
    files: list[Coded] = []
    for example in progress(examples, what=f"{codec} files of equal bits"):
        files.append(best_within(_picture(example), codec, bits_of(example.media.codes, codebook_size) / 8))
    return CodecQuality(
        fits=statistics.fmean(file.fits for file in files),
        bytes=statistics.fmean(file.size for file in files),
        **_summary({"psnr": [file.psnr for file in files], "ssim": [file.ssim for file in files]}),
    )


def _picture(example: Example) -> PIL.Image.Image:
    return pixels_to_image(to_pixels(example.frames[0]))


def _summary(scores: dict[str, list[float]]) -> dict[str, float]:
    means = {name: statistics.fmean(values) for name, values in scores.items()}
    return means | {f"{name}_median": statistics.median(values) for name, values in scores.items()}
