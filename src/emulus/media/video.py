"""Clips: files to frames to pixels, and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import torch
from av.stream import Disposition
from jaxtyping import Float
from PIL import Image, ImageFile
from torch import Tensor

from emulus.errors import EmulusError
from emulus.media.image import (
    WHITE,
    WRITABLE,
    Colour,
    as_rgb,
    by_suffix,
    bytes_to_pixels,
    finish,
    open_picture,
    pixels_to_bytes,
    to_rgb,
    write_content,
)
from emulus.media.limits import LIMITS, Limits
from emulus.media.resize import resize
from emulus.media.source import ImageSource, decoding, encoding, given_image, name_of, opened

# Containers of one file. Playlists are left out, since they make the reader open other files and addresses.
CONTAINERS = (
    "mov",
    "mp4",
    "matroska",
    "webm",
    "avi",
    "flv",
    "mpegts",
    "mpeg",
    "ogg",
    "asf",
    "ivf",
    "mxf",
    "nut",
    "yuv4mpegpipe",
)

# Picture formats that can be animated. The several pictures of a TIFF or a JPEG are pages, not frames.
ANIMATED = ("WEBP", "GIF", "PNG", "AVIF")

# Viewers show a frame of no stated duration for a tenth of a second.
UNTIMED = 0.1

# A clip read at its own rate is not given more frames a second than this to render uneven durations.
MAX_OWN_FPS = 60

# How the writer turns RGB into brightness and colour; the numbers are ITU-T H.273's (and FFmpeg's).
BT601 = 6
LIMITED_RANGE = 1

# Decoding frames smaller than this in several threads costs more than it saves.
THREADED_PIXELS = 512 * 512

_TURN = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}

# One decoded frame: when it stops being shown (seconds since the clip's start), and what makes a picture of
# it. The next frame may overwrite it, so the picture is made before that is asked for, or never.
_Timed = tuple[float, Callable[[], Image.Image]]


@dataclass(frozen=True)
class Clip:
    """Frames shown one after the other, each for 1 / ``fps`` seconds.

    Attributes:
        frames: At least one RGB picture; all of one size. A picture shown for long stands in several places.
        fps: Frames per second.

    Raises:
        EmulusError: No frames, several sizes, or a rate that is not a positive number.
    """

    frames: tuple[Image.Image, ...]
    fps: float

    def __post_init__(self) -> None:
        if not self.frames:
            raise EmulusError("a clip of no frames; give at least one")
        sizes = sorted({frame.size for frame in self.frames})
        if len(sizes) > 1:
            raise EmulusError(f"the frames of a clip have several sizes ({sizes[0]}, {sizes[1]}); resize them to one")
        _check_fps(self.fps)

    @property
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last."""
        return len(self.frames) / self.fps


MediaSource = ImageSource | Clip
"""Everything that can be given where an image or a clip is wanted."""


def is_video(source: MediaSource) -> bool:
    """Say whether a file is a clip: a film, or an animated WebP, GIF, PNG or AVIF of more than one frame.

    Goes by the content, not the name; reads headers only.

    Raises:
        EmulusError: The file is missing, empty, a folder or may not be read.
    """
    if isinstance(source, Clip):
        return True
    if given_image(source) is not None:
        return False
    name = name_of(source)
    with opened(source) as file:
        try:
            picture = open_picture(file, name)
            if picture is not None:
                with decoding(name):
                    return picture.format in ANIMATED and bool(getattr(picture, "is_animated", False))
            with _open_container(file, name) as container:
                return _video_stream(container) is not None
        except EmulusError:
            return False


def read_media(
    source: MediaSource,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    background: Colour = WHITE,
    limits: Limits = LIMITS,
) -> Image.Image | Clip:
    """Read whichever it is: an image as RGB, or a clip.

    Args:
        source: What :func:`read_image` or :func:`read_video` takes, or a clip, which is brought to ``fps`` and
            ``max_frames``.
        fps: As for :func:`read_video`.
        max_frames: As for :func:`read_video`.
        background: As for :func:`read_video`.
        limits: As for :func:`read_video`.

    Raises:
        EmulusError: It is neither, or is damaged or too large.
    """
    if isinstance(source, Clip):
        return read_video(source, fps=fps, max_frames=max_frames, limits=limits)
    image = given_image(source)
    if image is not None:
        return finish(image, name_of(source), background, limits)
    name = name_of(source)
    with opened(source) as file:
        picture = open_picture(file, name)
        if picture is not None and not (picture.format in ANIMATED and getattr(picture, "is_animated", False)):
            return finish(picture, name, background, limits)
        file.seek(0)
        return _read_clip(file, name, fps=fps, max_frames=max_frames, background=background, limits=limits)


