"""Messages are one line of bounded length, whatever names they hold."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulus.errors import MAX_MESSAGE, MAX_SHOWN, EmulusError, at_least, did_you_mean, one_line, shown


@given(st.text(st.characters(), max_size=200))
def test_any_text_is_one_printable_line(text: str) -> None:
    line = str(EmulusError(text))
    assert len(line.splitlines()) <= 1
    assert not any(
        unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") and letter not in "\u200c\u200d"
        for letter in line
    )
    line.encode()


def test_a_long_message_keeps_its_beginning_and_its_remedy() -> None:
    line = str(EmulusError(f"the file {'x' * 10**7} is odd; rename it"))
    assert line.startswith("the file xxx")
    assert line.endswith("; rename it")
    assert len(line) <= MAX_MESSAGE


def test_what_is_short_and_plain_stays_as_it_is() -> None:
    assert one_line("a ‘é’ 猫 👩‍👩‍👧 {x}") == "a ‘é’ 猫 👩‍👩‍👧 {x}"


def test_line_breaks_become_blanks_and_controls_are_spelt() -> None:
    assert one_line("a\r\n  b\x1b[2J\u202ec\udcff\ufeff") == "a b\\x1b[2J\\u202ec\\udcff\\ufeff"


def test_values_are_shown_short() -> None:
    assert shown("a\nb") == "'a b'"
    assert len(shown("x" * 10**6)) <= MAX_SHOWN + 2
    assert shown(10**6000) == "a value of type int"
    assert len(did_you_mean("x" * 10**6, ["a", "b"])) < 50


def test_numbers_of_any_size_can_be_refused() -> None:
    with pytest.raises(EmulusError, match="size must be at least 1, got a value of type int"):
        at_least(1, size=-(10**6000))
