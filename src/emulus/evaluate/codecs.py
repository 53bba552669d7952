"""How well WebP, JPEG and VP9 do with as many bits as the vision tokenizer's codes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from emulus.lazy import later
from emulus.media import image_to_pixels, read_image, resize
from emulus.tokenizer.vision.metrics import psnr, ssim

if TYPE_CHECKING:
    import av
else:
    av = later("av")

Codec = Literal["WebP", "JPEG"]
ClipCodec = Literal["WebP", "JPEG", "VP9"]

SHRINKS = (1, 2, 4, 8)
"""The picture may be stored at a part of its size and scaled up again: at few bits that is better."""
FILM_SHRINKS = (1, 2)
"""VP9 is the slowest and needs it least."""

_OPTIONS: dict[Codec, tuple[dict[str, Any], ...]] = {
    "WebP": ({"method": 6},),
    "JPEG": ({"optimize": True, "subsampling": "4:2:0"}, {"optimize": True, "subsampling": "4:4:4"}),
}
_QUALITIES: dict[Codec, tuple[int, int]] = {"WebP": (0, 100), "JPEG": (1, 95)}
_TICK = 100
"""Milliseconds of a frame in the animations."""
_VP9 = {"b": "0", "deadline": "good", "cpu-used": "2", "lag-in-frames": "16", "auto-alt-ref": "0"}
_VP9_COARSEST = 63
_LENGTH_BYTES = 3


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A picture or clip through a codec.

    Attributes:
        size: Of the file in bytes.
        fits: Whether that is within the budget.
        psnr: In dB; a clip's is the mean over its frames.
        ssim: At most 1, likewise.
        frames: What the file shows, at the original's own size; one for a picture.
    """

    size: int
    fits: bool
    psnr: float
    ssim: float
    frames: tuple[PIL.Image.Image, ...]

    @property
    def image(self) -> PIL.Image.Image:
        """What the file shows first."""
        return self.frames[0]


@dataclass(frozen=True, kw_only=True)
class _Way:
    """One way to store frames.

    Attributes:
        store: quality, the higher the better, -> file.
        qualities: The lowest and the highest.
        show: file -> frames, at any size.
    """

    store: Callable[[int], bytes]
    qualities: tuple[int, int]
    show: Callable[[bytes], Sequence[PIL.Image.Image]]


def best_within(image: PIL.Image.Image, codec: Codec, max_bytes: float) -> Coded:
    """Find the file of the highest PSNR within a budget.

    Args:
        image: An RGB picture.
        codec: Which.
        max_bytes: The budget: whole files count, headers and all.

    Returns:
        The best file that fits; where headers alone are too large, the smallest file that there is.
    """
    ways = itertools.chain.from_iterable(_still(small, codec) for small in _shrunk(image, SHRINKS))
    return _best([image], ways, max_bytes)


def best_clip_within(frames: Sequence[PIL.Image.Image], codec: ClipCodec, max_bytes: float) -> Coded:
    """Find the file of the highest mean PSNR within a budget, of the whole clip.

    So few bytes are less than the headers of a file for each frame, so frames share one. JPEG stores them side by side
    in one picture. WebP does that too or is animated, which stores differences, whichever comes out better. VP9, a real
    video codec, is counted without a container, whose hundreds of bytes would leave it little.

    Args:
        frames: RGB pictures of one size.
        codec: Which.
        max_bytes: The budget of the whole clip.

    Returns:
        As for pictures.
    """
    shrinks = FILM_SHRINKS if codec == "VP9" else SHRINKS
    smaller = zip(*(_shrunk(frame, shrinks) for frame in frames), strict=True)
    ways = itertools.chain.from_iterable(_moving(small, codec) for small in smaller)
    return _best(frames, ways, max_bytes)


def _best(originals: Sequence[PIL.Image.Image], ways: Iterator[_Way], max_bytes: float) -> Coded:
    files = [(_largest_within(way, max_bytes), way) for way in ways]
    fitting = [each for each in files if len(each[0]) <= max_bytes]
    chosen = fitting or [min(files, key=lambda each: len(each[0]))]
    height, width = originals[0].height, originals[0].width
    shown = [(len(file), tuple(resize(frame, height, width) for frame in way.show(file))) for file, way in chosen]
    pixels = pixels_of(originals)
    scores = [float(psnr(pixels_of(frames), pixels).mean()) for _, frames in shown]
    best = max(range(len(scores)), key=scores.__getitem__)
    size, frames = shown[best]
    return Coded(
        size=size,
        fits=size <= max_bytes,
        psnr=scores[best],
        ssim=float(ssim(pixels_of(frames), pixels).mean()),
        frames=frames,
    )


