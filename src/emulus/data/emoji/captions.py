"""An emoji's words -> natural captions that carry style and name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from emulus.data.emoji.names import LOCALES, Emoji


@dataclass(frozen=True, kw_only=True)
class Style:
    """How one style of artwork is spoken of."""

    title: str
    """After the name: ``red apple, 3D render``."""
    spoken: str
    """The answer to "which style?"."""
    drawing: str
    """Before "of", in the canonical caption: ``a 3D render of ...``."""
    emoji: str
    """Before "of", with the background: ``a 3D emoji of ... on a pink background``."""
    other: tuple[str, ...]
    """More ways to say it; an item takes one. ``{}`` stands for the name with its article."""
    locales: dict[str, str] = field(default_factory=dict)
    """The words for the style in other languages; the name follows after a colon."""


STYLES: dict[str, Style] = {
    "3d": Style(
        title="3D render",
        spoken="3D",
        drawing="a 3D render",
        emoji="a 3D emoji",
        other=("{} in 3D", "{}, rendered in 3D", "a glossy 3D picture of {}"),
        locales={
            "de": "ein 3D-Bild",
            "fr": "une image 3D",
            "es": "una imagen 3D",
            "zh": "3D 图像",
            "ja": "3D画像",
        },
    ),
    "flat": Style(
        title="flat drawing",
        spoken="flat",
        drawing="a flat drawing",
        emoji="a flat emoji",
        other=("{} in a flat style", "{}, drawn flat", "a flat picture of {}"),
        locales={
            "de": "eine flache Zeichnung",
            "fr": "un dessin plat",
            "es": "un dibujo plano",
            "zh": "扁平图画",
            "ja": "フラットな絵",
        },
    ),
    "noto": Style(
        title="Noto drawing",
        spoken="Noto",
        drawing="a Noto drawing",
        emoji="a Noto emoji",
        other=("{} in the Noto style", "{}, drawn as in Noto", "a Noto picture of {}"),
        locales={
            "de": "eine Noto-Zeichnung",
            "fr": "un dessin Noto",
            "es": "un dibujo Noto",
            "zh": "Noto 图画",
            "ja": "Notoの絵",
        },
    ),
    "twemoji": Style(
        title="Twemoji icon",
        spoken="Twemoji",
        drawing="a Twemoji icon",
        emoji="a Twemoji emoji",
        other=("{} in the Twemoji style", "{}, drawn as in Twemoji", "a Twemoji picture of {}"),
        locales={
            "de": "ein Twemoji-Symbol",
            "fr": "une icône Twemoji",
            "es": "un icono Twemoji",
            "zh": "Twemoji 图标",
            "ja": "Twemojiのアイコン",
        },
    ),
    "anim": Style(
        title="3D animation",
        spoken="animated 3D",
        drawing="an animated 3D clip",
        emoji="a moving 3D emoji",
        other=("{}, animated in 3D", "a short looping 3D video of {}", "{} moving in 3D"),
        locales={
            "de": "eine 3D-Animation",
            "fr": "une animation 3D",
            "es": "una animación 3D",
            "zh": "3D 动画",
            "ja": "3Dアニメーション",
        },
    ),
}
"""Style by the name that an item's id begins with. ``anim`` is the style of the clips."""

_MAX_KEYWORDS = 5


