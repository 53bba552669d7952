"""Questions about emoji, and which of them may be mirrored."""

from __future__ import annotations

import pytest

from emulus.data.emoji.names import Emoji
from emulus.data.emoji.questions import how_many, questions_of, what_moves, which_skin_tone
from emulus.data.emoji.versions import may_be_mirrored


def emoji(label: str, group: str = "people & body", codepoint: str = "1f34e") -> Emoji:
    return Emoji(codepoint=codepoint, label=label, keywords=(), group=group, translations={})


def test_questions_ask_what_the_words_answer() -> None:
    apple = emoji("red apple", "food & drink")
    assert dict(questions_of(apple, "3d", "pale blue")) == {
        "which style?": "3D",
        "what is it?": "red apple",
        "what group?": "food & drink",
        "which background colour?": "pale blue",
        "how many?": "one",
    }
    hand = emoji("waving hand: medium-dark skin tone", codepoint="1f44b-1f3fe")
    assert dict(questions_of(hand, "anim", "white")) == {
        "which style?": "animated 3D",
        "what is it?": "waving hand with medium-dark skin tone",
        "what group?": "people & body",
        "which background colour?": "white",
        "how many?": "one",
        "which skin tone?": "medium-dark",
        "what moves?": "hand",
    }
    assert "what moves?" not in dict(questions_of(hand, "3d", "white"))


@pytest.mark.parametrize(
    ("label", "number"),
    [
        ("family: man, woman, girl, boy", "four"),
        ("family: woman, boy, boy", "three"),
        ("family: adult, child", "two"),
        ("family", None),
        ("kiss: woman, man, dark skin tone, light skin tone", "two"),
        ("couple with heart", "two"),
        ("folded hands: light skin tone", "two"),
        ("man health worker", "one"),
        ("person: bald", "one"),
        ("woman feeding baby", None),
        ("woman and man holding hands", "two"),
        ("person getting haircut", None),
        ("mountain", None),
    ],
)
def test_numbers_are_told_where_the_label_says_them(label: str, number: str | None) -> None:
    assert how_many(emoji(label)) == number


def test_smileys_are_single() -> None:
    assert how_many(emoji("face with tears of joy", "smileys & emotion")) == "one"
    assert how_many(emoji("two hearts", "smileys & emotion")) == "two"
    assert how_many(emoji("revolving hearts", "smileys & emotion")) is None
    assert how_many(emoji("three o\u2019clock", "travel & places")) is None


def test_a_skin_tone_is_asked_for_where_there_is_one() -> None:
    assert which_skin_tone(emoji("handshake", codepoint="1f91d")) is None
    assert which_skin_tone(emoji("handshake", codepoint="1f91d-1f3fb")) == "light"
    assert which_skin_tone(emoji("kiss", codepoint="1f468-1f3fc-200d-1f468-1f3fc")) == "medium-light"
    assert which_skin_tone(emoji("kiss", codepoint="1f468-1f3fc-200d-1f468-1f3fd")) is None


def test_what_moves_is_told_for_a_few_kinds() -> None:
    assert what_moves(emoji("man bowing: dark skin tone")) == "man"
    assert what_moves(emoji("smiling face with hearts", "smileys & emotion")) == "face"
    assert what_moves(emoji("women holding hands")) is None
    assert what_moves(emoji("tiger face", "animals & nature")) is None


@pytest.mark.parametrize(
    ("label", "group"),
    [
        ("flag: Japan", "flags"),
        ("up arrow", "symbols"),
        ("waving hand", "people & body"),
        ("backhand index pointing left", "people & body"),
        ("person walking", "people & body"),
        ("person walking: facing right", "people & body"),
        ("three o\u2019clock", "travel & places"),
        ("alarm clock", "travel & places"),
        ("last quarter moon face", "travel & places"),
        ("hotel", "travel & places"),
        ("chart increasing", "objects"),
        ("musical note", "objects"),
        ("magnifying glass tilted right", "objects"),
    ],
)
def test_what_would_mean_something_else_is_not_mirrored(label: str, group: str) -> None:
    assert not may_be_mirrored(emoji(label, group))


@pytest.mark.parametrize(
    ("label", "group"),
    [("red apple", "food & drink"), ("grinning face", "smileys & emotion"), ("man cook", "people & body")],
)
def test_what_means_the_same_is_mirrored(label: str, group: str) -> None:
    assert may_be_mirrored(emoji(label, group))
