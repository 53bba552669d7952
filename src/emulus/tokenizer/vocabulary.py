"""The one id space: text, special, visual and action ids side by side, and what each id means."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, cast

from emulus.codec import decode_fields
from emulus.errors import EmulusError, shown
from emulus.files import read_config, write_json

MAX_IDS = 2**24
"""A table with more ids is damaged: that of Emu3.5 has 282,926."""
ROLES = ("pad", "bos", "eos", "boi", "img", "eoi", "eol", "eof")
ACTION_ROLES = ("boa", "eoa")
NAME = re.compile(r"<\|[^|]+\|>")
"""What every surface string looks like. Without a bar inside, one pass over a text finds them all."""

_SIZES = ("text_size", "visual_start", "visual_size", "action_start", "action_size")
_TOKEN_NAME = re.compile(r"<\|(visual|action) token (\d{6,})\|>")
_NATIVE_NAMES = {
    "pad": "<|pad|>",
    "bos": "<|bos|>",
    "eos": "<|eos|>",
    "boi": "<|image start|>",
    "img": "<|image token|>",
    "eoi": "<|image end|>",
    "eol": "<|row end|>",
    "eof": "<|frame end|>",
    "boa": "<|action start|>",
    "eoa": "<|action end|>",
}

EMU3_5_MARKS: Mapping[str, str] = MappingProxyType(
    {
        "tms": "<|extra_202|>",
        "bss": "<|extra_100|>",
        "ess": "<|extra_101|>",
        "bog": "<|extra_60|>",
        "eog": "<|extra_61|>",
        "boc": "<|extra_50|>",
        "eoc": "<|extra_51|>",
    }
)
"""Emu3.5's names for specials that it uses beside the format's own: BSS stands before an answer and ESS after it,
BOG and EOG enclose the thoughts on the whole of it, BOC and EOC those on one picture; TMS is only named.

