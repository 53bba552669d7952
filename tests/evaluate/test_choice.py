"""A model that knows its pictures by heart picks the right ones; one that knows nothing does not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emulus.data.tokens import TokenizedItem
from emulus.evaluate.choice import (
    Accuracy,
    Ranks,
    caption_scores,
    choose,
    make_groups,
    neighbour_scores,
    picture_scores,
    ranks_of,
)
from emulus.model import Decoder
from emulus.model.attention import Row
from emulus.pipeline import Emulus
from emulus.sequence import Document, Image, Text, caption_first, caption_last, collate

WORDS = ("red", "green", "blue", "orange")


def items(styles: tuple[str, ...] = ("flat", "round"), each: int = 4) -> list[TokenizedItem]:
    found = []
    for style in styles:
        for place in range(each):
            codes = np.random.default_rng([len(style), place]).integers(0, 64, size=(3, 3))
            caption = f"a {style} {WORDS[place % 4]} disc" + " big" * (place // 4)
            found.append(
                TokenizedItem(id=f"{style}/{place}", captions=(caption,), media=Image(torch.from_numpy(codes)))
            )
    return found


@pytest.fixture(scope="module")
def learned(model: Emulus) -> Decoder:
    """The tiny decoder after learning eight pictures and their captions by heart."""
    torch.manual_seed(0)
    decoder = copy.deepcopy(model.decoder).eval()
    documents = []
    for item in items():
        documents += [caption_first(item.captions[0], item.media), caption_last(item.media, item.captions[0])]
    batch = collate([model.grammar.build(document) for document in documents], model.grammar.vocabulary)
    here, row = batch.loss_weights.nonzero()[:, 0], Row.whole(batch.document_lengths)
    equal = torch.full((len(here),), 1 / len(here))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        losses = decoder.losses(
            batch.input_ids, batch.position_ids, row, supervised=here, targets=batch.targets[here], weights=equal
        )
        losses.total.backward()
        optimizer.step()
    return decoder


@pytest.fixture(scope="module")
def undecided(model: Emulus) -> Decoder:
    """The tiny decoder with random weights that are large enough for its scores to differ from item to item."""
    decoder = copy.deepcopy(model.decoder).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.2, generator=generator)
    return decoder


def test_a_model_that_knows_picks_right(model: Emulus, learned: Decoder) -> None:
    found = choose(learned, model.grammar, make_groups(items(), size=8, count=1))
    assert found is not None
    assert (found.candidates, found.groups, found.chance) == (8, 1, 1 / 8)
    of_pictures = (found.picture_raw, found.picture_pmi, found.picture_by_words, found.picture_both)
    for ranks in (*of_pictures, found.caption_raw, found.caption_pmi, found.caption_both):
        assert ranks is not None
        assert (ranks.top1.right, ranks.top1.asked, ranks.median) == (8, 8, 1)


def test_a_model_that_prefers_one_picture_is_right_once(model: Emulus, learned: Decoder) -> None:
    """Captions that belong to other pictures: what the model learned is now wrong for all but the unmoved."""
    known = items()
    moved = [
        *known[:2],
        *(
            TokenizedItem(id=item.id, captions=other.captions, media=item.media)
            for item, other in zip(known[2:], [*known[3:], known[2]], strict=True)
        ),
    ]
    found = choose(learned, model.grammar, [moved])
    assert found is not None
    assert found.picture_pmi is not None
    assert found.picture_pmi.top1.right == found.caption_raw.top1.right == 2
    assert found.picture_pmi.top10.right == 8


def test_both_sides_add_up(model: Emulus, learned: Decoder) -> None:
    group = items()[:5]
    words, words_alone = caption_scores(learned, model.grammar, group)
    codes, codes_alone = picture_scores(learned, model.grammar, group)
    by_picture = (words - words_alone) + (codes - codes_alone).T
    found = choose(learned, model.grammar, [group])
    assert found is not None
    assert found.caption_both == Ranks.of(ranks_of(by_picture))
    assert found.picture_both == Ranks.of(ranks_of(by_picture.T))
    assert found.picture_by_words == Ranks.of(ranks_of(words.T))


def test_every_figure_is_ranked_by_what_it_is_named_after(undecided: Decoder, model: Emulus) -> None:
    """With a decoder that knows nothing the ranks are arbitrary, so every figure has ranks of its own."""
    groups = [items(each=5), items(("other", "square"), each=5)]
    found = choose(undecided, model.grammar, groups)
    assert found is not None
    ranks: dict[str, list[int]] = {}
    for group in groups:
        words, words_alone = caption_scores(undecided, model.grammar, group)
        codes, codes_alone = picture_scores(undecided, model.grammar, group)
        tables = {
            "caption_raw": words,
            "caption_pmi": words - words_alone,
            "caption_both": words - words_alone + (codes - codes_alone).T,
            "picture_raw": codes,
            "picture_pmi": codes - codes_alone,
            "picture_both": (words - words_alone).T + codes - codes_alone,
            "picture_by_words": words.T,
            # What a wrong sign would give, which must be something else for this test to tell.
            "caption_sum": words + words_alone,
            "picture_sum": codes + codes_alone,
        }
        for name, table in tables.items():
            ranks.setdefault(name, []).extend(ranks_of(table))
    for wrong in ("caption_sum", "picture_sum"):
        name = wrong.replace("sum", "pmi")
        assert Ranks.of(ranks.pop(wrong)) != Ranks.of(ranks[name])
    assert {name: getattr(found, name) for name in ranks} == {name: Ranks.of(each) for name, each in ranks.items()}


def test_scores_are_sums_over_the_ids_of_the_caption_or_the_picture(undecided: Decoder, model: Emulus) -> None:
    """Against plain forward passes: of captions among text ids, of pictures among visual ones."""
    group = items()[:3]
    vocabulary = model.grammar.vocabulary

    @torch.no_grad()
    def plain(ids: list[int], id_range: tuple[int, int]) -> float:
        start, stop = id_range
        logs = undecided(torch.tensor([ids]))[0][:, start:stop].log_softmax(-1)
        return sum(float(logs[place - 1, id - start]) for place, id in enumerate(ids) if start <= id < stop and place)

    # A picture's size is written in text ids, too, and is not part of its caption.
    def size_text(media: Image) -> float:
        return plain(model.grammar.build(caption_last(media, ""), eos=False), vocabulary.text_range)

    words, words_alone = caption_scores(undecided, model.grammar, group)
    codes, codes_alone = picture_scores(undecided, model.grammar, group)
    for row, item in enumerate(group):
        for column, other in enumerate(group):
            written = model.grammar.build(caption_last(item.media, other.captions[0]), eos=False)
            expected = plain(written, vocabulary.text_range) - size_text(item.media)
            assert words[row, column] == pytest.approx(expected, abs=1e-3)
            drawn = model.grammar.build(caption_first(item.captions[0], other.media), eos=False)
            assert codes[row, column] == pytest.approx(plain(drawn, vocabulary.visual_range), abs=1e-3)
        alone = model.grammar.build(Document((Text(item.captions[0]),)), eos=False)
        assert words_alone[row] == pytest.approx(plain(alone, vocabulary.text_range), abs=1e-3)
        bare = model.grammar.build(caption_first("", item.media), eos=False)
        assert codes_alone[row] == pytest.approx(plain(bare, vocabulary.visual_range), abs=1e-3)


def test_mutual_information_subtracts_the_score_without_a_caption(model: Emulus, learned: Decoder) -> None:
    group = items()[:3]
    table, alone = picture_scores(learned, model.grammar, group)
    assert table.shape == (3, 3)
    again, nothing = picture_scores(
        learned, model.grammar, [TokenizedItem(id=i.id, captions=("",), media=i.media) for i in group]
    )
    assert again == pytest.approx(np.tile(alone, (3, 1)), abs=1e-3)
    assert nothing == pytest.approx(alone, abs=1e-3)
    words, words_alone = caption_scores(learned, model.grammar, group)
    assert (words.diagonal() > words_alone).all()


def test_groups_are_full_distinct_and_always_the_same() -> None:
    pool = [*items(each=8), *items(("other",), each=3), TokenizedItem(id="flat/x", captions=(), media=items()[0].media)]
    groups = make_groups(pool, size=4, count=10)
    assert groups == make_groups(pool[::-1], size=4, count=10)
    assert [len(group) for group in groups] == [4] * 4
    chosen = [item.id for group in groups for item in group]
    assert len(set(chosen)) == len(chosen)
    assert all(len({item.captions[0] for item in group}) == 4 for group in groups)
    assert make_groups(pool, size=4, count=10, seed=1) != groups


def test_groups_of_one_style_take_turns() -> None:
    groups = make_groups(items(each=8), size=4, count=3, same_style=True)
    styles = [{item.id.split("/")[0] for item in group} for group in groups]
    assert styles == [{"flat"}, {"round"}, {"flat"}]
    assert make_groups(items(each=8), size=9, count=3, same_style=True) == []


def test_same_caption_never_meets_itself() -> None:
    twins = [TokenizedItem(id=str(n), captions=("a disc",), media=items()[0].media) for n in range(6)]
    assert make_groups(twins, size=2) == []


def test_too_few_pictures(model: Emulus) -> None:
    assert choose(model.decoder, model.grammar, make_groups(items(), size=16)) is None


def test_only_captions(model: Emulus, learned: Decoder) -> None:
    groups = make_groups(items(), size=8, count=1)
    found = choose(learned, model.grammar, groups, pictures=False)
    both = choose(learned, model.grammar, groups)
    assert found is not None
    assert both is not None
    assert found.picture_pmi is found.picture_raw is found.caption_neighbour is None
    assert found.picture_both is found.caption_both is None
    assert found.picture_by_words == both.picture_by_words
    assert (found.caption_raw, found.caption_pmi) == (both.caption_raw, both.caption_pmi)


def test_neighbours_choose_by_shared_words(model: Emulus, learned: Decoder) -> None:
    groups = make_groups(items(), size=8, count=1)
    same = {item.id: f"{item.captions[0]} indeed" for item in items()}
    known = choose(learned, model.grammar, groups, pictures=False, neighbours=same)
    nothing = choose(learned, model.grammar, groups, pictures=False, neighbours={})
    assert known is not None
    assert nothing is not None
    assert known.caption_neighbour is not None
    assert known.caption_neighbour.top1.right == 8
    assert nothing.caption_neighbour is not None
    assert nothing.caption_neighbour.top1.right < 6


def test_a_row_of_neighbour_scores_is_one_picture_s() -> None:
    group = items(each=4)[:3]
    table = neighbour_scores(group, {group[0].id: group[2].captions[0]})
    assert table[0].argmax() == 2
    assert table[0, 2] > 0.99
    assert (table[1:] < 1e-5).all()


@given(st.integers(2, 12), st.integers(0, 2**31))
def test_ranks_are_those_of_sorting(size: int, seed: int) -> None:
    table = np.random.default_rng(seed).normal(size=(size, size))
    expected = [sorted(row, reverse=True).index(row[place]) + 1 for place, row in enumerate(table.tolist())]
    assert ranks_of(table) == expected
    assert ranks_of(np.zeros((size, size))) == [size] * size


def test_ranks_in_figures() -> None:
    found = Ranks.of([1, 1, 3, 6, 6, 11])
    assert [found.top1.right, found.top5.right, found.top10.right, found.median] == [2, 3, 5, 4.5]


def test_wilson_interval() -> None:
    # Published example: 10 of 100 give 5.52 % to 17.44 %.
    accuracy = Accuracy.of(10, 100)
    assert (accuracy.low, accuracy.high) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert accuracy.share == 0.1
    assert Accuracy.of(0, 16).low == 0
    assert Accuracy.of(16, 16).high == 1
