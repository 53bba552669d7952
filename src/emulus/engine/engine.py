"""Prompts in, ids out: the only place that decodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emulus.engine.request import Done, Event, Request, Result
from emulus.engine.walk import Walk
from emulus.errors import EmulusError
from emulus.model.cache import KVCache
from emulus.model.transformer import Decoder
from emulus.sampling.draw import sample
from emulus.sampling.guidance import apply_guidance
from emulus.sequence.grammar import Grammar

Ranges = tuple[tuple[int, int], ...]

_AT_ONCE = 512
"""Most tokens of a row in one pass: a picture of 16,000 tokens attends to itself in pieces, not as one square."""


@dataclass(kw_only=True)
class _Lane:
    """One row of the batch: a request's prompt or its null prompt, and what follows."""

    walk: Walk
    null: bool
    feed: list[int]
    fed: int = 0


@dataclass(kw_only=True)
class _Choice:
    """Requests whose next id is chosen among the same ids, guided alike."""

    cond: list[int] = field(default_factory=list)
    null: list[int] = field(default_factory=list)
    walks: list[Walk] = field(default_factory=list)


class Engine:
    """Generates ids for many requests at once.

    A request's ids depend on the request alone, not on what is generated beside it: rows never see one
    another, and noise is keyed by seed and position.
    """

    def __init__(self, decoder: Decoder, grammar: Grammar) -> None:
        """Put a decoder and a grammar together.

        Args:
            decoder: Predicts; it is in eval mode while the engine generates, and put back after.
            grammar: Says what may follow.

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
            batch_size: How many requests are decoded together (a guided one takes two rows).
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
            if isinstance(event, Done):
                results[event.request] = event.result
        return [results[index] for index in range(len(requests))]

    def stream(self, request: Request) -> Iterator[Event]:
        """Generate one request, giving each event as it happens; closing the iterator cancels."""
        return self.events([request])

    def events(self, requests: Sequence[Request], *, batch_size: int = 8) -> Iterator[Event]:
        """Generate everything, giving each event as it happens; closing the iterator cancels.

        Arguments and errors are those of :meth:`generate`.
        """
        if batch_size < 1:
            raise EmulusError(f"batch_size is {batch_size} but must be at least 1")
        walks = self._walks(requests)
        training = self.decoder.training
        self.decoder.eval()
        try:
            for start in range(0, len(walks), batch_size):
                yield from self._run(walks[start : start + batch_size])
        finally:
            self.decoder.train(training)

    def most_new_tokens(self, requests: Sequence[Request]) -> int:
        """Most ids that will be generated, for a progress bar; exact where only open media are finished."""
        return sum(walk.most_new for walk in self._walks(requests))

    def _walks(self, requests: Sequence[Request]) -> list[Walk]:
        context = self.decoder.config.max_position_embeddings
        return [Walk(index, request, self.grammar, context) for index, request in enumerate(requests)]

    def _run(self, walks: Sequence[Walk]) -> Iterator[Event]:
        """Decode one batch to its end."""
        for walk in walks:
            yield from walk.run_forced()
        lanes = _lanes([walk for walk in walks if not walk.finished])
        if not lanes:
            return
        length = max(lane.walk.length for lane in lanes)
        cache = self.decoder.new_cache(len(lanes), length)
        while lanes:
            for walk, id in self._step(lanes, cache):
                yield from walk.take(id)
                yield from walk.run_forced()
            kept = [row for row, lane in enumerate(lanes) if not lane.walk.finished]
            if len(kept) < len(lanes):
                cache.select(torch.tensor(kept, dtype=torch.long))
                lanes = [lanes[row] for row in kept]
            _refill(lanes)

    @torch.inference_mode()
    def _step(self, lanes: Sequence[_Lane], cache: KVCache) -> list[tuple[Walk, int]]:
        """Feed every lane what it has, and choose each request's next id."""
        device = self.decoder.lm_head.weight.device
        ids, positions = _rectangle(lanes, device)
        for part, where in zip(ids.split(_AT_ONCE, dim=1), positions.split(_AT_ONCE, dim=1), strict=True):
            hidden = self.decoder.hidden(part, position_ids=where, cache=cache)[:, -1]
        for lane in lanes:
            lane.fed += len(lane.feed)
        chosen: list[tuple[Walk, int]] = []
        for (ranges, scale), choice in _choices(lanes).items():
            logits = self._legal_logits(hidden[choice.cond], ranges)
            if choice.null:
                logits = apply_guidance(logits, self._legal_logits(hidden[choice.null], ranges), scale)
            legal = torch.cat([torch.arange(start, stop, device=device) for start, stop in ranges])
            params = [walk.request.params for walk in choice.walks]
            picked = sample(logits, legal, params, [walk.position for walk in choice.walks])
            chosen += zip(choice.walks, picked, strict=True)
        return chosen

    def _legal_logits(self, hidden: Float[Tensor, "rows hidden"], ranges: Ranges) -> Float[Tensor, "rows legal"]:
        """Compute logits of legal ids only: where cells are drawn, text's part of the head is not read."""
        return torch.cat([self.decoder.head(hidden, part) for part in ranges], dim=-1)


def _lanes(walks: Sequence[Walk]) -> list[_Lane]:
    """Give each request its row, and each guided one a second."""
    lanes = []
    for walk in walks:
        lanes.append(_Lane(walk=walk, null=False, feed=[*walk.request.prompt_ids, *walk.fresh]))
        if walk.request.guided:
            lanes.append(_Lane(walk=walk, null=True, feed=[*(walk.request.null_ids or ()), *walk.fresh]))
        walk.fresh.clear()
    return lanes


def _refill(lanes: Sequence[_Lane]) -> None:
    """Hand the new ids to the lanes of their request."""
    for lane in lanes:
        lane.feed = list(lane.walk.fresh)
    for lane in lanes:
        lane.walk.fresh.clear()


def _rectangle(
    lanes: Sequence[_Lane], device: torch.device
) -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, "rows tokens"]]:
    """Lay out ids and positions, so that every row's last column is its last id.

    A shorter row repeats its last id at the same position: that writes the same key and value into the same
    slot, so it changes nothing, and there is no padding to mask.
    """
    width = max(len(lane.feed) for lane in lanes)
    ids = [lane.feed + lane.feed[-1:] * (width - len(lane.feed)) for lane in lanes]
    last = [lane.fed + len(lane.feed) - 1 for lane in lanes]
    positions = [
        [min(lane.fed + column, end) for column in range(width)] for lane, end in zip(lanes, last, strict=True)
    ]
    return torch.tensor(ids, device=device), torch.tensor(positions, device=device)


def _choices(lanes: Sequence[_Lane]) -> dict[tuple[Ranges, float], _Choice]:
    """Group rows whose legal ids and guidance are the same: each group is one product with the head."""
    groups: dict[tuple[Ranges, float], _Choice] = {}
    for row, lane in enumerate(lanes):
        request = lane.walk.request
        key = (lane.walk.allowed().ranges, request.params.guidance_scale if request.guided else 1.0)
        group = groups.setdefault(key, _Choice())
        (group.null if lane.null else group.cond).append(row)
        if not lane.null:
            group.walks.append(lane.walk)
    return groups
