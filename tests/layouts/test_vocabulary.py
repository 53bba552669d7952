"""The vocabulary as published: tables that say every id once, and what is wrong with those that do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.layouts import vocabulary as vocabularies
from emulus.tokenizer.vocabulary import Vocabulary

THREE = ["<|image token|>", "<|image start|>", "<|image end|>"]


def visual(codes: int) -> list[str]:
    return [f"<|visual token {code:06d}|>" for code in range(codes)]


@given(st.integers(1, 2000), st.integers(1, 300))
def test_ids_and_names_are_a_bijection(text_size: int, codes: int) -> None:
    vocabulary = vocabularies.from_lines(text_size, [*THREE, "", *visual(codes), "  "])
    assert vocabulary.size == text_size + 208 + 3 + codes
    names = vocabularies.names_after_text(vocabulary)
    assert names == [*vocabularies.FIRST_NAMES, *THREE, *visual(codes)]
    assert [vocabulary.special_names[name] for name in names] == list(range(text_size, vocabulary.size))
    assert [vocabulary.surface(id) for id in range(text_size, vocabulary.size)] == names
    pieces = [f"piece {index}" for index in range(text_size)]
    ids = vocabularies.whole_map(pieces, names)
    assert list(ids.values()) == list(range(vocabulary.size))
    assert ids["<image>"] == text_size + 3
    assert "<|extra_0|>" not in ids
    assert vocabularies.from_map(ids) == vocabulary


def test_the_released_sizes_give_the_released_vocabularies() -> None:
    assert (
        vocabularies.from_lines(151_643, [*THREE, *visual(32_768)]) == Vocabulary.emu3() == vocabularies.known(184_622)
    )
    assert vocabularies.known(282_926) == Vocabulary.emu3_5()
    assert vocabularies.known(300) is None


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([*THREE, "garbage", *visual(4)], "line 4 is 'garbage'"),
        ([*THREE, "<|visual token 0|>"], "its 1 visual tokens do not follow one another"),
        ([*THREE, *visual(4)[::-1]], "000001.*missing or misplaced"),
        ([*THREE, *visual(4)[1:]], "missing or misplaced"),
        ([*THREE, *visual(4), "<|visual token 000003|>"], "a name that is there twice"),
        ([*THREE, "<|extra_7|>", *visual(4)], "a name that is there twice"),
        (THREE, "0 visual tokens"),
        ([THREE[0], THREE[1], *visual(4)], r"lacks <\|image end\|>"),
    ],
)
def test_wrong_lines_are_named(lines: list[str], says: str) -> None:
    with pytest.raises(EmulusError, match=says) as caught:
        vocabularies.from_lines(300, lines)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda ids: ids.pop("<|extra_200|>"), "once each"),
        (lambda ids: ids.update({"p1": 7}), "once each"),
        (lambda ids: ids.update({"p1": "x"}), "whole numbers"),
        (lambda ids: ids.update({"<|x|>": ids.pop("<|endoftext|>")}), r"no <\|endoftext\|>"),
        (lambda ids: ids.update({"<|x|>": ids.pop("<|extra_200|>")}), r"lacks <\|extra_200\|>"),
        (lambda ids: ids.update({"<|x|>": ids.pop("<image>")}), r"lacks <\|extra_0\|>"),
        (lambda ids: ids.update({"surprise": len(ids)}), "special name 'surprise'"),
    ],
)
def test_wrong_maps_are_named(change: Callable[[dict[str, object]], object], says: str) -> None:
    names = vocabularies.names_after_text(vocabularies.from_lines(300, [*THREE, *visual(4)]))
    ids: dict[str, object] = dict(vocabularies.whole_map([f"p{index}" for index in range(300)], names))
    change(ids)
    with pytest.raises(EmulusError, match=says) as caught:
        vocabularies.from_map(ids)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_what_published_layouts_cannot_say_is_refused() -> None:
    ours = vocabularies.from_lines(300, [*THREE, *visual(4)])
    swapped = {**ours.specials, "eol": ours.eof, "eof": ours.eol}
    later = dataclasses.replace(ours, visual_start=ours.visual_start + 1)
    for other, says in (
        (Vocabulary.native(text_size=300, visual_size=4), "other special tokens"),
        (dataclasses.replace(ours, specials=swapped), "other special tokens"),
        (later, "no name for id 511"),
    ):
        with pytest.raises(EmulusError, match=says):
            vocabularies.names_after_text(other)
    with pytest.raises(EmulusError, match="spelt like a special"):
        vocabularies.whole_map(["<image>"], vocabularies.names_after_text(ours))
