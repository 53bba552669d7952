"""Clips keep their frames and times; broken ones and bombs become one line."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emulus.errors import EmulusError
from emulus.media import Clip, Limits, clip_to_pixels, is_video, pixels_to_clip, read_media, read_video, write_video

FORMATS = ("mp4", "webm", "webp", "gif")


def numbered(index: int, width: int = 32, height: int = 24) -> Image.Image:
    """A frame whose grey tells its number, also after lossy coding."""
    return Image.new("RGB", (width, height), (index * 8 + 4,) * 3)


def numbers(clip: Clip) -> list[int]:
    return [round((float(np.asarray(frame).mean()) - 4) / 8) for frame in clip.frames]


def clip_of(indices: Sequence[int], fps: float = 8, width: int = 32, height: int = 24) -> Clip:
    return Clip(tuple(numbered(index, width, height) for index in indices), fps)


def animation(indices: Sequence[int], durations: Sequence[int], kind: str = "WEBP", **options: object) -> bytes:
    first, *rest = (numbered(index) for index in indices)
    content = BytesIO()
    options = {"lossless": True, **options} if kind == "WEBP" else options
    first.save(content, kind, save_all=True, append_images=rest, duration=list(durations), **options)
    return content.getvalue()


def film(times: Sequence[int], container: str = "matroska", codec: str = "libx264", **options: str) -> bytes:
    """A film whose frame k starts at times[k] milliseconds."""
    content = BytesIO()
    with av.open(content, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options={"crf": "10", **options})
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        tick = 40 if container == "avi" else 1  # milliseconds
        stream.codec_context.time_base = Fraction(tick, 1000)
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_image(numbered(index))
            frame.pts, frame.time_base = time // tick, Fraction(tick, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return content.getvalue()


@contextmanager
def one_line_or_nothing() -> Iterator[None]:
    """What is inside succeeds or says in one line why not."""
    message = ""
    try:
        yield
    except EmulusError as error:
        message = str(error)
    assert "\n" not in message


def message_of(source: str | Path | bytes, limits: Limits = Limits(), **options: object) -> str:  # noqa: B008 (frozen)
    with pytest.raises(EmulusError) as caught:
        read_video(source, limits=limits, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert (f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)) in message
    return message


# Round trips


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("fps", [8, 12.5, 24])
def test_what_is_written_is_read(suffix: str, fps: float, tmp_path: Path) -> None:
    path = tmp_path / f"new/clip.{suffix}"
    write_video(clip_of(range(24), fps), path)
    assert os.listdir(path.parent) == [path.name]
    for source in (path, str(path), path.read_bytes()):
        clip = read_video(source)
        assert clip.fps == pytest.approx(fps, rel=2e-3)
        assert clip.frames[0].size == (32, 24)
        assert numbers(clip) == list(range(24))
        assert is_video(source)


@pytest.mark.parametrize("suffix", FORMATS)
def test_colours_survive(suffix: str, tmp_path: Path) -> None:
    colours = ((255, 0, 0), (0, 160, 60), (20, 40, 250), (255, 255, 255), (0, 0, 0))
    frames = tuple(Image.new("RGB", (32, 32), colour) for colour in colours)
    write_video(Clip(frames, 5), tmp_path / f"a.{suffix}")
    for frame, colour in zip(read_video(tmp_path / f"a.{suffix}").frames, colours, strict=True):
        assert np.abs(np.asarray(frame).astype(int) - colour).max() <= 8


@given(
    shown=st.lists(st.integers(1, 3), min_size=2, max_size=10).filter(lambda times: 1 in times),
    suffix=st.sampled_from(["webp", "gif"]),
    fps=st.sampled_from([5, 8, 10, 12, 24, 25]),
)
@settings(max_examples=30, deadline=None)
def test_merged_frames_come_back(
    shown: list[int], suffix: str, fps: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """These formats store equal neighbours once; the clip read has them all again."""
    indices = [index for index, times in enumerate(shown) for _ in range(times)]
    path = tmp_path_factory.mktemp("clip") / f"clip.{suffix}"
    write_video(clip_of(indices, fps), path)
    assert numbers(read_video(path, fps=fps)) == indices
    if suffix == "webp" or 100 % fps == 0:  # a GIF counts in hundredths, so a short one cannot say another rate
        own = read_video(path)
        assert numbers(own) == indices
        assert own.fps == fps


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
@pytest.mark.parametrize("size", [(1, 1), (33, 24), (32, 25), (33, 25)])
def test_odd_sizes_are_padded_by_the_edge(suffix: str, size: tuple[int, int], tmp_path: Path) -> None:
    write_video(clip_of([5, 9], width=size[0], height=size[1]), tmp_path / f"a.{suffix}")
    clip = read_video(tmp_path / f"a.{suffix}")
    assert clip.frames[0].size == (size[0] + size[0] % 2, size[1] + size[1] % 2)
    assert np.ptp(np.asarray(clip.frames[1])) <= 6


def test_one_frame(tmp_path: Path) -> None:
    for suffix in FORMATS:
        write_video(clip_of([7], fps=4), tmp_path / f"a.{suffix}")
        clip = read_video(tmp_path / f"a.{suffix}", fps=4)
        assert (numbers(clip), clip.fps) == ([7], 4)
    assert read_video(tmp_path / "a.mp4").fps == 4
    assert not is_video(tmp_path / "a.webp")


@given(st.data())
@settings(max_examples=30)
def test_pixels_give_back_every_byte(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.tuples(*[st.integers(1, 6)] * 3)))
    values = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, (*shape, 3), np.uint8)
    pixels = clip_to_pixels(Clip(tuple(Image.fromarray(frame) for frame in values), 8))
    assert pixels.shape == (shape[0], 3, *shape[1:])
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    clip = pixels_to_clip(pixels, 8)
    assert clip.fps == 8
    np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in clip.frames]), values)


# Times


@pytest.mark.parametrize("duration", [41, 42])
def test_a_third_of_the_frames_is_every_third(duration: int) -> None:
    """24 frames a second in whole milliseconds, as emoji animations come."""
    clip = read_video(animation(range(30), [duration] * 30), fps=8)
    assert numbers(clip) == list(range(0, 30, 3))
    assert clip.fps == 8


def test_a_third_of_a_film_is_every_third(tmp_path: Path) -> None:
    write_video(clip_of(range(24), 24), tmp_path / "a.mp4")
    assert numbers(read_video(tmp_path / "a.mp4", fps=8)) == list(range(0, 24, 3))
    assert numbers(read_video(tmp_path / "a.mp4", fps=24)) == list(range(24))
    assert numbers(read_video(tmp_path / "a.mp4", fps=48)) == [k // 2 for k in range(48)]


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_uneven_durations_are_kept(kind: str) -> None:
    source = animation([3, 5, 9], [500, 100, 200], kind)
    clip = read_video(source)
    assert numbers(clip) == [3] * 5 + [5] + [9] * 2
    assert clip.fps == 10
    assert clip.duration == pytest.approx(0.8)
    assert numbers(read_video(source, fps=5)) == [3, 3, 3, 9]
    assert numbers(read_video(source, fps=20)) == [3] * 10 + [5] * 2 + [9] * 4


def test_uneven_times_of_a_film_are_kept() -> None:
    source = film([1000, 1400, 1440, 1480, 1880, 1920])
    clip = read_video(source)
    assert numbers(clip) == [0] * 10 + [1, 2] + [3] * 10 + [4, 5]
    assert clip.fps == 25
    assert numbers(read_video(source, fps=5)) == [0, 0, 1, 3, 4]


def test_one_odd_frame_does_not_set_the_rate() -> None:
    clip = read_video(animation(range(30), [40] * 20 + [20] + [40] * 9))
    assert numbers(clip) == list(range(30))
    assert clip.duration == pytest.approx(1.18)


@given(
    durations=st.lists(st.integers(11, 400), min_size=1, max_size=8),
    fps=st.floats(0.5, 120),
)
@settings(max_examples=60, deadline=None)
def test_any_rate_shows_what_is_on_show(durations: list[int], fps: float) -> None:
    durations = [*durations, 50]  # at least two frames: a still picture has no duration
    clip = read_video(animation(range(len(durations)), durations), fps=fps)
    shown = numbers(clip)
    total = sum(durations) / 1000
    assert clip.fps == fps
    assert shown[0] == 0
    assert shown == sorted(shown)  # as the frames are
    assert len(shown) == 1 or abs(len(shown) - total * fps) <= 0.5 + 1e-6
    borders = np.cumsum([0, *durations]) / 1000
    for tick, index in enumerate(shown):
        assert borders[index] < (tick + 0.5) / fps + 1e-6  # it starts before the middle of its time
        assert borders[index + 1] > tick / fps - 1e-6  # and ends after that time's start


def test_frames_of_no_duration_last_a_tenth_of_a_second() -> None:
    clip = read_video(animation([1, 2, 3], [0, 0, 0], "GIF"))
    assert (numbers(clip), clip.fps) == ([1, 2, 3], 10)


def test_only_the_first_frames_are_read() -> None:
    source = animation(range(30), [40] * 30)
    assert numbers(read_video(source, max_frames=4)) == [0, 1, 2, 3]
    assert numbers(read_video(source, fps=12.5, max_frames=4)) == [0, 2, 4, 6]
    assert numbers(read_video(source, max_frames=99)) == list(range(30))
    cut = film(range(0, 4000, 40), "webm", "libvpx-vp9")
    cut = cut[: len(cut) * 3 // 4]
    assert "truncated" in message_of(cut)
    assert numbers(read_video(cut, max_frames=4)) == [0, 1, 2, 3]


# Pictures in the frames


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_transparent_frames_show_the_background(kind: str) -> None:
    frames = [Image.new("RGBA", (16, 16)) for _ in range(3)]
    for index, frame in enumerate(frames):
        frame.paste((255, 0, 0, 255), (index * 4, 4, index * 4 + 4, 16))
        frame.putpixel((15, 0), (255, 0, 0, 128))
    content = BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {"disposal": 2 if kind == "GIF" else 1}
    frames[0].save(content, kind, save_all=True, append_images=frames[1:], duration=100, **options)
    clip = read_video(content.getvalue(), background=(0, 0, 255))
    for index, frame in enumerate(clip.frames):
        row = [frame.getpixel((x, 8)) for x in (1, 5, 9, 13)]
        assert row == [(255, 0, 0) if place == index else (0, 0, 255) for place in range(4)]


def test_frames_are_pictures_of_their_own() -> None:
    first, second, *_ = read_video(animation(range(4), [100] * 4)).frames
    first.putpixel((0, 0), (255, 0, 0))
    assert second.getpixel((0, 0)) == (12, 12, 12)


@pytest.mark.parametrize(
    ("matrix", "corner"), [((0, 1, -1, 0), "right"), ((-1, 0, 0, -1), "low"), ((0, -1, 1, 0), "left low")]
)
def test_a_turned_film_is_shown_upright(matrix: tuple[int, ...], corner: str, tmp_path: Path) -> None:
    stored = Image.new("RGB", (32, 16), "black")
    stored.paste("white", (0, 0, 16, 8))  # the top left quarter
    write_video(Clip((stored, stored), 8), tmp_path / "a.mp4")
    fixed = [0x10000 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 0x4000)]
    turned = [0x10000 * value for value in (*matrix[:2], 0, *matrix[2:], 0, 0, 0, 0x4000)]
    source = (tmp_path / "a.mp4").read_bytes()
    header = source.index(b"tkhd")
    place = source.index(struct.pack(">9i", *fixed), header)
    frame = read_video(source[:place] + struct.pack(">9i", *turned) + source[place + 36 :]).frames[0]
    width, height = frame.size
    assert (width, height) == ((32, 16) if corner == "low" else (16, 32))
    at = {"right": (0.75, 0.25), "low": (0.75, 0.75), "left low": (0.25, 0.75)}[corner]
    assert frame.getpixel((int(at[0] * width), int(at[1] * height)))[0] > 200
    assert np.asarray(frame).mean() < 80


def test_a_cover_picture_and_changing_sizes() -> None:
    """The cover of a song is no film."""
    content = BytesIO()
    with av.open(content, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
    assert "sound only" in message_of(content.getvalue())
    assert not is_video(content.getvalue())


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("avi", "mpeg4"),
        ("matroska", "libx264"),
        ("mov", "mpeg4"),
        ("mpegts", "libx264"),
        ("nut", "ffv1"),
    ],
)
def test_other_containers(container: str, codec: str) -> None:
    content = BytesIO()
    with av.open(content, "w", format=container) as output:
        stream = output.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for index in range(8):
            output.mux(stream.encode(av.VideoFrame.from_image(numbered(index))))
        output.mux(stream.encode())
    clip = read_video(content.getvalue())
    assert numbers(clip) == list(range(8))
    assert clip.fps == pytest.approx(8, rel=0.02)


# What is a clip


def test_is_video_goes_by_the_content(tmp_path: Path) -> None:
    pictures = [numbered(index) for index in range(2)]
    pictures[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pictures[1:])
    for name in ("a.png", "a.webp", "a.gif", "a.jpg"):
        pictures[0].save(tmp_path / name)
    (tmp_path / "a.mp4").write_text("no film")
    (tmp_path / "film.txt").write_bytes(film([0, 40]))
    clips = {path.name for path in tmp_path.iterdir() if is_video(path)}
    assert clips == {"film.txt"}
    assert is_video(animation([0, 1], [40, 40], "PNG"))
    assert not is_video(b"RIFF....WEBPVP8 broken")
    with pytest.raises(EmulusError, match="does not exist"):
        is_video(tmp_path / "missing.mp4")


# Bad input


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a clip")
    numbered(0).save(tmp_path / "still.jpg")
    numbered(0).save(tmp_path / "still.png")
    assert "does not exist" in message_of(tmp_path / "missing.mp4")
    assert "folder" in message_of(tmp_path)
    assert "empty" in message_of(tmp_path / "empty.mp4")
    assert "neither an image nor a clip that can be read" in message_of(tmp_path / "text.mp4")
    assert "still image" in message_of(tmp_path / "still.jpg")
    assert "still image" in message_of(tmp_path / "still.png")


def test_playlists_open_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.mkv").write_bytes(film([0, 40]))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/a.mkv\n#EXT-X-ENDLIST\n".encode()
    for source in (playlist, f"ffconcat version 1.0\nfile {tmp_path}/a.mkv\n".encode()):
        assert "neither an image nor a clip that can be read" in message_of(source)
    assert "does not exist" in message_of(f"concat:{tmp_path}/a.mkv")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_truncated_clips(suffix: str, part: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = tuple(Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(12))
    write_video(Clip(frames, 8), tmp_path / f"a.{suffix}")
    source = (tmp_path / f"a.{suffix}").read_bytes()
    assert "truncated" in message_of(source[: int(len(source) * part)])


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_damage_gives_a_clip_or_one_line(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(DAMAGEABLE))
    source = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        source[data.draw(st.integers(0, len(source) - 1))] = data.draw(st.integers(0, 255))
    with one_line_or_nothing():
        clip = read_video(bytes(source), limits=Limits(max_pixels=10**5, max_frames=100))
        assert {frame.mode for frame in clip.frames} == {"RGB"}


DAMAGEABLE = [
    animation(range(4), [40] * 4),
    animation(range(4), [40] * 4, "GIF"),
    animation(range(4), [40] * 4, "PNG"),
    film([0, 40, 80]),
    film([0, 40, 80], "mp4"),
    film([0, 40, 80], "avi", "mpeg4"),
]


@pytest.mark.parametrize("source", DAMAGEABLE, ids=["webp", "gif", "png", "mkv", "mp4", "avi"])
def test_bombs_are_refused(source: bytes) -> None:
    assert "32×24, more than the 767 pixels" in message_of(source, Limits(max_pixels=767))
    assert "2 are allowed" in message_of(source, Limits(max_frames=2))
    assert "0.1 s are allowed" in message_of(source, Limits(max_seconds=0.1))
    assert "pixels allowed together" in message_of(source, Limits(max_clip_pixels=3 * 32 * 24 - 1))
    assert "decoding more than" in message_of(source, Limits(max_decoded_pixels=3 * 32 * 24 - 1))
    assert len(read_video(source, limits=Limits(max_pixels=768, max_frames=5)).frames) in (3, 4)


def test_many_frames_out_of_few_are_refused() -> None:
    source = animation([0, 1], [5000, 5000])
    assert "10 are allowed" in message_of(source, Limits(max_frames=10), fps=1000)
    assert len(read_video(source, fps=1000, max_frames=10, limits=Limits(max_frames=10)).frames) == 10


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1001])
def test_rates_that_are_none(fps: float) -> None:
    with pytest.raises(EmulusError, match="frames per second; give a number"):
        read_video(DAMAGEABLE[0], fps=fps)
    with pytest.raises(EmulusError, match="frames per second; give a number"):
        Clip((numbered(0),), fps)


def test_clips_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match="no frames"):
        Clip((), 8)
    with pytest.raises(EmulusError, match="no frames"):
        pixels_to_clip(torch.zeros(0, 3, 8, 8), 8)
    with pytest.raises(EmulusError, match="several sizes"):
        Clip((numbered(0), numbered(1, 16)), 8)
    with pytest.raises(EmulusError, match="max_frames is 0"):
        read_video(DAMAGEABLE[0], max_frames=0)
    with pytest.raises(EmulusError, match=r"suffix '\.mp3'; did you mean '\.mp4'\?"):
        write_video(clip_of([0]), tmp_path / "a.mp3")
    with pytest.raises(EmulusError, match=r"a\.gif .*at most 50\); choose"):
        write_video(clip_of([0, 1], fps=100), tmp_path / "a.gif")
    assert os.listdir(tmp_path) == []


def test_a_gif_cut_inside_its_second_frames_header_is_refused_in_one_line() -> None:
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "blue", "green")]
    content = BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=120)
    whole = content.getvalue()
    for length in range(13, len(whole)):
        with suppress(EmulusError):
            read_media(whole[:length])
        is_video(whole[:length])
