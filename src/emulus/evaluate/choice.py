"""caption -> picture, picture -> caption: does the model's own likelihood pick what belongs together?"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emulus.data.tokens import TokenizedItem
from emulus.engine.scores import Ids, Scores, score, score_endings
from emulus.evaluate.words import overlap
from emulus.log import progress
from emulus.model import Decoder
from emulus.sequence import Grammar, Image, caption_first, caption_last, modalities, templates

Matrix = npt.NDArray[np.float64]

Z = 1.959964
"""Standard deviations of a two-sided interval of 95 %."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often the right one was picked.

    Attributes:
        right: How often.
        asked: Of how many questions.
        share: Their ratio.
        low: Lower end of the 95 % interval (Wilson's).
        high: Upper end. Questions of one group share their candidates, so both are a little narrow.
    """

    right: int
    asked: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, right: int, asked: int) -> Accuracy:
        """With the interval.

        Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
        """
        share, square = right / asked, Z * Z / asked
        middle = (share + square / 2) / (1 + square)
        reach = math.sqrt(share * (1 - share) / asked + square / asked / 4) * Z / (1 + square)
        low, high = max(middle - reach, 0.0), min(middle + reach, 1.0)
        return cls(right=right, asked=asked, share=share, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where the right one stood among all candidates, 1 being the first.

    Attributes:
        top1: How often it was the first.
        top5: How often among the first five.
        top10: How often among the first ten.
        median: The middle rank.
    """

    top1: Accuracy
    top5: Accuracy
    top10: Accuracy
    median: float

    @classmethod
    def of(cls, ranks: Sequence[int]) -> Ranks:
        """Of at least one rank."""
        top1, top5, top10 = (Accuracy.of(sum(rank <= most for rank in ranks), len(ranks)) for most in (1, 5, 10))
        return cls(top1=top1, top5=top5, top10=top10, median=statistics.median(ranks))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Both directions, by raw likelihood and by pointwise mutual information.

    Mutual information subtracts what a candidate scores by itself: a plain picture is likely under any caption. The
    decoder foretells it from either side, as ``log p(caption | picture) - log p(caption | no picture)`` and as
    ``log p(picture | caption) - log p(picture | no caption)``, which would agree if its likelihoods were those of the
    world; their sum hears both.

    Attributes:
        candidates: In each question.
        chance: How often guessing is right.
        groups: Of as many pictures as there are candidates; every one of a group is asked for once.
        caption_raw: Picture to caption, by log p(caption | picture).
        caption_pmi: Picture to caption, by log p(caption | picture) - log p(caption | no picture).
        picture_raw: Caption to picture, by log p(picture | caption); ``None`` where that was not asked.
        picture_pmi: Caption to picture, by log p(picture | caption) - log p(picture | no caption); likewise.
        picture_by_words: Caption to picture, by log p(caption | picture); what the caption scores without a picture is
            the same for all of them.
        caption_both: Picture to caption, by the sum of the information from either side; likewise.
        picture_both: Caption to picture, by the same sum; likewise.
        caption_neighbour: Picture to caption without the decoder: by the words that a candidate shares with the
            caption of the nearest training picture (see :func:`emulus.evaluate.peers.nearest`).
    """

    candidates: int
    chance: float
    groups: int
    caption_raw: Ranks
    caption_pmi: Ranks
    picture_by_words: Ranks
    picture_raw: Ranks | None = None
    picture_pmi: Ranks | None = None
    caption_both: Ranks | None = None
    picture_both: Ranks | None = None
    caption_neighbour: Ranks | None = None


def choose(
    decoder: Decoder,
    grammar: Grammar,
    groups: Sequence[Sequence[TokenizedItem]],
    *,
    pictures: bool = True,
    neighbours: Mapping[str, str] | None = None,
) -> Choice | None:
    """Ask for every caption of every group by its picture, and for every picture by its caption.

    Args:
        decoder: The model.
        grammar: documents -> ids.
        groups: See :func:`make_groups`; all of one size.
        pictures: Whether to ask for pictures, too. Every picture is scored under every caption for that, which takes
            as many times as long as a picture has more ids than a caption.
        neighbours: By the items' ids, captions of the nearest training pictures.

    Returns:
        The figures, or ``None`` without groups.
    """
    if not groups:
        return None
    found: dict[str, list[int]] = {}
    for group in progress(groups, what="choosing among pictures and captions"):
        tables = _tables("caption", *caption_scores(decoder, grammar, group))
        tables["picture_by_words"] = tables["caption_raw"].T
        if pictures:
            tables |= _tables("picture", *picture_scores(decoder, grammar, group))
            both = tables["caption_pmi"] + tables["picture_pmi"].T
            tables |= {"caption_both": both, "picture_both": both.T}
        if neighbours is not None:
            tables["caption_neighbour"] = neighbour_scores(group, neighbours)
        for name, table in tables.items():
            found.setdefault(name, []).extend(ranks_of(table))
    size = len(groups[0])
    ranks = {name: Ranks.of(each) for name, each in found.items()}
    return Choice(candidates=size, chance=1 / size, groups=len(groups), **ranks)


def _tables(name: str, table: Matrix, alone: Scores) -> dict[str, Matrix]:
    return {f"{name}_raw": table, f"{name}_pmi": table - alone}


def picture_scores(decoder: Decoder, grammar: Grammar, group: Sequence[TokenizedItem]) -> tuple[Matrix, Scores]:
    """Natural logarithm of p(picture | caption), a row per caption, and of p(picture | no caption)."""
    captions = [*(item.captions[0] for item in group), ""]
    documents = [
        np.array(grammar.build(caption_first(caption, item.media), eos=False)) for caption in captions for item in group
    ]
    visual = [modalities(ids, grammar.vocabulary)["visual"] for ids in documents]
    scores = score(decoder, documents, visual, vocab_range=grammar.vocabulary.visual_range, what="pictures")
    table = np.array([part.sum() for part in scores]).reshape(len(captions), len(group))
    return table[:-1], table[-1]


def caption_scores(decoder: Decoder, grammar: Grammar, group: Sequence[TokenizedItem]) -> tuple[Matrix, Scores]:
    """Natural logarithm of p(caption | picture), a row per picture, and of p(caption | no picture)."""
    prompts = [templates.caption(grammar, item.media) for item in group]
    beginnings: list[Ids] = [np.array(prompt.ids) for prompt in [*prompts]] + [np.array(prompts[0].null_ids)]
    endings = []
    for item, beginning in zip(group, beginnings, strict=False):
        document = np.array(grammar.build(caption_last(item.media, item.captions[0]), eos=False))
        endings.append(document[len(beginning) :])
    text = grammar.vocabulary.text_range
    table = np.array([score_endings(decoder, ids, endings, vocab_range=text) for ids in beginnings])
    return table[:-1], table[-1]


def neighbour_scores(group: Sequence[TokenizedItem], neighbours: Mapping[str, str]) -> Matrix:
    """Words that each caption, a column, shares with the caption of each picture's neighbour, a row."""
    shared = [[overlap(neighbours.get(item.id, ""), other.captions[0]) for other in group] for item in group]
    # Captions of the same style tie all the time; lots are drawn then, so that nobody gains from it.
    return np.array(shared) + np.random.default_rng(len(group)).uniform(0, 1e-6, (len(group), len(group)))


def ranks_of(table: Matrix) -> list[int]:
    """The rank of the diagonal in each row; what ties with it counts as better."""
    own = table.diagonal()[:, None]
    return [int(rank) for rank in (table >= own).sum(1)]


def make_groups(
    items: Sequence[TokenizedItem], *, size: int = 16, count: int = 4, same_style: bool = False, seed: int = 0
) -> list[list[TokenizedItem]]:
    """Put captioned pictures into groups, always the same ones for the same items and seed.

    Args:
        items: Pictures; clips among them are left out.
        size: Pictures in a group, all with different captions.
        count: Most groups.
        same_style: Only pictures of one style (see :func:`style_of`) meet in a group, and styles take turns.
        seed: Another seed gives other groups.

    Returns:
        Full groups, which share no picture; fewer than ``count`` where there are not enough pictures.
    """
    pictures = [item for item in items if isinstance(item.media, Image) and item.captions]
    pictures.sort(key=lambda item: hashlib.sha256(f"{seed} {item.id}".encode()).digest())
    pools: dict[str, list[TokenizedItem]] = {}
    for item in pictures:
        pools.setdefault(style_of(item.id) if same_style else "", []).append(item)
    by_pool = [_full_groups(pool, size) for _, pool in sorted(pools.items())]
    rounds = max((len(groups) for groups in by_pool), default=0)
    turns = [groups[place] for place in range(rounds) for groups in by_pool if place < len(groups)]
    return turns[:count]


def _full_groups(pool: Sequence[TokenizedItem], size: int) -> list[list[TokenizedItem]]:
    groups: list[list[TokenizedItem]] = []
    waiting = list(pool)
    while len(group := _distinct(waiting, size)) == size:
        groups.append(group)
        taken = {item.id for item in group}
        waiting = [item for item in waiting if item.id not in taken]
    return groups


def _distinct(items: Sequence[TokenizedItem], size: int) -> list[TokenizedItem]:
    """The first items of different captions."""
    first: dict[str, TokenizedItem] = {}
    for item in items:
        if len(first) < size:
            first.setdefault(item.captions[0], item)
    return list(first.values())


def style_of(id: str) -> str:
    """The part of an item's id before the first slash, which names its style or folder; empty if there is none."""
    return id.split("/", 1)[0] if "/" in id else ""
