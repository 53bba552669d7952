"""documents' ids -> one flat row for training, without padding and without cutting a document."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace

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

    input_ids = torch.cat([torch.as_tensor(ids, dtype=torch.int64) for ids in documents_ids])
    ends = torch.tensor(lengths).cumsum(0)
    targets = input_ids.roll(-1)
    targets[ends - 1] = vocabulary.pad

    start, stop = vocabulary.visual_range
    visual = (start <= targets) & (targets < stop)
    loss_weights = torch.where(visual, visual_weight, 1.0)
    for mask, end, length in zip(masks, ends.tolist(), lengths, strict=True):
        if mask is not None:
            # The weight of a target stands where the id before it is.
            loss_weights[end - length : end - 1][torch.as_tensor(mask, dtype=torch.bool)[1:]] = 0
    loss_weights[ends - 1] = 0
    return Batch(
        input_ids=input_ids,
        targets=targets,
        loss_weights=loss_weights,
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        document_lengths=lengths,
    )
