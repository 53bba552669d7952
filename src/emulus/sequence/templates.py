"""task -> prompt: the only place that knows one task from another.

Beside each prompt stands the document that teaches it, so that what is trained and what is asked never drift
apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from emulus.errors import EmulusError
from emulus.sequence.document import Document, Image, Text, Video
from emulus.sequence.grammar import Grammar

_FINISH = frozenset[str]()
_WRITE = frozenset({"text"})


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


def draw(grammar: Grammar, caption: str, h: int, w: int) -> Prompt:
    """Ask for a picture of ``h`` by ``w`` cells.

    Raises:
        EmulusError: The size is not one.
    """
    return _captioned(grammar, caption, grammar.open_media(h=h, w=w))


def animate(grammar: Grammar, caption: str, t: int, h: int, w: int, fps: float) -> Prompt:
    """Ask for a clip of ``t`` frames of ``h`` by ``w`` cells, at ``fps`` frames of pixels per second.

    Raises:
        EmulusError: The size is not one.
    """
    return _captioned(grammar, caption, grammar.open_media(h=h, w=w, t=t, fps=fps))


def continue_video(grammar: Grammar, caption: str, video_so_far: Video, total_t: int) -> Prompt:
    """Ask for the rest of a clip.

    Args:
        grammar: Writes the ids.
        caption: What the clip shows; may be empty.
        video_so_far: Its first frames of cells.
        total_t: Frames of cells of the whole clip.

    Raises:
        EmulusError: There is nothing left to add.
    """
    t, h, w = video_so_far.codes.shape
    if total_t <= t:
        raise EmulusError(f"a clip of {t} frames cannot be continued to {total_t}; ask for more than there are")
    codes = video_so_far.codes.flatten()
    return _captioned(grammar, caption, grammar.open_media(h=h, w=w, t=total_t, fps=video_so_far.fps, codes=codes))


def caption(grammar: Grammar, media: Image | Video) -> Prompt:
    """Ask for the words for a picture or clip."""
    return _about(grammar, Document((media,)), Document())


def answer(grammar: Grammar, media: Image | Video, question: str) -> Prompt:
    """Ask a question about a picture or clip."""
    return _about(grammar, Document((media, _question(question))), Document((_question(question),)))


def caption_first(caption: str, media: Image | Video) -> Document:
    """What teaches :func:`draw` and :func:`animate`."""
    return Document((Text(caption), media))


def caption_last(media: Image | Video, caption: str) -> Document:
    """What teaches :func:`caption`."""
    return Document((media, Text(caption)))


def question_answer(media: Image | Video, question: str, answer: str) -> Document:
    """What teaches :func:`answer`: that prompt's ids are the first of this document's."""
    return Document((media, _question(question), Text(f" {answer}")))


def _captioned(grammar: Grammar, caption: str, opening: list[int]) -> Prompt:
    """A caption, then a medium to finish; without the caption for guidance."""
    words = grammar.build(Document((Text(caption),)), eos=False)
    return Prompt(ids=words + opening, null_ids=grammar.build(Document(), eos=False) + opening)


def _about(grammar: Grammar, document: Document, without_media: Document) -> Prompt:
    """Words to write after a document; without the medium for guidance."""
    ids, null_ids = (grammar.build(each, eos=False) for each in (document, without_media))
    return Prompt(ids=ids, null_ids=null_ids, may=_WRITE)


def _question(question: str) -> Text:
    return Text(f"Question: {question}\nAnswer:")
