"""task -> prompt: the only place that knows one task from another.

Beside each prompt stands the document that teaches it, so that what is trained and what is asked never drift
apart. How a prompt is worded is a value (:class:`Wording`): ours, or that which a published model was trained with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from emulus.errors import EmulusError
from emulus.sequence.document import Document, Image, Segment, Special, Text, Video
from emulus.sequence.grammar import Grammar

_FINISH = frozenset[str]()
_WRITE = frozenset({"text"})
_SLOT = re.compile(r"(\{text\}|\{media\}|<\|[^|]+\|>)")

Media = Image | Video


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The words around what a user gives. ``{text}`` and ``{media}`` stand for it; ``<|names|>`` are specials.

    Attributes:
        draw: Before a picture or clip to be drawn.
        draw_null: The same for the unguided branch, with the negative text.
        system: Begins a conversation; ``{text}`` is a system message.
        helper: The system message where none is given.
        turn: A question, up to where its answer begins.
        between: Between an answer and the next question; a space stands before the answer.
        describe: The question that asks for a caption; None asks by showing the medium and nothing else.
    """

    draw: str = "{text}"
    draw_null: str = "{text}"
    system: str = ""
    helper: str = ""
    turn: str = "{media}Question: {text}\nAnswer:"
    between: str = "\n"
    describe: str | None = None


NATIVE = Wording()
"""What our own recipes train."""

EMU3 = Wording(
    system="{text} ",
    helper="You are a helpful assistant.",
    turn="USER: {media}{text}. ASSISTANT:",
    between=" ",
    describe="Please describe the image",
)
"""Emu3-Chat's and Emu3-Gen's. The full stop after the text is there even if the text ends with one.

What stands between an answer and the next question was not published; a space is the least that can.

Source: baaivision/Emu3, emu3/mllm/processing_emu3.py, multimodal_understanding.py.
"""

EMU3_BASE = Wording(turn="{media}{text}", describe="Please describe the image")
"""Emu3-Stage1's: the picture, then the text.

Source: baaivision/Emu3, the captioning template of its README and the question it is used with.
"""

EMU3_5 = Wording(
    draw="You are a helpful assistant for t2i task. USER: {text} ASSISTANT: <|extra_100|>",
    draw_null="You are a helpful assistant. USER: {text} ASSISTANT: <|extra_100|>",
    system="{text} ",
    helper="You are a helpful assistant.",
    turn="USER: {text}{media} ASSISTANT: <|extra_100|>",
    between=" ",
    describe="Please describe the image",
)
"""Emu3.5's; extra_100 begins what the model writes.

Source: baaivision/Emu3.5, its inference prompts.
"""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question and, unless it is the last, its answer.

    Attributes:
        text: What is asked.
        media: Pictures and clips that go with it.
        answer: What was answered; None where the answer is to come.
    """

    text: str
    media: tuple[Media, ...] = ()
    answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a decoder is given, and what it may do with it.

    Attributes:
        ids: The prompt.
        null_ids: The same without what shall guide: guidance pushes away from what would follow these.
        may: What may be written beside the medium left open (see :meth:`Grammar.start`).
    """

    ids: list[int]
    null_ids: list[int]
    may: frozenset[str] = _FINISH


def draw(grammar: Grammar, caption: str, h: int, w: int, *, negative: str = "", wording: Wording = NATIVE) -> Prompt:
    """Ask for a picture of ``h`` by ``w`` cells; guidance leads away from ``negative``.

    Raises:
        EmulusError: The size is not one.
    """
    return _captioned(grammar, caption, negative, wording, grammar.open_media(h=h, w=w))


def animate(
    grammar: Grammar,
    caption: str,
    t: int,
    h: int,
    w: int,
    fps: float,
    *,
    negative: str = "",
    wording: Wording = NATIVE,
) -> Prompt:
    """Ask for a clip of ``t`` frames of ``h`` by ``w`` cells, at ``fps`` frames of pixels per second.

    Raises:
        EmulusError: The size is not one.
    """
    return _captioned(grammar, caption, negative, wording, grammar.open_media(h=h, w=w, t=t, fps=fps))


def continue_video(
    grammar: Grammar, caption: str, video_so_far: Video, total_t: int, *, wording: Wording = NATIVE
) -> Prompt:
    """Ask for the rest of a clip.

    Args:
        grammar: Writes the ids.
        caption: What the clip shows; may be empty.
        video_so_far: Its first frames of cells.
        total_t: Frames of cells of the whole clip.
        wording: The model's.

    Raises:
        EmulusError: There is nothing left to add.
    """
    t, h, w = video_so_far.codes.shape
    if total_t <= t:
        raise EmulusError(f"a clip of {t} frames cannot be continued to {total_t}; ask for more than there are")
    codes = video_so_far.codes.flatten()
    opening = grammar.open_media(h=h, w=w, t=total_t, fps=video_so_far.fps, codes=codes)
    return _captioned(grammar, caption, "", wording, opening)


