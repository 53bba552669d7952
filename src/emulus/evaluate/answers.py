"""What the model says about held-out pictures and clips, beside what can be said without looking, or without a decoder.

The entry point is :func:`answers`::

    figures = answers(model, examples, known, training)

``known`` are the training items of the data set, whose answers tell which are common and which are possible at all;
``training`` are some of them as codes, among which the nearest neighbour is looked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from emulus.data.item import Item
from emulus.data.tokens import TokenizedItem
from emulus.dual.names import NAME_QUESTION
from emulus.evaluate.asking import Shown
from emulus.evaluate.choice import Accuracy, style_of
from emulus.evaluate.held_out import Example
from emulus.evaluate.peers import nearest
from emulus.evaluate.words import answer_to, mention, name_of, names_of, plain, same, style_named
from emulus.log import progress
from emulus.pipeline import Emulus

T = TypeVar("T")
U = TypeVar("U")

STYLE_QUESTION = "which style?"
_CLOSED = 16
"""A question with at most so many different answers in the training data is asked by likelihood, too."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One question, asked about all held-out items for which the data set has an answer.

    Attributes:
        question: As it was asked.
        exact: How often the model's words were the answer, but for case, an article and a full stop.
        any_name: How often they were the answer or any other name of the item: its keywords and its names in other
            languages; only of the question for the name.
        likeliest: How often the right answer was the likeliest of all possible ones; only where these are few.
        possible: How many those are.
        majority: How often the commonest answer of the training items is right.
        majority_answer: Which one that is.
        neighbour: How often the answer of the nearest training item is right; ``None`` without any.
        neighbour_any_name: The same as ``any_name`` is counted.
    """

    question: str
    exact: Accuracy
    any_name: Accuracy | None = None
    likeliest: Accuracy | None = None
    possible: int = 0
    majority: Accuracy
    majority_answer: str
    neighbour: Accuracy | None = None
    neighbour_any_name: Accuracy | None = None


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """Captions of held-out items.

    Attributes:
        exact: How often the words were one of the item's captions.
        named: How often the item's name stood in them; ``None`` where the data set does not say what items are.
        any_name: How often any name of the item did (see :class:`Answered`).
        dealt: The same as ``any_name``, had every caption been written for some other item, one of another name: what
            general words earn that suit many items. The mean over all such pairs, so it has no count.
        style: How often they named the style; ``None`` where styles have no names.
    """

    exact: Accuracy
    named: Accuracy | None
    any_name: Accuracy | None
    dealt: float | None
    style: Accuracy | None


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All that was said.

    Attributes:
        items: How many pictures and clips were shown.
        neighbours: Among how many training items the nearest was looked for.
        questions: In order of first use.
        captions: The model's.
        neighbour_captions: Those of the nearest training items; ``None`` without any.
    """

    items: int
    neighbours: int
    questions: tuple[Answered, ...]
    captions: Captioned
    neighbour_captions: Captioned | None


@dataclass(frozen=True, kw_only=True)
class _Said:
    """What was said about one item.

    Attributes:
        item: The item.
        written: By question, None for the caption.
        likeliest: By question, of those with few answers.
        neighbour: The nearest training item, if there is any.
    """

    item: Item
    written: dict[str | None, str]
    likeliest: dict[str, str]
    neighbour: Item | None


def answers(
    model: Emulus, examples: Sequence[Example], known: Sequence[Item], training: Sequence[TokenizedItem] = ()
) -> Answers | None:
    """Let the model describe held-out items and answer everything that the data set asks about them.

    Args:
        model: A whole model.
        examples: Held-out pictures and clips.
        known: The training items of the data set.
        training: Some or all of these as codes.

    Returns:
        The figures, or ``None`` without examples.
    """
    if not examples:
        return None
    asked = list(dict.fromkeys(each.question for example in examples for each in example.item.questions))
    common = {question: _common_answers(known, question) for question in asked}
    possible = {question: sorted(counts) for question, counts in common.items() if 1 < len(counts) <= _CLOSED}
    by_id = {item.id: item for item in known}
    neighbours = nearest(model.vision, [example.tokenized for example in examples], training)
    said = [
        _say(model, example, possible, None if peer is None else by_id.get(peer.id))
        for example, peer in zip(progress(examples, what="describing and answering"), neighbours, strict=True)
    ]
    items = [each.item for each in said]
    peers = [each.neighbour for each in said]
    return Answers(
        items=len(said),
        neighbours=len(training),
        questions=tuple(
            _answered(question, [each for each in said if answer_to(each.item, question) is not None], common[question])
            for question in asked
        ),
        captions=captioned(items, [each.written[None] for each in said]),
        neighbour_captions=captioned(items, ["" if peer is None else peer.caption for peer in peers])
        if any(peers)
        else None,
    )


