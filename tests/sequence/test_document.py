"""Segments: what they accept, and that equality is by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from emulus.errors import EmulusError
from emulus.sequence import Action, Document, Image, MediaSize, OpenMedia, Special, Text, Video


def test_codes_are_held_as_int64_and_compared_by_value() -> None:
    picture = Image(np.array([[1, 2], [3, 4]], dtype=np.int32))  # type: ignore[arg-type]
    assert picture.codes.dtype == torch.int64
    assert picture == Image(torch.tensor([[1, 2], [3, 4]]))
    assert picture != Image(torch.tensor([[1, 2], [3, 5]]))
    assert picture != Image(torch.tensor([[1, 2]]))
    assert picture != Text("a")
    clip = torch.ones(2, 3, 4, dtype=torch.int64)
    assert Video(clip, fps=8) == Video(clip.clone(), fps=8.0)
    assert Video(clip, fps=8) != Video(clip, fps=9)
    assert Special("<|extra_1|>") == Special("<|extra_1|>") != Text("<|extra_1|>")
    assert Document((Text("a"), picture)) == Document((Text("a"), Image(picture.codes.clone())))


def test_sizes() -> None:
    assert Image(torch.ones(2, 3, dtype=torch.int64)).size == MediaSize(h=2, w=3)
    size = Video(torch.ones(4, 2, 3, dtype=torch.int64), fps=8).size
    assert (size, size.kind, size.cells) == (MediaSize(h=2, w=3, t=4, fps=8.0), "video", 24)
    assert size.medium(torch.arange(24)) == Video(torch.arange(24).reshape(4, 2, 3), fps=8)


@pytest.mark.parametrize(
    "codes",
    [
        torch.ones(2, 2),
        torch.ones(2, 2, dtype=torch.bool),
        torch.ones(2, dtype=torch.int64),
        torch.ones(0, 3, dtype=torch.int64),
        torch.tensor([[0, -1]]),
        [[1, 2], [3]],
        "abc",
    ],
)
def test_what_is_no_grid_of_codes_is_refused(codes: Any) -> None:
    with pytest.raises(EmulusError, match="codes must be"):
        Image(codes)


def test_clips_and_actions_have_their_own_shapes() -> None:
    with pytest.raises(EmulusError, match=r"\(t, h, w\)"):
        Video(torch.ones(2, 2, dtype=torch.int64), fps=8)
    with pytest.raises(EmulusError, match=r"\(n,\)"):
        Action(torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_frame_rates_are_refused(fps: float) -> None:
    with pytest.raises(EmulusError, match="frames per second"):
        Video(torch.ones(1, 1, 1, dtype=torch.int64), fps=fps)


@pytest.mark.parametrize("size", [{"h": 0}, {"w": -1}, {"h": 1.5}, {"t": 2}, {"fps": 8.0}, {"t": 0, "fps": 8.0}])
def test_impossible_sizes_are_refused(size: dict[str, Any]) -> None:
    with pytest.raises(EmulusError, match="give"):
        MediaSize(**({"h": 2, "w": 2} | size))


def test_only_segments_make_a_document() -> None:
    with pytest.raises(EmulusError, match="not str"):
        Document(("a",))  # type: ignore[arg-type]


def test_whole_rows_and_frames_of_what_is_open() -> None:
    picture = OpenMedia(kind="image", size=MediaSize(h=4, w=3), codes=torch.arange(8))
    assert picture.whole() == Image(torch.arange(6).reshape(2, 3))
    clip = OpenMedia(kind="video", size=MediaSize(h=1, w=3, t=4, fps=8.0), codes=torch.arange(8))
    assert clip.whole() == Video(torch.arange(6).reshape(2, 1, 3), fps=8)
    assert OpenMedia(kind="image", size=MediaSize(h=4, w=9), codes=torch.arange(8)).whole() is None
    assert OpenMedia(kind="meta", meta="4*", codes=torch.arange(0)).whole() is None
