"""Size texts: what is written is what is read, and nothing else can be written."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.sequence.document import MediaSize
from emulus.sequence.layout import SequenceLayout
from emulus.sequence.meta import MetaTemplate

PICTURE = MetaTemplate("image", SequenceLayout().image_meta, 4)
CLIP = MetaTemplate("video", SequenceLayout().video_meta, 4)
OTHERS = [
    MetaTemplate("image", "1*{w}x{h};", 4),
    MetaTemplate("video", "{fps} fps, {h} by {w} by {t}", 2),
    MetaTemplate("video", "<{w}|{t}|{h}|{fps}|{seconds}>", 1),
]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (MediaSize(h=8, w=8, t=2, fps=24.0), "2*8*8 24fps 0.333s"),
        (MediaSize(h=8, w=8, t=2, fps=8), "2*8*8 8fps 1s"),
        (MediaSize(h=64, w=65, t=30, fps=23.976), "30*64*65 23.976fps 5.005s"),
        (MediaSize(h=1, w=2, t=1, fps=0.5), "1*1*2 0.5fps 8s"),
        (MediaSize(h=1, w=2, t=100, fps=10.0), "100*1*2 10fps 40s"),
        (MediaSize(h=1, w=2, t=1, fps=29.97003), "1*1*2 29.97fps 0.133s"),
    ],
)
def test_clips_are_written_in_full(size: MediaSize, text: str) -> None:
    assert CLIP.write(size) == text


sizes = st.builds(
    MediaSize,
    h=st.integers(1, 99),
    w=st.integers(1, 99),
    t=st.integers(1, 99),
    fps=st.integers(1, 999_999).map(lambda thousandths: thousandths / 1000),
)


@given(sizes, st.sampled_from([PICTURE, CLIP, *OTHERS]))
def test_every_size_is_read_back_and_every_step_of_it_is_allowed(size: MediaSize, template: MetaTemplate) -> None:
    size = size if template.kind == "video" else MediaSize(h=size.h, w=size.w)
    text = template.write(size)
    assert set(text) <= set(template.characters)
    for length, character in enumerate(text):
        assert character in template.follow(text[:length], size.cells).characters
    assert template.follow(text, size.cells).size == size
    assert template.follow(text, size.cells - 1).size is None


@given(st.randoms(use_true_random=False), st.sampled_from([PICTURE, CLIP, *OTHERS]), st.integers(1, 3000))
def test_whatever_is_written_letter_by_letter_is_a_size(
    choose: random.Random, template: MetaTemplate, max_cells: int
) -> None:
    text = ""
    follow = template.follow(text, max_cells)
    while follow.characters and not (follow.size and choose.random() < 0.3):
        text += choose.choice(follow.characters)
        follow = template.follow(text, max_cells)
    assert follow.size
    assert follow.size.cells <= max_cells
    assert template.write(follow.size) == text


@pytest.mark.parametrize(
    "text",
    ["0", "08", "8*0", "8x8", "8**", "-8*8", "8*8 ", "8.5*8", "５*8", "9" * 10_000, "101*1", "2*8*8 24fps 1s"],
)
def test_wrong_picture_sizes_lead_nowhere(text: str) -> None:
    follow = PICTURE.follow(text, 100)
    assert (follow.characters, follow.size) == ("", None)


@pytest.mark.parametrize(
    "text",
    ["2*8*8 24fps 1s", "2*8*8 024", "2*8*8 24.0f", "2*8*8 0f", "2*8*8 1000", "2*8*8 1.2345", "2*8*8 1..", "8*8f"],
)
def test_wrong_clip_sizes_lead_nowhere(text: str) -> None:
    follow = CLIP.follow(text, 1000)
    assert (follow.characters, follow.size) == ("", None)


@pytest.mark.parametrize("fps", [0.0004, 1000.0, 999.9999])
def test_frame_rates_that_cannot_be_written_are_refused(fps: float) -> None:
    with pytest.raises(EmulusError, match="frames per second"):
        CLIP.write(MediaSize(h=1, w=1, t=1, fps=fps))


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        ("image", "{h}"),
        ("image", "{h}{w}"),
        ("image", "{h}.{w}"),
        ("image", "{h}*{w}0"),
        ("image", "{h}*{w}*{h}"),
        ("image", "{h}*{w}*{seconds}"),
        ("image", "{h:03}*{w}"),
        ("image", "{{{h}*{w}"),
        ("image", "{h}×{w}"),
        ("video", "{t}*{h}*{w}"),
        ("video", "{seconds}s {t}*{h}*{w} {fps}fps"),
    ],
)
def test_templates_that_could_not_be_read_back_are_refused(kind: str, template: str) -> None:
    with pytest.raises(EmulusError, match="cannot be read back"):
        MetaTemplate(kind, template, 4)
