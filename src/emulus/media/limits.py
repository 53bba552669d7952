"""How much a media file may ask for before it is refused."""

from __future__ import annotations

from dataclasses import dataclass

from emulus.errors import EmulusError

_FIRST = "ask for its first frames only (--max-frames, max_frames)"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that may be read of one file, and the most work that this may take.

    A few kilobytes can claim gigabytes of pixels (a "bomb"). What a file claims about itself is checked
    before anything is decoded, and what it really holds is counted while decoding, since the claim may be
    false. Of a clip, only what is asked for counts: the start of a film of any length can be read.

    Attributes:
        max_pixels: Pixels (height × width) of an image or of one frame, as stored and as shown.
        max_frames: Frames of a clip that is returned.
        max_seconds: Duration of a clip that is returned.
        max_clip_pixels: Pixels of all the frames of a clip that are kept in memory together (3 bytes each).
        max_decoded_pixels: Pixels of all the frames of a clip that are decoded, kept or not: bounds the time
            taken. A frame counts as at least 2^14 pixels, a pixel of an animated image as 8.
    """

    max_pixels: int = 178_956_970 // 2
    max_frames: int = 10_000
    max_seconds: float = 600.0
    max_clip_pixels: int = 2**30
    max_decoded_pixels: int = 2**35

    def check_size(self, name: str, width: int, height: int) -> None:
        """Refuse an image or frame of no pixels or of too many.

        Args:
            name: What to call the file in the message.
            width: Pixels.
            height: Pixels.

        Raises:
            EmulusError: It is empty or beyond ``max_pixels``.
        """
        if width < 1 or height < 1:
            raise EmulusError(f"{name} has no pixels ({width}×{height}); replace it")
        if width * height > self.max_pixels:
            raise EmulusError(
                f"{name} is {width}×{height}, more than the {self.max_pixels:,} pixels allowed; "
                "make it smaller, or raise Limits.max_pixels if you trust it"
            )

    def check_frames(self, name: str, frames: int) -> None:
        """Refuse to return more than ``max_frames`` frames of a clip (raises EmulusError)."""
        if frames > self.max_frames:
            raise EmulusError(
                f"{name} has {frames:,} frames or more, and {self.max_frames:,} are allowed; {_FIRST}, for fewer per "
                "second (--fps, fps), or raise Limits.max_frames if you trust it"
            )

    def check_seconds(self, name: str, seconds: float) -> None:
        """Refuse to return a clip longer than ``max_seconds`` (raises EmulusError)."""
        # Written so that a duration that is not a number is refused as well.
        if not seconds <= self.max_seconds:
            raise EmulusError(
                f"{name} lasts {seconds:.1f} s or more, and {self.max_seconds:g} s are allowed; {_FIRST}, or raise "
                "Limits.max_seconds if you trust it"
            )

    def check_clip_pixels(self, name: str, pixels: int) -> None:
        """Refuse to keep more than ``max_clip_pixels`` pixels of a clip (raises EmulusError)."""
        if pixels > self.max_clip_pixels:
            raise EmulusError(
                f"the frames of {name} hold more than the {self.max_clip_pixels:,} pixels allowed together; {_FIRST}, "
                "for fewer per second (--fps, fps), make it smaller, or raise Limits.max_clip_pixels"
            )

    def check_decoded_pixels(self, name: str, pixels: int) -> None:
        """Refuse to decode more than ``max_decoded_pixels`` pixels of a clip (raises EmulusError)."""
        if pixels > self.max_decoded_pixels:
            raise EmulusError(
                f"{name} takes decoding more than the {self.max_decoded_pixels:,} pixels allowed; {_FIRST}, make it "
                "smaller, or raise Limits.max_decoded_pixels if you trust it"
            )


LIMITS = Limits()
"""The limits that hold where none are given."""