def _shrunk(image: PIL.Image.Image, shrinks: Sequence[int]) -> Iterator[PIL.Image.Image]:
    for shrink in shrinks:
        height, width = (max(side // shrink, 1) for side in (image.height, image.width))
        yield resize(image, height, width)


def _largest_within(way: _Way, max_bytes: float) -> bytes:
    """The file of the highest quality that fits, by bisection; of the lowest quality if none does."""
    low, high = way.qualities
    best = way.store(low)
    while low < high:
        middle = (low + high + 1) // 2
        file = way.store(middle)
        if len(file) <= max_bytes:
            low, best = middle, file
        else:
            high = middle - 1
    return best


def pixels_of(frames: Sequence[PIL.Image.Image]) -> Float[Tensor, "t 3 h w"]:
    """Frames of one size as pixels in [-1, 1]."""
    return torch.stack([image_to_pixels(frame) for frame in frames])


# The ways of each codec.


def _still(image: PIL.Image.Image, codec: Codec) -> Iterator[_Way]:
    for options in _OPTIONS[codec]:
        store = partial(_save, image, codec, **options)
        yield _Way(store=store, qualities=_QUALITIES[codec], show=lambda file: [read_image(file)])


def _moving(frames: Sequence[PIL.Image.Image], codec: ClipCodec) -> Iterator[_Way]:
    if codec == "VP9":
        yield _Way(store=partial(_film, frames), qualities=(0, _VP9_COARSEST), show=_film_frames)
        return
    sheet = _sheet(frames)
    cut = partial(_cut, size=frames[0].size, count=len(frames))
    for way in _still(sheet, codec):
        yield _Way(store=way.store, qualities=way.qualities, show=lambda file: cut(read_image(file)))
    if codec == "WebP":
        store = partial(_save, frames[0], "WebP", method=4, save_all=True, append_images=frames[1:], duration=_TICK)
        yield _Way(store=store, qualities=_QUALITIES["WebP"], show=partial(_animation_frames, count=len(frames)))


def _save(image: PIL.Image.Image, codec: Codec, quality: int, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, codec, quality=quality, **options)
    return buffer.getvalue()


def _sheet(frames: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """All frames in one picture that is about square."""
    width, height = frames[0].size
    columns = math.ceil(math.sqrt(len(frames)))
    sheet = PIL.Image.new("RGB", (columns * width, math.ceil(len(frames) / columns) * height))
    for place, frame in enumerate(frames):
        sheet.paste(frame, (place % columns * width, place // columns * height))
    return sheet


def _cut(sheet: PIL.Image.Image, *, size: tuple[int, int], count: int) -> list[PIL.Image.Image]:
    width, height = size
    columns = sheet.width // width
    corners = ((place % columns * width, place // columns * height) for place in range(count))
    return [sheet.crop((left, top, left + width, top + height)) for left, top in corners]


def _animation_frames(file: bytes, *, count: int) -> list[PIL.Image.Image]:
    """The frames of an animated WebP, which merges equal neighbours."""
    shown: list[PIL.Image.Image] = []
    with PIL.Image.open(BytesIO(file)) as animation:
        for place in range(getattr(animation, "n_frames", 1)):
            animation.seek(place)
            animation.load()
            times = round(animation.info.get("duration", 0) / _TICK) or 1
            shown += [animation.convert("RGB")] * times
    return (shown + shown[-1:] * count)[:count]


def _film(frames: Sequence[PIL.Image.Image], quality: int) -> bytes:
    """VP9 packets, each after its length."""
    context = av.CodecContext.create("libvpx-vp9", "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height = frames[0].size
    context.pix_fmt, context.thread_count = "yuv420p", 1
    context.framerate, context.time_base = Fraction(1000, _TICK), Fraction(_TICK, 1000)
    context.options = {**_VP9, "crf": str(_VP9_COARSEST - quality)}
    packets = []
    for place, image in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.asarray(image), "rgb24")
        frame.pts = place
        packets += context.encode(frame)
    packets += context.encode(None)
    return b"".join(len(packet := bytes(each)).to_bytes(_LENGTH_BYTES) + packet for each in packets)


def _film_frames(file: bytes) -> list[PIL.Image.Image]:
    context = av.CodecContext.create("vp9", "r")
    assert isinstance(context, av.VideoCodecContext)
    shown: list[av.VideoFrame] = []
    while file:
        end = _LENGTH_BYTES + int.from_bytes(file[:_LENGTH_BYTES])
        shown += context.decode(av.Packet(file[_LENGTH_BYTES:end]))
        file = file[end:]
    return [frame.to_image() for frame in [*shown, *context.decode(None)]]
