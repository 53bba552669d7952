"""Questions about held-out pictures and clips, each of which the decoder reads once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from emulus.engine import Done, Event, Request
from emulus.engine.scores import Beginning, Ids
from emulus.engine.step import Feed
from emulus.engine.walk import Walk
from emulus.pipeline import Emulus
from emulus.sampling import SamplingParams
from emulus.sequence import Document, Image, Prompt, Text, Video, templates


class Shown:
    """A picture or clip that the model has read, for all that it is asked about it.

    Prompts and grammar are the pipeline's, and so are the answers: those of :meth:`Emulus.describe` and
    :meth:`Emulus.answer` at temperature 0. Only what all prompts begin with, the medium above all, is computed once
    instead of once for each.
    """

    def __init__(self, model: Emulus, media: Image | Video, questions: Sequence[str | None]) -> None:
        """Read a picture or clip.

        Args:
            model: A whole model.
            media: Its codes.
            questions: All that will be asked, at least one; None asks for a caption.
        """
        self._model = model
        wording = model.preset.wording
        self._prompts: dict[str | None, Prompt] = {
            question: templates.caption(model.grammar, media, wording=wording)
            if question is None
            else templates.answer(model.grammar, media, question, wording=wording)
            for question in questions
        }
        self._shared = _shared([prompt.ids for prompt in self._prompts.values()])
        first = next(iter(self._prompts.values())).ids
        self._beginning = Beginning.read(model.decoder, np.array(first[: self._shared]))

    @torch.inference_mode()
    def write(self) -> dict[str | None, str]:
        """The answer to each question, with the likeliest id each time."""
        model, runner = self._model, self._beginning.runner
        params = SamplingParams(temperature=0, guidance_scale=1, max_new_tokens=model.defaults.max_text_tokens)
        going: list[tuple[Walk, Beginning]] = []
        for number, (question, prompt) in enumerate(self._prompts.items()):
            walk = model.engine.walk(number, Request(prompt_ids=prompt.ids, may=prompt.may, params=params))
            going.append((walk, self._after(question, room=walk.most_new)))
            walk.fresh.clear()  # the end of the prompt is computed already
        answers: dict[int, str] = {}
        while going:
            for walk, read in going:
                ranges = walk.allowed().ranges
                logits = runner.logits(read.last, ranges)[0]
                legal = torch.cat([torch.arange(start, stop, device=logits.device) for start, stop in ranges])
                answers |= self._told(walk.take(int(legal[logits.argmax()])))
                answers |= self._told(walk.run_forced())
            going = [each for each in going if not each[0].finished]
            _feed(going)
        return {question: answers[number] for number, question in enumerate(self._prompts)}

    def likeliest(self, question: str, answers: Sequence[str]) -> str:
        """The one of some answers that the model finds likeliest, the end of the document after it included.

        Args:
            question: One of those that were given.
            answers: At least one.
        """
        read = self._after(question)
        # As in the documents that teach it, an answer is written by itself, with a space before it.
        endings = [np.array(self._model.grammar.build(Document((Text(f" {answer}"),)))[1:]) for answer in answers]
        return answers[int(np.argmax(read.scores(endings)))]

    def _after(self, question: str | None, *, room: int = 0) -> Beginning:
        rest: Ids = np.array(self._prompts[question].ids[self._shared :], dtype=np.int64)
        return self._beginning.then(rest, room=room)

    def _told(self, events: Iterable[Event]) -> dict[int, str]:
        """The texts of the answers that are finished."""
        start, stop = self._model.grammar.vocabulary.text_range
        return {
            event.request: self._model.text.decode([id for id in event.result.ids if start <= id < stop]).strip()
            for event in events
            if isinstance(event, Done)
        }


def _feed(going: Sequence[tuple[Walk, Beginning]]) -> None:
    """Compute what was chosen last."""
    if not going:
        return
    feeds = [Feed(lane=read.lane, ids=walk.fresh) for walk, read in going]
    hidden = going[0][1].runner.forward(feeds)
    for (walk, read), state in zip(going, hidden.split(1), strict=True):
        read.last = state
        read.lane.length += len(walk.fresh)
        walk.fresh.clear()


def _shared(prompts: Sequence[list[int]]) -> int:
    """How many ids all of them begin with."""
    first, last = min(prompts), max(prompts)
    return next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