def read_video(
    source: MediaSource,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    background: Colour = WHITE,
    limits: Limits = LIMITS,
) -> Clip:
    """Read a clip from a film (MP4, WebM, AVI ...) or an animated picture (WebP, GIF, PNG, AVIF).

    Frames keep the times at which they are shown, also where these are uneven. With ``fps``, frame k of the
    result is the one shown at k / fps seconds (or about to be: within half of the old and of the new frame's
    duration). Without it, the rate is the clip's own, and a frame that is shown for longer than the shortest
    ones stands several times.

    Args:
        source: A path, a file's content, an open binary file, or a clip, which is brought to the rate.
        fps: Frames per second wanted; None for the clip's own.
        max_frames: Keep at most this many frames, from the start; the rest is not decoded.
        background: What shows through transparent frames, red, green, blue in 0 to 255.
        limits: What the file claims is checked against these before decoding, what it holds while decoding.

    Returns:
        RGB frames, turned upright and all of the first one's size.

    Raises:
        EmulusError: The file is missing, empty, no clip, corrupt, truncated, or beyond the limits.
    """
    if isinstance(source, Clip):
        return resample(source, source.fps if fps is None else fps, max_frames=max_frames, limits=limits)
    name = name_of(source)
    if given_image(source) is not None:
        raise EmulusError(f"{name} is a still image, not a clip; read it with read_image")
    with opened(source) as file:
        return _read_clip(file, name, fps=fps, max_frames=max_frames, background=background, limits=limits)


def _read_clip(
    file: BinaryIO, name: str, *, fps: float | None, max_frames: int | None, background: Colour, limits: Limits
) -> Clip:
    if fps is not None:
        _check_fps(fps)
    if max_frames is not None and max_frames < 1:
        raise EmulusError(f"max_frames is {max_frames}; ask for at least 1")
    kept = _Kept(name, limits, max_frames)
    with closing(_timed_frames(file, name, background, limits)) as decoded:
        frames = _counted(decoded, name, limits)
        rate = _at_own_rate(frames, kept) if fps is None else _at_rate(frames, fps, kept)
    return Clip(tuple(kept.frames), rate)


def write_video(clip: Clip, path: str | Path) -> None:
    """Write a clip atomically, in the format of its suffix.

    ``.mp4`` (H.264) and ``.webm`` (VP9) hold colour at half resolution (4:2:0) and so need even sides: an odd
    side is padded by one pixel, a copy of the right or bottom edge. ``.webp`` is lossy at high quality;
    ``.gif`` has 256 colours a frame. These two merge equal neighbouring frames into one that is shown for
    longer, and a clip of a single frame is a still picture in them, without a rate.

    Args:
        clip: What to write.
        path: Ends in ``.mp4``, ``.webm``, ``.webp`` or ``.gif``.

    Raises:
        EmulusError: Another suffix, a size or rate that the format cannot hold, or the disk refuses.
    """
    path = Path(path)
    encode = by_suffix(path, WRITERS)
    with encoding(path):
        content = encode(clip)
    write_content(path, content)


def resample(clip: Clip, fps: float, *, max_frames: int | None = None, limits: Limits = LIMITS) -> Clip:
    """A clip at another frame rate: at each new moment the frame that is on show.

    Args:
        clip: What to bring to the rate; assumed to be evenly timed.
        fps: Frames per second.
        max_frames: Keep at most this many frames, from the start.
        limits: A slow clip at a high rate is many frames.

    Raises:
        EmulusError: The rate is out of range, or there would be too many frames.
    """
    _check_fps(fps)
    if fps == clip.fps:
        return clip if max_frames is None else Clip(clip.frames[:max_frames], fps)
    count = max(round(clip.duration * fps), 1)
    count = count if max_frames is None else min(count, max_frames)
    limits.check_frames(f"a clip of {len(clip.frames)} frames at {clip.fps:g} per second, brought to {fps:g},", count)
    # The slack keeps rounding from showing the frame before.
    places = (min(int(place * clip.fps / fps + 1e-6), len(clip.frames) - 1) for place in range(count))
    return Clip(tuple(clip.frames[place] for place in places), fps)


