"""Bits per held-out id of the decoder, beside models that only count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from emulus.data.tokens import TokenizedItem
from emulus.engine.scores import Ids, Scores, score
from emulus.errors import EmulusError
from emulus.evaluate.ngrams import NGrams, tuned_bits
from emulus.log import progress
from emulus.model import Decoder
from emulus.sequence import Document, Grammar, Image, Text, caption_first, caption_last, modalities


@dataclass(frozen=True, kw_only=True)
class BitsPerId:
    """Means over some ids; lower is better.

    Attributes:
        ids: How many ids.
        model: Bits per id of the decoder, over the whole vocabulary.
        unigram: Of counts of single training ids; it is told whether an id is visual or text.
        bigram: Of counts of pairs of neighbouring training ids; likewise.
    """

    ids: int
    model: float
    unigram: float
    bigram: float


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some of the ids.

    Attributes:
        modality: ``visual`` or ``text``.
        kind: Of the documents, ``picture`` or ``clip``.
        order: Of the documents, ``caption first`` or ``caption last``.
        bits: Of these ids.
    """

    modality: str
    kind: str
    order: str
    bits: BitsPerId


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How well held-out documents are foretold.

    Attributes:
        documents: How many documents were scored.
        training_ids: From how many training ids the counting models know what they know.
        all: By modality, ``visual`` and ``text``.
        parts: By modality, kind and order.
    """

    documents: int
    training_ids: int
    all: dict[str, BitsPerId]
    parts: tuple[Part, ...]


def likelihood(
    decoder: Decoder, grammar: Grammar, held_out: Sequence[TokenizedItem], training: Iterable[TokenizedItem]
) -> Likelihood:
    """Score held-out documents.

    Every item is scored in both orders: caption first (its picture given its words) and caption last (its words
    given its picture). Captions are taken in turn, so that every phrasing has its share, as in training.

    Args:
        decoder: The model.
        grammar: documents -> ids.
        held_out: Items with captions, never trained on.
        training: What the model was trained on, for the counting models.

    Raises:
        EmulusError: There is nothing to score or nothing to count.
    """
    known = training_ids(grammar, training)
    documents, labels = _both_orders(grammar, held_out)
    if not documents or not len(known):
        raise EmulusError("bits per id need held-out and training items with captions: there are none")
    flat = np.concatenate(documents)
    lengths = [len(ids) for ids in documents]
    document_of = np.repeat(np.arange(len(documents)), lengths)
    known_masks, masks = (modalities(ids, grammar.vocabulary) for ids in (known, flat))
    model_bits = np.zeros(len(flat))
    asked = np.logical_or(*masks.values())
    scores = score(decoder, documents, np.split(asked, np.cumsum(lengths)[:-1]), what="held-out documents")
    model_bits[asked] = -np.concatenate(scores) / np.log(2)

    everything: dict[str, BitsPerId] = {}
    parts: list[Part] = []
    ranges = {"visual": grammar.vocabulary.visual_range, "text": grammar.vocabulary.text_range}
    for modality, id_range in ranges.items():
        # Documents begin with BOS, which is of no modality, so no pair reaches over two documents.
        places, known_places = np.flatnonzero(masks[modality]), np.flatnonzero(known_masks[modality])
        if not len(places) or not len(known_places):
            continue
        counts = NGrams.fit(known[known_places - 1], known[known_places], id_range)
        bits = np.stack([model_bits[places], *tuned_bits(counts, flat[places - 1], flat[places])])
        everything[modality] = _means(bits)
        for kind, order in dict.fromkeys(labels):
            chosen = np.array([label == (kind, order) for label in labels])[document_of[places]]
            if chosen.any():
                parts.append(Part(modality=modality, kind=kind, order=order, bits=_means(bits[:, chosen])))
    return Likelihood(documents=len(documents), training_ids=len(known), all=everything, parts=tuple(parts))


def _both_orders(grammar: Grammar, items: Sequence[TokenizedItem]) -> tuple[list[Ids], list[tuple[str, str]]]:
    """Ids of each item's two documents, and the kind and order of each."""
    documents: list[Ids] = []
    labels: list[tuple[str, str]] = []
    for item, caption in with_captions(items):
        kind = "picture" if isinstance(item.media, Image) else "clip"
        for order, document in {
            "caption first": caption_first(caption, item.media),
            "caption last": caption_last(item.media, caption),
        }.items():
            documents.append(np.array(grammar.build(document)))
            labels.append((kind, order))
    return documents, labels


def with_captions(items: Iterable[TokenizedItem]) -> list[tuple[TokenizedItem, str]]:
    """Items that have captions, each with one of its own: in turn, so that every phrasing has its share."""
    captioned = [item for item in items if item.captions]
    return [(item, item.captions[number % len(item.captions)]) for number, item in enumerate(captioned)]


def _means(bits: Scores) -> BitsPerId:
    model, unigram, bigram = (float(mean) for mean in bits.mean(1))
    return BitsPerId(ids=bits.shape[1], model=model, unigram=unigram, bigram=bigram)


def training_ids(grammar: Grammar, items: Iterable[TokenizedItem]) -> Ids:
    """Ids of training documents, end to end, for counting.

    The items' media begin and end with their caption in turn, as in pretraining; the captions for which an item has
    no second picture stand by themselves, so that no word is missed.
    """
    parts = [np.empty(0, dtype=np.int64)]
    for number, item in enumerate(progress(items, what="counting training ids")):
        captions = item.captions or ("",)
        place = number // 2 % len(captions)
        order = caption_last(item.media, captions[place]) if number % 2 else caption_first(captions[place], item.media)
        documents = [order, *(Document((Text(text),)) for i, text in enumerate(captions) if i != place)]
        parts += [np.array(grammar.build(document)) for document in documents]
    return np.concatenate(parts)
