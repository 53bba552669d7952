"""Terms of the reconstruction loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.tokenizer.vision.losses import ReconstructionConfig, ReconstructionLoss, chosen_frames, frames_of
from emulus.tokenizer.vision.perceptual import PerceptualDistance, available


def test_terms_are_weighed_and_summed() -> None:
    painted, pixels = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    total, terms = ReconstructionLoss(ReconstructionConfig(l2=2.0, l1=0.5))(painted, pixels)
    error = painted - pixels
    torch.testing.assert_close(terms["l2"], error.square().mean())
    torch.testing.assert_close(terms["l1"], error.abs().mean())
    torch.testing.assert_close(total, 2 * terms["l2"] + 0.5 * terms["l1"])


def test_a_term_of_no_weight_is_not_computed() -> None:
    painted = torch.rand(2, 3, 8, 8)
    total, terms = ReconstructionLoss(ReconstructionConfig(l2=0.0, l1=1.0))(painted, painted)
    assert terms.keys() == {"l1"}
    assert total == 0


def test_the_motion_of_clips_is_compared_whatever_their_stills() -> None:
    loss = ReconstructionLoss(ReconstructionConfig(l2=0.0, motion=3.0))
    clip, still = torch.rand(2, 4, 3, 8, 8), torch.rand(2, 1, 3, 8, 8)
    total, _ = loss(clip + still, clip)
    assert total == pytest.approx(0, abs=1e-6)
    total, _ = loss(still.expand_as(clip), clip)
    torch.testing.assert_close(total, 3 * (clip[:, 1:] - clip[:, :-1]).square().mean())
    assert loss(clip[:, 0], clip[:, 1])[1].keys() == set()


@pytest.mark.skipif(not available(), reason="the extra is not installed")
def test_the_perceptual_term_measures_some_frames() -> None:
    config = ReconstructionConfig(l2=0.0, perceptual=0.1, perceptual_frames=3)
    loss, distance = ReconstructionLoss(config), PerceptualDistance.load()
    painted, pixels = torch.rand(2, 4, 3, 32, 32, requires_grad=True), torch.rand(2, 4, 3, 32, 32)
    torch.manual_seed(3)
    total, terms = loss(painted, pixels)
    torch.manual_seed(3)
    some = chosen_frames(pixels, 3)
    expected = distance(frames_of(painted)[some], frames_of(pixels)[some]).mean()
    torch.testing.assert_close(terms["perceptual"], expected.detach())
    torch.testing.assert_close(total, 0.1 * expected)
    total.backward()
    assert painted.grad is not None
    assert int((painted.grad.abs().amax((2, 3, 4)) > 0).sum()) == 3


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 12))
def test_frames_are_chosen_once_each(clips: int, length: int, most: int) -> None:
    pixels = torch.arange(clips * length).float().reshape(clips, length, 1, 1, 1)
    chosen = frames_of(pixels)[chosen_frames(pixels, most)].flatten().tolist()
    assert len(chosen) == len(set(chosen)) == min(clips * length, most)


def test_weights_are_checked() -> None:
    with pytest.raises(EmulusError, match="perceptual must be at least 0"):
        ReconstructionConfig(perceptual=-1.0)
    with pytest.raises(EmulusError, match="perceptual_frames must be at least 1"):
        ReconstructionConfig(perceptual_frames=0)
