"""One request on its way, as the host sees it: ids, grammar, limit, events. No tensors."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from emulus.engine.request import Done, Event, Frame, Request, Result, Row, TextPiece, Token
from emulus.errors import EmulusError
from emulus.sequence.allowed import Allowed
from emulus.sequence.grammar import Grammar
from emulus.sequence.layout import CELL, Ids

_CHOICE: Ids = np.array([CELL])


class Rest(NamedTuple):
    """What is missing of a picture or clip.

    Attributes:
        ids: What the grammar forces, and ``CELL`` where a cell is chosen.
        width: Cells in a row.
    """

    ids: Ids
    width: int


class Walk:
    """Follows one request from its prompt to its end.

    Attributes:
        index: The request's place in the list.
        request: What was asked.
        fresh: Ids that the model has not been fed yet, the last of the prompt to begin with.
        finished: Whether it is over.
        length: Most ids that prompt and answer can come to, end of document included.
    """

    def __init__(self, index: int, request: Request, grammar: Grammar, context: int) -> None:
        """Check the request and find out how long it can become.

        Args:
            index: The request's place in the list.
            request: What is asked.
            grammar: Says what may follow.
            context: Longest sequence of the model.

        Raises:
            EmulusError: The prompt is empty or broken, holds ids that do not exist, or leaves too little
                room.
        """
        self.index = index
        self.request = request
        self.fresh = list(request.prompt_ids[-1:])
        self.finished = False
        self._grammar = grammar
        self._ids: list[int] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        prompts = [request.prompt_ids, request.null_ids] if request.null_ids is not None else [request.prompt_ids]
        for ids in prompts:
            _check_ids(ids, grammar.vocabulary.size)
        # A picture or clip of more cells could not be finished, so the model may not begin one.
        most_cells = min(request.params.max_new_tokens, grammar.max_cells)
        self._state = grammar.start(request.prompt_ids, may=request.may, max_cells=most_cells)
        longest = max(map(len, prompts if request.guided else prompts[:1]))
        self._limit = self._room(longest, context)
        self.length = longest + self._limit
        self._cells = self._cells_of_prompt()

    @property
    def position(self) -> int:
        """Where in its sequence the next id will stand."""
        return len(self.request.prompt_ids) + len(self._ids)

    @property
    def most_new(self) -> int:
        """Most ids it can generate; exactly so many when only an open medium is finished."""
        return self._limit

    @property
    def rest(self) -> Rest | None:
        """What is missing of the open picture or clip; None outside of one, or where the limit comes before its end."""
        ids, size = self._state.upcoming, self._state.position.size
        return Rest(ids, size.w) if size is not None and 0 < len(ids) <= self._room_left else None

    def allowed(self) -> Allowed:
        """Which ids may come next."""
        return self._state.allowed()

    def upcoming(self, cells: int) -> Ids:
        """The next id to be chosen and, in a picture or clip, what follows it up to the ``cells``-th choice.

        ``CELL`` stands for a choice, anything else is what the grammar forces.
        """
        # Between two cells stand two ids at most: the ends of a row and of a frame.
        rest = self._state.upcoming[: min(3 * cells, self._room_left)]
        if cells == 1 or not len(rest):
            return _CHOICE
        places = np.flatnonzero(rest == CELL)[:cells]
        return rest[: places[-1] + 1]

    def nearby(self, guesses: Sequence[int], count: int) -> list[int]:
        """Guess further cells of the open picture or clip: as in the frame before, else as above, else as to the left.

        Args:
            guesses: What the next cells are guessed to be.
            count: How many more to guess.
        """
        size = self._state.position.size
        assert size is not None, "there are cells only in pictures and clips"
        known, more = self._cells, list(guesses)
        for _ in range(count):
            place = len(known) + len(more)
            back = next((step for step in (size.h * size.w, size.w, 1) if step <= place), 0)
            before = place - back
            if not back:
                more.append(self._grammar.vocabulary.visual_start)
            else:
                more.append(known[before] if before < len(known) else more[before - len(known)])
        return more[len(guesses) :]

    def run_forced(self) -> Iterator[Event]:
        """Take every id that needs no model: what the grammar forces, and the end at the limit."""
        eos = self._grammar.vocabulary.eos
        while not self.finished:
            forced = self._state.allowed().forced
            at_limit = self._room_left <= 0
            if forced is not None and (forced == eos or not at_limit):
                yield from self.take(forced)
            elif at_limit:
                yield from self._cut(eos)
            else:
                return

    def take(self, id: int) -> Iterator[Event]:
        """Add an id, and tell what has become whole by it."""
        vocabulary = self._grammar.vocabulary
        is_text = self._state.position.kind == "text" and vocabulary.is_text(id)
        self._state.advance(id)
        self._ids.append(id)
        self.fresh.append(id)
        yield Token(request=self.index, id=id)
        yield from self._readable([id]) if is_text else self._readable([], final=True)
        if vocabulary.is_visual(id):
            yield from self._whole(id)
        if self._state.done:
            yield self._done("end")

    def _room(self, prompt: int, context: int) -> int:
        """Most ids that can be generated."""
        known = self._state.remaining
        least = known if known is not None else self._state.least + 1
        if prompt + least > context:
            medium = self._state.position.size
            wanted = f"the {medium} asked for" if medium else "an answer"
            raise EmulusError(
                f"a prompt of {prompt} ids and {least} more for {wanted} make {prompt + least}, but the "
                f"model's longest sequence is {context}; shorten the prompt or ask for less"
            )
        if known is not None:
            return known
        return min(self._state.least + self.request.params.max_new_tokens, context - prompt)

    @property
    def _room_left(self) -> int:
        """Ids that may be taken before the end."""
        return self._limit - 1 - len(self._ids)

    def _cells_of_prompt(self) -> list[int]:
        """The cells that the prompt holds of the picture or clip it breaks off in."""
        cells = self._state.position.cells
        visual = [id for id in self.request.prompt_ids if self._grammar.vocabulary.is_visual(id)]
        return visual[len(visual) - cells :]

    def _readable(self, ids: Sequence[int], *, final: bool = False) -> Iterator[Event]:
        """The characters that are whole now; with ``final``, no further byte belongs to those that are not."""
        # Holds three bytes at most, and gives the same text as decoding everything at once, whatever the bytes are.
        text = self._decoder.decode(b"".join(self._grammar.text.pieces[id] for id in ids), final)
        if text:
            yield TextPiece(request=self.index, text=text)

    def _whole(self, id: int) -> Iterator[Event]:
        position = self._state.position
        size = position.size
        if size is None:
            return
        if position.cells == 1:
            self._cells = []
        self._cells.append(id)
        if position.column:
            return
        yield Row(request=self.index, size=size, index=position.rows - 1, codes=self._codes(size.w))
        if position.row == 0:
            yield Frame(request=self.index, size=size, index=position.frames - 1, codes=self._codes(size.h * size.w))

    def _codes(self, count: int) -> tuple[int, ...]:
        """Visual codes of the last cells."""
        return tuple(id - self._grammar.vocabulary.visual_start for id in self._cells[-count:])

    def _cut(self, eos: int) -> Iterator[Event]:
        """End a document that may grow no longer."""
        if self._state.allowed().contains(eos):
            self._ids.append(eos)
            yield Token(request=self.index, id=eos)
        yield from self._readable([], final=True)
        yield self._done("length")

    def _done(self, finished: Literal["end", "length"]) -> Done:
        self.finished = True
        return Done(request=self.index, result=Result(ids=tuple(self._ids), finished=finished))


def _check_ids(ids: Sequence[int], size: int) -> None:
    if not len(ids):
        raise EmulusError("the prompt is empty; give at least the beginning of a document")
    wrong = next((id for id in ids if not 0 <= id < size), None)
    if wrong is not None:
        raise EmulusError(f"the prompt holds id {wrong}, but there are {size} ids; is it another model's?")
