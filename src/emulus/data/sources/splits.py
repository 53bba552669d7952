"""Which split a data set itself gives to its files: by names, as Hugging Face reads them, or by its card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from emulus.data.item import Split

_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "validate", "dev", "minival"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation", "testdev", "devtest", "heldout", "holdout"), "test"),
}
_ORDER: tuple[Split, ...] = ("test", "validation", "train")
_LETTERS = re.compile(r"[^\W\d_]+")
_CAMEL = re.compile(r"([a-z]+)[A-Z]|[a-z]([A-Z][a-z]+)$")


def split_named(name: str) -> Split | None:
    """The split that a name speaks of: a keyword between letters of another kind (``train2017``, ``x_test-0``).

    Of several, the one that must not be trained on.
    """
    found = set[Split]()
    for word in _LETTERS.findall(name):
        # Also trainA, testB, ImageNetVal.
        camel = [piece for pair in _CAMEL.findall(word) for piece in pair if piece]
        found |= {_WORDS[piece.lower()] for piece in (word, *camel) if piece.lower() in _WORDS}
    return next((split for split in _ORDER if split in found), None)


def split_called(name: str) -> Split | None:
    """The split whose name this is, whole."""
    return _WORDS.get(name.lower())


def split_of_path(folders: Sequence[str], file: str = "") -> Split | None:
    """The split that the names of a file and of the folders around it speak of, the nearest first."""
    return next((split for split in map(split_named, (file, *reversed(folders))) if split), None)


def names_splits(splits: Iterable[Split | None]) -> bool:
    """Whether names tell splits apart: a folder called ``train`` among others can as well hold pictures of trains."""
    found = set(splits)
    return bool(found - {None}) and found != {"train", None}
