"""Quality figures on known answers."""

from __future__ import annotations

import pytest
import torch

from emulus.tokenizer.vision.metrics import codebook_usage, psnr, ssim


def test_psnr_of_a_known_error() -> None:
    pixels = torch.zeros(2, 3, 16, 16)
    # An error of 0.2 on a range of 2 is one tenth: 20 dB.
    torch.testing.assert_close(psnr(pixels, pixels + 0.2), torch.full((2,), 20.0))
    assert float(psnr(pixels, pixels)[0]) > 90


def test_ssim() -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(ssim(pixels, pixels), torch.ones(2))
    noise = pixels + 0.3 * torch.randn_like(pixels)
    assert 0 < float(ssim(pixels, noise).mean()) < 0.95
    assert float(ssim(pixels, -pixels).mean()) < 0.1


def test_ssim_of_plain_pictures() -> None:
    """Without structure the closed form of the luminance term alone is left."""
    dark, bright = torch.full((1, 1, 16, 16), -0.5), torch.full((1, 1, 16, 16), 0.5)
    a, b = 0.25, 0.75
    assert float(ssim(dark, bright)) == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-5)


def test_usage() -> None:
    figures = codebook_usage(torch.tensor([[0, 1], [1, 0]]), 8)
    assert figures["usage"] == 0.25
    assert figures["perplexity"] == pytest.approx(2)
    assert figures["dead_codes"] == 6
    assert figures["entropy_bits"] == pytest.approx(1)
