"""Bits per id of what can and cannot be known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulus.data.tokens import TokenizedItem
from emulus.engine.scores import score_endings
from emulus.errors import EmulusError
from emulus.evaluate.likelihood import BitsPerId, Likelihood, likelihood, training_ids
from emulus.pipeline import Emulus
from emulus.sequence import Document, Image, Text, Video, caption_first, caption_last, modalities


def picture(seed: int, *captions: str) -> TokenizedItem:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 64, size=(4, 4)))
    return TokenizedItem(id=f"p/{seed}", captions=captions, media=Image(codes))


def part(found: Likelihood, *names: str) -> BitsPerId:
    return next(part.bits for part in found.parts if (part.modality, part.kind, part.order) == names)


def test_modalities_leave_out_what_the_grammar_writes(model: Emulus) -> None:
    grammar, item = model.grammar, picture(0, "a red disc")
    ids = np.array(grammar.build(caption_first("a red disc", item.media)))
    masks = modalities(np.concatenate([ids, ids]), grammar.vocabulary)
    start = grammar.vocabulary.visual_start
    both = np.concatenate([ids, ids])
    assert (both[masks["visual"]] - start).tolist() == item.media.codes.flatten().tolist() * 2
    assert both[masks["text"]].tolist() == model.text.encode("a red disc") * 2


def test_training_ids_hold_every_caption_and_picture(model: Emulus) -> None:
    items = [picture(seed, "one disc", "two discs", "three") for seed in range(3)]
    found = training_ids(model.grammar, items)
    masks = modalities(found, model.grammar.vocabulary)
    codes = torch.cat([item.media.codes.flatten() for item in items]).tolist()
    assert (found[masks["visual"]] - model.grammar.vocabulary.visual_start).tolist() == codes
    words = sum(len(model.text.encode(text)) for text in items[0].captions)
    assert int(masks["text"].sum()) == 3 * words


def test_bits_beside_counting_models(model: Emulus) -> None:
    """Random codes: no model can know more than their distribution, and an untrained one knows nothing at all."""
    training = [picture(seed, f"disc {seed % 7}") for seed in range(100, 160)]
    clip = TokenizedItem(id="c", captions=("a clip",), media=Video(torch.zeros(2, 4, 4, dtype=torch.int64), fps=8))
    found = likelihood(model.decoder, model.grammar, [*(picture(seed, "disc 3") for seed in range(8)), clip], training)
    assert found.documents == 18
    assert found.all["visual"].ids == 2 * (8 * 16 + 32)
    assert part(found, "visual", "picture", "caption first").ids == 8 * 16
    assert part(found, "visual", "picture", "caption last").unigram == pytest.approx(6, abs=0.3)
    # The decoder's random weights are near to uniform over the whole vocabulary.
    assert found.all["visual"].model == pytest.approx(np.log2(model.grammar.vocabulary.size), abs=0.5)
    # "disc" and a number: the words are easily counted.
    assert (
        part(found, "text", "picture", "caption first").bigram
        < part(found, "text", "picture", "caption first").unigram
        < 5
    )


def test_text_given_a_picture_differs_from_text_alone(model: Emulus) -> None:
    found = likelihood(model.decoder, model.grammar, [picture(0, "a red disc")], [picture(1, "a red disc")])
    grammar, ids = model.grammar, model.text.encode("a red disc")
    before = grammar.build(Document((picture(0).media,)), eos=False)
    assert grammar.build(caption_last(picture(0).media, "a red disc"), eos=False) == [*before, *ids]
    (expected,) = score_endings(model.decoder, np.array(before), [np.array(ids)])
    text = part(found, "text", "picture", "caption last")
    assert text.model * text.ids == pytest.approx(-expected / np.log(2), abs=1e-3)
    alone = grammar.build(Document((Text("a red disc"),)), eos=False)
    assert alone[1:] == ids


def test_nothing_to_score(model: Emulus) -> None:
    with pytest.raises(EmulusError, match="held-out and training items"):
        likelihood(model.decoder, model.grammar, [], [picture(0, "a disc")])
