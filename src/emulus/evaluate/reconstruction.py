"""pixels -> codes -> pixels: what is lost, how many bits it takes, and what WebP, JPEG and VP9 do with as many."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emulus.data.media_dataset import to_pixels
from emulus.evaluate.codecs import ClipCodec, Codec, Coded, best_clip_within, best_within, pixels_of
from emulus.evaluate.held_out import Example
from emulus.evaluate.perceptual import Metric, perceptual_metric
from emulus.log import progress
from emulus.media import Clip
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
        stlpips: Mean, lower is better; ``None`` without the extra ``emulus[perceptual]``.
        stlpips_median: Median.
        codes: Codes of each, on average.
        bits: Bits of each, on average: codes times the binary logarithm of the codebook's size.
    """

    count: int
    psnr: float
    psnr_median: float
    ssim: float
    ssim_median: float
    stlpips: float | None
    stlpips_median: float | None
    codes: float
    bits: float


@dataclass(frozen=True, kw_only=True)
class CodecQuality:
    """Of the same pictures or clips through a codec, in files of at most as many bits as their codes.

    Attributes:
        count: How many.
        fits: Share of which a file within the bits exists. Of the others the smallest file counts,
            which has more bits.
        bytes: Mean size of the files.
        psnr: Mean, in dB.
        psnr_median: Median, in dB.
        ssim: Mean, at most 1.
        ssim_median: Median.
        stlpips: Mean, lower is better; ``None`` without the extra ``emulus[perceptual]``.
        stlpips_median: Median.
    """

    count: int
    fits: float
    bytes: float
    psnr: float
    psnr_median: float
    ssim: float
    ssim_median: float
    stlpips: float | None
    stlpips_median: float | None


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What the vision tokenizer keeps.

    Attributes:
        pictures: Of held-out pictures; ``None`` without any.
        clips: Of held-out clips; ``None`` without any.
        codecs: By name, of the pictures.
        clip_codecs: By name, of the clips: each as the codec stores a clip best (see
            :func:`emulus.evaluate.codecs.best_clip_within`).
        codebook_size: Codes there are.
        codebook: Usage, perplexity, dead codes and entropy over pictures and clips together (see
            :func:`emulus.tokenizer.vision.metrics.codebook_usage`).
    """

    pictures: Quality | None
    clips: Quality | None
    codecs: dict[str, CodecQuality] = field(default_factory=dict)
    clip_codecs: dict[str, CodecQuality] = field(default_factory=dict)
    codebook_size: int
    codebook: dict[str, float]


def reconstruct(vision: VisionTokenizer, examples: Sequence[Example], *, codecs: bool = True) -> Reconstruction:
    """Measure the reconstructions of held-out pictures and clips, in float32.

    Args:
        vision: The tokenizer that made the examples' codes.
        examples: At least one.
        codecs: Whether to look for files of equal bits, which takes about a tenth of a second for a picture and one for
            a clip.
    """
    size, metric = vision.config.codebook_size, perceptual_metric()
    pictures = [example for example in examples if isinstance(example.media, Image)]
    clips = [example for example in examples if not isinstance(example.media, Image)]
    return Reconstruction(
        pictures=_quality(vision, pictures, metric),
        clips=_quality(vision, clips, metric),
        codecs=_beside(get_args(Codec) if codecs else (), pictures, size, metric),
        clip_codecs=_beside(get_args(ClipCodec) if codecs else (), clips, size, metric),
        codebook_size=size,
        codebook=codebook_usage(torch.cat([example.media.codes.flatten() for example in examples]), size),
    )


def bits_of(codes: Tensor, codebook_size: int) -> float:
    """Bits that codes take when each takes the same."""
    return codes.numel() * math.log2(codebook_size)


def paint(vision: VisionTokenizer, example: Example) -> Tensor:
    """Frames ``(T, 3, H, W)`` of an example's codes; values may leave [-1, 1] a little."""
    return painted(vision, example.media.codes).reshape(example.frames.shape)


def painted(vision: VisionTokenizer, codes: Int[Tensor, "*t h w"]) -> Float[Tensor, "*frames 3 height width"]:
    """Pixels of the codes of one picture or clip; values may leave [-1, 1] a little."""
    return vision.decode(codes[None].to(vision.device))[0].float().cpu()


def _beside(
    codecs: Sequence[ClipCodec], examples: Sequence[Example], codebook_size: int, metric: Metric | None
) -> dict[str, CodecQuality]:
    found = {codec: _codec_quality(codec, examples, codebook_size, metric) for codec in codecs}
    return {codec: quality for codec, quality in found.items() if quality is not None}


def _quality(vision: VisionTokenizer, examples: Sequence[Example], metric: Metric | None) -> Quality | None:
    if not examples:
        return None
    scores = _Scores(metric)
    for example in progress(examples, what="reconstructing"):
        frames, pixels = paint(vision, example), to_pixels(example.frames)
        scores.add(frames, pixels, psnr=float(psnr(frames, pixels).mean()), ssim=float(ssim(frames, pixels).mean()))
    return Quality(
        count=len(examples),
        codes=statistics.fmean(example.media.codes.numel() for example in examples),
        bits=statistics.fmean(bits_of(example.media.codes, vision.config.codebook_size) for example in examples),
        **scores.summary(),
    )


def _codec_quality(
    codec: ClipCodec, examples: Sequence[Example], codebook_size: int, metric: Metric | None
) -> CodecQuality | None:
    if not examples:
        return None
    files: list[Coded] = []
    scores = _Scores(metric)
    for example in progress(examples, what=f"{codec} files of equal bits"):
        original, budget = example.original, bits_of(example.media.codes, codebook_size) / 8
        if isinstance(original, Clip):
            file = best_clip_within(original.frames, codec, budget)
        else:
            assert codec != "VP9", "of clips only"
            file = best_within(original, codec, budget)
        files.append(file)
        scores.add(pixels_of(file.frames), to_pixels(example.frames), psnr=file.psnr, ssim=file.ssim)
    return CodecQuality(
        count=len(files),
        fits=statistics.fmean(file.fits for file in files),
        bytes=statistics.fmean(file.size for file in files),
        **scores.summary(),
    )


class _Scores:
    """Figures of many pictures or clips."""

    def __init__(self, metric: Metric | None) -> None:
        self._metric = metric
        self._values: dict[str, list[float]] = {"psnr": [], "ssim": [], "stlpips": []}

    def add(self, frames: Tensor, pixels: Tensor, *, psnr: float, ssim: float) -> None:
        """One more, with the distance of its frames from the true ones."""
        self._values["psnr"].append(psnr)
        self._values["ssim"].append(ssim)
        if self._metric is not None:
            self._values["stlpips"].append(float(self._metric(frames, pixels).mean()))

    def summary(self) -> dict[str, Any]:
        """Mean and median of each figure, ``None`` where there is none."""
        found: dict[str, float | None] = {}
        for name, values in self._values.items():
            found[name] = statistics.fmean(values) if values else None
            found[f"{name}_median"] = statistics.median(values) if values else None
        return found