def captions_of(emoji: Emoji, style: str, background: str, choice: int, version: int = 1) -> tuple[str, ...]:
    """Describe one picture or clip.

    Args:
        emoji: Its words.
        style: One of :data:`STYLES`.
        background: Name of its background's colour.
        choice: Any number; decides between wordings, and which two other languages are used.
        version: Which version of the item; later ones have other wordings and languages, and more of the keywords,
            and name the background more often.

    Returns:
        Four to eight captions without doubles; the first is the canonical English one.
    """
    words = STYLES[style]
    keywords = [word for word in emoji.keywords if word.lower() != plain_name(emoji.label).lower()]
    if version == 1:
        captions = _first_captions(emoji, words, background, choice, keywords[:_MAX_KEYWORDS])
    else:
        start = (choice + (version - 2) * _MAX_KEYWORDS) % max(len(keywords), 1)
        rotated = (keywords[start:] + keywords[:start])[:_MAX_KEYWORDS]
        captions = _more_captions(emoji, words, background, choice + version - 1, rotated)
    known = [locale for locale in LOCALES if locale in emoji.translations]
    for step in range(min(2, len(known))):
        # The other two thirds of the number, so that languages and wordings vary independently.
        locale = known[(choice // len(words.other) + step * 2 + version - 1) % len(known)]
        captions.append(_translated(words.locales[locale], emoji.translations[locale], locale))
    return tuple(dict.fromkeys(captions))


def _first_captions(emoji: Emoji, words: Style, background: str, choice: int, keywords: Sequence[str]) -> list[str]:
    name, plain = noun_phrase(emoji.label), plain_name(emoji.label)
    captions = [
        f"{words.drawing} of {name}",
        f"{plain}, {words.title}",
        f"{words.emoji} of {name} on {article(background)}{background} background",
        words.other[choice % len(words.other)].format(name),
    ]
    return captions + ([f"{words.title} of {name}: {', '.join(keywords)}"] if keywords else [])


def _more_captions(emoji: Emoji, words: Style, background: str, choice: int, keywords: Sequence[str]) -> list[str]:
    name, plain = noun_phrase(emoji.label), plain_name(emoji.label)
    ground = f"on {article(background)}{background} background"
    # Versions of one picture differ in their backgrounds, so most captions say which it is: where one in eight does, it
    # is not learned in 40,000 documents.
    on_ground = (
        f"{words.drawing} of {name} {ground}",
        f"{plain} {ground}, {words.title}",
        f"{name} {ground}: {words.drawing}",
    )
    others = (
        f"{words.title}: {plain} {ground}",
        f"{words.drawing} showing {name} {ground}",
        f"{ground.removeprefix('on ')}, {plain}, {words.title}",
    )
    captions = [
        f"{words.drawing} of {name}",
        on_ground[choice % len(on_ground)],
        words.other[choice % len(words.other)].format(f"{name} {ground}"),
        others[choice // len(words.other) % len(others)],
    ]
    if keywords:
        listed = ", ".join(keywords)
        with_name = (f"{words.title} of {name}: {listed}", f"{plain} ({listed}), {words.title}")
        # Keywords alone teach what a name means that is not known yet.
        captions += [f"{listed}, {background} background: {words.drawing}", with_name[choice % len(with_name)]]
    return captions


def _translated(style: str, label: str, locale: str) -> str:
    colon = {"zh": "：", "ja": "：", "fr": " : "}.get(locale, ": ")
    # Some labels hold narrow or unbreakable spaces, which would only split the vocabulary.
    return f"{style}{colon}{' '.join(label.split())}"


def article(words: str) -> str:
    """``"an "`` before a vowel sound, else ``"a "``; judged by the first word as it is spoken."""
    first = re.split(r"[\s-]", words, maxsplit=1)[0]
    if first.isupper() and first.isalpha() and len(first) < 4 and first not in _SPOKEN_AS_WORDS:
        # Spelt out: the names of these letters begin with a vowel.
        return "an " if first[0] in "AEFHILMNORSX" else "a "
    lower = words.lower()
    if lower.startswith(_CONSONANT_DESPITE_SPELLING):
        return "a "
    return "an " if lower.startswith(_VOWELS) else "a "


def noun_phrase(label: str) -> str:
    """Turn a label into words that can follow "a drawing of".

    Examples:
        ``red apple`` -> ``a red apple``; ``glasses`` -> ``glasses``; ``man: bald`` -> ``a bald man``;
        ``flag: Japan`` -> ``the flag of Japan``; ``family: man, girl`` -> ``a family of a man and a girl``.
    """
    head, colon, rest = label.partition(": ")
    if colon:
        return _with_details(head, rest)
    if label in _PHRASES:
        return _PHRASES[label]
    if label in _ZODIAC:
        return f"the zodiac sign {label}"
    if label.startswith("regional indicator "):
        return f"the {label}"
    if label.endswith(("o’clock", "-thirty")):
        return f"a clock showing {label}"
    if label in _NO_ARTICLE or _is_plural(label) or label.startswith("no "):
        return label
    return article(label) + label


def plain_name(label: str) -> str:
    """The noun phrase without its article: what a tag or a title would say."""
    return re.sub(r"^(an?|the) ", "", noun_phrase(label))


def _with_details(head: str, rest: str) -> str:
    """``head: detail, detail`` in words."""
    if head == "flag":
        return f"the flag of {'the ' if _FLAG_WITH_THE.search(rest) else ''}{rest}"
    if head == "keycap":
        return f"the keycap {rest}"
    people, traits, before, after = [], [], "", ""
    for detail in rest.split(", "):
        if detail in _PEOPLE:
            people.append(detail)
        elif detail == "bald":
            before = "bald "
        elif detail == "beard":
            traits.append("a beard")
        elif detail.endswith((" skin tone", " hair")):
            traits.append(detail)
        else:
            after += f", {detail}"
    phrase = noun_phrase(before + head)
    if people:
        phrase += f"{_JOINED_BY.get(head, ':')} {_and(_counted(people))}"
    if traits:
        phrase += f" with {_and(traits)}"
    return phrase + after


def _counted(people: Sequence[str]) -> list[str]:
    """``man, boy, boy`` -> ``a man``, ``two boys``."""
    counts = Counter(people)
    return [article(one) + one if count == 1 else f"two {_PEOPLE[one]}" for one, count in counts.items()]


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _is_plural(label: str) -> bool:
    """Whether the noun that a label is about is a plural, by its ending."""
    words = label.split()
    # What follows a preposition or a verb says more about the noun before it.
    tails = [
        place
        for place, word in enumerate(words)
        if place and (word in _PREPOSITIONS or (word.endswith("ing") and not word.endswith("ring")))
    ]
    noun = words[(tails[0] if tails else len(words)) - 1]
    return noun in ("people", "men", "women") or (
        noun.endswith("s") and not noun.endswith(("ss", "us", "is")) and noun not in _SINGULAR
    )


def _listed(words: str) -> frozenset[str]:
    return frozenset(" ".join(word.split()) for word in words.split(","))


_VOWELS = ("a", "e", "i", "o", "u", "8", "11", "18", "hour", "x-ray", "“a", "“e")
_CONSONANT_DESPITE_SPELLING = ("one", "uni", "eu", "ewe")
_SPOKEN_AS_WORDS = frozenset({"TOP", "NEW"})
_SINGULAR = frozenset({"rhinoceros", "leftwards", "rightwards"})
_PREPOSITIONS = _listed("with, without, of, in, on, at, from, behind, and, up, down, for")
_PEOPLE = {
    "man": "men",
    "woman": "women",
    "person": "people",
    "boy": "boys",
    "girl": "girls",
    "adult": "adults",
    "child": "children",
}
_JOINED_BY = {"family": " of", "kiss": " between", "couple with heart": ":"}
_FLAG_WITH_THE = re.compile(
    r"^(United|European|Dominican Rep|Central Af|Isle of|Netherlands|Philippines|Bahamas|Gambia|Maldives)"
    r"|^Comoros$|^[\w. ()]+ (Islands|Territory|Territories)$"
)
_ZODIAC = _listed(
    """
    Aries, Taurus, Gemini, Cancer, Leo, Virgo, Libra, Scorpio, Sagittarius, Capricorn, Aquarius, Pisces,
    Ophiuchus
    """
)
_PHRASES = {
    "mount fuji": "Mount Fuji",
    "Tokyo tower": "Tokyo Tower",
    "Statue of Liberty": "the Statue of Liberty",
    "milky way": "the Milky Way",
    "kaaba": "the Kaaba",
    "om": "the om symbol",
    "ZZZ": "the letters ZZZ",
    "dna": "DNA",
    "dvd": "a DVD",
    "multiply": "a multiplication sign",
    "plus": "a plus sign",
    "minus": "a minus sign",
    "divide": "a division sign",
    "infinity": "the infinity sign",
    "copyright": "the copyright sign",
    "registered": "the registered sign",
    "trade mark": "the trade mark sign",
    "information": "an information sign",
    "warning": "a warning sign",
    "prohibited": "a prohibition sign",
    "radioactive": "a radioactivity sign",
    "biohazard": "a biohazard sign",
    "construction": "a construction sign",
    "wireless": "a wireless symbol",
    "dizzy": "a dizzy star",
    "locked": "a locked padlock",
    "unlocked": "an unlocked padlock",
    "locked with pen": "a padlock with a pen",
    "locked with key": "a padlock with a key",
    "star-struck": "a star-struck face",
    "rolling on the floor laughing": "a face rolling on the floor laughing",
    "foggy": "a foggy city",
    "bald": "a bald head",
    "performing arts": "the performing arts",
}
_NO_ARTICLE = _listed(
    """
    Santa Claus, Mrs. Claus, Mx Claus, bread, baguette bread, bacon, butter, salt, canned food,
    popcorn, spaghetti, cooked rice, curry rice, sushi, oden, garlic, broccoli, fried shrimp, shaved
    ice, soft ice cream, ice cream, custard, sake, mate, ice, bubble tea, meat on bone, wood, fog,
    fire, camping, building construction, cooking, pouring liquid, flatbread, stuffed flatbread,
    coral, thread, yarn, soap, luggage, left luggage, baggage claim, passport control, potable
    water, non-potable water, children crossing, bowling, field hockey, ice hockey, lacrosse, ping
    pong, badminton, tennis, american football, rugby football, horse racing, breast-feeding, nail
    polish, high voltage, dashing away, red hair, curly hair, white hair, vibration mode, input
    latin uppercase, input latin lowercase, currency exchange, flower playing cards, money with wings,
    dango, fondue, light rail, airplane departure, airplane arrival, skis
    """
)
