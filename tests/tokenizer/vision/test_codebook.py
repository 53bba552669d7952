"""The codebook learns without collapse."""

from __future__ import annotations

import torch

from emulus.tokenizer.vision.codebook import CodebookConfig, CodebookTrainer
from emulus.tokenizer.vision.metrics import codebook_usage
from emulus.tokenizer.vision.quantizer import Quantizer


def clusters(count: int, points: int) -> torch.Tensor:
    """Points around ``count`` centres on a line."""
    centres = torch.arange(count).float()[torch.randint(count, (points,))]
    return centres[:, None] + 0.01 * torch.randn(points, 2)


def fit(latents: torch.Tensor, size: int, *, start: bool, steps: int = 200) -> Quantizer:
    quantizer = Quantizer(size, 2)
    trainer = CodebookTrainer(quantizer, CodebookConfig(decay=0.9))
    if start:
        trainer.start(latents)
    for _ in range(steps):
        trainer.update(latents, quantizer.nearest(latents), revive=start)
    return quantizer


def test_codes_settle_on_clusters() -> None:
    latents = clusters(8, 512)
    quantizer = fit(latents, 24, start=True)
    error = (quantizer.embedding.weight[quantizer.nearest(latents)] - latents).square().mean()
    assert error < 1e-3
    assert codebook_usage(quantizer.nearest(latents), 24)["usage"] > 0.9


def test_the_plain_recipe_collapses() -> None:
    """Without the measures most codes stay unused: the test above can fail."""
    latents = clusters(8, 512) + 100
    assert codebook_usage(fit(latents, 8, start=False).nearest(latents), 8)["usage"] < 0.5


def test_dead_codes_are_counted_and_revived() -> None:
    latents = clusters(4, 256)
    quantizer = Quantizer(8, 2)
    trainer = CodebookTrainer(quantizer, CodebookConfig(decay=0.5))
    trainer.start(latents)
    quantizer.embedding.weight.data[5:] = 1e6
    trainer.sums[5:] = 0.5e6
    revived = sum(trainer.update(latents, quantizer.nearest(latents), revive=True) for _ in range(10))
    assert revived >= 3
    assert float(quantizer.embedding.weight.max()) < 10


def test_state_round_trip() -> None:
    latents = clusters(4, 64)
    quantizer = Quantizer(4, 2)
    trainer = CodebookTrainer(quantizer, CodebookConfig())
    trainer.start(latents)
    trainer.update(latents, quantizer.nearest(latents), revive=True)
    again = CodebookTrainer(quantizer, CodebookConfig())
    for name, value in trainer.state().items():
        again.state()[name].copy_(value)
    assert torch.equal(again.sums, trainer.sums)
    before = quantizer.embedding.weight.clone()
    again.start(latents)
    assert torch.equal(before, quantizer.embedding.weight), "a started codebook is not started again"


def test_search_is_exact() -> None:
    quantizer = Quantizer(50, 3)
    quantizer.embedding.weight.data.normal_()
    latents = torch.randn(5000, 3)
    brute = torch.cdist(latents.double(), quantizer.embedding.weight.double()).argmin(1)
    assert torch.equal(quantizer.nearest(latents), brute)


def test_a_trained_codebook_is_gone_on_with() -> None:
    latents = clusters(4, 256)
    quantizer = Quantizer(4, 2)
    quantizer.embedding.weight.data = torch.arange(4.0)[:, None].expand(-1, 2) + 0.1
    before = quantizer.embedding.weight.clone()
    trainer = CodebookTrainer(quantizer, CodebookConfig(decay=0.9))
    trainer.adopt()
    trainer.start(latents)
    assert torch.equal(before, quantizer.embedding.weight)
    trainer.update(latents, quantizer.nearest(latents), revive=True)
    moved = (quantizer.embedding.weight - before).abs().max()
    assert 0 < moved < 0.03, "a first batch moves it by its share of the running mean"
