"""Prompts: parity with the released drawing prompts, null prompts, and documents that teach them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.sequence import (
    EMU3,
    Document,
    Grammar,
    Image,
    Text,
    Turn,
    Video,
    animate,
    answer,
    caption,
    caption_first,
    caption_last,
    captioned,
    continue_video,
    conversation,
    converse,
    draw,
    question_answer,
)

PICTURE = Image(torch.arange(6).reshape(2, 3))
CLIP = Video(torch.arange(12).reshape(3, 2, 2), fps=8)
TEXT_ONLY = frozenset({"text"})


def test_released_drawing_prompts(official: Path, released: Grammar) -> None:
    entries = json.loads((official / "expected.json").read_text())["generate_prompts"]
    assert len(entries) == 4
    for entry in entries:
        prompt = draw(released, entry["text"], *entry["size"])
        assert prompt.ids == entry["ids"]
        assert prompt.may == frozenset()


def test_drawing_begins_its_document_and_forgets_the_caption_without_guidance(grammar: Grammar) -> None:
    document = grammar.build(caption_first("a cat", PICTURE))
    prompt = draw(grammar, "a cat", 2, 3)
    assert document[: len(prompt.ids)] == prompt.ids
    assert (
        prompt.null_ids
        == draw(grammar, "", 2, 3).ids
        == grammar.build(caption_first("", PICTURE))[: len(prompt.null_ids)]
    )
    assert prompt.may == frozenset()


def test_animating_and_continuing_begin_their_document(grammar: Grammar) -> None:
    document = grammar.build(caption_first("a cat", CLIP))
    prompt = animate(grammar, "a cat", 3, 2, 2, 8)
    assert document[: len(prompt.ids)] == prompt.ids
    further = continue_video(grammar, "a cat", Video(CLIP.codes[:2], fps=8), 3)
    assert document[: len(further.ids)] == further.ids
    assert further.ids[: len(prompt.ids)] == prompt.ids
    assert grammar.start(further.ids).position.frames == 2
    assert grammar.parse(further.null_ids).document == Document()
    assert grammar.start(further.null_ids).position.frames == 2


def test_a_clip_cannot_be_continued_to_what_it_is(grammar: Grammar) -> None:
    with pytest.raises(EmulusError, match="3 frames cannot be continued to 3"):
        continue_video(grammar, "", CLIP, 3)


@pytest.mark.parametrize("media", [PICTURE, CLIP])
def test_captions_and_answers_begin_their_document(grammar: Grammar, media: Image | Video) -> None:
    described = caption(grammar, media)
    assert grammar.build(caption_last(media, "a cat")) == [
        *described.ids,
        *grammar.text.encode("a cat"),
        grammar.vocabulary.eos,
    ]
    assert captioned(grammar, media, "a cat") == (grammar.build(caption_last(media, "a cat")), len(described.ids))
    chat, start = captioned(grammar, media, "a cat", wording=EMU3)
    assert chat[:start] == caption(grammar, media, wording=EMU3).ids
    assert chat[start:] == [*grammar.text.encode(" a cat"), grammar.vocabulary.eos]
    assert described.null_ids == [grammar.vocabulary.bos]
    asked = answer(grammar, media, "how many?")
    taught = grammar.build(question_answer(media, "how many?", "2"))
    assert taught == [*asked.ids, *grammar.text.encode(" 2"), grammar.vocabulary.eos]
    assert grammar.parse(asked.null_ids).document == Document((Text("Question: how many?\nAnswer:"),))
    assert described.may == asked.may == TEXT_ONLY


WORD = st.text(st.characters(categories=["Ll", "Lu", "Nd"]), min_size=1, max_size=9)
PHRASE = st.lists(WORD, min_size=1, max_size=4).map(" ".join)


@given(st.lists(st.tuples(PHRASE, PHRASE), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_conversations_begin_their_document(grammar: Grammar, pairs: list[tuple[str, str]]) -> None:
    taught = grammar.build(conversation(PICTURE, pairs))
    for count in range(len(pairs)):
        said = [
            Turn(text=question, media=(PICTURE,) * (not n), answer=answer)
            for n, (question, answer) in enumerate(pairs[:count])
        ]
        asked = converse(grammar, [*said, Turn(text=pairs[count][0], media=(PICTURE,) * (not count))])
        ids = [*asked.ids, *grammar.text.encode(f" {pairs[count][1]}")]
        assert taught[: len(ids)] == ids
    assert taught == [*ids, grammar.vocabulary.eos]


def test_an_empty_system_message_leaves_nothing(grammar: Grammar) -> None:
    turn = Turn(text="what is it?")
    (text,) = grammar.parse(converse(grammar, [turn], system="", wording=EMU3).ids).document.segments
    assert isinstance(text, Text)
    assert text.text == "USER: what is it?. ASSISTANT:"
    assert converse(grammar, [turn], system="", wording=EMU3).ids != converse(grammar, [turn], wording=EMU3).ids
