"""Figures of what is said are those of counting by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from emulus.data.item import Question
from emulus.data.source import open_source
from emulus.evaluate.answers import Answers, answers, captioned
from emulus.evaluate.held_out import Example, encode_examples
from emulus.evaluate.words import plain
from emulus.pipeline import Emulus


@pytest.fixture(scope="module")
def asked(model: Emulus, data: Path) -> list[Example]:
    """Validation pictures with questions; one has no colour. Style and colour are asked for in vain."""
    items = [item for item in open_source(data) if item.split == "validation" and item.kind == "image"]
    found = []
    for number, example in enumerate(encode_examples(model, items)):
        style, colour = example.item.id.split("/")[0], example.caption.split()[2]
        questions = [Question("which style?", style), Question("what is it?", f"{colour} disc")]
        questions += [Question("which colour?", colour)] if number else []
        captions = (example.caption, f"{style} disc: shape, {colour}")
        item = dataclasses.replace(example.item, captions=captions, questions=tuple(questions))
        found.append(dataclasses.replace(example, item=item))
    return found


@pytest.fixture(scope="module")
def found(model: Emulus, asked: list[Example]) -> Answers:
    """The neighbours are the items themselves."""
    result = answers(model, asked, [each.item for each in asked], [each.tokenized for each in asked])
    assert result is not None
    return result


def test_what_a_random_model_gets_wrong(found: Answers, asked: list[Example]) -> None:
    assert [each.question for each in found.questions] == ["which style?", "what is it?", "which colour?"]
    style, name, colour = found.questions
    count = len(asked)
    for each, number in zip(found.questions, (count, count, count - 1), strict=True):
        assert each.neighbour is not None
        assert each.likeliest is not None
        assert (each.exact.right, each.exact.asked) == (0, number)
        assert each.neighbour.right == each.majority.asked == each.likeliest.asked == number
    assert (style.possible, style.majority.share, style.any_name) == (2, 0.5, None)
    assert style.majority_answer in ("flat", "round")
    assert name.any_name is not None
    assert name.any_name.right == 0
    assert name.neighbour_any_name is not None
    assert name.neighbour_any_name.right == count
    assert colour.majority.right == 2
    assert found.items == found.neighbours == count
    assert found.captions.exact.right == 0
    assert found.captions.style is None
    assert found.neighbour_captions is not None
    assert found.neighbour_captions.exact.right == count


def test_what_it_says_is_right_where_the_data_say_the_same(model: Emulus, asked: list[Example]) -> None:
    """Half of the items are called what the model calls them; one has that for a keyword only."""
    told = []
    for number, example in enumerate(asked):
        said = model.answer(example.original, "what is it?")
        assert plain(said)
        item = example.item
        if number % 2 == 0:
            item = dataclasses.replace(item, questions=(Question("what is it?", f"The {said}."),))
        elif number == 1:
            keywords = f"disc: shape, {said}"
            item = dataclasses.replace(item, captions=(keywords,), questions=(Question("what is it?", "disc"),))
        written = model.describe(example.original)
        item = dataclasses.replace(item, captions=(*item.captions, written)) if number < 3 else item
        told.append(dataclasses.replace(example, item=item))
    result = answers(model, told, [])
    assert result is not None
    name = next(each for each in result.questions if each.question == "what is it?")
    assert name.any_name is not None
    assert (name.exact.right, name.any_name.right, name.neighbour, name.likeliest) == (4, 5, None, None)
    assert (name.majority.right, name.majority_answer) == (0, "")
    assert result.captions.exact.right == 3


@pytest.mark.parametrize(("count", "asked_by_likelihood"), [(1, False), (2, True), (16, True), (17, False)])
def test_few_possible_answers_are_asked_for_by_likelihood(
    model: Emulus, asked: list[Example], count: int, asked_by_likelihood: bool
) -> None:
    item = dataclasses.replace(asked[0].item, questions=(Question("which one?", "answer 0"),))
    known = [
        dataclasses.replace(item, id=f"known/{n}", questions=(Question("which one?", f"answer {n % count}"),))
        for n in range(2 * count)
    ]
    found = answers(model, [dataclasses.replace(asked[0], item=item)], known, [])
    assert found is not None
    (figures,) = found.questions
    assert (figures.likeliest is not None) == asked_by_likelihood
    assert figures.possible == (count if asked_by_likelihood else 0)


def test_the_majority_is_that_of_the_training_items(model: Emulus, asked: list[Example]) -> None:
    known = [
        dataclasses.replace(asked[0].item, id=f"known/{n}", questions=(Question("which style?", answer),))
        for n, answer in enumerate(["wild", "round", "wild", "flat", "wild"])
    ]
    found = answers(model, asked, known, [])
    assert found is not None
    style = found.questions[0]
    assert (style.majority_answer, style.majority.right, style.possible) == ("wild", 0, 3)


def test_a_keyword_is_a_name_but_not_the_name(asked: list[Example]) -> None:
    item = dataclasses.replace(
        asked[0].item, captions=("disc: shape, wheel",), questions=(Question("what is it?", "disc"),)
    )
    found = captioned([item] * 3, ["a red wheel", "a disc", "nothing of it"])
    assert found.named is not None
    assert found.any_name is not None
    assert (found.named.right, found.any_name.right, found.named.asked) == (1, 2, 3)


def test_captions_dealt_to_others(asked: list[Example]) -> None:
    items = [each.item for each in asked]
    one = captioned(items, ["there is a red disc"] * len(items))
    assert one.named is not None
    assert one.any_name is not None
    assert (one.named.right, one.any_name.right) == (2, 2)
    # Two of eight are red, and are not asked when the caption was written for one of them.
    others = [name for name in ("red", "green", "blue", "orange") for _ in range(2)]
    pairs = [(a, b) for a in others for b in others if a != b]
    assert one.dealt == pytest.approx(sum(b == "red" for _, b in pairs) / len(pairs))


def test_style_of_emoji_captions(asked: list[Example]) -> None:
    items = [
        dataclasses.replace(asked[0].item, id=f"{style}/{n}", captions=(caption,), questions=())
        for n, (style, caption) in enumerate([("3d", "a 3D render of a disc"), ("anim", "a disc moving in 3D")])
    ]
    found = captioned(items, ["a 3D emoji", "a 3D emoji"])
    assert found.style is not None
    assert (found.style.right, found.style.asked) == (1, 2)
    assert found.named is found.any_name is found.dealt is None


def test_nothing_is_asked_of_nothing(model: Emulus, asked: list[Example]) -> None:
    assert answers(model, [], []) is None
    plain = [dataclasses.replace(each, item=dataclasses.replace(each.item, questions=())) for each in asked[:2]]
    found = answers(model, plain, [])
    assert found is not None
    assert (found.questions, found.neighbour_captions, found.items) == ((), None, 2)
