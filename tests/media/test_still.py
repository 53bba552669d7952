"""What stands still keeps its pixels, what moves is as it was painted."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.media.still import keep_still


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_a_still_scene_is_the_given_frame() -> None:
    sharp, blurred = drawn(0, 3, 16, 16), drawn(1, 3, 16, 16)
    found = keep_still(blurred.expand(5, -1, -1, -1), blurred, sharp, cell=4)
    assert torch.equal(found, sharp.expand(5, -1, -1, -1))


def test_what_moves_is_as_it_was_painted() -> None:
    sharp, blurred = torch.full((3, 24, 24), 0.5), torch.full((3, 24, 24), 0.4)
    frames = blurred.repeat(2, 1, 1, 1)
    frames[1, :, 8:16, 8:16] = -0.9
    found = keep_still(frames, blurred, sharp, cell=4)
    assert torch.equal(found[0], sharp)
    assert torch.equal(found[1, :, 8:16, 8:16], frames[1, :, 8:16, 8:16])
    far = torch.ones(24, 24, dtype=torch.bool)
    far[4:20, 4:20] = False
    assert torch.equal(found[1][:, far], sharp[:, far])


@given(st.integers(0, 99), st.sampled_from([4, 8]), st.integers(8, 20))
@settings(max_examples=20, deadline=None)
def test_pixels_lie_between_both(seed: int, cell: int, side: int) -> None:
    frames, painted, true = (
        drawn(seed, 3, 3, side, side),
        drawn(seed + 1, 3, side, side),
        drawn(seed + 2, 3, side, side),
    )
    found = keep_still(frames, painted, true, cell=cell)
    assert (found >= torch.minimum(frames, true) - 1e-6).all()
    assert (found <= torch.maximum(frames, true) + 1e-6).all()
