"""The released decoding rule, mistakes included: what ``compat="released"`` walks beside a decoder.

It is right for one picture of more than two columns. With several pictures it counts from the wrong one, and
narrow pictures lose their last ids; :class:`~emulus.sequence.grammar.GrammarState` does both right.
"""

from __future__ import annotations

import copy

import numpy as np

from emulus.errors import EmulusError
from emulus.sequence.allowed import Allowed, Position, only
from emulus.sequence.document import MediaSize
from emulus.sequence.layout import Ids
from emulus.tokenizer.vocabulary import Vocabulary


class ReleasedState:
    """Says which ids the released code would let come next; made by :meth:`Grammar.start`.

    In a picture, ``offset`` decides, tested in this order: a multiple of ``w + 1`` ends a row; then the ends of
    frame, picture and document stand 1, 2 and 3 after the last row; later comes padding; else any visual id.
    Where pictures stand before the open one, that offset begins too large, and EOS may never come. Outside a
    picture everything may come, whatever it means there.

    Source: baaivision/Emu3, emu3/mllm/utils_emu3.py.
    """

    def __init__(
        self, vocabulary: Vocabulary, size: MediaSize | None = None, *, offset: int = 0, cells: int = 0
    ) -> None:
        """Begin after a prompt.

        Args:
            vocabulary: Which id means what.
            size: Size of the picture that the prompt leaves open; None where words are to come.
            offset: How far the end of the prompt is from its first IMG: 1 right after it.
            cells: How many of the picture's cells the prompt holds.
        """
        self._vocabulary = vocabulary
        self._size = size
        self._offset = offset
        self._cells = cells
        self._done = False
        self._anything = Allowed("text", ((0, vocabulary.size),))
        self._visual = Allowed.of("visual", [vocabulary.visual_range])

    @property
    def done(self) -> bool:
        """Whether EOS has come. After it only padding may."""
        return self._done

    @property
    def position(self) -> Position:
        """Where the next id falls, e.g. to show rows and frames as they become whole."""
        if self._done:
            return Position(kind="end")
        if self._size is None or self._after_rows(self._size) > 2:
            return Position(kind="text")
        return Position(kind="image", size=self._size, cells=self._cells)

    @property
    def least(self) -> int:
        """At least so many ids are still to come, EOS included if it comes."""
        remaining = self.remaining
        return 1 if remaining is None else remaining

    @property
    def remaining(self) -> int | None:
        """Exactly so many ids are still to come, EOS included; None where nobody knows, or it never comes."""
        if self._done:
            return 0
        if self._size is None:
            return None
        to_eos = 3 - self._after_rows(self._size)
        passed = to_eos < 0
        shadowed = (self._offset + to_eos) % (self._size.w + 1) == 0
        return None if passed or shadowed else to_eos + 1

    @property
    def upcoming(self) -> Ids:
        """Nothing: what this rule forces where is found out step by step."""
        return np.empty(0, np.int64)

    def allowed(self) -> Allowed:
        """Which ids may come next."""
        v = self._vocabulary
        if self._done:
            return only(v.pad)
        if self._size is None:
            return self._anything
        if self._offset % (self._size.w + 1) == 0:
            return only(v.eol)
        after = self._after_rows(self._size)
        return self._visual if after < 1 else only({1: v.eof, 2: v.eoi, 3: v.eos}.get(after, v.pad))

    def advance(self, id: int) -> None:
        """Take the id that came.

        Raises:
            EmulusError: It was not allowed.
        """
        v = self._vocabulary
        allowed = self.allowed()
        if not allowed.contains(id):
            raise EmulusError(
                f"{v.surface(id)} cannot follow by the released rule: allowed are ids {allowed.ranges}; "
                "choose among ReleasedState.allowed()"
            )
        self._offset += 1
        self._cells += v.is_visual(id)
        self._done = self._done or id == v.eos

    def copy(self) -> ReleasedState:
        """A state that goes its own way from here."""
        return copy.copy(self)

    def _after_rows(self, size: MediaSize) -> int:
        """How far the next id is behind the last row's end, by the released count."""
        return self._offset - (size.w + 1) * size.h
