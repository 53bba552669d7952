"""An emoji's words -> questions about its picture or clip that have one short answer."""

from __future__ import annotations

import re

from emulus.data.emoji.captions import STYLES, plain_name
from emulus.data.emoji.names import Emoji, skin_tones_of
from emulus.data.item import Question


def questions_of(emoji: Emoji, style: str, background: str) -> tuple[Question, ...]:
    """Ask about one picture or clip.

    Args:
        emoji: Its words.
        style: One of :data:`~emulus.data.emoji.captions.STYLES`.
        background: Name of its background's colour.

    Returns:
        Four to seven questions; what the words do not say for sure is not asked.
    """
    answers = {
        "which style?": STYLES[style].spoken,
        "what is it?": plain_name(emoji.label),
        "what group?": emoji.group,
        "which background colour?": background,
        "how many?": how_many(emoji),
        "which skin tone?": which_skin_tone(emoji),
        "what moves?": what_moves(emoji) if style == "anim" else None,
    }
    return tuple(Question(question, answer) for question, answer in answers.items() if answer)


def how_many(emoji: Emoji) -> str | None:
    """A number word where the label leaves no doubt about how many of its things are shown."""
    label = emoji.label
    head, _, details = _without_tones(label).partition(": ")
    if head == "family":
        return _NUMBERS.get(len(details.split(", "))) if details else None
    if head in _PAIRS:
        return "two"
    if emoji.group == "smileys & emotion" and re.search(r"\b(face|cat|monkey|heart)$|\bface with\b", head):
        return "one"
    if head in _SINGLE or (_ONE_PERSON.search(head) and not _MORE_THAN_ONE.search(head)):
        return "one"
    return None


def which_skin_tone(emoji: Emoji) -> str | None:
    """``light`` to ``dark`` where the emoji asks for exactly one skin tone."""
    tones = skin_tones_of(emoji.codepoint)
    return tones[0] if len(tones) == 1 else None


def what_moves(emoji: Emoji) -> str | None:
    """The kind of thing that a clip shows moving, where its label names one of a few for sure."""
    label = _without_tones(emoji.label)
    head = label.partition(": ")[0]
    if emoji.group not in ("smileys & emotion", "people & body") or head in _PAIRS or head == "family":
        return None
    found = [word for word in re.findall(r"[a-z]+", label) if word in _MOVERS]
    return found[0] if found else None


def _without_tones(label: str) -> str:
    """The label of the same emoji without skin tones."""
    head, _, details = label.partition(": ")
    kept = [detail for detail in details.split(", ") if detail and not detail.endswith("skin tone")]
    return f"{head}: {', '.join(kept)}" if kept else head


_NUMBERS = {2: "two", 3: "three", 4: "four"}
_PAIRS = frozenset(
    {
        "two hearts",
        "kiss",
        "couple with heart",
        "people holding hands",
        "women holding hands",
        "men holding hands",
        "woman and man holding hands",
        "people hugging",
        "people wrestling",
        "men wrestling",
        "women wrestling",
        "people with bunny ears",
        "men with bunny ears",
        "women with bunny ears",
        "busts in silhouette",
        "handshake",
        "clapping hands",
        "raising hands",
        "heart hands",
        "open hands",
        "palms up together",
        "folded hands",
        "eyes",
        "footprints",
        "clinking beer mugs",
        "clinking glasses",
        "chopsticks",
        "fork and knife",
        "crossed swords",
        "crossed flags",
        "cherries",
        "socks",
        "gloves",
        "ballet shoes",
        "Japanese dolls",
        "double exclamation mark",
    }
)
_SINGLE = frozenset(
    {
        "waving hand",
        "raised hand",
        "raised back of hand",
        "hand with fingers splayed",
        "rightwards hand",
        "leftwards hand",
        "palm down hand",
        "palm up hand",
        "OK hand",
        "victory hand",
        "thumbs up",
        "thumbs down",
        "raised fist",
        "oncoming fist",
        "bust in silhouette",
        "eye",
        "ear",
        "nose",
        "foot",
        "leg",
        "beer mug",
        "wine glass",
        "musical note",
        "red apple",
        "green apple",
        "lemon",
        "banana",
        "pear",
        "balloon",
        "bell",
        "key",
    }
)
_ONE_PERSON = re.compile(r"^(baby|child|boy|girl|person|man|woman|old man|old woman|older person)\b")
_MORE_THAN_ONE = re.compile(r"\b(and|feeding|getting|baby .+|holding|juggling)\b")
_MOVERS = frozenset({"face", "cat", "monkey", "hand", "heart", "hearts", "man", "woman", "person", "people"})
