"""documents <-> ids, written once: data set, training, engine and server all use this one object.

A document is ids in this order (Emu3's; :class:`SequenceLayout` has the variants)::

    BOS  text  BOI "64*64" IMG  row EOL row EOL ... EOF  EOI  text ... EOS

A picture is a clip of one frame, but for what its size text says. :class:`Grammar` writes documents and reads
them back, and :class:`GrammarState` walks beside a decoder and says which ids may come next.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Literal, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

from emulus.errors import EmulusError, did_you_mean
from emulus.sequence.allowed import Allowed, Position, just, only
from emulus.sequence.document import (
    Action,
    Document,
    Image,
    MediaSize,
    OpenMedia,
    Parsed,
    Segment,
    Special,
    Text,
    Video,
)
from emulus.sequence.layout import CELL, Ids, SequenceLayout
from emulus.sequence.meta import Follow, MetaTemplate
from emulus.sequence.released import ReleasedState
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import Vocabulary

_MEDIA = ("image", "video")
_NO_IDS: Ids = np.empty(0, np.int64)

MAX_CELLS = 1 << 20
"""Most cells of one picture or clip: eight times what Emu3's longest context holds."""


class Grammar:
    """Builds ids from documents, parses ids, and starts a :class:`GrammarState` beside a decoder.

    Args:
        vocabulary: What each id means.
        text: The text tokenizer that the vocabulary was made for.
        layout: Which published sequence format.
        max_cells: Most cells of one picture or clip; a larger one is refused before memory is taken for it.
        compat: ``"released"`` does what the released Emu3 code does where that differs: specials written in a
            text become those specials, so whoever writes it can open and close pictures; and
            :meth:`start` follows the released rule, wrong as it is with several pictures.

    Raises:
        EmulusError: The text tokenizer is not the vocabulary's, size texts could not be read back, or the
            released code knows no such layout.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        text: TextTokenizer,
        layout: SequenceLayout | None = None,
        *,
        max_cells: int = MAX_CELLS,
        compat: Literal["released"] | None = None,
    ) -> None:
        if text.size != vocabulary.text_size:
            raise EmulusError(
                f"the text tokenizer has {text.size} ids, the vocabulary {vocabulary.text_size} for text; "
                "take both from the same checkpoint"
            )
        self.vocabulary = vocabulary
        self.text = text
        self.layout = layout = layout or SequenceLayout()
        self.max_cells = max_cells
        self.compat = compat
        if compat not in (None, "released"):
            raise EmulusError(f"unknown compat {compat!r}{did_you_mean(str(compat), ['released'])}")
        if compat and not (layout.row_end and layout.last_row_end and layout.frame_end):
            raise EmulusError("compat='released' is Emu3's rule, which ends every row and frame; leave compat away")
        self._parsed_in_text = vocabulary.special_names if compat else None
        self._marks = vocabulary.marks
        self._mark_of_id = {id: name for name, id in self._marks.items()}
        self._templates = {
            "image": MetaTemplate("image", layout.image_meta, layout.temporal_factor),
            "video": MetaTemplate("video", layout.video_meta, layout.temporal_factor),
        }
        characters = {c for template in self._templates.values() for c in template.characters}
        self._id_of_character = {c: text.id_of_char(c) for c in characters}
        self._character_of_id = {id: c for c, id in self._id_of_character.items()}

    # documents -> ids

    def build(self, document: Document, *, bos: bool = True, eos: bool = True) -> list[int]:
        """Write a document as ids.

        Text can hold anything, strings that look like specials too: it only ever becomes text ids (but for
        ``compat="released"``).

        Args:
            document: Segments in order.
            bos: Whether to begin with BOS.
            eos: Whether to end with EOS; a prompt does not.

        Returns:
            The ids; :meth:`parse` gives the document back.

        Raises:
            EmulusError: Codes are outside the codebook, a picture or clip is too large, or a special is none
                or has a role of its own.
        """
        ids = [self.vocabulary.bos] if bos else []
        for segment in document.segments:
            ids += self._segment_ids(segment)
        return [*ids, self.vocabulary.eos] if eos else ids

    def open_media(
        self,
        *,
        h: int,
        w: int,
        t: int | None = None,
        fps: float | None = None,
        codes: Int64[Tensor, " cells"] | None = None,
    ) -> list[int]:
        """The start of a picture or clip, as a prompt ends with it: BOI, size text, IMG.

        Args:
            h: Rows of cells.
            w: Cells in a row.
            t: Frames of cells, for a clip.
            fps: Frames of pixels per second, for a clip.
            codes: The first codes, when some are there already; the row and frame ends after them come too.

        Raises:
            EmulusError: The size is not one, or codes are outside the codebook or too many.
        """
        size = MediaSize(h=h, w=w, t=t, fps=fps)
        return self._media_ids(size, torch.empty(0, dtype=torch.int64) if codes is None else codes)

    def media_ids(self, medium: Image | Video) -> Ids:
        """The ids of a whole picture or clip, from BOI to EOI, as :meth:`build` writes them.

        Raises:
            EmulusError: Codes are outside the codebook, or it is too large.
        """
        return self._media(medium.size, medium.codes.flatten())

    def media_length(self, *, h: int, w: int, t: int | None = None) -> int:
        """How many ids follow IMG, up to and with EOI.

        Args:
            h: Rows of cells.
            w: Cells in a row.
            t: Frames of cells; None for a picture.
        """
        return len(self.block(MediaSize(h=h, w=w, t=t, fps=None if t is None else 1.0)))

    def block(self, size: MediaSize) -> Ids:
        """The ids after IMG, up to and with EOI (see :meth:`SequenceLayout.block`).

        Raises:
            EmulusError: The size has more cells than :attr:`max_cells`.
        """
        if size.cells > self.max_cells:
            raise EmulusError(f"a medium of {size} has more than {self.max_cells} cells; make it smaller or shorter")
        v = self.vocabulary
        return self.layout.block(size, eol=v.eol, eof=v.eof, eoi=v.eoi)

    def _segment_ids(self, segment: Segment) -> list[int]:
        match segment:
            case Text():
                return self.text.encode(segment.text, allow_special=self._parsed_in_text)
            case Special():
                return [self._mark_id(str(segment.name))]
            case Action():
                self._check_codes(segment.codes, self.vocabulary.action_size, "action")
                ids = (segment.codes + self.vocabulary.action_start).tolist()
                return [self.vocabulary.boa, *ids, self.vocabulary.eoa]
            case _:
                return self._media_ids(segment.size, segment.codes.flatten())

    def _media_ids(self, size: MediaSize, codes: Int64[Tensor, " cells"]) -> list[int]:
        return self._media(size, codes).tolist()

    def _media(self, size: MediaSize, codes: Int64[Tensor, " cells"]) -> Ids:
        """BOI, size text, IMG, and the block up to the first cell that has no code."""
        v = self.vocabulary
        self._check_codes(codes, v.visual_size, "visual")
        block = self.block(size)
        cells = np.flatnonzero(block == CELL)
        if len(codes) > len(cells):
            raise EmulusError(f"{len(codes)} codes do not fit into {size}; give at most {len(cells)}")
        filled = block[: cells[len(codes)] if len(codes) < len(cells) else len(block)].copy()
        filled[cells[: len(codes)]] = codes.numpy() + v.visual_start
        meta = [self._id_of_character[c] for c in self._templates[size.kind].write(size)]
        return np.concatenate([np.array([v.boi, *meta, v.img], np.int64), filled])

    def _mark_id(self, name: str) -> int:
        if name in self._marks:
            return self._marks[name]
        if name in self.vocabulary.special_names:
            raise EmulusError(
                f"{name} cannot be a Special: the sequence format has a place for it, where the grammar writes it; "
                "give the Image, Video or Action, or leave it away"
            )
        raise EmulusError(f"no special is called {name!r}; Vocabulary.marks names those that a document can hold")

    @staticmethod
    def _check_codes(codes: Tensor, size: int, kind: str) -> None:
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise EmulusError(
                f"{kind} codes {int(codes.min())} to {int(codes.max())} are not within 0 to {size - 1}; "
                "use the tokenizer that belongs to the checkpoint"
            )

    # ids -> documents

    def parse(self, ids: Sequence[int] | Tensor | Ids) -> Parsed:
        """Read ids back.

        Ids may end anywhere: what is whole is given, and what they break off in. Padding may follow EOS.

        Args:
            ids: Ids with or without BOS and EOS.

        Returns:
            The document; neighbouring texts come back as one.

        Raises:
            EmulusError: The order is broken: what should stand where, and what stands there.
        """
        array = _as_array(ids)
        v = self.vocabulary
        segments: list[Segment] = []
        position = 1 if len(array) and array[0] == v.bos else 0
        while position < len(array):
            id = int(array[position])
            found: Segment | OpenMedia
            if id == v.eos:
                self._check_block(array, position + 1, np.full(len(array) - position - 1, v.pad))
                return Parsed(document=Document(tuple(segments)), complete=True)
            if v.is_text(id):
                found, position = self._read_text(array, position)
            elif id in self._mark_of_id:
                found, position = Special(self._mark_of_id[id]), position + 1
            elif id == v.boi:
                found, position = self._read_media(array, position + 1)
            elif id == v.specials.get("boa"):
                found, position = self._read_action(array, position + 1)
            else:
                self._fail(array, position, "text, the start of a medium or the end")
            if isinstance(found, OpenMedia):
                return Parsed(document=Document(tuple(segments)), open=found)
            segments.append(found)
        return Parsed(document=Document(tuple(segments)))

    def _read_text(self, ids: Ids, start: int) -> tuple[Text, int]:
        stop = _run_end(ids, start, self.vocabulary.text_range)
        return Text(self.text.decode(ids[start:stop].tolist())), stop

    def _read_action(self, ids: Ids, start: int) -> tuple[Action | OpenMedia, int]:
        v = self.vocabulary
        stop = _run_end(ids, start, v.action_range)
        codes = torch.from_numpy(ids[start:stop] - v.action_start)
        if stop == len(ids):
            return OpenMedia(kind="action", offset=len(codes), codes=codes), stop
        if ids[stop] != v.eoa or not len(codes):
            self._fail(ids, stop, f"an action id{' or ' + v.surface(v.eoa) if len(codes) else ''}")
        return Action(codes), stop + 1

    def _read_media(self, ids: Ids, start: int) -> tuple[Image | Video | OpenMedia, int]:
        meta, size, start = self._read_meta(ids, start)
        if size is None:
            return OpenMedia(kind="meta", meta=meta, codes=torch.empty(0, dtype=torch.int64)), start
        whole = self.block(size)
        block = whole[: len(ids) - start]
        self._check_block(ids, start, block)
        stop = start + len(block)
        codes = torch.from_numpy(ids[start:stop][block == CELL] - self.vocabulary.visual_start)
        if len(block) < len(whole):
            return OpenMedia(kind=size.kind, meta=meta, size=size, offset=len(block), codes=codes), stop
        return size.medium(codes), stop

    def _read_meta(self, ids: Ids, start: int) -> tuple[str, MediaSize | None, int]:
        """The size text, the size if the text is whole, and where what follows it starts."""
        meta = ""
        for position in range(start, len(ids)):
            follow = self.follow(meta)
            id = int(ids[position])
            if id == self.vocabulary.img and follow.size:
                return meta, follow.size, position + 1
            character = self._character_of_id.get(id)
            if character is None or character not in follow.characters:
                end = f" or {self.vocabulary.surface(self.vocabulary.img)}" if follow.size else ""
                self._fail(ids, position, f"one of {follow.characters!r}{end} after size text {meta!r}")
            meta += character
        return meta, None, len(ids)

    def _check_block(self, ids: Ids, start: int, block: Ids) -> None:
        """Refuse ids that differ from a block, where a cell matches any visual id."""
        seen = ids[start : start + len(block)]
        low, high = self.vocabulary.visual_range
        right = np.where(block == CELL, (low <= seen) & (seen < high), seen == block)
        if not right.all():
            wrong = int(right.argmin())
            expected = int(block[wrong])
            self._fail(ids, start + wrong, "a visual id" if expected == CELL else self.vocabulary.surface(expected))

    def _fail(self, ids: Ids, position: int, expected: str) -> NoReturn:
        found = self.vocabulary.surface(int(ids[position]))
        raise EmulusError(
            f"broken ids at position {position}: {found} where {expected} should be; "
            "they are damaged or of another vocabulary: make them again"
        )

    # what may come next

    def start(
        self,
        prompt_ids: Sequence[int] | Tensor | Ids,
        *,
        may: frozenset[str] = frozenset(),
        max_cells: int | None = None,
    ) -> GrammarState | ReleasedState:
        """Begin to walk beside a decoder, after a prompt.

        With ``compat="released"`` the released rule is followed: what the prompt leaves open is finished by it
        when ``may`` is empty, and otherwise every id may come until EOS. Such prompts need not parse.

        Args:
            prompt_ids: What the decoder is given; it may break off anywhere, in a medium too.
            may: What the decoder may write of its own accord after the medium that the prompt leaves open:
                ``"text"``, ``"image"``, ``"video"``, ``"action"``, ``"special"`` (the specials that have no
                role). With nothing, the medium is finished and EOS follows.
            max_cells: Most cells of a medium whose size the decoder writes itself; None for the grammar's.

        Raises:
            EmulusError: The prompt is broken or already ended, or ``may`` holds something else.
        """
        choices = {"text", "image", "video"}
        choices |= {"action"} if self.vocabulary.action_size else set()
        choices |= {"special"} if self._marks else set()
        for word in sorted(may - choices):
            raise EmulusError(f"this model cannot write {word!r}{did_you_mean(word, choices)}")
        if self.compat:
            return ReleasedState(self.vocabulary) if may else self._start_released(_as_array(prompt_ids))
        parsed = self.parse(prompt_ids)
        if parsed.complete:
            raise EmulusError("the prompt has ended already, nothing can follow; leave its EOS away")
        state = GrammarState(self, parsed.open, may=may, max_cells=max_cells or self.max_cells)
        if parsed.open and not state.allowed().ranges:
            raise EmulusError(
                f"the prompt's size text {parsed.open.meta!r} cannot become a size that is allowed here; "
                "give a smaller one, or none"
            )
        return state

    def _start_released(self, ids: Ids) -> ReleasedState:
        """Finish a picture by the released rule: its size is the last one, but the first IMG is counted from."""
        v = self.vocabulary
        opened = np.flatnonzero(ids == v.boi)
        if len(opened):
            _, size, start = self._read_meta(ids, int(opened[-1]) + 1)
            if size and size.kind == "image" and not (ids[start:] == v.eoi).any():
                offset = len(ids) - int((ids == v.img).argmax())
                return ReleasedState(v, size, offset=offset, cells=sum(map(v.is_visual, ids[start:].tolist())))
        raise EmulusError(
            "the prompt leaves no picture open, and compat='released' finishes nothing else; "
            "end it with a picture's size and IMG, or say what may be written"
        )

    def follow(self, meta: str, kinds: Iterable[str] = _MEDIA, max_cells: int | None = None) -> Follow:
        """How a size text may go on, given what kinds of medium it may speak of.

        Args:
            meta: The size text so far.
            kinds: ``"image"``, ``"video"`` or both.
            max_cells: Most cells; None for the grammar's.
        """
        follows = [self._templates[kind].follow(meta, max_cells or self.max_cells) for kind in kinds]
        characters = sorted({c for follow in follows for c in follow.characters})
        return Follow("".join(characters), next((follow.size for follow in follows if follow.size), None))

    def character(self, id: int) -> str:
        """The character of a size text that an id stands for.

        Raises:
            KeyError: It stands for none.
        """
        return self._character_of_id[id]

    def characters_allowed(self, follow: Follow) -> Allowed:
        """The ids of the characters that may follow a size text, and IMG where it may end."""
        ids = [self._id_of_character[c] for c in follow.characters]
        ids += [self.vocabulary.img] if follow.size else []
        return Allowed.of("meta", map(just, ids))


class GrammarState:
    """Walks beside a decoder: says which ids may come next, and is told which one came.

    Whatever of the allowed ids is chosen, the ids parse into whole media. Each step costs the same, however
    long the sequence. Made by :meth:`Grammar.start`.
    """

    def __init__(self, grammar: Grammar, opened: OpenMedia | None, *, may: frozenset[str], max_cells: int) -> None:
        v = grammar.vocabulary
        self._grammar = grammar
        self._may = may
        self._max_cells = max_cells
        # A size text that the prompt began must be finished even where no further medium may follow.
        self._media = [kind for kind in _MEDIA if kind in may] or list(_MEDIA)
        self._openers = {v.boi: "meta", v.eos: "end"}
        outside = [just(v.eos)]
        outside += [v.text_range] if "text" in may else []
        outside += [just(v.boi)] if may & set(_MEDIA) else []
        outside += map(just, v.marks.values()) if "special" in may else []
        if v.action_size:
            self._openers[v.boa] = "action"
            outside += [just(v.boa)] if "action" in may else []
            self._first_action = Allowed.of("action", [v.action_range])
            self._next_action = Allowed.of("action", [v.action_range, just(v.eoa)])
        self._outside = Allowed.of("text", outside)
        self._visual = Allowed.of("visual", [v.visual_range])
        if opened is None:
            self._move("text")
        else:
            cells = len(opened.codes)
            self._move(opened.kind, meta=opened.meta, size=opened.size, offset=opened.offset, cells=cells)
        self._allowed = self._look_ahead()

    @property
    def done(self) -> bool:
        """Whether EOS has come. After it only padding may."""
        return self._kind == "end"

    @property
    def position(self) -> Position:
        """Where the next id falls, e.g. to show rows and frames as they become whole."""
        return Position(kind=self._kind, size=self._size, cells=self._cells)

    @property
    def least(self) -> int:
        """At least so many ids are still to come: the rest of the open medium, and EOS."""
        return 0 if self.done else max(len(self._block) - self._offset, 0) + 1

    @property
    def remaining(self) -> int | None:
        """Exactly so many ids are still to come, EOS included; None where the decoder has a say in it."""
        settled = self.done or (not self._may and self._kind not in ("meta", "action"))
        return self.least if settled else None

    @property
    def upcoming(self) -> Ids:
        """The rest of the open picture or clip: forced ids, and ``CELL`` for every cell to be drawn; else nothing."""
        return self._block[self._offset :] if self._kind in _MEDIA else _NO_IDS

    def allowed(self) -> Allowed:
        """Which ids may come next."""
        return self._allowed

    def advance(self, id: int) -> None:
        """Take the id that came.

        Raises:
            EmulusError: It was not allowed.
        """
        v = self._grammar.vocabulary
        if not self._allowed.contains(id):
            raise EmulusError(
                f"{v.surface(id)} cannot follow in {self._kind}: allowed are ids {self._allowed.ranges}; "
                "choose among GrammarState.allowed()"
            )
        if self._kind in _MEDIA:
            self._offset += 1
            self._cells += v.is_visual(id)
            if self._offset == len(self._block):
                self._move("text")
        elif self._kind == "meta":
            size = self._follow.size
            if id == v.img and size:
                self._move(size.kind, size=size)
            else:
                self._meta += self._grammar.character(id)
        elif self._kind == "action":
            self._offset += 1
            if id == v.eoa:
                self._move("text")
        elif id in self._openers:
            self._move(self._openers[id])
        self._allowed = self._look_ahead()

    def copy(self) -> GrammarState:
        """A state that goes its own way from here."""
        return copy.copy(self)  # what it holds is replaced, never written to

    def _move(
        self, kind: str, *, meta: str = "", size: MediaSize | None = None, offset: int = 0, cells: int = 0
    ) -> None:
        """Go into a stretch of ids of one kind; in a prompt, into the middle of it."""
        self._kind = kind
        self._meta = meta
        self._size = size
        self._offset = offset
        self._cells = cells
        self._block = self._grammar.block(size) if size else _NO_IDS

    def _look_ahead(self) -> Allowed:
        v = self._grammar.vocabulary
        match self._kind:
            case "image" | "video":
                id = int(self._block[self._offset])
                return self._visual if id == CELL else only(id)
            case "meta":
                self._follow = self._grammar.follow(self._meta, self._media, self._max_cells)
                return self._grammar.characters_allowed(self._follow)
            case "action":
                return self._next_action if self._offset else self._first_action
            case "end":
                return only(v.pad)
        return self._outside


def modalities(ids: Ids, vocabulary: Vocabulary) -> dict[str, npt.NDArray[np.bool_]]:
    """Say which ids are visual and which are words.

    Ids that the grammar writes (row ends, the size text of a picture) are neither: they can be foretold.

    Args:
        ids: Whole documents, one or several end to end.
        vocabulary: Which id means what.

    Returns:
        ``visual`` and ``text``, masks as long as ``ids``.
    """
    # The size text is written in the same ids as words, between BOI and IMG.
    in_size_text = np.cumsum(ids == vocabulary.boi) - np.cumsum(ids == vocabulary.img) > 0
    masks = {}
    for name, (start, stop) in {"visual": vocabulary.visual_range, "text": vocabulary.text_range}.items():
        masks[name] = (ids >= start) & (ids < stop) & ~in_size_text
    return masks


def _as_array(ids: Sequence[int] | Tensor | Ids) -> Ids:
    array = np.asarray(ids)
    if array.size == 0:
        return _NO_IDS
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise EmulusError(f"ids must be a row of whole numbers, not {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)


def _run_end(ids: Ids, start: int, within: tuple[int, int]) -> int:
    """Where a run of ids of one range ends."""
    outside = (ids[start:] < within[0]) | (ids[start:] >= within[1])
    return start + int(outside.argmax()) if outside.any() else len(ids)