Source: baaivision/Emu3.5, configs/config.py.
"""


class SurfaceNames(Mapping[str, int]):
    """Surface strings to ids: a table of the named specials, and visual and action tokens by pattern.

    ``names["<|visual token 000123|>"]`` is computed, so that tens of thousands of names need not be held.

    Args:
        named: The specials by name.
        ranges: ``"visual"`` and ``"action"`` to their half-open id ranges.
    """

    def __init__(self, named: Mapping[str, int], ranges: Mapping[str, tuple[int, int]]) -> None:
        self.named = dict(named)
        self.ranges = dict(ranges)
        self._by_id = {id: name for name, id in named.items()}

    def __getitem__(self, name: str) -> int:
        if name in self.named:
            return self.named[name]
        match = _TOKEN_NAME.fullmatch(name)
        if match:
            start, stop = self.ranges[match[1]]
            code = int(match[2])
            if code < stop - start and name == token_name(match[1], code):
                return start + code
        raise KeyError(name)

    def name_of(self, id: int) -> str | None:
        """The surface string of an id, or None for an id that has none."""
        if id in self._by_id:
            return self._by_id[id]
        for kind, (start, stop) in self.ranges.items():
            if start <= id < stop:
                return token_name(kind, id - start)
        return None

    def __iter__(self) -> Iterator[str]:
        yield from self.named
        for kind, (start, stop) in self.ranges.items():
            yield from (token_name(kind, code) for code in range(stop - start))

    def __len__(self) -> int:
        return len(self.named) + sum(stop - start for start, stop in self.ranges.values())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SurfaceNames):
            return self.named == other.named and self.ranges == other.ranges
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SurfaceNames({self.named}, {self.ranges})"


def token_name(kind: str, code: int) -> str:
    """The surface string of a visual or action token, e.g. ``"<|visual token 000123|>"``."""
    return f"<|{kind} token {code:06d}|>"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Who owns which id. The only place, beside the grammar, that knows a special id.

    Attributes:
        text_size: Ids ``0 .. text_size - 1`` belong to the text tokenizer.
        specials: Role to id. The roles are ``pad bos eos``, ``boi img eoi`` (start of a picture or clip, end
            of its size, end of it), ``eol eof`` (end of a row, of a frame), and ``boa eoa`` (start and end of
            actions) when there are actions.
        visual_start: The id of visual code 0.
        visual_size: How many visual codes there are (the vision tokenizer's codebook size).
        action_start: The id of action code 0.
        action_size: How many action codes there are; 0 for none.
        special_names: Surface string to id of every special, of unused ones too. Strings serve display and
            texts that are explicitly allowed to hold specials; nothing else reads them. Visual and action
            tokens are found here by pattern.

    Raises:
        EmulusError: Roles are missing, or ids or ranges overlap.
    """

    text_size: int
    specials: Mapping[str, int]
    visual_start: int
    visual_size: int
    action_start: int = 0
    action_size: int = 0
    special_names: Mapping[str, int]

    def __post_init__(self) -> None:
        given = self.special_names
        named = given.named if isinstance(given, SurfaceNames) else given
        _check(self, named)
        ranges = {"visual": self.visual_range, "action": self.action_range}
        object.__setattr__(self, "specials", dict(self.specials))
        object.__setattr__(self, "special_names", SurfaceNames(named, ranges))

    @property
    def size(self) -> int:
        """Length of the whole id space: one more than the largest id."""
        last_special = max(self._surfaces.named.values())
        return max(last_special + 1, self.text_size, self.visual_range[1], self.action_range[1])

    @property
    def marks(self) -> dict[str, int]:
        """The specials without a role, by surface string: what a document's ``Special`` can be."""
        roles = set(self.specials.values())
        return {name: id for name, id in self._surfaces.named.items() if id not in roles}

    @property
    def pad(self) -> int:
        """The id that fills what is not there."""
        return self.specials["pad"]

    @property
    def bos(self) -> int:
        """The id before a document."""
        return self.specials["bos"]

    @property
    def eos(self) -> int:
        """The id after a document."""
        return self.specials["eos"]

    @property
    def boi(self) -> int:
        """The id before the size of a picture or clip."""
        return self.specials["boi"]

    @property
    def img(self) -> int:
        """The id between the size and the cells of a picture or clip."""
        return self.specials["img"]

    @property
    def eoi(self) -> int:
        """The id after a picture or clip."""
        return self.specials["eoi"]

    @property
    def eol(self) -> int:
        """The id after a row of cells."""
        return self.specials["eol"]

    @property
    def eof(self) -> int:
        """The id after a frame."""
        return self.specials["eof"]

    @property
    def boa(self) -> int:
        """The id before actions; only where there are actions."""
        return self.specials["boa"]

    @property
    def eoa(self) -> int:
        """The id after actions; only where there are actions."""
        return self.specials["eoa"]

    @property
    def text_range(self) -> tuple[int, int]:
        """Half-open range of the text ids."""
        return 0, self.text_size

    @property
    def visual_range(self) -> tuple[int, int]:
        """Half-open range of the visual ids."""
        return self.visual_start, self.visual_start + self.visual_size

    @property
    def action_range(self) -> tuple[int, int]:
        """Half-open range of the action ids; empty when there are none."""
        return self.action_start, self.action_start + self.action_size

    def is_text(self, id: int) -> bool:
        """Whether the id belongs to the text tokenizer."""
        return 0 <= id < self.text_size

    def is_visual(self, id: int) -> bool:
        """Whether the id is a visual code."""
        return 0 <= id - self.visual_start < self.visual_size

    def is_action(self, id: int) -> bool:
        """Whether the id is an action code."""
        return 0 <= id - self.action_start < self.action_size

    def surface(self, id: int) -> str:
        """Name an id for people.

        Args:
            id: Any integer.

        Returns:
            ``"<|image start|>"``, ``"<|visual token 000123|>"``, ``"text id 17"`` (only the text tokenizer
            knows its letters), or ``"unknown id 999999"``.
        """
        name = self._surfaces.name_of(id)
        return name or (f"text id {id}" if self.is_text(id) else f"unknown id {id}")

    @classmethod
    def native(cls, *, text_size: int, visual_size: int, action_size: int = 0) -> Vocabulary:
        """Emulus's own order: text ids, specials, visual ids, action ids, without gaps.

        Args:
            text_size: Size of the text tokenizer.
            visual_size: Size of the vision tokenizer's codebook.
            action_size: How many action codes; 0 for none.

        Raises:
            EmulusError: A size is out of range.
        """
        roles = ROLES + ACTION_ROLES if action_size else ROLES
        specials = {role: text_size + index for index, role in enumerate(roles)}
        visual_start = text_size + len(roles)
        return cls(
            text_size=text_size,
            specials=specials,
            visual_start=visual_start,
            visual_size=visual_size,
            action_start=visual_start + visual_size if action_size else 0,
            action_size=action_size,
            special_names={_NATIVE_NAMES[role]: id for role, id in specials.items()},
        )

    @classmethod
    def emu3(cls, *, visual_size: int = 32_768) -> Vocabulary:
        """The released Emu3 ids: 151,643 text ids, 211 specials, 32,768 visual ids; 184,622 in all.

        Args:
            visual_size: Another codebook's size, with everything before the visual ids as released.

        Source: baaivision/Emu3, emu3/mllm/tokenization_emu3.py.
        """
        text_size = 151_643
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        names += [f"<|extra_{index}|>" for index in range(205)]
        names += ["<|image token|>", "<|image start|>", "<|image end|>"]
        ids = {name: text_size + index for index, name in enumerate(names)}
        roles = {
            "pad": "<|endoftext|>",
            "bos": "<|extra_203|>",
            "eos": "<|extra_204|>",
            "boi": "<|image start|>",
            "img": "<|image token|>",
            "eoi": "<|image end|>",
            "eol": "<|extra_200|>",
            "eof": "<|extra_201|>",
        }
        return cls(
            text_size=text_size,
            specials={role: ids[name] for role, name in roles.items()},
            visual_start=text_size + len(names),
            visual_size=visual_size,
            special_names=ids,
        )

    @classmethod
    def emu3_5(cls) -> Vocabulary:
        """The released Emu3.5 ids: Emu3's, with 131,072 visual ids; 282,926 in all.

        What some of Emu3's unused specials mean there is in :data:`EMU3_5_MARKS`.

        Source: baaivision/Emu3.5, src/tokenizer_emu3_ibq/tokenization_emu3.py.
        """
        return cls.emu3(visual_size=131_072)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that :meth:`from_dict` reads back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"special_names": dict(self._surfaces.named)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Vocabulary:
        """Read what :meth:`to_dict` gave.

        Raises:
            EmulusError: A key is missing, unknown or of the wrong type, or the ids do not fit together.
        """
        return decode_fields(cls, values, "vocabulary")

    def save(self, path: Path) -> None:
        """Write the table as JSON, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read a table that :meth:`save` wrote.

        Raises:
            EmulusError: The file is missing, is not JSON, or its ids do not fit together.
        """
        values = read_config(path)
        try:
            return cls.from_dict(values)
        except EmulusError as error:
            raise EmulusError(f"{path}: {error}") from error

    @property
    def _surfaces(self) -> SurfaceNames:
        return cast(SurfaceNames, self.special_names)  # made so by __post_init__


