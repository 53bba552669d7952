"""size <-> meta text: what stands between the start of a picture or clip and its cells, e.g. ``"64*64"``.

One walk over the template (:meth:`MetaTemplate.follow`) serves reading, checking and generating: what it says
may come next is what a reader accepts and what a decoder may write.
"""

from __future__ import annotations

import math
import re
import string
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from emulus.errors import EmulusError
from emulus.sequence.document import MediaSize

_DIGITS = "0123456789"
_NUMBERS = {"image": ["h", "w"], "video": ["fps", "h", "t", "w"]}
_NUMBER = re.compile(r"[0-9.]*")
# Frames per second: 0.001 to 999.999 without needless zeros; and what can still become such a number.
_FPS = re.compile(r"(?:[1-9][0-9]{0,2}|0(?=\.))(?:\.[0-9]{0,2}[1-9])?")
_FPS_BEGUN = re.compile(r"(?:[1-9][0-9]{0,2}|0)(?:\.[0-9]{0,2})?")


@dataclass(frozen=True)
class Follow:
    """What a meta text so far leaves open.

    Attributes:
        characters: Those that may come next; empty when none may.
        size: The size that the text says, when it may end here.
    """

    characters: str
    size: MediaSize | None = None


@dataclass(frozen=True)
class MetaTemplate:
    """How a size is written, e.g. ``"{t}*{h}*{w} {fps}fps {seconds}s"``.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        template: ASCII text with ``{h} {w}``, and ``{t} {fps}`` for clips, once each in any order; for clips
            ``{seconds}``, which follows from the others, may come after them.
        temporal_factor: Frames of pixels in one frame of cells.

    Raises:
        EmulusError: What the template writes could not be read back.
    """

    kind: str
    template: str
    temporal_factor: int

    def __post_init__(self) -> None:
        fields = [value for is_field, value in self.parts if is_field]
        numbers = fields[:-1] if self.kind == "video" and fields[-1:] == ["seconds"] else fields
        # A number must end before the next character could belong to it.
        ends = all(
            not next_is_field and value[0] not in _DIGITS + "."
            for (is_field, _), (next_is_field, value) in pairwise(self.parts)
            if is_field
        )
        plain = "".join(f"{{{value}}}" if is_field else value for is_field, value in self.parts)
        if sorted(numbers) != _NUMBERS[self.kind] or not ends or plain != self.template or not plain.isascii():
            raise EmulusError(
                f"{self.kind} meta {self.template!r} cannot be read back: it needs {{h}} {{w}}, for clips "
                "{t} {fps} and last, if at all, {seconds}, once each, with ASCII letters, no digits, between"
            )

    @cached_property
    def parts(self) -> tuple[tuple[bool, str], ...]:
        """The template in pieces: (is it a field, its name or the letters)."""
        parts: list[tuple[bool, str]] = []
        for letters, field, _, _ in string.Formatter().parse(self.template):
            parts += [(False, letters)] if letters else []
            parts += [(True, field)] if field is not None else []
        return tuple(parts)

    @property
    def characters(self) -> str:
        """Every character that may stand in what the template writes."""
        letters = "".join(value for is_field, value in self.parts if not is_field)
        return "".join(sorted({*letters, *_DIGITS, "."}))

    def write(self, size: MediaSize) -> str:
        """The meta text of a size.

        Raises:
            EmulusError: The frame rate rounds to nothing or is 1000 or more.
        """
        values = {"h": str(size.h), "w": str(size.w)}
        if size.fps is not None:
            values |= {"t": str(size.t), "fps": _decimal(size.fps)}
            if not _FPS.fullmatch(values["fps"]):
                raise EmulusError(f"{size.fps} frames per second are outside 0.001 to 999.999; resample the clip")
            values["seconds"] = self._seconds(values)
        return self.template.format(**values)

    def follow(self, text: str, max_cells: int) -> Follow:
        """Say how a meta text may go on.

        Only sizes of at most ``max_cells`` cells can be written to the end, so nothing need be checked later.

        Args:
            text: The meta text so far.
            max_cells: Most cells of a picture or of all frames of a clip.

        Returns:
            The characters that may come next, and the size if the text is whole; neither if it is wrong.
        """
        values: dict[str, str] = {}
        rest = text
        more = ""  # digits that may extend a number at the end of the text
        for is_field, value in self.parts:
            if is_field and value != "seconds":
                number = _NUMBER.match(rest)[0]  # type: ignore[index]  # it matches the empty text too
                rest = rest[len(number) :]
                room = max_cells // math.prod(int(values[name]) for name in values if name != "fps")
                if not rest:
                    more = "".join(c for c in _DIGITS + "." if _may_begin(value, number + c, room))
                if not _may_be(value, number, room):
                    return Follow(more)
                values[value] = number
            else:
                letters = self._seconds(values) if is_field else value
                if not rest.startswith(letters):
                    return Follow(more + letters[len(rest)] if letters.startswith(rest) else "")
                rest = rest[len(letters) :]
        return Follow("") if rest else Follow(more, _size(values))

    def _seconds(self, values: dict[str, str]) -> str:
        """The duration that the other values give, with the frame rate as it is written."""
        return _decimal(self.temporal_factor * int(values["t"]) / float(values["fps"]))


def _size(values: dict[str, str]) -> MediaSize:
    picture = MediaSize(h=int(values["h"]), w=int(values["w"]))
    if "t" not in values:
        return picture
    return MediaSize(h=picture.h, w=picture.w, t=int(values["t"]), fps=float(values["fps"]))


def _may_be(field: str, number: str, room: int) -> bool:
    """Whether a field may have this value, with so much room for cells."""
    if field == "fps":
        return _FPS.fullmatch(number) is not None
    # Comparing lengths first keeps a file from making us parse a million digits.
    return number.isdecimal() and number[0] != "0" and len(number) <= len(str(room)) and int(number) <= room


def _may_begin(field: str, number: str, room: int) -> bool:
    """Whether a field's value may be this or begin so."""
    return _may_be(field, number, room) or (field == "fps" and _FPS_BEGUN.fullmatch(number) is not None)


def _decimal(value: float) -> str:
    """A number with up to three decimals and no needless zeros: ``24``, ``23.976``, ``0.5``."""
    return f"{value:.3f}".rstrip("0").rstrip(".")
