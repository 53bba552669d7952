"""Tokens folders made of nothing, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from emulus.data.records import Kind, Record, Role, ShardLine, Span, add_to_manifest, shard_name, write_shard
from emulus.data.tokens import SETTINGS
from emulus.files import write_json
from emulus.sequence import Document, Grammar, Image, Text, Video
from emulus.sequence.templates import question_answer
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import Vocabulary

CODES = 50


@dataclass(frozen=True, kw_only=True)
class Thing:
    """What a record was made of: a text, or a medium with words about it."""

    id: str
    text: str = ""
    media: Image | Video | None = None
    captions: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()


def grammar_of_things(seed: int = 0) -> Grammar:
    """A small vocabulary; another seed gives another one."""
    text = TextTokenizer.train(
        [f"a red disc {'xyzw'[seed]}{'xyzw'[seed]}", "Question: what?\nAnswer: it"] * 3, size=290
    )
    return Grammar(Vocabulary.native(text_size=text.size, visual_size=CODES), text)


def make_things(kind: Kind, count: int, prefix: str, seed: int = 0) -> list[Thing]:
    """Texts of one to twelve words, or media of 4 to 25 cells with up to three captions, a third with questions."""
    draw = np.random.default_rng([seed, *prefix.encode()])
    things = []
    for number in range(count):
        id = f"{prefix}/{number}"
        if kind == "text":
            things.append(Thing(id=id, text=" ".join(["word"] * int(draw.integers(1, 12))) + f" {number} é"))
            continue
        grid = torch.from_numpy(draw.integers(0, CODES, (2, *draw.integers(2, 6, 2))))
        media = Image(grid[0]) if kind == "image" else Video(grid, fps=8.0)
        captions = tuple(f"a red disc, {'big ' * place}{number}" for place in range(int(draw.integers(0, 4))))
        questions = tuple((f"what is {place}?", f"it is {number}") for place in range(number % 3 // 2 * 2))
        things.append(Thing(id=id, media=media, captions=captions, questions=questions))
    return things


def to_record(grammar: Grammar, thing: Thing) -> Record:
    """Encode a thing."""
    parts: list[tuple[Role, list[int]]] = [("caption", grammar.text.encode(caption)) for caption in thing.captions]
    for question, answer in thing.questions:
        parts.append(("question", grammar.text.encode(f"Question: {question}\nAnswer:")))
        parts.append(("answer", grammar.text.encode(f" {answer}")))
    if thing.media is None:
        parts = [("text", grammar.text.encode(thing.text))]
    else:
        parts.append(("media", grammar.build(Document((thing.media,)), bos=False, eos=False)))
    spans, ids = [], list[int]()
    for role, more in parts:
        spans.append(Span(role, len(ids), len(ids) + len(more)))
        ids += more
    return Record(
        id=thing.id,
        kind="text" if thing.media is None else thing.media.size.kind,
        ids=np.array(ids, np.uint32),
        spans=tuple(spans),
        shape=() if thing.media is None else tuple(thing.media.codes.shape),
        fps=thing.media.fps if isinstance(thing.media, Video) else 0.0,
    )


def make_folder(
    folder: Path,
    things: dict[tuple[str, Kind], Sequence[Thing]],
    *,
    seed: int = 0,
    vision: str = "eyes",
    shards: int = 2,
) -> Path:
    """Write things of each split and kind into so many shards each."""
    folder.mkdir(parents=True)
    grammar = grammar_of_things(seed)
    grammar.text.save(folder)
    grammar.vocabulary.save(folder / "vocabulary.json")
    for (split, kind), chosen in things.items():
        for number in range(shards):
            path = folder / shard_name(split, kind, number)
            figures = write_shard(path, [to_record(grammar, thing) for thing in chosen[number::shards]])
            add_to_manifest(folder, ShardLine(name=path.name, **vars(figures)))
    write_json(folder / SETTINGS, {"vision_sha256": vision})
    return folder


def documents_of(thing: Thing) -> list[Document]:
    """Every document that a thing can become."""
    if thing.media is None:
        return [Document((Text(thing.text),))]
    words = ["", *thing.captions]
    first = [Document((Text(caption), thing.media)) for caption in words]
    last = [Document((thing.media, Text(caption))) for caption in words]
    return [*first, *last, *(question_answer(thing.media, *pair) for pair in thing.questions)]