def check_writable(path: str | Path, *, clip: bool) -> None:
    """Find out by its suffix whether a picture (or a clip) can be written to a path.

    Raises:
        EmulusError: The suffix is not known, or is of the other kind.
    """
    known: dict[str, object] = {**(WRITERS if clip else WRITABLE)}
    by_suffix(Path(path), known)


def clip_to_pixels(clip: Clip) -> Float[Tensor, "frames 3 height width"]:
    """Turn a clip into float32 pixels in [-1, 1]; :func:`pixels_to_clip` gives it back exactly."""
    return bytes_to_pixels(torch.from_numpy(np.stack([np.asarray(as_rgb(frame)) for frame in clip.frames])))


def pixels_to_clip(pixels: Float[Tensor, "frames 3 height width"], fps: float) -> Clip:
    """Turn pixels in [-1, 1], on any device, into a clip; what lies outside is clipped."""
    return Clip(tuple(Image.fromarray(frame) for frame in pixels_to_bytes(pixels).numpy()), fps)


# Which frames are kept, and how often


class _Kept:
    """The frames of the clip to be, of one size and within the limits."""

    def __init__(self, name: str, limits: Limits, max_frames: int | None) -> None:
        self.frames: list[Image.Image] = []
        self._name = name
        self._limits = limits
        self._most = math.inf if max_frames is None else max_frames
        self._pixels = 0

    @property
    def full(self) -> bool:
        return len(self.frames) >= self._most

    def add(self, picture: Callable[[], Image.Image], times: int) -> None:
        times = int(min(times, self._most - len(self.frames)))
        if times <= 0:
            return
        self._limits.check_frames(self._name, len(self.frames) + times)
        image = picture()
        if self.frames:
            image = resize(image, self.frames[0].height, self.frames[0].width)
        self._pixels += image.width * image.height
        self._limits.check_clip_pixels(self._name, self._pixels)
        self.frames += [image] * times

    def repeat(self, times: list[int]) -> None:
        self._limits.check_frames(self._name, int(min(sum(times), self._most)))
        repeated = itertools.chain.from_iterable(map(itertools.repeat, self.frames, times))
        self.frames = list(itertools.islice(repeated, None if self._most == math.inf else int(self._most)))


def _at_rate(frames: Iterable[_Timed], fps: float, kept: _Kept) -> float:
    """Keep the frame on show at every k / fps seconds; returns ``fps``."""
    end = 0.0
    for stop, picture in frames:
        # Most files round durations to milliseconds, so borders of frames waver around the ticks, k / fps.
        # A frame that ends within half its duration after a tick leaves the tick to its successor, but within
        # no more than half a tick, so that a frame shown for long is not cut short.
        slack = min((stop - end) * fps, 1) / 2
        kept.add(picture, math.floor(stop * fps - slack + 1e-9) + 1 - len(kept.frames))
        end = stop
        if kept.full:
            return fps
    del kept.frames[max(1, math.ceil(end * fps - 0.5)) :]
    return fps


