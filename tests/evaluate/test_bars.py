"""A figure reaches the bars that it is not below."""

from __future__ import annotations

import pytest

from emulus.evaluate.answers import Answered, Answers, Captioned
from emulus.evaluate.bars import Bar, bars
from emulus.evaluate.choice import Accuracy, Choice, Ranks
from emulus.evaluate.report import Figures
from emulus.evaluate.summary import bars_section


@pytest.mark.parametrize(
    ("value", "least", "reached"),
    [(30.0, 26.0, "aim"), (29.99, 26.0, "least"), (26.0, 26.0, "least"), (25.9, 26.0, "no"), (29.0, None, "no")],
)
def test_reached(value: float, least: float | None, reached: str) -> None:
    assert Bar.of("b", value, least, 30.0, "{}").reached == reached
    assert Bar.of("b", None, least, 30.0, "{}").reached == "not measured"


def test_nothing_measured() -> None:
    found = bars(size=128)
    assert {bar.reached for bar in found} == {"not measured"}
    assert next(bar.least for bar in found if bar.name.startswith("Pictures")) == 26
    assert next(bar.least for bar in bars(size=64) if bar.name.startswith("Pictures")) == 24


def test_values_are_those_of_the_figures() -> None:
    ranks = Ranks.of([1, 1, 9, 9, 9])
    choice = Choice(
        candidates=16,
        chance=1 / 16,
        groups=1,
        caption_raw=ranks,
        caption_pmi=Ranks.of([1, 1, 1, 5]),
        picture_by_words=ranks,
    )
    style = Answered(
        question="which style?", exact=Accuracy.of(97, 100), majority=Accuracy.of(1, 100), majority_answer="flat"
    )
    said = Captioned(exact=Accuracy.of(1, 2), named=None, any_name=None, dealt=None, style=None)
    answers = Answers(items=1, neighbours=0, questions=(style,), captions=said, neighbour_captions=None)
    found = {bar.name: bar for bar in bars(size=64, same_style=choice, answers=answers)}
    assert found["A picture's caption found"].value == 0.75
    assert found["A picture's caption found"].reached == "aim"
    by_words = found["The same by the caption's likelihood"]
    assert (by_words.value, by_words.reached) == (0.4, "least")
    assert found["A caption's picture found"].reached == "not measured"
    assert (found['"Which style?" answered right'].value, found['"Which style?" answered right'].reached) == (
        0.97,
        "least",
    )
    (table,) = bars_section(tuple(found.values()), "words").blocks
    assert isinstance(table, Figures)
    rows = {row.name: (row.value, row.beside) for row in table.rows}
    assert rows["A picture's caption found"] == ("75%", "aim reached · at least 30% · aim 60%")
    assert rows["Clips, reconstructed"] == ("–", "not measured · at least 25.0 dB · aim 29.0 dB")
    assert rows["Frames ahead nearer than the given frames again"] == ("–", "not measured · aim 100%")
