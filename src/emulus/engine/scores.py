"""ids -> how likely the decoder finds each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from emulus.engine.cache import Lane
from emulus.engine.runner import AT_ONCE, Runner
from emulus.engine.step import Feed
from emulus.log import progress
from emulus.model import Decoder
from emulus.sequence import pack

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]

ROW_IDS = 8192
_CHUNK = 2**23
"""Most logits in memory at a time (32 MB)."""
_LANES = 16
"""Endings that are computed at a time."""


@torch.inference_mode()
def score(
    decoder: Decoder,
    documents: Sequence[Ids],
    scored: Sequence[Mask],
    *,
    vocab_range: tuple[int, int] | None = None,
    row_ids: int = ROW_IDS,
    what: str = "scoring",
) -> list[Scores]:
    """Measure how likely ids are, each given all ids before it in its document.

    Args:
        decoder: The model.
        documents: Their ids.
        scored: Which ids of each document are asked for; never its first, which nothing foretells.
        vocab_range: Ids ``(start, stop)`` that the scored ones are known to be among; all ids by default.
        row_ids: Documents are packed into rows of about this many ids, computed one at a time.
        what: Name of the progress bar.

    Returns:
        For each document the natural logarithms of the scored ids' probabilities, in order.
    """
    scores: list[Scores] = [np.empty(0)] * len(documents)
    device = decoder.model.norm.weight.device
    capacity = max(row_ids, *(len(document) for document in documents)) if documents else row_ids
    rows = pack([len(document) for document in documents], capacity)
    # Which picture is the likeliest must not depend on whose autocast this is called under.
    with evaluating(decoder), torch.autocast(device.type, enabled=False):
        for row in progress(rows, what=what):
            ids = torch.from_numpy(np.concatenate([documents[i] for i in row])).to(device)
            lengths = [len(documents[i]) for i in row]
            places = torch.from_numpy(np.flatnonzero(np.concatenate([scored[i] for i in row]))).to(device)
            hidden = decoder.hidden(ids[None], document_lengths=lengths)[0]
            # An id is foretold by the state of the one before it.
            row_scores = log_probabilities(decoder, hidden[places - 1], ids[places], vocab_range)
            counts = np.cumsum([int(scored[i].sum()) for i in row])
            for i, part in zip(row, np.split(row_scores.cpu().numpy(), counts[:-1]), strict=True):
                scores[i] = part
    return scores


def score_endings(
    decoder: Decoder, beginning: Ids, endings: Sequence[Ids], *, vocab_range: tuple[int, int] | None = None
) -> list[float]:
    """Measure how likely whole endings of one beginning are; the beginning is computed once.

    Args:
        decoder: The model.
        beginning: Ids, at least one.
        endings: Ids that may follow, at least one each.
        vocab_range: As in :func:`score`.

    Returns:
        Natural logarithm of each ending's probability.
    """
    return Beginning.read(decoder, beginning).scores(endings, vocab_range=vocab_range)


class Beginning:
    """Ids that are computed once, for all that may follow them.

    Attributes:
        decoder: The model.
        runner: Computes.
        lane: Keys and values of the ids.
        last: What the head reads to foretell the next id.
    """

    def __init__(self, decoder: Decoder, runner: Runner, lane: Lane, last: Float[Tensor, "1 hidden"]) -> None:
        self.decoder = decoder
        self.runner = runner
        self.lane = lane
        self.last = last

    @classmethod
    def read(cls, decoder: Decoder, ids: Ids) -> Beginning:
        """Compute ids, at least one, from the start of a sequence."""
        runner = Runner(decoder, record=False)
        lane, last = runner.new_lane(len(ids)), torch.empty(0)
        for start in range(0, len(ids), AT_ONCE):
            piece = ids[start : start + AT_ONCE].tolist()
            last = runner.forward([Feed(lane=lane, ids=piece)])
            lane.length += len(piece)
        return cls(decoder, runner, lane, last)

    def then(self, ids: Ids, *, room: int = 0) -> Beginning:
        """The same with further ids, if any; this one stays as it is.

        Args:
            ids: What follows.
            room: For how many more there shall be room behind them.
        """
        lane, last = self._lane(len(ids) + room), self.last
        if len(ids):
            last = self.runner.forward([Feed(lane=lane, ids=ids.tolist())])
            lane.length += len(ids)
        return Beginning(self.decoder, self.runner, lane, last)

    @torch.inference_mode()
    def scores(self, endings: Sequence[Ids], *, vocab_range: tuple[int, int] | None = None) -> list[float]:
        """Natural logarithm of each ending's probability.

        Args:
            endings: Ids that may follow, at least one each.
            vocab_range: As in :func:`score`.
        """
        # To copy a long beginning takes as long as to compute a few ids, so the copies are used again.
        longest = max((len(ending) for ending in endings), default=0)
        lanes = [self._lane(longest) for _ in endings[:_LANES]]
        found: list[float] = []
        for start in range(0, len(endings), _LANES):
            found += self._scores(endings[start : start + _LANES], lanes, vocab_range)
        return found

    def _scores(
        self, endings: Sequence[Ids], lanes: Sequence[Lane], vocab_range: tuple[int, int] | None
    ) -> list[float]:
        # Nothing is asked of what would follow an ending's last id.
        lengths = [len(ending) - 1 for ending in endings]
        feeds = [
            Feed(lane=lane, ids=ending[:-1].tolist(), wanted=range(length))
            for ending, length, lane in zip(endings, lengths, lanes, strict=False)
            if length
        ]
        hidden = self.runner.forward(feeds) if feeds else self.last[:0]
        before = torch.cat([state for states in hidden.split(lengths) for state in (self.last, states)])
        ids = torch.from_numpy(np.concatenate(endings)).to(before.device)
        scores = log_probabilities(self.decoder, before, ids, vocab_range)
        return [float(part.sum()) for part in scores.split([len(ending) for ending in endings])]

    def _lane(self, more: int) -> Lane:
        lane = self.runner.new_lane(self.lane.length + more)
        lane.begin_like(self.lane, self.lane.length)
        return lane


def log_probabilities(
    decoder: Decoder,
    hidden: Float[Tensor, "n hidden"],
    targets: Int[Tensor, "n"],
    vocab_range: tuple[int, int] | None,
) -> Float[Tensor, "n"]:
    """Natural logarithm of each target's probability, in float64, with few logits in memory at a time."""
    start, stop = vocab_range or (0, decoder.config.vocab_size)
    chunk = max(_CHUNK // (stop - start), 1)
    parts = [torch.empty(0, dtype=torch.float64, device=hidden.device)]
    for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = decoder.head(states, (start, stop))
        parts.append(logits.log_softmax(-1).gather(-1, ids[:, None] - start)[:, 0].double())
    return torch.cat(parts)


@contextmanager
def evaluating(decoder: Decoder) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = decoder.training
    decoder.eval()
    try:
        yield
    finally:
        decoder.train(training)
