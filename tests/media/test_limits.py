"""What is asked for is limited, not what is stored; the remedies that messages name work."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
import pytest
from PIL import Image

from emulus.errors import EmulusError
from emulus.media import Clip, Limits, read_video


def film(count: int, rate: int, container: str = "mp4") -> bytes:
    """Frames of 16 × 16 whose grey is four times their number, modulo 62."""
    content = BytesIO()
    with av.open(content, "w", format=container) as output:
        stream = output.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 4 * (index % 62), np.uint8), "rgb24")
            frame.pts, frame.time_base = index, Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return content.getvalue()


def animation(durations: list[int], kind: str = "GIF") -> bytes:
    frames = [Image.new("L", (8, 8), 4 * (index % 62)) for index in range(len(durations))]
    content = BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(content, kind, save_all=True, append_images=frames[1:], duration=durations, **options)
    return content.getvalue()


def numbers(clip: Clip) -> list[int]:
    return [round(frame.getpixel((8, 8) if frame.width > 8 else (4, 4))[0] / 4) for frame in clip.frames]


LONG = film(800, 60)
SLOW = film(70, 1)


def test_the_start_of_a_long_film() -> None:
    few = Limits(max_frames=100, max_seconds=5)
    shown = numbers(read_video(LONG, fps=8, max_frames=16, limits=few))
    assert shown == [int(7.5 * place) % 62 for place in range(16)]
    assert numbers(read_video(SLOW, fps=1, max_frames=5, limits=few)) == list(range(5))
    assert numbers(read_video(LONG, max_frames=16, limits=few)) == list(range(16))
    assert len(read_video(SLOW, fps=8, max_frames=16, limits=few).frames) == 16


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi", "nut"])
def test_the_start_equals_the_whole(container: str) -> None:
    source = film(50, 10, container)
    whole = read_video(source)
    assert len(whole.frames) == 50
    start = read_video(source, max_frames=7)
    assert [frame.tobytes() for frame in start.frames] == [frame.tobytes() for frame in whole.frames[:7]]
    slow = read_video(source, fps=4)
    start = read_video(source, fps=4, max_frames=7)
    assert [frame.tobytes() for frame in start.frames] == [frame.tobytes() for frame in slow.frames[:7]]


def test_what_is_not_needed_is_not_decoded() -> None:
    """The damaged rest of a file does not matter, and work beyond the start is not counted."""
    damaged = bytearray(film(200, 20, "mpegts"))
    damaged[len(damaged) // 2 :] = b"\xff" * (len(damaged) - len(damaged) // 2)
    assert numbers(read_video(bytes(damaged), max_frames=10)) == list(range(10))
    work = Limits(max_decoded_pixels=40 * 2**14)
    assert len(read_video(LONG, fps=60, max_frames=20, limits=work).frames) == 20
    with pytest.raises(EmulusError, match="takes decoding more"):
        read_video(LONG, fps=2, max_frames=20, limits=work)


def test_a_cut_before_the_end_of_what_is_wanted_is_found() -> None:
    source = film(200, 20, "matroska")
    cut = source[: len(source) // 2]
    with pytest.raises(EmulusError, match="truncated"):
        read_video(cut, max_frames=150)
    assert len(read_video(cut, max_frames=20).frames) == 20


def test_a_frame_that_is_shown_for_very_long() -> None:
    source = animation([20, 600_000, 20])
    assert numbers(read_video(source, fps=8, max_frames=16)) == [0] + [1] * 15
    assert numbers(read_video(source, max_frames=4)) == [0, 1, 1, 1]
    with pytest.raises(EmulusError, match=r"lasts 600.0 s or more"):
        read_video(source)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_start_of_a_long_animation(kind: str) -> None:
    source = animation([100] * 60, kind)
    few = Limits(max_frames=20, max_seconds=3)
    assert numbers(read_video(source, max_frames=20, limits=few)) == list(range(20))
    assert numbers(read_video(source, fps=5, max_frames=10, limits=few)) == list(range(0, 20, 2))
    work = Limits(max_decoded_pixels=30 * 8 * 2**14)
    assert len(read_video(source, max_frames=20, limits=work).frames) == 20
    with pytest.raises(EmulusError, match="takes decoding more"):
        read_video(source, limits=work)


REMEDIES: dict[str, Callable[[bytes, Limits], Clip]] = {
    "max_frames": lambda source, limits: read_video(source, max_frames=8, limits=limits),
    "fps": lambda source, limits: read_video(source, fps=0.8, limits=limits),
    "raise": lambda source, _: read_video(source),
}


@pytest.mark.parametrize("source", [film(100, 10), animation([100] * 100), animation([100] * 100, "WEBP")])
@pytest.mark.parametrize(
    ("limits", "remedies"),
    [
        (Limits(max_frames=10), ("max_frames", "fps", "raise")),
        (Limits(max_seconds=2), ("max_frames", "raise")),
        (Limits(max_clip_pixels=16 * 256), ("max_frames", "fps", "raise")),
        (Limits(max_decoded_pixels=20 * 8 * 2**14), ("max_frames", "raise")),
    ],
    ids=["frames", "seconds", "memory", "work"],
)
def test_remedies_help(source: bytes, limits: Limits, remedies: tuple[str, ...]) -> None:
    if limits.max_clip_pixels == 16 * 256 and not source.startswith((b"\0\0\0", b"RIFF1")):
        limits = Limits(max_clip_pixels=16 * 64)
    if limits.max_decoded_pixels == 20 * 8 * 2**14 and source.startswith(b"\0\0\0"):
        limits = Limits(max_decoded_pixels=20 * 2**14)
    with pytest.raises(EmulusError) as caught:
        read_video(source, limits=limits)
    message = str(caught.value)
    named = {"raise"} if re.search(r"raise Limits\.\w+", message) else set()
    named |= {name for name in ("max_frames", "fps") if re.search(rf"\([^)]*\b{name}\b", message)}
    assert named == set(remedies)
    for remedy in remedies:
        assert REMEDIES[remedy](source, limits).frames


def test_memory_holds_what_each_frame_became() -> None:
    limits = Limits(max_clip_pixels=100 * 16)
    source = film(100, 10)
    with pytest.raises(EmulusError, match="allowed together"):
        read_video(source, limits=limits)
    clip = read_video(source, limits=limits, transform=lambda frame: frame.resize((4, 4)))
    assert len(clip.frames) == 100
    whole = read_video(source)
    assert [frame.tobytes() for frame in clip.frames] == [frame.resize((4, 4)).tobytes() for frame in whole.frames]
    assert read_video(whole, transform=lambda frame: frame.resize((4, 4))) == clip


def test_short_delays_are_shown_as_in_browsers() -> None:
    assert read_video(animation([10] * 5)).duration == pytest.approx(0.5)
    assert read_video(animation([0] * 5)).duration == pytest.approx(0.5)
    assert read_video(animation([20] * 5)).duration == pytest.approx(0.1)
    for kind in ("WEBP", "PNG"):
        assert read_video(animation([10] * 5, kind)).duration == pytest.approx(0.5)
        assert read_video(animation([11] * 6, kind)).duration == pytest.approx(0.066, abs=0.02)
