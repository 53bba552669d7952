from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulus.data.emoji import base_of, split_of
from emulus.data.emoji.captions import article, noun_phrase, plain_name
from emulus.data.emoji.names import has_skin_tone, normalise
from emulus.data.source import split_of_key
from emulus.errors import EmulusError

TONES = ["1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"]
parts = st.integers(0x2000, 0x1FAFF).map(lambda number: f"{number:x}").filter(lambda part: part not in TONES)


def test_normalise_writes_one_form() -> None:
    assert normalise("0031-FE0F-20E3") == "31-20e3"
    assert normalise("1F44B-1F3FB") == "1f44b-1f3fb"


def test_normalise_refuses_other_words() -> None:
    with pytest.raises(EmulusError, match="'red-apple' is no code point sequence"):
        normalise("red-apple")


@given(st.lists(parts, min_size=1, max_size=5), st.data())
def test_skin_tones_and_variation_selectors_never_change_the_split(sequence: list[str], data: st.DataObject) -> None:
    place = data.draw(st.integers(1, len(sequence)))
    for extra in [*TONES, "FE0F"]:
        variant = "-".join([*sequence[:place], extra, *sequence[place:]])
        assert base_of(variant) == base_of("-".join(sequence))
        assert split_of(variant) == split_of("-".join(sequence))
        assert has_skin_tone(variant) == (extra in TONES)


def test_two_tones_that_are_spelt_as_two_people_stay_with_their_emoji() -> None:
    assert base_of("1faf1-1f3fb-200d-1faf2-1f3ff") == base_of("1f91d-1f3fd") == "1f91d"
    assert base_of("1f469-1f3fb-200d-1f91d-200d-1f469-1f3fc") == "1f46d"


def test_splits_are_known_and_about_90_5_5() -> None:
    # Pinned, since a changed split would leak what a trained checkpoint has seen into its test set.
    pinned = {"1f34e": "train", "1f600": "train", "1f334": "validation", "1f418": "test"}
    assert {code: split_of(code) for code in pinned} == pinned
    counts = Counter(split_of_key(f"{number:x}") for number in range(20_000))
    assert abs(counts["train"] / 20_000 - 0.9) < 0.01
    assert abs(counts["validation"] / 20_000 - 0.05) < 0.01
    assert abs(counts["test"] / 20_000 - 0.05) < 0.01


@pytest.mark.parametrize(
    ("label", "phrase"),
    [
        ("red apple", "a red apple"),
        ("eagle", "an eagle"),
        ("ewe", "a ewe"),
        ("unicorn", "a unicorn"),
        ("one-piece swimsuit", "a one-piece swimsuit"),
        ("SOS button", "an SOS button"),
        ("TOP arrow", "a TOP arrow"),
        ("x-ray", "an x-ray"),
        ("glasses", "glasses"),
        ("octopus", "an octopus"),
        ("dress", "a dress"),
        ("sushi", "sushi"),
        ("two hearts", "two hearts"),
        ("man lifting weights", "a man lifting weights"),
        ("people hugging", "people hugging"),
        ("leftwards pushing hand", "a leftwards pushing hand"),
        ("Leo", "the zodiac sign Leo"),
        ("one-thirty", "a clock showing one-thirty"),
        ("flag: Japan", "the flag of Japan"),
        ("flag: United States", "the flag of the United States"),
        ("flag: Cook Islands", "the flag of the Cook Islands"),
        ("keycap: 1", "the keycap 1"),
        ("man: bald", "a bald man"),
        ("person: beard", "a person with a beard"),
        ("woman: light skin tone, red hair", "a woman with light skin tone and red hair"),
        ("family: man, woman, girl, girl", "a family of a man, a woman and two girls"),
        ("kiss: man, man, dark skin tone", "a kiss between two men with dark skin tone"),
        ("person walking: facing right", "a person walking, facing right"),
    ],
)
def test_labels_become_phrases(label: str, phrase: str) -> None:
    assert noun_phrase(label) == phrase


def test_plain_names_have_no_article() -> None:
    assert [plain_name(label) for label in ("owl", "flag: Japan", "glasses")] == [
        "owl",
        "flag of Japan",
        "glasses",
    ]


@given(st.text(min_size=1).filter(str.strip))
def test_every_label_has_an_article(label: str) -> None:
    assert article(label) in ("a ", "an ")
    assert noun_phrase(label)
