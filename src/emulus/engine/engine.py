"""Prompts in, ids out: the only place that decodes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch

from emulus.checks import whole
from emulus.engine.budget import Budget
from emulus.engine.pace import Pace
from emulus.engine.request import Counts, Done, Event, Failed, Request, Result
from emulus.engine.runner import Runner
from emulus.engine.schedule import Schedule, Sequential
from emulus.engine.scheduler import Scheduler
from emulus.engine.walk import Walk
from emulus.errors import EmulusError
from emulus.model.transformer import Decoder
from emulus.sequence.grammar import Grammar


class Engine:
    """Generates ids for many requests at once.

    A request's ids depend on the request alone, not on what is generated beside it: sequences never see one another,
    and noise is keyed by seed and position.

    Attributes:
        counts: What has been done since the engine was made.
    """

    def __init__(
        self,
        decoder: Decoder,
        grammar: Grammar,
        *,
        schedule: Schedule | None = None,
        kv_budget: int | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """Put a decoder and a grammar together.

        Args:
            decoder: Predicts. Dropout is never applied here.
            grammar: Says what may follow.
            schedule: In which order ids are computed; by default one after another.
            kv_budget: Bytes for keys and values on each device; by default nine tenths of what is free.
            kv_dtype: Of keys and values, as for :class:`~emulus.engine.runner.Runner`.

        Raises:
            EmulusError: They are of different vocabularies.
        """
        if decoder.config.vocab_size != grammar.vocabulary.size:
            raise EmulusError(
                f"the decoder knows {decoder.config.vocab_size} ids but the vocabulary has "
                f"{grammar.vocabulary.size}; take both from the same checkpoint"
            )
        self.decoder = decoder
        self.grammar = grammar
        self.schedule: Schedule = schedule or Sequential()
        self.kv_budget = kv_budget
        self.kv_dtype = kv_dtype
        self.counts = Counts()
        self._pace = Pace()
        self._budget = Budget()
        self._runner: Runner | None = None

    @property
    def runner(self) -> Runner:
        """What computes; the same one, with what it has recorded, as long as the weights stay where they are."""
        if self._runner is None or self._runner.stale:
            self._runner = Runner(self.decoder, kv_dtype=self.kv_dtype)
        return self._runner

    def generate(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = 8,
        on_event: Callable[[Event], object] | None = None,
    ) -> list[Result]:
        """Generate everything.

        Args:
            requests: What is asked.
            batch_size: Most requests that are decoded together (a guided one is two sequences).
            on_event: Called with each event as it happens.

        Returns:
            One result per request, in order.

        Raises:
            EmulusError: A request is broken or too long, found before anything is generated; or memory is
                short.
        """
        results: dict[int, Result] = {}
        for event in self.events(requests, batch_size=batch_size):
            if on_event is not None:
                on_event(event)
            if isinstance(event, Failed):
                raise EmulusError(event.message)
            if isinstance(event, Done):
                results[event.request] = event.result
        return [results[index] for index in range(len(requests))]

    def stream(self, request: Request) -> Generator[Event, None, None]:
        """Generate one request, giving each event as it happens; closing the iterator cancels."""
        return self.events([request])

    def events(self, requests: Sequence[Request], *, batch_size: int = 8) -> Generator[Event, None, None]:
        """Generate everything, giving each event as it happens; closing the iterator cancels.

        Arguments and errors are those of :meth:`generate`.
        """
        scheduler = self.scheduler(batch_size)
        try:
            for request in requests:
                scheduler.submit(request)
            while scheduler.busy:
                yield from scheduler.step()
        finally:
            scheduler.close()

    def scheduler(self, most_running: int = 8, *, ahead: int | None = None) -> Scheduler:
        """What runs requests together, for those who submit and cancel them as they come.

        Args:
            most_running: Most requests at once.
            ahead: Most further steps that the device is given before the host looks at what was chosen; by default
                none, but on a GPU.

        Raises:
            EmulusError: That is less than one.
        """
        whole("batch_size", most_running, least=1)
        return Scheduler(
            self.runner,
            self.grammar,
            self.schedule,
            most_running=most_running,
            kv_budget=self.kv_budget,
            ahead=ahead,
            pace=self._pace,
            counts=self.counts,
            budget=self._budget,
        )

    def walk(self, index: int, request: Request) -> Walk:
        """Check a request, and stand at the end of its prompt; ``index`` is what its events will call it.

        Raises:
            EmulusError: It is broken or too long.
        """
        return Walk(index, request, self.grammar, self.decoder.config.max_position_embeddings)

    def most_new_tokens(self, requests: Sequence[Request]) -> int:
        """Most ids that will be generated, for a progress bar; exact where only open media are finished."""
        return sum(self.walk(index, request).most_new for index, request in enumerate(requests))
