"""Whether words say the same: as little as possible is forgiven, and what is forgiven is said here."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from emulus.data.emoji.captions import STYLES
from emulus.data.item import Item
from emulus.dual.names import NAME_QUESTION

_ARTICLE = re.compile(r"^(?:an?|the)\s+")
_COLON = re.compile(r"\s*[:：]\s*")
_COMMA = re.compile(r"\s*[,、]\s*")
_WORD = re.compile(r"\w+")


def plain(text: str) -> str:
    """A text without case, doubled blanks, an article before it and a full stop behind it."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return _ARTICLE.sub("", folded).rstrip(" .!")


def same(first: str, second: str) -> bool:
    """Whether two texts are one but for what :func:`plain` takes away."""
    return plain(first) == plain(second)


def name_of(item: Item) -> str | None:
    """What the data set's answer to "what is it?" is; None where it has none."""
    return answer_to(item, NAME_QUESTION)


def answer_to(item: Item, question: str) -> str | None:
    """A data set's answer to a question about an item; None where it has none."""
    return next((each.answer for each in item.questions if each.question == question), None)


def names_of(item: Item) -> frozenset[str]:
    """Everything that an item is called, as :func:`plain` has it.

    That is its name, and what stands behind a colon in its captions, where keywords (between commas) and names in
    other languages are. What names a style is no name.
    """
    name = name_of(item)
    found = set() if name is None else {plain(name)}
    for caption in item.captions:
        _, *behind = _COLON.split(caption, maxsplit=1)
        parts = [part for words in behind for part in (words, *_COMMA.split(words))]
        found |= {plain(part) for part in parts if style_named(part) is None}
    return frozenset(found - {""})


def mention(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of these names, as whole words, in a text that :func:`plain` has been through."""
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)" if longest_first else r"(?!)")


def overlap(first: str, second: str) -> float:
    """How many words two texts share, each word once: 1 for the same words, 0 for none (the F1 score)."""
    one, other = (set(_WORD.findall(plain(text))) for text in (first, second))
    return 2 * len(one & other) / max(len(one) + len(other), 1)


def style_named(caption: str) -> str | None:
    """The style that a caption of emoji names, as the ids of the data set call it; None if it names none.

    The wordings are those of the data set's own captions; the longest that is there counts, since "moving in 3D" is
    another style than "in 3D".
    """
    folded = unicodedata.normalize("NFKC", caption).casefold()
    found = [(len(phrase), style) for phrase, style in _PHRASES if phrase in folded]
    return max(found)[1] if found else None


def _phrases() -> list[tuple[str, str]]:
    """What is said of each style, beside the name."""
    found = []
    for style, words in STYLES.items():
        others = [wording.replace("{}", "") for wording in words.other]
        for phrase in (words.title, words.drawing, words.emoji, *others, *words.locales.values()):
            found.append((unicodedata.normalize("NFKC", phrase).casefold(), style))
    return found


_PHRASES = _phrases()
