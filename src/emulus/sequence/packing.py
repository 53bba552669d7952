"""documents' ids -> one flat row for training, without padding and without cutting a document."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from emulus.errors import EmulusError
from emulus.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Documents end to end. None may see another: ``document_lengths`` says where they meet.

    Attributes:
        input_ids: The ids.
        targets: The id after each in its document; at a document's last id there is none (PAD, weight 0).
        loss_weights: How much each target counts.
        position_ids: Place of each id in its document, from 0.
        document_lengths: Ids of each document, in order.
    """

    input_ids: Int64[Tensor, " n"]
    targets: Int64[Tensor, " n"]
    loss_weights: Float32[Tensor, " n"]
    position_ids: Int64[Tensor, " n"]
    document_lengths: list[int]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        names = ("input_ids", "targets", "loss_weights", "position_ids")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put documents into as few rows as best-fit-decreasing finds; the same lengths always pack the same.

    Args:
        lengths: Ids of each document.
        capacity: Most ids in a row.

    Returns:
        For each row the indices of its documents.

    Raises:
        EmulusError: A document has no ids, or more than a row holds: documents are never cut.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise EmulusError(
                f"document {index} has {length} ids, a row holds 1 to {capacity}; "
                "make its pictures or clips smaller, leave it out, or raise the context length"
            )
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free ids, row), sorted: the fullest row that still fits is found by bisection
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(room, (lengths[index], 0))
        if place == len(room):
            free, row = capacity, len(rows)
            rows.append([])
        else:
            free, row = room.pop(place)
        rows[row].append(index)
        insort(room, (free - lengths[index], row))
    return rows


def collate(
    documents_ids: Sequence[Sequence[int]],
    vocabulary: Vocabulary,
    *,
    visual_weight: float = 0.5,
    prompt_masks: Sequence[Sequence[bool] | None] | None = None,
) -> Batch:
    """Join documents into one row with next-id targets inside each.

    Args:
        documents_ids: Ids of each document.
        vocabulary: Tells visual ids from others.
        visual_weight: Weight of a visual target; Emu3 trains with 0.5. Every other target weighs 1.
        prompt_masks: For each document None, or for each of its ids whether it belongs to a prompt, which is
            seen but not learned: targets there weigh 0.

    Raises:
        EmulusError: There are no documents, one is empty, or a mask is not as long as its document.
    """
    masks = [None] * len(documents_ids) if prompt_masks is None else prompt_masks
    lengths = [len(ids) for ids in documents_ids]
    if not lengths or not all(lengths) or len(masks) != len(lengths):
        raise EmulusError(f"cannot join documents of {lengths} ids with {len(masks)} masks; leave out empty ones")
    for index, (mask, length) in enumerate(zip(masks, lengths, strict=True)):
        if mask is not None and len(mask) != length:
            raise EmulusError(
                f"the prompt mask of document {index} has {len(mask)} places for {length} ids; give one each"
            )

    factors = [
        np.ones(length) if mask is None else 1.0 - np.asarray(mask, np.float64)
        for mask, length in zip(masks, lengths, strict=True)
    ]
    ids = np.concatenate([np.asarray(document, np.int64) for document in documents_ids])
    return join(ids, lengths, vocabulary, visual_weight=visual_weight, factors=np.concatenate(factors))


def join(
    ids: npt.NDArray[np.int64],
    document_lengths: Sequence[int],
    vocabulary: Vocabulary,
    *,
    visual_weight: float = 0.5,
    factors: npt.NDArray[np.float64] | None = None,
) -> Batch:
    """Make a row of documents that are end to end already (see :func:`collate`).

    Args:
        ids: Ids of all documents.
        document_lengths: Ids of each, at least 1.
        vocabulary: Tells visual ids from others.
        visual_weight: Weight of a visual target; every other weighs 1.
        factors: For each id how many times its weight it counts; 0 where it is seen and not learned.
    """
    lengths = np.array(document_lengths, np.int64)
    ends = lengths.cumsum()
    targets = np.roll(ids, -1)
    start, stop = vocabulary.visual_range
    weights = np.where((targets >= start) & (targets < stop), visual_weight, 1.0).astype(np.float32)
    if factors is not None:
        # The weight of a target stands where the id before it is.
        weights *= np.roll(factors, -1)
    targets[ends - 1] = vocabulary.pad
    weights[ends - 1] = 0
    return Batch(
        input_ids=torch.from_numpy(ids),
        targets=torch.from_numpy(targets),
        loss_weights=torch.from_numpy(weights),
        position_ids=torch.from_numpy(np.arange(len(ids)) - np.repeat(ends - lengths, lengths)),
        document_lengths=lengths.tolist(),
    )


def pad(batch: Batch, length: int, vocabulary: Vocabulary) -> Batch:
    """Make a row longer, for where all rows must be equally long.

    Args:
        batch: A row.
        length: Ids that it shall have.
        vocabulary: Whose PAD it is filled with.

    Returns:
        The row with one more document, of PAD alone and without weight; the row itself if it is as long already.

    Raises:
        EmulusError: It is longer.
    """
    more = length - len(batch.input_ids)
    if more < 0:
        raise EmulusError(f"a row of {len(batch.input_ids)} ids cannot be padded to {length}; raise row_tokens")
    if not more:
        return batch
    filling = torch.full((more,), vocabulary.pad)
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, filling]),
        targets=torch.cat([batch.targets, filling]),
        loss_weights=torch.cat([batch.loss_weights, torch.zeros(more)]),
        position_ids=torch.cat([batch.position_ids, torch.arange(more)]),
        document_lengths=[*batch.document_lengths, more],
    )
