"""What counts as the same words, as a name and as a style."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulus.data.emoji.captions import STYLES, captions_of
from emulus.data.emoji.names import Emoji
from emulus.data.item import Item, Question
from emulus.evaluate.words import mention, name_of, names_of, overlap, plain, same, style_named

APPLE = Item(
    id="3d/1f34e",
    kind="image",
    captions=(
        "a 3D render of a red apple",
        "3D render of a red apple: apple, fruit, health",
        "3D画像：赤リンゴ",
        "une image 3D : pomme rouge",
        "fruit, red: a 3D render",
    ),
    split="test",
    stored=b"",
    questions=(Question("which style?", "3D"), Question("what is it?", "red apple")),
)


def test_names() -> None:
    assert name_of(APPLE) == "red apple"
    assert names_of(APPLE) == {
        "red apple",
        "apple, fruit, health",
        "apple",
        "fruit",
        "health",
        plain("赤リンゴ"),
        "pomme rouge",
    }


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a flat drawing of a red apple", True),
        ("une image 3D : pomme rouge", True),
        ("a pineapple", False),
        ("", False),
    ],
)
def test_mentions_are_whole_words(text: str, found: bool) -> None:
    assert (mention(names_of(APPLE)).search(plain(text)) is not None) == found
    assert mention([]).search(plain(text)) is None


def test_the_same_but_for_little() -> None:
    assert same(" The  Red apple.", "red apple")
    assert not same("red apples", "red apple")
    assert plain("a") == "a"


@pytest.mark.parametrize("style", STYLES)
def test_every_caption_of_the_data_names_its_style(style: str) -> None:
    emoji = Emoji(
        codepoint="1f34e",
        label="red apple",
        group="food & drink",
        keywords=("fruit",),
        translations=dict.fromkeys(("de", "fr", "es", "zh", "ja"), "x"),
    )
    for version in (1, 2, 3):
        for choice in range(30):
            for caption in captions_of(emoji, style, "white", choice, version):
                assert style_named(caption) == style, caption


def test_no_style() -> None:
    assert style_named("an apple") is None


@given(st.text(), st.text())
def test_overlap(first: str, second: str) -> None:
    assert overlap(first, second) == overlap(second, first)
    assert 0 <= overlap(first, second) <= 1


def test_overlap_of_words() -> None:
    assert overlap("a red apple", "the Red, apple!") == 1
    assert overlap("red apple", "red disc") == 0.5
    assert overlap("", "") == 0