def caption(grammar: Grammar, media: Media, *, wording: Wording = NATIVE) -> Prompt:
    """Ask for the words for a picture or clip."""
    if wording.describe is not None:
        return answer(grammar, media, wording.describe, wording=wording)
    return _about(grammar, [media])


def captioned(grammar: Grammar, media: Media, words: str, *, wording: Wording = NATIVE) -> tuple[list[int], int]:
    """A whole document that says what a picture or clip shows.

    Returns:
        The ids, from BOS to EOS, and where :func:`caption`'s prompt ends and the words begin.
    """
    prompt = caption(grammar, media, wording=wording).ids
    # An answer is a piece of its own, with a space before it.
    text = Text(words if wording.describe is None else f" {words}")
    return [*prompt, *grammar.build(Document((text,)), bos=False)], len(prompt)


def answer(grammar: Grammar, media: Media, question: str, *, wording: Wording = NATIVE) -> Prompt:
    """Ask a question about a picture or clip."""
    return converse(grammar, [Turn(text=question, media=(media,))], wording=wording)


def converse(
    grammar: Grammar, turns: Sequence[Turn], *, system: str | None = None, wording: Wording = NATIVE
) -> Prompt:
    """Ask for the next answer of a conversation.

    Args:
        grammar: Writes the ids.
        turns: What was said; the last has no answer yet.
        system: A message before the first question, "" for none; by default the wording's own.
        wording: The model's.

    Raises:
        EmulusError: Answers are missing where they should be, or there is nothing to answer.
    """
    if not turns or [turn.answer is None for turn in turns] != [False] * (len(turns) - 1) + [True]:
        raise EmulusError("a conversation needs questions with their answers, and a last question without one")
    said = wording.helper if system is None else system
    # Without a message nothing of its template stays either.
    segments = _fill(wording.system, said) if said else []
    if system and not wording.system:
        segments.append(Text(f"{system}\n"))
    for index, turn in enumerate(turns):
        segments += [Text(wording.between)] if index else []
        segments += _fill(wording.turn, turn.text, turn.media)
        segments += [] if turn.answer is None else [Text(f" {turn.answer}")]
    return _about(grammar, segments)


def caption_first(caption: str, media: Media) -> Document:
    """What teaches :func:`draw` and :func:`animate`."""
    return Document((Text(caption), media))


def caption_last(media: Media, caption: str) -> Document:
    """What teaches :func:`caption`."""
    return Document((media, Text(caption)))


def question_answer(media: Media, question: str, answer: str) -> Document:
    """What teaches :func:`answer`: that prompt's ids are the first of this document's."""
    return conversation(media, [(question, answer)])


def conversation(media: Media, pairs: Sequence[tuple[str, str]]) -> Document:
    """What teaches :func:`converse`: that prompt's ids are the first of this document's, up to each answer.

    An answer is a piece of its own, as it is when it is written. So after one that ends with a sign, which a tokenizer
    may merge with the line's end, the prompt of the next question can have other ids for these two.

    Args:
        media: What is asked about.
        pairs: Questions and their answers, at least one.
    """
    segments: list[Segment] = []
    for index, (question, answer) in enumerate(pairs):
        turn = _fill(NATIVE.turn, question, () if index else (media,))
        segments += [*_document([Text(NATIVE.between), *turn] if index else turn).segments, Text(f" {answer}")]
    return Document(tuple(segments))


def _captioned(grammar: Grammar, caption: str, negative: str, wording: Wording, opening: list[int]) -> Prompt:
    """A caption, then a medium to finish; with the negative caption for guidance."""
    ids, null_ids = (
        grammar.build(_document(_fill(template, text)), eos=False) + opening
        for template, text in ((wording.draw, caption), (wording.draw_null, negative))
    )
    return Prompt(ids=ids, null_ids=null_ids)


def _about(grammar: Grammar, segments: Sequence[Segment]) -> Prompt:
    """Words to write after segments; without the media for guidance."""
    unseen = [segment for segment in segments if not isinstance(segment, Media)]
    ids, null_ids = (grammar.build(_document(each), eos=False) for each in (segments, unseen))
    return Prompt(ids=ids, null_ids=null_ids, may=_WRITE)


def _fill(template: str, text: str, media: Sequence[Media] = ()) -> list[Segment]:
    """A template's segments. What the user wrote is never searched for slots or specials."""
    segments: list[Segment] = []
    for part in _SLOT.split(template):
        if part == "{media}":
            segments += media
        elif part == "{text}":
            segments.append(Text(text))
        elif _SLOT.fullmatch(part):
            segments.append(Special(part))
        else:
            segments.append(Text(part))
    return segments


def _document(segments: Iterable[Segment]) -> Document:
    """Neighbouring texts are one: where they are split into pieces is the tokenizer's to say, as it was released."""
    joined: list[Segment] = []
    for segment in segments:
        if isinstance(segment, Text) and joined and isinstance(joined[-1], Text):
            joined[-1] = Text(joined[-1].text + segment.text)
        elif segment != Text(""):
            joined.append(segment)
    return Document(tuple(joined))
