"""The discriminator, its losses and when they begin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.tokenizer.vision.discriminator import AdversarialConfig, Discriminator, Verdicts, views_of

CONFIG = AdversarialConfig(weight=0.1, width=8)


def test_it_learns_to_tell_real_from_blurred() -> None:
    discriminator, verdicts = Discriminator(3, CONFIG), Verdicts(CONFIG.lecam)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        real = F.interpolate((torch.rand(8, 3, 8, 8) < 0.5).float() * 2 - 1, scale_factor=4)
        return views_of(real), views_of(F.avg_pool2d(real, 5, stride=1, padding=2))

    for _ in range(40):
        real, painted = batch()
        optimizer.zero_grad()
        verdicts.discriminator_loss(discriminator(real), discriminator(painted)).backward()
        optimizer.step()
    with torch.no_grad():
        real, painted = (discriminator(views) for views in batch())
    assert (real > 0).float().mean() > 0.9
    assert (painted < 0).float().mean() > 0.9
    # What is told apart pays for it, and what passes for real does not.
    assert verdicts.tokenizer_loss(painted) > 2 * verdicts.tokenizer_loss(real)


def test_clips_are_seen_with_their_change() -> None:
    clips = torch.rand(2, 3, 3, 8, 8)
    views = views_of(clips).unflatten(0, (2, 3))
    assert torch.equal(views[:, :, :3], clips)
    assert not views[:, 0, 3:].any()
    assert torch.equal(views[:, 2, 3:], clips[:, 2] - clips[:, 1])
    assert not views_of(clips[:, 0])[:, 3:].any(), "a picture does not change"


def test_the_running_means_follow_the_verdicts() -> None:
    verdicts = Verdicts(lecam=0.0)
    for _ in range(3):
        verdicts.discriminator_loss(torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), -1.0))
    share = 1 - 0.99**3
    assert float(verdicts.real) == pytest.approx(2 * share)
    assert float(verdicts.painted) == pytest.approx(-share)
    assert verdicts.state()["real"] is verdicts.real, "a checkpoint is loaded in place"


def test_lecam_pulls_verdicts_together() -> None:
    """Its part of the loss is the squared way to the other side's running mean, after that has moved."""
    verdicts, plain = Verdicts(lecam=0.5), Verdicts(lecam=0.0)
    for each in (verdicts, plain):
        each.real.fill_(1.0)
        each.painted.fill_(-1.0)
    real, painted = torch.full((1, 1, 1), 3.0), torch.full((1, 1, 1), -2.0)
    pull = verdicts.discriminator_loss(real, painted) - plain.discriminator_loss(real, painted)
    real_mean, painted_mean = 1 + 0.01 * 2, -1 - 0.01
    assert float(pull) == pytest.approx(0.5 * ((3 - painted_mean) ** 2 + (real_mean + 2) ** 2), rel=1e-5)


@given(st.floats(0, 0.9), st.floats(0, 0.5), st.integers(2, 200))
def test_the_weight_rises_once(start: float, rise: float, steps: int) -> None:
    config = AdversarialConfig(weight=0.3, start_share=start, rise_share=rise)
    weights = [config.weight_at(step, steps) for step in range(steps)]
    assert weights == sorted(weights)
    assert all(weight == 0 for step, weight in enumerate(weights) if step + 1 <= start * steps)
    assert all(weight == 0.3 for step, weight in enumerate(weights) if step + 1 >= (start + rise) * steps + 1)


def test_settings_are_checked() -> None:
    with pytest.raises(EmulusError, match="width must be a multiple of 8, got 12"):
        AdversarialConfig(width=12)
    with pytest.raises(EmulusError, match="learning_rate must be positive"):
        AdversarialConfig(learning_rate=0.0)
    with pytest.raises(EmulusError, match="lecam must be at least 0"):
        AdversarialConfig(lecam=-0.1)
