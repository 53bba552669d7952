"""Bits per id of what can and cannot be known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulus.data.tokens import TokenizedItem
from emulus.engine.scores import score_endings
from emulus.errors import EmulusError
from emulus.evaluate.likelihood import BitsPerId, Likelihood, likelihood, training_ids, with_captions
from emulus.evaluate.ngrams import NGrams, tuned_bits
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


def test_captions_take_turns(model: Emulus) -> None:
    """Every phrasing of a data set has its share: in what is scored, and in what is counted beside a picture."""
    items = [picture(seed, f"one {seed}", f"two {seed}", f"three {seed}") for seed in range(7)]
    captioned = with_captions([items[0], picture(9), *items[1:]])
    assert [caption.split()[0] for _, caption in captioned] == ["one", "two", "three", "one", "two", "three", "one"]
    assert [item for item, _ in captioned] == items
    documents = split_documents(training_ids(model.grammar, items), model.grammar.vocabulary.bos)
    for number, item in enumerate(items):
        own = item.captions[number // 2 % 3]
        order = caption_last(item.media, own) if number % 2 else caption_first(own, item.media)
        others = [Document((Text(text),)) for text in item.captions if text != own]
        expected = [model.grammar.build(document) for document in (order, *others)]
        assert documents[3 * number : 3 * number + 3] == expected


def split_documents(ids: np.ndarray, bos: int) -> list[list[int]]:
    starts = np.flatnonzero(ids == bos).tolist()
    return [ids[start:stop].tolist() for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]


def test_bits_are_those_of_plain_passes_and_of_counts(model: Emulus) -> None:
    """Each part recomputed id by id: the decoder over the whole vocabulary, pairs with the id before them."""
    training = [picture(seed, f"a disc {seed % 3}") for seed in range(20, 40)]
    clip = TokenizedItem(id="c", captions=("a clip",), media=Video(torch.zeros(2, 3, 3, dtype=torch.int64), fps=8))
    held_out = [picture(0, "disc 1", "a second phrasing"), clip, picture(1, "disc 2", "a disc 2")]
    found = likelihood(model.decoder, model.grammar, held_out, training)
    known = training_ids(model.grammar, training)
    vocabulary = model.grammar.vocabulary
    bits: dict[tuple[str, str, str], list[float]] = {}
    pairs: dict[str, list[tuple[int, int]]] = {"visual": [], "text": []}
    for item, caption in with_captions(held_out):
        kind = "picture" if isinstance(item.media, Image) else "clip"
        for order, document in (
            ("caption first", caption_first(caption, item.media)),
            ("caption last", caption_last(item.media, caption)),
        ):
            ids = model.grammar.build(document)
            with torch.no_grad():
                logs = model.decoder(torch.tensor([ids]))[0].log_softmax(-1)
            for modality, mask in modalities(np.array(ids), vocabulary).items():
                for place in np.flatnonzero(mask).tolist():
                    value = -float(logs[place - 1, ids[place]]) / np.log(2)
                    bits.setdefault((modality, kind, order), []).append(value)
                    pairs[modality].append((ids[place - 1], ids[place]))
    assert {(each.modality, each.kind, each.order) for each in found.parts} == set(bits)
    for names, values in bits.items():
        assert part(found, *names).ids == len(values)
        assert part(found, *names).model == pytest.approx(np.mean(values), abs=1e-3)
    for modality, id_range in (("visual", vocabulary.visual_range), ("text", vocabulary.text_range)):
        places = np.flatnonzero(modalities(known, vocabulary)[modality])
        counts = NGrams.fit(known[places - 1], known[places], id_range)
        before, ids = np.array(pairs[modality]).T
        unigram, bigram = tuned_bits(counts, before, ids)
        assert found.all[modality].unigram == pytest.approx(unigram.mean())
        assert found.all[modality].bigram == pytest.approx(bigram.mean())
        assert found.all[modality].ids == len(ids)


def test_nothing_to_score(model: Emulus) -> None:
    with pytest.raises(EmulusError, match="held-out and training items"):
        likelihood(model.decoder, model.grammar, [], [picture(0, "a disc")])
