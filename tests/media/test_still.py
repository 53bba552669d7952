"""What stands still keeps its pixels, what moves is as it was painted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.media import keep_still


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_still_scene_is_the_last_given_frame() -> None:
    sharp, blurred = drawn(0, 2, 3, 16, 16), drawn(1, 3, 16, 16)
    found = keep_still(blurred.expand(7, -1, -1, -1), sharp, cell=4)
    assert torch.equal(found, sharp[1].expand(5, -1, -1, -1))


@pytest.mark.parametrize("side", [2, 8])
def test_what_moves_is_as_it_was_painted(side: int) -> None:
    """An eye of two by two pixels, too."""
    sharp, blurred = torch.full((1, 3, 24, 24), 0.5), torch.full((3, 24, 24), 0.4)
    painted = blurred.repeat(3, 1, 1, 1)
    painted[2, :, 10 : 10 + side, 10 : 10 + side] = -0.9
    found = keep_still(painted, sharp, cell=4)
    assert torch.equal(found[0], sharp[0])
    assert torch.equal(found[1, :, 10 : 10 + side, 10 : 10 + side], painted[2, :, 10 : 10 + side, 10 : 10 + side])
    far = torch.ones(24, 24, dtype=torch.bool)
    far[6 : 14 + side, 6 : 14 + side] = False
    assert torch.equal(found[1][:, far], sharp[0][:, far])


@given(st.integers(0, 99), st.sampled_from([4, 8]), st.integers(8, 20))
@settings(max_examples=20, deadline=None)
def test_pixels_lie_between_both(seed: int, cell: int, side: int) -> None:
    painted, true = drawn(seed, 4, 3, side, side), drawn(seed + 1, 2, 3, side, side)
    found = keep_still(painted, true, cell=cell)
    assert found.shape == (2, 3, side, side)
    assert (found >= torch.minimum(painted[2:], true[1]) - 1e-6).all()
    assert (found <= torch.maximum(painted[2:], true[1]) + 1e-6).all()
