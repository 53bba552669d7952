"""One request on its way, as the host sees it: ids, grammar, limit, events. No tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from emulus.engine.request import Done, Event, Frame, Request, Result, Row, TextPiece, Token
from emulus.errors import EmulusError
from emulus.sequence.allowed import Allowed
from emulus.sequence.grammar import Grammar

# A character has at most four bytes; more ids than that without a readable end are not going to become one.
_LONGEST_CHARACTER = 4


class Walk:
    """Follows one request from its prompt to its end.

    Attributes:
        index: The request's place in the list.
        request: What was asked.
        fresh: Generated ids that the model has not been fed yet.
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
        self.fresh: list[int] = []
        self.finished = False
        self._grammar = grammar
        self._ids: list[int] = []
        self._text: list[int] = []
        prompts = [request.prompt_ids, request.null_ids] if request.null_ids is not None else [request.prompt_ids]
        for ids in prompts:
            _check_ids(ids, grammar.vocabulary.size)
        # A picture or clip of more cells could not be finished, so the model may not begin one.
        most_cells = request.params.max_new_tokens
        self._state = grammar.start(request.prompt_ids, may=request.may, max_cells=most_cells)
        longest = max(map(len, prompts))
        self._limit = self._room(longest, context)
        self.length = longest + self._limit
        self._codes = self._codes_of_open_frame()

    @property
    def position(self) -> int:
        """Where in its sequence the next id will stand."""
        return len(self.request.prompt_ids) + len(self._ids)

    @property
    def most_new(self) -> int:
        """Most ids it can generate; exactly so many when only an open medium is finished."""
        return self._limit

    def allowed(self) -> Allowed:
        """Which ids may come next."""
        return self._state.allowed()

    def run_forced(self) -> Iterator[Event]:
        """Take every id that needs no model: what the grammar forces, and the end at the limit."""
        eos = self._grammar.vocabulary.eos
        while not self.finished:
            forced = self._state.allowed().forced
            at_limit = len(self._ids) >= self._limit - 1
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
        if is_text:
            self._text.append(id)
        yield from self._readable(flush=not is_text)
        if vocabulary.is_visual(id):
            yield from self._whole(id - vocabulary.visual_start)
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

    def _codes_of_open_frame(self) -> list[int]:
        """The cells that the prompt holds of the frame it breaks off in."""
        position, vocabulary = self._state.position, self._grammar.vocabulary
        if position.size is None:
            return []
        count = position.cells % (position.size.h * position.size.w)
        codes = [id - vocabulary.visual_start for id in self.request.prompt_ids if vocabulary.is_visual(id)]
        return codes[len(codes) - count :]

    def _readable(self, *, flush: bool) -> Iterator[Event]:
        if not self._text:
            return
        text = self._grammar.text.decode(self._text)
        # A replacement character at the end is most likely a character whose other bytes are still to come.
        if flush or not text.endswith("\ufffd") or len(self._text) > _LONGEST_CHARACTER:
            self._text = []
            yield TextPiece(request=self.index, text=text)

    def _whole(self, code: int) -> Iterator[Event]:
        self._codes.append(code)
        position = self._state.position
        size = position.size
        if size is None or position.column:
            return
        row = tuple(self._codes[-size.w :])
        yield Row(request=self.index, size=size, index=position.rows - 1, codes=row)
        if position.row == 0:
            yield Frame(request=self.index, size=size, index=position.frames - 1, codes=tuple(self._codes))
            self._codes = []

    def _cut(self, eos: int) -> Iterator[Event]:
        """End a document that may grow no longer."""
        if self._state.allowed().contains(eos):
            self._ids.append(eos)
            yield Token(request=self.index, id=eos)
        yield from self._readable(flush=True)
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
