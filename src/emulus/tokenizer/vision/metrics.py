"""How good reconstructions are, and how much of the codebook they use."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emulus.tokenizer.vision.model import VisionTokenizer


def psnr(pixels: Float[Tensor, "n c h w"], other: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Peak signal-to-noise ratio in dB of each picture, both clipped to [-1, 1]. Higher is better."""
    error = (pixels.clamp(-1, 1) - other.clamp(-1, 1)).square().flatten(1).mean(1)
    # The range is 2 wide, so the squared peak is 4.
    return 10 * torch.log10(4.0 / error.clamp_min(1e-10))


def ssim(pixels: Float[Tensor, "n c h w"], other: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Structural similarity of each picture, at most 1, both clipped to [-1, 1].

    Gaussian window of 11 (sigma 1.5), per channel, over the places where the window fits.

    Source: Wang et al. 2004, with its constants K1 = 0.01 and K2 = 0.03.
    """
    # Variances are small differences of large numbers: float64, whatever the pixels came in.
    x, y = ((image.double().clamp(-1, 1) + 1) / 2 for image in (pixels, other))
    offsets = range(-5, 6)
    weights = [math.exp(-(offset**2) / (2 * 1.5**2)) for offset in offsets]
    total = sum(weights)

    def blur(image: Tensor) -> Tensor:
        # Sums of shifted pictures: depthwise convolutions in float64 are twenty times slower on CPUs.
        for axis in (-2, -1):
            inside = image.shape[axis] - len(weights) + 1
            shifted = (image.narrow(axis, place, inside) * (weight / total) for place, weight in enumerate(weights))
            image = functools.reduce(torch.add, shifted)
        return image

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.flatten(1).mean(1).float()


def codebook_usage(codes: Int[Tensor, ...], codebook_size: int) -> dict[str, float]:
    """How a set of codes spreads over the codebook.

    Returns:
        ``usage``: share of the codebook that occurs at all; ``perplexity``: size of the uniform codebook of the same
        entropy; ``dead_codes``: how many never occur; ``entropy_bits``: bits per code.
    """
    counts = torch.bincount(codes.flatten(), minlength=codebook_size).double()
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    used = int((counts > 0).sum())
    return {
        "usage": used / codebook_size,
        "perplexity": 2**entropy,
        "dead_codes": float(codebook_size - used),
        "entropy_bits": entropy,
    }


def code_flip_rate(model: VisionTokenizer, other: VisionTokenizer, pixels: Float[Tensor, "b *frames c H W"]) -> float:
    """Share of the codes of images or clips that two tokenizers of one codebook choose differently.

    What rounding an encoder does to its codes: most flips go to a near neighbour, so look at the PSNR too.
    """
    return float((model.encode(pixels) != other.encode(pixels)).float().mean())
