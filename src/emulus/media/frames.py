"""A file -> its frames, one after the other, each with the time at which it stops being shown.

Frames are decoded as they are asked for and turned into images only if wanted, so what is not needed costs little.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from PIL import Image, ImageFile

from emulus.errors import EmulusError
from emulus.lazy import later
from emulus.media.colour import rgb_profile
from emulus.media.display import Colour, Look, display, look_of, turn_of_matrix
from emulus.media.hdr import HLG, PQ, to_screen
from emulus.media.image import open_picture
from emulus.media.limits import Limits
from emulus.media.source import decoding

if TYPE_CHECKING:
    import av
    import av.sidedata.sidedata
else:
    av = later("av")

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

# Image formats that can be animated. The several images of a TIFF or a JPEG are pages, not frames.
ANIMATED = ("WEBP", "GIF", "PNG", "AVIF")

# Viewers show a frame of no stated duration for a tenth of a second. Browsers do so with all frames of up to 10 ms,
# which old programs wrote for "as fast as possible".
UNTIMED = 0.1
TOO_SHORT = 10
"""Milliseconds."""

# Decoding frames smaller than this in several threads costs more than it saves.
_THREADED_PIXELS = 512 * 512

# The work of a frame, in pixels: a very small one costs what one of this many pixels does. Animated images are
# decoded at half the speed of videos, are seldom large, and a few kilobytes can hold thousands of huge frames.
_LEAST_WORK = 2**14
_ANIMATION_WORK = 8

# What ITU-T H.273 and FFmpeg call these.
_UNKNOWN = 2
_BT709 = 1
_PRIMARIES = {
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # DCI-P3
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
}

# VP8 and VP9 keep alpha in a second stream, which only these decoders look at.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

Timed = tuple[float, Callable[[], Image.Image]]
"""When a frame stops being shown (seconds since the clip's start), and what makes an image of it. The next frame may
overwrite it, so the image is made before that is asked for, or never."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a clip.

    Attributes:
        fps: Frames per second; None for the clip's own.
        max_frames: At most this many, from the start; None for all.
        background: What shows through transparent frames.
        limits: What may be returned and decoded.
    """

    fps: float | None
    max_frames: int | None
    background: Colour
    limits: Limits

    def check_claims(self, name: str, *, frames: int, pixels: int, seconds: float, cost: int = 1) -> None:
        """Check what a file says of itself before anything is decoded; 0 for what it does not say.

        Of a clip whose start is wanted, nothing is known from that, so everything is counted while decoding.
        """
        if self.max_frames is not None:
            return
        self.limits.check_seconds(name, seconds)
        self.limits.check_frames(name, frames if self.fps is None else int(seconds * self.fps))
        self.limits.check_decoded_pixels(name, frames * max(pixels, _LEAST_WORK) * cost)


def timed_frames(file: BinaryIO, name: str, wanted: Wanted) -> Generator[Timed, None, None]:
    """Decode a video or an animated image.

    Raises:
        EmulusError: It is neither, is damaged, or takes more work than is allowed.
    """
    image = open_picture(file, name, wanted.limits)
    if image is not None:
        yield from _animation_frames(image, name, wanted)
        return
    with open_container(file, name) as container:
        yield from _container_frames(container, name, wanted)


def is_animated(image: Image.Image, name: str) -> bool:
    """Say whether an opened image has several frames that are shown one after the other.

    Args:
        image: The image.
        name: Names it in errors.

    Raises:
        EmulusError: It is damaged: Pillow counts a GIF's frames by reading them.
    """
    with decoding(name):
        return image.format in ANIMATED and bool(getattr(image, "is_animated", False))


# Animated images


def _animation_frames(image: ImageFile.ImageFile, name: str, wanted: Wanted) -> Iterator[Timed]:
    if image.format not in ANIMATED or (image.format == "PNG" and not is_animated(image, name)):
        raise EmulusError(f"{name} is a still image, not a clip; read it with read_image")
    limits = wanted.limits
    # Of a GIF, the number of frames is known only at the end.
    with decoding(name):
        stated = None if image.format == "GIF" else int(getattr(image, "n_frames", 1))
    limits.check_size(name, image.width, image.height)
    wanted.check_claims(name, frames=stated or 0, pixels=image.width * image.height, seconds=0, cost=_ANIMATION_WORK)
    # An animated PNG may start with an image for viewers that do not animate.
    first = int(bool(getattr(image, "default_image", False)))
    look: Look | None = None
    end, work = 0.0, 0
    for index in itertools.count(first):
        if index == stated or not _go_to(image, index, name):
            break
        limits.check_size(name, image.width, image.height)
        work += max(image.width * image.height, _LEAST_WORK) * _ANIMATION_WORK
        limits.check_decoded_pixels(name, work)
        with decoding(name):
            image.load()
            look = look or look_of(image, wanted.background)
        duration = image.info.get("duration") or 0
        end += duration / 1000 if duration > TOO_SHORT else UNTIMED
        yield end, partial(_shown, image, look, name, limits)
    if stated is not None and index < stated:
        raise EmulusError(f"{name} is truncated: {index} of {stated} frames; restore it from its source")


def _go_to(image: ImageFile.ImageFile, index: int, name: str) -> bool:
    with decoding(name):
        try:
            image.seek(index)
        except EOFError:
            return False
    return True


def _shown(image: Image.Image, look: Look, name: str, limits: Limits) -> Image.Image:
    with decoding(name):
        return display(image, look, name=name, limits=limits)


# Videos


def open_container(file: BinaryIO, name: str) -> av.container.InputContainer:
    """Open a video; its frames are not decoded yet (raises EmulusError)."""
    open_file = av.open  # fails here where PyAV is not installed
    try:
        return open_file(file, "r", options={"format_whitelist": ",".join(CONTAINERS)}, metadata_errors="replace")
    except Exception as error:
        raise EmulusError(
            f"{name} is neither an image nor a clip that can be read: it is corrupt, truncated or of an unknown "
            "format; convert it to PNG, JPEG, WebP, MP4 or WebM, or restore it from its source"
        ) from error


def video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """Find the film in a container; None where there is only sound."""
    # The cover picture of a song is a video stream as well.
    cover = av.stream.Disposition.attached_pic
    films = (stream for stream in container.streams.video if not stream.disposition & cover)
    return next(films, None)


def _container_frames(container: av.container.InputContainer, name: str, wanted: Wanted) -> Iterator[Timed]:
    stream = video_stream(container)
    if stream is None:
        raise EmulusError(f"{name} holds no film (sound only?); give a file with a video stream")
    limits = wanted.limits
    _check_claims(container, stream, name, wanted)
    interval = float(1 / stream.average_rate) if stream.average_rate else UNTIMED
    look: Look | None = None
    held: Callable[[], Image.Image] | None = None
    start: float | None = None
    begin, duration = 0.0, 0.0
    count, work = 0, 0
    for frame in _decoded(container, stream, name, limits):
        count += 1
        work += max(frame.width * frame.height, _LEAST_WORK)
        limits.check_decoded_pixels(name, work)
        if start is None:
            start = frame.time or 0.0
        elif held is not None:
            # How long a frame is shown is known when the next one comes.
            begin = max(frame.time - start, begin) if frame.time is not None else begin + interval
            yield begin, held
        look = look or _look_of_stream(stream, frame, wanted.background)
        held = partial(_shown_frame, frame, look, name, limits, _has_alpha(frame, container, stream))
        duration = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
    if held is None or start is None:
        return
    end = begin + (duration or (begin / (count - 1) if count > 1 else 0.0) or interval)
    # Some containers count their duration from zero, not from the first frame.
    _check_whole(container, stream, end + max(start, 0.0), end / count, name)
    yield end, held


def _check_claims(container: av.container.InputContainer, stream: av.VideoStream, name: str, wanted: Wanted) -> None:
    """Check what the file says of itself, before anything is decoded."""
    codec = stream.codec_context
    if codec is None:
        raise EmulusError(f"{name} is in a coding that cannot be decoded here; convert it to MP4 (H.264) or WebM")
    wanted.limits.check_size(name, codec.width, codec.height)
    seconds = _stated_seconds(container, stream) or 0.0
    wanted.check_claims(name, frames=stream.frames, pixels=codec.width * codec.height, seconds=seconds)
    _prepare(codec, codec.width * codec.height, wanted.limits)


def _prepare(codec: Any, pixels: int, limits: Limits) -> None:
    # The decoder itself refuses frames that turn out larger. It counts whole blocks, hence the margin.
    codec.options = {"max_pixels": str(2 * limits.max_pixels + 2**16)}
    codec.thread_type = "AUTO" if pixels > _THREADED_PIXELS else "NONE"


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
    decode = _alpha_decoder(stream, limits)
    packets = container.demux(stream)
    while True:
        with decoding(name):
            packet = next(packets, None)
            if packet is None:
                return
            if packet.is_corrupt:
                raise ValueError("a packet is incomplete")
            frames = packet.decode() if decode is None else decode(packet)
        for frame in frames:
            limits.check_size(name, frame.width, frame.height)
            yield frame


def _alpha_decoder(stream: av.VideoStream, limits: Limits) -> Callable[[Any], list[av.VideoFrame]] | None:
    """The decoder that sees a WebM's alpha; None for films without it, and where FFmpeg was built without that."""
    kind = _ALPHA_DECODERS.get(stream.codec_context.name)
    if kind is None or stream.metadata.get("alpha_mode") != "1":
        return None
    try:
        codec = av.CodecContext.create(kind, "r")
    except Exception:
        return None
    _prepare(codec, 0, limits)
    return cast(Any, codec).decode


def _look_of_stream(stream: av.VideoStream, frame: av.VideoFrame, background: Colour) -> Look:
    """How a film is to be shown, by its container and its first frame."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    look = Look(background=background, pixel_aspect=float(aspect) if aspect else 1.0)
    # PyAV refuses to list the side data of a frame where one is of a kind that it does not know.
    try:
        side_data: Any = frame.side_data
        found = {data.type: bytes(data) for data in side_data}
    except ValueError:
        return replace(look, turn=_TURNS.get(frame.rotation % 360))
    kinds = av.sidedata.sidedata.Type
    matrix, profile = found.get(kinds.DISPLAYMATRIX, b""), found.get(kinds.ICC_PROFILE)
    turn = turn_of_matrix(struct.unpack("=9i", matrix[:36])) if len(matrix) >= 36 else None
    return replace(look, turn=turn, profile=profile)


_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def _has_alpha(frame: av.VideoFrame, container: av.container.InputContainer, stream: av.VideoStream) -> bool:
    layout = frame.format
    if not (layout.has_palette or any(component.is_alpha for component in layout.components)):
        return False
    # The fourth byte of uncompressed AVI (a Windows bitmap) is unused, and 0 in most files.
    return not (container.format.name == "avi" and stream.codec_context.name == "rawvideo")


def _shown_frame(frame: av.VideoFrame, look: Look, name: str, limits: Limits, alpha: bool) -> Image.Image:
    with decoding(name):
        if not frame.format.is_rgb and frame.colorspace == _UNKNOWN and (frame.width >= 1280 or frame.height > 576):
            # Players take large films that do not say it for BT.709, small ones for BT.601.
            frame.colorspace = _BT709
        if frame.color_trc in (PQ, HLG) and not alpha:
            image = Image.fromarray(to_screen(frame.to_ndarray(format="rgb48le"), frame.color_trc))
        else:
            image = Image.fromarray(np.ascontiguousarray(frame.to_ndarray(format="rgba" if alpha else "rgb24")))
            primaries = None if look.profile else _PRIMARIES.get(frame.color_primaries)
            look = look if primaries is None else replace(look, profile=rgb_profile(primaries))
        return display(image, look, name=name, limits=limits)
