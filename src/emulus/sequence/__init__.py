"""documents <-> ids. What a document is, its one grammar, each task's prompt, and rows of ids to train on."""

from emulus.sequence.allowed import Allowed, Position
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
from emulus.sequence.grammar import MAX_CELLS, Grammar, GrammarState, modalities
from emulus.sequence.layout import CELL, SequenceLayout
from emulus.sequence.packing import Batch, collate, pack
from emulus.sequence.released import ReleasedState
from emulus.sequence.templates import (
    Prompt,
    animate,
    answer,
    caption,
    caption_first,
    caption_last,
    continue_video,
    draw,
    question_answer,
)

__all__ = [
    "CELL",
    "MAX_CELLS",
    "Action",
    "Allowed",
    "Batch",
    "Document",
    "Grammar",
    "GrammarState",
    "Image",
    "MediaSize",
    "OpenMedia",
    "Parsed",
    "Position",
    "Prompt",
    "ReleasedState",
    "Segment",
    "SequenceLayout",
    "Special",
    "Text",
    "Video",
    "animate",
    "answer",
    "caption",
    "caption_first",
    "caption_last",
    "collate",
    "continue_video",
    "draw",
    "modalities",
    "pack",
    "question_answer",
]
