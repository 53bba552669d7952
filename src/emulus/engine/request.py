"""What is asked of the engine, what it answers, and what it tells on the way."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

from emulus.checks import choice, several, shown, whole
from emulus.errors import EmulusError
from emulus.sampling.params import SamplingParams
from emulus.sequence.document import MediaSize

_MAY = ("text", "image", "video", "action", "special")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One thing to generate.

    Attributes:
        prompt_ids: What the model is given; it may break off anywhere, also inside a picture or clip.
        null_ids: The unguided prompt (empty or negative text, the same medium left open); None for no
            guidance.
        may: What may be generated besides the medium that the prompt leaves open: ``"text"``, ``"image"``,
            ``"video"``, ``"action"``. With nothing, that medium is finished and the document ends.
        params: How ids are drawn; None for the defaults.

    Raises:
        EmulusError: Ids are not whole numbers, or there is no such thing as ``may`` names.
    """

    prompt_ids: Sequence[int]
    null_ids: Sequence[int] | None = None
    may: frozenset[str] = frozenset()
    params: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_ids", _ids("prompt_ids", self.prompt_ids))
        if self.null_ids is not None:
            object.__setattr__(self, "null_ids", _ids("null_ids", self.null_ids))
        object.__setattr__(self, "may", _kinds(self.may))
        params = SamplingParams() if self.params is None else self.params
        if not isinstance(params, SamplingParams):
            raise EmulusError(f"params is {shown(params)} but must be SamplingParams")
        object.__setattr__(self, "params", params)

    @property
    def guided(self) -> bool:
        """Whether there is an unguided row beside the prompt's."""
        return self.null_ids is not None and self.params.guidance_scale != 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was generated.

    Attributes:
        ids: The generated ids, without the prompt; with the end-of-document id unless cut inside a medium.
        finished: ``"end"`` when the document came to its end, ``"length"`` when ``max_new_tokens`` or the
            model's
            context cut it short.
    """

    ids: tuple[int, ...]
    finished: Literal["end", "length"]

    @property
    def truncated(self) -> bool:
        """Whether it was cut short."""
        return self.finished == "length"


@dataclass(frozen=True, kw_only=True)
class Token:
    """One id was added. ``request`` is the request's place in the list."""

    request: int
    id: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of cells is whole.

    Attributes:
        request: The request's place in the list.
        size: Size of the picture or clip.
        index: Which row, counted over all frames.
        codes: Its visual codes, left to right.
    """

    request: int
    size: MediaSize
    index: int
    codes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A frame of cells is whole (a picture has one).

    Attributes:
        request: The request's place in the list.
        size: Size of the picture or clip.
        index: Which frame.
        codes: Its visual codes, row by row: ``size.h * size.w`` of them.
    """

    request: int
    size: MediaSize
    index: int
    codes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """Some text is readable: whole characters only."""

    request: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Done:
    """A request is finished."""

    request: int
    result: Result


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A request could not be begun, e.g. for want of memory; others go on."""

    request: int
    message: str


Event = Token | Row | Frame | TextPiece | Done | Failed


@dataclass(kw_only=True)
class Counts:
    """What an engine has done.

    Attributes:
        forwards: Steps of the model, each for all running requests; prompts are not counted.
        tokens: Ids generated, those that the grammar forces included.
        computed: Tokens that went through the model in those steps, null prompts' and wrong guesses included.
        prefilled: Tokens of prompts that went through the model before.
    """

    forwards: int = 0
    tokens: int = 0
    computed: int = 0
    prefilled: int = 0


def _ids(name: str, ids: Any) -> Sequence[int]:
    """Whole numbers in a row; an array or tensor of them becomes a list."""
    if getattr(ids, "ndim", None) == 1 and hasattr(ids, "tolist"):
        ids = ids.tolist()
    ids = several(name, ids, str | bytes | bytearray)
    # Of a range only its ends could be wrong, and lists of plain numbers are the rule.
    if not isinstance(ids, range) and any(type(id) is not int for id in ids):
        return [whole(f"an id of {name}", id) for id in ids]
    return ids


def _kinds(may: Any) -> frozenset[str]:
    if may is None:
        return frozenset()
    if not isinstance(may, Set | Sequence) or isinstance(may, str):
        raise EmulusError(f"may is {shown(may)} but must be a set of some of {', '.join(_MAY)}")
    return frozenset(choice("may", each, _MAY) for each in may)