def _at_own_rate(frames: Iterable[_Timed], kept: _Kept) -> float:
    """Keep all frames, those shown for long several times; returns the frames per second."""
    durations: list[float] = []
    end = 0.0
    for stop, picture in frames:
        kept.add(picture, 1)
        durations.append(stop - end)
        end = stop
        if kept.full:
            break
    # Not the very shortest, since one odd frame among hundreds would set the rate.
    unit = max(sorted(durations)[len(durations) // 20], 1 / MAX_OWN_FPS)
    times = [max(1, round(duration / unit)) for duration in durations]
    kept.repeat(times)
    rate, whole = sum(times) / end, round(sum(times) / end)
    # Files round times, to as much as hundredths of a second: a whole rate that fits the duration was meant.
    return float(whole) if whole and abs(sum(times) / whole - end) <= 0.0051 else rate


# Decoding: files to timed frames


def _timed_frames(file: BinaryIO, name: str, background: Colour, limits: Limits) -> Generator[_Timed, None, None]:
    picture = open_picture(file, name)
    if picture is not None:
        yield from _animation_frames(picture, name, background, limits)
        return
    with _open_container(file, name) as container:
        yield from _container_frames(container, name, limits)


def _counted(frames: Iterator[_Timed], name: str, limits: Limits) -> Iterator[_Timed]:
    """Stop at the limits, as a file need not tell the truth of itself; leave out frames of no duration."""
    end = 0.0
    for count, (stop, picture) in enumerate(frames, 1):
        limits.check_frames(name, count)
        limits.check_seconds(name, stop)
        if stop > end:
            yield stop, picture
            end = stop
    if end == 0:
        raise EmulusError(f"{name} is corrupt or truncated (no frame can be decoded); restore it from its source")


def _animation_frames(image: ImageFile.ImageFile, name: str, background: Colour, limits: Limits) -> Iterator[_Timed]:
    if image.format not in ANIMATED or (image.format == "PNG" and not getattr(image, "is_animated", False)):
        raise EmulusError(f"{name} is a still image, not a clip; read it with read_image")
    # Of a GIF, the number of frames is known only at the end.
    stated = None if image.format == "GIF" else int(getattr(image, "n_frames", 1))
    limits.check_size(name, image.width, image.height)
    if stated is not None:
        limits.check_frames(name, stated)
        limits.check_decoded_pixels(name, stated * image.width * image.height)
    # An animated PNG may start with a picture for viewers that do not animate.
    first = int(bool(getattr(image, "default_image", False)))
    end, pixels = 0.0, 0
    for index in itertools.count(first):
        if index == stated or not _go_to(image, index, name):
            break
        limits.check_size(name, image.width, image.height)
        pixels += image.width * image.height
        limits.check_decoded_pixels(name, pixels)
        with decoding(name):
            image.load()
        end += (image.info.get("duration") or UNTIMED * 1000) / 1000
        yield end, partial(_picture, image, name, background)
    if stated is not None and index < stated:
        raise EmulusError(f"{name} is truncated: {index} of {stated} frames; restore it from its source")


def _go_to(image: ImageFile.ImageFile, index: int, name: str) -> bool:
    with decoding(name):
        try:
            image.seek(index)
        except EOFError:
            return False
    return True


def _picture(image: Image.Image, name: str, background: Colour) -> Image.Image:
    with decoding(name):
        return to_rgb(image, background)


def _open_container(file: BinaryIO, name: str) -> av.container.InputContainer:
    try:
        return av.open(file, "r", options={"format_whitelist": ",".join(CONTAINERS)}, metadata_errors="replace")
    except Exception as error:
        raise EmulusError(
            f"{name} is neither a picture nor a clip that can be read: it is corrupt, truncated or of an unknown "
            "format; convert it to PNG, JPEG, WebP, MP4 or WebM, or restore it from its source"
        ) from error


def _video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    # The cover picture of a song is a video stream as well.
    films = (stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic)
    return next(films, None)


def _container_frames(container: av.container.InputContainer, name: str, limits: Limits) -> Iterator[_Timed]:
    stream = _video_stream(container)
    if stream is None:
        raise EmulusError(f"{name} holds no film (sound only?); give a file with a video stream")
    _check_claims(container, stream, name, limits)
    interval = float(1 / stream.average_rate) if stream.average_rate else UNTIMED
    held: Callable[[], Image.Image] | None = None
    start: float | None = None
    begin, duration = 0.0, 0.0
    count, pixels = 0, 0
    for frame in _decoded(container, stream, name, limits):
        count += 1
        pixels += frame.width * frame.height
        limits.check_decoded_pixels(name, pixels)
        if start is None:
            start = frame.time or 0.0
        elif held is not None:
            # How long a frame is shown is known when the next one comes.
            begin = max(frame.time - start, begin) if frame.time is not None else begin + interval
            yield begin, held
        held = partial(_upright, frame, name)
        duration = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
    if held is None or start is None:
        return
    end = begin + (duration or (begin / (count - 1) if count > 1 else 0.0) or interval)
    # Some containers count their duration from zero, not from the first frame.
    _check_whole(container, stream, end + max(start, 0.0), end / count, name)
    yield end, held


def _check_claims(container: av.container.InputContainer, stream: av.VideoStream, name: str, limits: Limits) -> None:
    """Check what the file says of itself, before anything is decoded."""
    codec = stream.codec_context
    if codec is None:
        raise EmulusError(f"{name} is in a coding that cannot be decoded here; convert it to MP4 (H.264) or WebM")
    limits.check_size(name, codec.width, codec.height)
    limits.check_frames(name, stream.frames)
    limits.check_decoded_pixels(name, stream.frames * codec.width * codec.height)
    limits.check_seconds(name, _stated_seconds(container, stream) or 0.0)
    # The decoder itself refuses frames that turn out larger. It counts whole blocks, hence the margin.
    codec.options = {"max_pixels": str(2 * limits.max_pixels + 2**16)}
    codec.thread_type = "AUTO" if codec.width * codec.height > THREADED_PIXELS else "NONE"


def _stated_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    # The file's duration may be its sound's.
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


def _check_whole(
    container: av.container.InputContainer, stream: av.VideoStream, end: float, interval: float, name: str
) -> None:
    """Refuse a film that stops well before its stated end: demuxers take a cut for the end without a word."""
    stated = _stated_seconds(container, stream)
    if stated is not None and stated - end > max(1.5 * interval, 0.05 * stated):
        raise EmulusError(
            f"{name} is truncated: {end:.1f} of {stated:.1f} s can be decoded; restore it from its source"
        )


def _decoded(
    container: av.container.InputContainer, stream: av.VideoStream, name: str, limits: Limits
) -> Iterator[av.VideoFrame]:
    packets = container.demux(stream)
    while True:
        with decoding(name):
            packet = next(packets, None)
            if packet is None:
                return
            if packet.is_corrupt:
                raise ValueError("a packet is incomplete")
            frames = packet.decode()
        for frame in frames:
            limits.check_size(name, frame.width, frame.height)
            yield frame


def _upright(frame: av.VideoFrame, name: str) -> Image.Image:
    with decoding(name):
        image: Image.Image = frame.to_image()
        turn = _TURN.get(frame.rotation % 360)
        return image if turn is None else image.transpose(turn)


# Encoding


def _encode_film(clip: Clip, *, container: str, codec: str, options: dict[str, str]) -> BytesIO:
    content = BytesIO()
    width, height = clip.frames[0].size
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    # Rates like 24000/1001 have such denominators.
    rate = Fraction(clip.fps).limit_denominator(1001)
    with av.open(content, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        # Said in the file, since players guess otherwise for large pictures.
        stream.codec_context.colorspace, stream.codec_context.color_range = BT601, LIMITED_RANGE
        stream.width, stream.height, stream.pix_fmt = width + width % 2, height + height % 2, "yuv420p"
        for index, image in enumerate(clip.frames):
            frame = av.VideoFrame.from_ndarray(np.pad(np.asarray(as_rgb(image)), padding, "edge"), "rgb24")
            frame.pts, frame.time_base = index, 1 / rate
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return content


def _encode_animation(clip: Clip, *, kind: str, tick: int, options: dict[str, Any]) -> BytesIO:
    content = BytesIO()
    # The times are rounded, not the durations, so that the whole lasts as long as it should.
    ticks = [round(index * 1000 / clip.fps / tick) for index in range(len(clip.frames) + 1)]
    durations = [(after - before) * tick for before, after in itertools.pairwise(ticks)]
    shortest = 2 * tick if kind == "GIF" else tick
    if min(durations) < shortest:
        fastest = 1000 // shortest
        raise ValueError(f"{clip.fps:g} frames per second, and the format shows at most {fastest}")
    first, *rest = (as_rgb(image) for image in clip.frames)
    first.save(content, kind, save_all=True, append_images=rest, duration=durations, loop=0, **options)
    return content


WRITERS: dict[str, Callable[[Clip], BytesIO]] = {
    ".mp4": partial(_encode_film, container="mp4", codec="libx264", options={"crf": "16", "preset": "medium"}),
    ".webm": partial(
        _encode_film,
        container="webm",
        codec="libvpx-vp9",
        options={"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"},
    ),
    ".webp": partial(_encode_animation, kind="WEBP", tick=1, options={"lossless": False, "quality": 90, "method": 4}),
    ".gif": partial(_encode_animation, kind="GIF", tick=10, options={"optimize": False}),
}


def _check_fps(fps: float) -> None:
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise EmulusError(f"a rate of {fps} frames per second; give a number above 0, at most 1000")