def _common_answers(known: Sequence[Item], question: str) -> Counter[str]:
    return Counter(answer for item in known if (answer := answer_to(item, question)) is not None)


def _say(model: Emulus, example: Example, possible: dict[str, list[str]], neighbour: Item | None) -> _Said:
    questions = list(dict.fromkeys(each.question for each in example.item.questions))
    shown = Shown(model, example.media, [None, *questions])
    return _Said(
        item=example.item,
        written=shown.write(),
        likeliest={
            question: shown.likeliest(question, possible[question]) for question in questions if question in possible
        },
        neighbour=neighbour,
    )


def _answered(question: str, said: Sequence[_Said], common: Counter[str]) -> Answered:
    truth = [answer_to(each.item, question) or "" for each in said]
    peers = ["" if each.neighbour is None else answer_to(each.neighbour, question) or "" for each in said]
    written = [each.written[question] for each in said]
    likeliest = [each.likeliest.get(question, "") for each in said]
    majority = common.most_common(1)[0][0] if common else ""
    names = [names_of(each.item) for each in said] if question == NAME_QUESTION else None
    seen = any(each.neighbour is not None for each in said)
    return Answered(
        question=question,
        exact=_share(zip(written, truth, strict=True), same),
        any_name=None if names is None else _share(zip(written, names, strict=True), _is_one_of),
        likeliest=_share(zip(likeliest, truth, strict=True), same) if any(likeliest) else None,
        possible=len(common) if any(likeliest) else 0,
        majority=_share(((majority, answer) for answer in truth), same),
        majority_answer=majority,
        neighbour=_share(zip(peers, truth, strict=True), same) if seen else None,
        neighbour_any_name=_share(zip(peers, names, strict=True), _is_one_of) if seen and names is not None else None,
    )


def captioned(items: Sequence[Item], captions: Sequence[str]) -> Captioned:
    """Judge captions.

    Args:
        items: What they are of, at least one.
        captions: One for each.
    """
    written = [plain(caption) for caption in captions]
    names = [name_of(item) for item in items]
    patterns = [mention(names_of(item)) for item in items]
    whole = [mention([] if name is None else [plain(name)]) for name in names]
    styles = [style_of(item.id) for item in items]
    named = any(name is not None for name in names)
    return Captioned(
        exact=_share(zip(captions, items, strict=True), _is_a_caption),
        named=_share(zip(written, whole, strict=True), _mentions) if named else None,
        any_name=_share(zip(written, patterns, strict=True), _mentions) if named else None,
        dealt=_dealt(written, names, patterns) if named else None,
        style=_share(zip(captions, styles, strict=True), _names_style)
        if any(style_named(item.caption) == style for item, style in zip(items, styles, strict=True))
        else None,
    )


def _dealt(written: Sequence[str], names: Sequence[str | None], patterns: Sequence[re.Pattern[str]]) -> float | None:
    hits = [
        _mentions(caption, pattern)
        for caption, name in zip(written, names, strict=True)
        for other, pattern in zip(names, patterns, strict=True)
        if other != name
    ]
    return sum(hits) / len(hits) if hits else None


def _share(pairs: Iterable[tuple[T, U]], right: Callable[[T, U], bool]) -> Accuracy:
    judged = [right(*pair) for pair in pairs]
    return Accuracy.of(sum(judged), len(judged))


def _is_one_of(text: str, names: frozenset[str]) -> bool:
    return plain(text) in names


def _is_a_caption(text: str, item: Item) -> bool:
    return any(same(text, caption) for caption in item.captions)


def _mentions(text: str, names: re.Pattern[str]) -> bool:
    return names.search(text) is not None


def _names_style(caption: str, style: str) -> bool:
    return style_named(caption) == style
