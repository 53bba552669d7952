"""Which emoji there are: code points, labels, keywords, translations, and the split they belong to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emulus.data.emoji.packages import WORDS, read_members
from emulus.data.source import Split, split_of_key
from emulus.errors import EmulusError

LOCALES = ("de", "fr", "es", "zh", "ja")

_VARIATION_SELECTOR = "fe0f"
_SKIN_TONES = {
    "1f3fb": "light",
    "1f3fc": "medium-light",
    "1f3fd": "medium",
    "1f3fe": "medium-dark",
    "1f3ff": "dark",
}

# With two different skin tones these pairs are spelled as two people joined, and without tones as one sign.
_SAME_EMOJI = {
    "1faf1-200d-1faf2": "1f91d",
    "1f9d1-200d-1f430-200d-1f9d1": "1f46f",
    "1f468-200d-1f430-200d-1f468": "1f46f-200d-2642",
    "1f469-200d-1f430-200d-1f469": "1f46f-200d-2640",
    "1f9d1-200d-1faef-200d-1f9d1": "1f93c",
    "1f468-200d-1faef-200d-1f468": "1f93c-200d-2642",
    "1f469-200d-1faef-200d-1f469": "1f93c-200d-2640",
    "1f469-200d-1f91d-200d-1f469": "1f46d",
    "1f469-200d-1f91d-200d-1f468": "1f46b",
    "1f468-200d-1f91d-200d-1f468": "1f46c",
    "1f9d1-200d-2764-200d-1f48b-200d-1f9d1": "1f48f",
    "1f9d1-200d-2764-200d-1f9d1": "1f491",
}


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """The words for one emoji."""

    codepoint: str
    """As :func:`normalise` writes it."""
    label: str
    keywords: tuple[str, ...]
    group: str
    translations: Mapping[str, str]
    """Label by locale, for those of :data:`LOCALES` that have one."""


def normalise(codepoint: str) -> str:
    """Write a code point sequence in the one way used here: lower-case hex, unpadded, no variation selector.

    Args:
        codepoint: Hex numbers joined by ``-``, such as ``"0031-FE0F-20E3"``; what follows a ``+`` is the version of
            an item and no part of the sequence.

    Returns:
        Such as ``"31-20e3"``.

    Raises:
        EmulusError: It is not of that form.
    """
    try:
        parts = [f"{int(part, 16):x}" for part in codepoint.partition("+")[0].split("-")]
    except ValueError:
        raise EmulusError(f"'{codepoint}' is no code point sequence such as '1f44b-1f3fb'") from None
    return "-".join(part for part in parts if part != _VARIATION_SELECTOR)


def base_of(codepoint: str) -> str:
    """Strip skin tones and variation selectors: the sequence that all variants of one emoji share."""
    parts = normalise(codepoint).split("-")
    base = "-".join(part for part in parts if part not in _SKIN_TONES)
    return _SAME_EMOJI.get(base, base) or "-".join(parts)


def has_skin_tone(codepoint: str) -> bool:
    """Whether a sequence asks for a skin tone (or is a bare skin tone)."""
    return bool(skin_tones_of(codepoint))


def skin_tones_of(codepoint: str) -> tuple[str, ...]:
    """The different skin tones that a sequence asks for, such as ``("medium-light",)``, in their order in it."""
    parts = normalise(codepoint).split("-")
    return tuple(dict.fromkeys(_SKIN_TONES[part] for part in parts if part in _SKIN_TONES))


def split_of(codepoint: str) -> Split:
    """The split of an emoji: a pure function of its base sequence, the same for every style and for clips."""
    return split_of_key(base_of(codepoint))


def read_emoji(packages: Path) -> dict[str, Emoji]:
    """Read the words for every emoji from the tarball of ``emojibase-data``.

    Args:
        packages: Folder of tarballs.

    Returns:
        Emoji by code point (as :func:`normalise` writes it), skin-tone variants included.

    Raises:
        EmulusError: The tarball is missing or not what it should be.
    """
    tarball = packages / WORDS.tarball
    wanted = {"package/en/data.json", "package/en/messages.json"}
    wanted |= {f"package/{locale}/compact.json" for locale in LOCALES}
    try:
        return _join({name: json.loads(text) for name, text in read_members(tarball, wanted.__contains__)})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise EmulusError(f"{tarball} is not {WORDS.name} {WORDS.version} ({error!r}); fetch it again") from error


def _join(tables: Mapping[str, Any]) -> dict[str, Emoji]:
    groups = {group["order"]: group["message"] for group in tables["package/en/messages.json"]["groups"]}
    labels = {locale: _labels(tables[f"package/{locale}/compact.json"]) for locale in LOCALES}
    found = {}
    for entry, parent in _entries(tables["package/en/data.json"]):
        codepoint = normalise(entry["hexcode"])
        found[codepoint] = Emoji(
            codepoint=codepoint,
            label=entry["label"],
            keywords=tuple(entry.get("tags", parent.get("tags", ()))),
            group=groups.get(entry.get("group"), "symbols"),
            translations={locale: names[codepoint] for locale, names in labels.items() if codepoint in names},
        )
    return found


def _entries(table: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every entry with its parent (itself, or for a skin-tone variant the emoji it varies)."""
    for entry in table:
        yield entry, entry
        for variant in entry.get("skins", ()):
            yield variant, entry


def _labels(table: list[dict[str, Any]]) -> dict[str, str]:
    return {normalise(entry["hexcode"]): entry["label"] for entry, _ in _entries(table) if entry.get("label")}