def _check(vocabulary: Vocabulary, named: Mapping[str, int]) -> None:
    """Refuse a table in which an id is missing, is no id, or means two things."""
    sizes = [getattr(vocabulary, name) for name in _SIZES]
    if not all(map(_is_count, sizes)) or not vocabulary.text_size or not vocabulary.visual_size:
        wanted = f"whole numbers below {MAX_IDS:,} with some text and visual ids"
        _refuse(f"{', '.join(_SIZES)} must be {wanted}, not {shown(sizes)}")
    for table in (vocabulary.specials, named):
        if not isinstance(table, Mapping) or not all(map(_is_count, table.values())):
            _refuse("specials and special_names must be tables of ids")
        if len(set(table.values())) < len(table):
            _refuse("two specials share an id")
    roles = ROLES + ACTION_ROLES if vocabulary.action_size else ROLES
    if set(vocabulary.specials) != set(roles):
        _refuse(f"specials must be {', '.join(roles)}, not {shown(list(vocabulary.specials))}")
    if not set(vocabulary.specials.values()) <= set(named.values()):
        _refuse("special_names must name the id of every role")
    for name in named:
        if not isinstance(name, str) or not NAME.fullmatch(name) or _TOKEN_NAME.fullmatch(name):
            _refuse(f"special name {shown(name)} must look like '<|row end|>' and not like a visual token")
    ranges = [vocabulary.text_range, vocabulary.visual_range, vocabulary.action_range]
    ranges = [*ranges, *((id, id + 1) for id in named.values())]
    for (start, stop), (next_start, next_stop) in pairwise(sorted(r for r in ranges if r[0] < r[1])):
        if next_start < stop:
            _refuse(f"the ids {start} to {stop - 1} and {next_start} to {next_stop - 1} overlap")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_IDS


def _refuse(what: str) -> NoReturn:
    raise EmulusError(f"bad vocabulary: {what}; restore it from the checkpoint it belongs to")
