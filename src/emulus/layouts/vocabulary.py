"""Emu3's vocabulary as published: a table of names, or the lines of a file <-> :class:`Vocabulary`.

After the text ids come, in this order, ``<|endoftext|> <|im_start|> <|im_end|>``, 205 spare names ``<|extra_0|>`` ...,
and the lines of ``emu3_vision_tokens.txt``: the three names around pictures and the visual tokens. Nothing here depends
on how many text or visual ids there are.

Source: baaivision/Emu3, emu3/mllm/tokenization_emu3.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from emulus.errors import EmulusError
from emulus.tokenizer.vocabulary import NAME, SurfaceNames, Vocabulary, token_name

_EMU3 = Vocabulary.emu3()
FIRST_NAMES = tuple(_EMU3.surface(id) for id in range(_EMU3.text_size, _EMU3.img))
ROLE_NAMES = {role: _EMU3.surface(id) for role, id in _EMU3.specials.items()}
# The transformers port marks the places of a picture's codes with the first spare name, renamed.
PLACEHOLDER = "<image>"
PLACEHOLDER_WAS = "<|extra_0|>"


def from_lines(text_size: int, lines: Iterable[str]) -> Vocabulary:
    """The vocabulary of a text vocabulary and the lines of ``emu3_vision_tokens.txt``.

    Args:
        text_size: How many text ids there are.
        lines: The file's; blank ones count for nothing.

    Raises:
        EmulusError: A line is not a token's name, is there twice or is missing.
    """
    names = [line.strip() for line in lines if line.strip()]
    for number, name in enumerate(names, start=1):
        if not NAME.fullmatch(name):
            raise EmulusError(f"line {number} is {name[:40]!r}, not a token like '<|image start|>'; restore the file")
    whole = (*FIRST_NAMES, *names)
    return from_names(text_size, {name: text_size + index for index, name in enumerate(whole)}, count=len(whole))


def from_map(ids: Mapping[str, int]) -> Vocabulary:
    """The vocabulary of a transformers ``vocabulary_map`` or of the ``vocab`` in its ``tokenizer.json``.

    Args:
        ids: Every token's name, text pieces included, to its id.

    Raises:
        EmulusError: A name of Emu3's is missing, or the ids are not ``0, 1, 2, ...`` once each.
    """
    if any(not isinstance(id, int) or isinstance(id, bool) for id in ids.values()):
        raise EmulusError("its ids are not all whole numbers; restore the file")
    if FIRST_NAMES[0] not in ids:
        raise EmulusError(f"it has no {FIRST_NAMES[0]}, so it is not Emu3's; restore the file")
    if sorted(ids.values()) != list(range(len(ids))):
        raise EmulusError(f"its {len(ids)} ids are not 0, 1, 2, ... once each; restore the file")
    text_size = ids[FIRST_NAMES[0]]
    names = {name: id for name, id in ids.items() if id >= text_size}
    if PLACEHOLDER in names and PLACEHOLDER_WAS not in names:
        names[PLACEHOLDER_WAS] = names.pop(PLACEHOLDER)
    return from_names(text_size, names, count=len(names))


def from_names(text_size: int, names: Mapping[str, int], *, count: int) -> Vocabulary:
    """The vocabulary in which ``names`` are all ids that are not text.

    Args:
        text_size: How many text ids there are.
        names: Every special's and visual token's name to its id.
        count: How many there should be; fewer means that a name was there twice.

    Raises:
        EmulusError: A name of Emu3's is missing, or the visual tokens do not follow one another.
    """
    if len(names) < count:
        raise EmulusError(f"{count - len(names)} of its {count} special tokens have a name that is there twice")
    missing = [name for name in (*FIRST_NAMES, *ROLE_NAMES.values()) if name not in names]
    if missing:
        raise EmulusError(f"it lacks {missing[0]}, a token that every Emu3 vocabulary has; restore the file")
    visual_start = names.get(token_name("visual", 0), -1)
    visual = {name: id for name, id in names.items() if name.startswith("<|visual token ")}
    wrong = [
        name for code in range(len(visual)) if names.get(name := token_name("visual", code)) != visual_start + code
    ]
    if wrong or not visual:
        raise EmulusError(
            f"its {len(visual)} visual tokens do not follow one another from {token_name('visual', 0)} on "
            f"({wrong[0] if wrong else 'the first'} is missing or misplaced); restore the file"
        )
    return Vocabulary(
        text_size=text_size,
        specials={role: names[name] for role, name in ROLE_NAMES.items()},
        visual_start=visual_start,
        visual_size=len(visual),
        special_names={name: id for name, id in names.items() if name not in visual},
    )


def names_after_text(vocabulary: Vocabulary) -> list[str]:
    """The inverse of :func:`from_lines`: the names of all ids from ``text_size`` on.

    Raises:
        EmulusError: The vocabulary is not built like Emu3's, so that no published layout can say what its ids mean.
    """
    surfaces = vocabulary.special_names
    assert isinstance(surfaces, SurfaceNames)  # made so by Vocabulary
    names = [surfaces.name_of(id) for id in range(vocabulary.text_size, vocabulary.size)]
    roles = {role: surfaces.name_of(id) for role, id in vocabulary.specials.items()}
    if tuple(names[: len(FIRST_NAMES)]) != FIRST_NAMES or roles != ROLE_NAMES or vocabulary.action_size:
        raise EmulusError(
            "its vocabulary has other special tokens than Emu3's, which the published layouts fix; it can only be "
            "written in the layout 'emulus'"
        )
    if None in names:
        raise EmulusError(
            f"its vocabulary has no name for id {vocabulary.text_size + names.index(None)}, which the published "
            "layouts need; it can only be written in the layout 'emulus'"
        )
    return [name for name in names if name is not None]


def check_roles(vocabulary: Vocabulary, ids: Mapping[str, int]) -> None:
    """Compare a vocabulary with the special ids that a config names.

    Raises:
        EmulusError: They differ.
    """
    wrong = [f"{role} is {id} but the vocabulary says {vocabulary.specials[role]}" for role, id in ids.items()
             if vocabulary.specials[role] != id]  # fmt: skip
    if wrong:
        raise EmulusError(f"{wrong[0]}: config and vocabulary are from different models")


def known(vocab_size: int) -> Vocabulary | None:
    """The vocabulary of a published model by its size alone, or ``None`` if no published one has that size."""
    published = (Vocabulary.emu3(), Vocabulary.emu3_5())
    return next((vocabulary for vocabulary in published if vocabulary.size == vocab_size), None)


def whole_map(pieces: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """The ``vocabulary_map`` of transformers: text pieces, then names, one spare name being the placeholder's.

    Raises:
        EmulusError: A text piece is spelt like a special token.
    """
    renamed = [PLACEHOLDER if name == PLACEHOLDER_WAS else name for name in names]
    ids = {name: id for id, name in enumerate((*pieces, *renamed))}
    if len(ids) < len(pieces) + len(renamed):
        raise EmulusError("a piece of its text vocabulary is spelt like a special token; transformers cannot hold both")
    return ids
