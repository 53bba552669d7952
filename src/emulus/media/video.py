"""Clips: reading files at the rate that is wanted, and writing them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from fractions import Fraction
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image

from emulus.errors import EmulusError
from emulus.lazy import later
from emulus.media.clip import Clip, check_fps, resample
from emulus.media.display import WHITE, Colour
from emulus.media.frames import TOO_SHORT, Timed, Wanted, is_animated, open_container, timed_frames, video_stream
from emulus.media.image import WRITABLE, as_rgb, by_suffix, finish, open_picture, write_content
from emulus.media.limits import LIMITS, Limits
from emulus.media.resize import resize
from emulus.media.source import ImageSource, encoding, given_image, name_of, opened

if TYPE_CHECKING:
    import av
else:
    av = later("av")

# A clip read at its own rate is not given more frames a second than this to render uneven durations.
MAX_OWN_FPS = 60

# How the writer turns RGB into brightness and colour; the numbers are ITU-T H.273's (and FFmpeg's).
BT601 = 6
LIMITED_RANGE = 1

MediaSource = ImageSource | Clip
"""Everything that can be given where an image or a clip is wanted."""


Transform = Callable[[Image.Image], Image.Image]
"""What is done to each frame as soon as it is decoded, such as making it smaller."""


def is_video(source: MediaSource) -> bool:
    """Say whether a file is a clip: a film, or an animated WebP, GIF, PNG or AVIF of more than one frame.

    Goes by the content, not the name; reads headers only.

    Raises:
        EmulusError: The file is missing, empty, a folder or may not be read, or is not media.
    """
    if isinstance(source, Clip):
        return True
    if given_image(source) is not None:
        return False
    name = name_of(source)
    with opened(source) as file:
        try:
            image = open_picture(file, name)
            if image is not None:
                return is_animated(image, name)
            with open_container(file, name) as container:
                return video_stream(container) is not None
        except EmulusError:
            return False


def read_media(
    source: MediaSource,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    background: Colour = WHITE,
    limits: Limits = LIMITS,
    transform: Transform | None = None,
) -> Image.Image | Clip:
    """Read whichever it is: an image as RGB, or a clip.

    Args:
        source: What :func:`read_image` or :func:`read_video` takes.
        fps: As for :func:`read_video`.
        max_frames: As for :func:`read_video`.
        background: As for :func:`read_video`.
        limits: As for :func:`read_video`.
        transform: As for :func:`read_video`; done to an image, too.

    Returns:
        What :func:`read_image` or :func:`read_video` returns.

    Raises:
        EmulusError: It is neither, or is damaged or too large.
    """
    name = name_of(source)
    given = None if isinstance(source, Clip) else given_image(source)
    if isinstance(source, Clip):
        return read_video(source, fps=fps, max_frames=max_frames, limits=limits, transform=transform)
    if given is not None:
        return _transformed(finish(given, name, background, limits), transform)
    wanted = Wanted(fps=fps, max_frames=max_frames, background=background, limits=limits)
    with opened(source) as file:
        image = open_picture(file, name, limits)
        if image is None or is_animated(image, name):
            file.seek(0)
            return _read_clip(file, name, wanted, transform)
        return _transformed(finish(image, name, background, limits), transform)


def read_video(
    source: MediaSource,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    background: Colour = WHITE,
    limits: Limits = LIMITS,
    transform: Transform | None = None,
) -> Clip:
    """Read a clip from a film (MP4, WebM, AVI ...) or an animated image (WebP, GIF, PNG, AVIF), as a viewer shows it.

    Frames keep the times at which they are shown, also where these are uneven. With ``fps``, frame k of the
    result is the one shown at k / fps seconds (or about to be: within half of the old and of the new frame's
    duration). Without it, the rate is the clip's own, and a frame that is shown for longer than the shortest
    ones stands several times. As in browsers, frames of an animated image that state 10 ms or less are shown for
    100 ms.

    Frames are upright sRGB with square pixels: rotated and mirrored by the display matrix or EXIF, scaled by the
    sample aspect ratio (the shorter side is lengthened), on ``background`` where the codec has alpha. High bit
    depths are scaled to 8, HDR is brought to the range of a screen, and films that do not state their colour matrix
    count as BT.709 from 1280 pixels of width or 577 of height on, as BT.601 below. Premultiplied alpha, which no
    common file has, is not told from straight alpha.

    Args:
        source: A path, a file's content, an open binary file, or a clip, which is brought to the rate.
        fps: Frames per second wanted; None for the clip's own.
        max_frames: Keep at most this many frames, from the start; the rest is not decoded, however long it is.
        background: What shows through transparent frames, red, green, blue in 0 to 255.
        limits: What is returned, and the work of decoding it, is checked against these: before decoding by what the
            file says of itself, and while decoding.
        transform: Done to each frame as it is decoded, so that only its results are held in memory, for instance a
            scaling. All its results must have one size.

    Returns:
        RGB frames, all of one size.

    Raises:
        EmulusError: The file is missing, empty, no clip, corrupt, truncated, or beyond the limits.
    """
    if isinstance(source, Clip):
        clip = resample(source, source.fps if fps is None else fps, max_frames=max_frames, limits=limits)
        return clip if transform is None else Clip(tuple(map(transform, clip.frames)), clip.fps)
    name = name_of(source)
    if given_image(source) is not None:
        raise EmulusError(f"{name} is a still image, not a clip; read it with read_image")
    wanted = Wanted(fps=fps, max_frames=max_frames, background=background, limits=limits)
    with opened(source) as file:
        return _read_clip(file, name, wanted, transform)


def _read_clip(file: BinaryIO, name: str, wanted: Wanted, transform: Transform | None) -> Clip:
    if wanted.fps is not None:
        check_fps(wanted.fps)
    if wanted.max_frames is not None and wanted.max_frames < 1:
        raise EmulusError(f"max_frames is {wanted.max_frames}; ask for at least 1")
    kept = _Kept(name, wanted, transform)
    with closing(timed_frames(file, name, wanted)) as decoded:
        frames = _lasting(decoded, name)
        rate = _at_own_rate(frames, kept) if wanted.fps is None else _at_rate(frames, wanted.fps, kept)
    return Clip(tuple(kept.frames), rate)


def _transformed(image: Image.Image, transform: Transform | None) -> Image.Image:
    return image if transform is None else transform(image)


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


def check_writable(path: str | Path, *, clip: bool) -> None:
    """Find out by its suffix whether a picture (or a clip) can be written to a path.

    Raises:
        EmulusError: The suffix is not known, or is of the other kind.
    """
    known: dict[str, object] = {**(WRITERS if clip else WRITABLE)}
    by_suffix(Path(path), known)


# Which frames are kept, and how often


class _Kept:
    """The frames of the clip to be, of one size and within the limits."""

    def __init__(self, name: str, wanted: Wanted, transform: Transform | None) -> None:
        self.frames: list[Image.Image] = []
        self._name = name
        self._limits = wanted.limits
        self._most = math.inf if wanted.max_frames is None else wanted.max_frames
        self._transform = transform
        self._size: tuple[int, int] | None = None
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
        self._size = self._size or image.size
        image = _transformed(resize(image, self._size[1], self._size[0]), self._transform)
        self._pixels += image.width * image.height
        self._limits.check_clip_pixels(self._name, self._pixels)
        self.frames += [image] * times

    def repeat(self, times: list[int]) -> None:
        self._limits.check_frames(self._name, int(min(sum(times), self._most)))
        repeated = itertools.chain.from_iterable(map(itertools.repeat, self.frames, times))
        self.frames = list(itertools.islice(repeated, None if self._most == math.inf else int(self._most)))

    def check_seconds(self, seconds: float, fps: float | None = None) -> None:
        """Refuse a clip that lasts too long; of a longer one, what is not wanted of it does not count."""
        if self._most < math.inf:
            if fps is None:
                return
            seconds = min(seconds, self._most / fps)
        self._limits.check_seconds(self._name, seconds)


def _lasting(frames: Iterator[Timed], name: str) -> Iterator[Timed]:
    """Leave out frames of no duration."""
    end = 0.0
    for stop, picture in frames:
        # Written so that a time that is not a number is left out as well.
        if stop > end:
            yield stop, picture
            end = stop
    if end == 0:
        raise EmulusError(f"{name} is corrupt or truncated (no frame can be decoded); restore it from its source")


def _at_rate(frames: Iterable[Timed], fps: float, kept: _Kept) -> float:
    """Keep the frame on show at every k / fps seconds; returns ``fps``."""
    end = 0.0
    for stop, picture in frames:
        kept.check_seconds(stop, fps)
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


def _at_own_rate(frames: Iterable[Timed], kept: _Kept) -> float:
    """Keep all frames, those shown for long several times; returns the frames per second."""
    durations: list[float] = []
    end = 0.0
    for stop, picture in frames:
        kept.check_seconds(stop)
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
    rate = float(whole) if whole and abs(sum(times) / whole - end) <= 0.0051 else rate
    kept.check_seconds(len(kept.frames) / rate, rate)
    return rate


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
    # Viewers show shorter ones for much longer.
    shortest = (TOO_SHORT // tick + 1) * tick
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
