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
from emulus.engine.runner import AT_ONCE, Feed, Runner
from emulus.log import progress
from emulus.model import Decoder
from emulus.sequence import pack

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]

ROW_IDS = 8192
_CHUNK = 2**23
"""Most logits in memory at a time (32 MB)."""


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
    with evaluating(decoder):
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


@torch.inference_mode()
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
    runner = Runner(decoder, record=False)
    start = len(beginning)
    first = runner.new_lane(start)
    last = _read(runner, first, beginning.tolist())[-1:]
    lanes = [runner.new_lane(start + len(ending)) for ending in endings]
    for lane in lanes:
        lane.begin_like(first, start)
    feeds = [
        Feed(lane=lane, ids=ending.tolist(), wanted=range(len(ending)))
        for lane, ending in zip(lanes, endings, strict=True)
    ]
    hidden = runner.forward(feeds).split([len(ending) for ending in endings])
    before = torch.cat([state for states in hidden for state in (last, states[:-1])])
    ids = torch.from_numpy(np.concatenate(endings)).to(before.device)
    scores = log_probabilities(decoder, before, ids, vocab_range)
    return [float(part.sum()) for part in scores.split([len(ending) for ending in endings])]


def _read(runner: Runner, lane: Lane, ids: Sequence[int]) -> Float[Tensor, "wanted hidden"]:
    """Compute the beginning of a sequence, in pieces; gives the last state."""
    hidden = torch.empty(0)
    for start in range(0, len(ids), AT_ONCE):
        piece = ids[start : start + AT_ONCE]
        hidden = runner.forward([Feed(lane=lane, ids=piece)])
        lane.length += len(piece)
    return hidden


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
