"""Rows of documents: nothing lost, nothing cut, no target across a border."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.sequence import Grammar, Image, caption_first, collate, pack, question_answer
from emulus.sequence.packing import join, pad
from emulus.sequence.templates import answer


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 120))
def test_every_document_is_in_one_row_that_holds_it(lengths: list[int], capacity: int) -> None:
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    fill = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < filled <= capacity for filled in fill)
    assert rows == pack(lengths, capacity)
    # No two rows could have been one: that is what fitting promises.
    assert sum(filled <= capacity / 2 for filled in fill) <= 1


def test_the_fullest_row_that_fits_is_filled() -> None:
    assert pack([6, 3, 5, 4, 2], 10) == [[0, 3], [2, 1, 4]]
    assert pack([5, 5, 5], 5) == [[0], [1], [2]]
    assert pack([], 5) == []


@pytest.mark.parametrize("length", [0, 11])
def test_a_document_that_no_row_holds_is_named(length: int) -> None:
    with pytest.raises(EmulusError, match=f"document 1 has {length} ids"):
        pack([5, length], 10)


def test_targets_stay_inside_their_document(grammar: Grammar) -> None:
    v = grammar.vocabulary
    visual = v.visual_start + 3
    batch = collate([[v.bos, 1, visual, v.eos], [v.bos], [7, visual]], v, visual_weight=0.25)
    assert batch.input_ids.tolist() == [v.bos, 1, visual, v.eos, v.bos, 7, visual]
    assert batch.targets.tolist() == [1, visual, v.eos, v.pad, v.pad, visual, v.pad]
    assert batch.loss_weights.tolist() == [1, 0.25, 1, 0, 0, 0.25, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 0, 1]
    assert batch.document_lengths == [4, 1, 2]
    assert batch.loss_weights.nonzero()[:, 0].tolist() == [0, 1, 2, 5]
    assert batch.targets.dtype == torch.int64
    assert batch.loss_weights.dtype == torch.float32


@given(st.lists(st.lists(st.integers(0, 370), min_size=1, max_size=9), min_size=1, max_size=6))
def test_a_row_is_its_documents_one_by_one(grammar: Grammar, documents: list[list[int]]) -> None:
    batch = collate(documents, grammar.vocabulary)
    alone = [collate([ids], grammar.vocabulary) for ids in documents]
    for name in ("input_ids", "targets", "loss_weights", "position_ids"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(one, name) for one in alone]))


def test_only_the_answer_is_learned(grammar: Grammar) -> None:
    media = Image(torch.tensor([[1, 2]]))
    ids = grammar.build(question_answer(media, "how many?", "2"))
    prompt = len(answer(grammar, media, "how many?").ids)
    other = grammar.build(caption_first("a", media))
    mask = [position < prompt for position in range(len(ids))]
    batch = collate([other, ids], grammar.vocabulary, prompt_masks=[None, mask])
    learned = batch.targets[len(other) :][batch.loss_weights[len(other) :] > 0]
    assert learned.tolist() == ids[prompt:]
    assert torch.equal(batch.loss_weights[: len(other)], collate([other], grammar.vocabulary).loss_weights)


def test_visual_ids_of_no_weight_are_not_supervised(grammar: Grammar) -> None:
    visual = grammar.vocabulary.visual_start
    batch = collate([[1, visual, 2, 3]], grammar.vocabulary, visual_weight=0)
    assert batch.loss_weights.tolist() == [0, 1, 1, 0]
    assert batch.loss_weights.nonzero()[:, 0].tolist() == [1, 2]


@given(st.lists(st.lists(st.integers(0, 370), min_size=1, max_size=9), min_size=1, max_size=6), st.data())
def test_joining_is_collating(grammar: Grammar, documents: list[list[int]], data: st.DataObject) -> None:
    ids = np.concatenate([np.array(document) for document in documents])
    lengths = [len(document) for document in documents]
    prompt = np.array(data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))))
    masks = [mask.tolist() for mask in np.split(prompt, np.cumsum(lengths)[:-1])]
    left = join(ids, lengths, grammar.vocabulary, visual_weight=0.3, factors=1.0 - prompt)
    right = collate(documents, grammar.vocabulary, visual_weight=0.3, prompt_masks=masks)
    for name in ("input_ids", "targets", "loss_weights", "position_ids"):
        assert torch.equal(getattr(left, name), getattr(right, name))
    assert left.document_lengths == right.document_lengths == lengths


def test_padding_is_a_document_of_its_own(grammar: Grammar) -> None:
    v = grammar.vocabulary
    batch = collate([[1, 2, 3], [4, 5]], v)
    padded = pad(batch, 9, v)
    assert padded.document_lengths == [3, 2, 4]
    assert padded.input_ids.tolist() == [1, 2, 3, 4, 5] + 4 * [v.pad]
    assert padded.targets.tolist()[5:] == 4 * [v.pad]
    assert padded.loss_weights.tolist() == [1, 1, 0, 1, 0, 0, 0, 0, 0]
    assert padded.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    for name in ("input_ids", "targets", "loss_weights", "position_ids"):
        assert getattr(padded, name).dtype == getattr(batch, name).dtype
    assert pad(batch, 5, v) is batch
    with pytest.raises(EmulusError, match="a row of 5 ids cannot be padded to 4"):
        pad(batch, 4, v)


def test_batches_move_between_devices(grammar: Grammar) -> None:
    batch = collate([[1, 2]], grammar.vocabulary).to("meta")
    assert batch.input_ids.device.type == batch.loss_weights.device.type == "meta"
    assert batch.document_lengths == [2]


@pytest.mark.parametrize(
    ("documents", "masks", "says"),
    [
        ([], None, "leave out empty ones"),
        ([[1], []], None, "leave out empty ones"),
        ([[1]], [], "with 0 masks"),
        ([[1, 2]], [[True]], "1 places for 2 ids"),
    ],
)
def test_what_cannot_be_joined_is_refused(
    grammar: Grammar, documents: list[list[int]], masks: list[list[bool] | None] | None, says: str
) -> None:
    with pytest.raises(EmulusError, match=says):
        collate(documents, grammar.vocabulary, prompt_masks=masks)
