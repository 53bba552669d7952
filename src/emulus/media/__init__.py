"""file <-> pixels. Pictures and clips, read within limits, resized by Emu3's rules, written atomically.

Pixels are float32 ``(..., 3, height, width)`` in [-1, 1]; a clip's are ``(frames, 3, height, width)``.
"""

from emulus.media.image import image_to_pixels, pixels_to_image, read_image, write_image
from emulus.media.limits import LIMITS, Limits
from emulus.media.resize import fit, generation_size, resize, smart_resize
from emulus.media.signatures import media_type
from emulus.media.source import ImageSource, Source
from emulus.media.still import keep_still
from emulus.media.video import (
    Clip,
    MediaSource,
    check_writable,
    clip_to_pixels,
    is_video,
    pixels_to_clip,
    read_media,
    read_video,
    resample,
    write_video,
)

__all__ = [
    "LIMITS",
    "Clip",
    "ImageSource",
    "Limits",
    "MediaSource",
    "Source",
    "check_writable",
    "clip_to_pixels",
    "fit",
    "generation_size",
    "image_to_pixels",
    "is_video",
    "keep_still",
    "media_type",
    "pixels_to_clip",
    "pixels_to_image",
    "read_image",
    "read_media",
    "read_video",
    "resample",
    "resize",
    "smart_resize",
    "write_image",
    "write_video",
]
