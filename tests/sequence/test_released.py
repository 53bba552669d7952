"""``compat="released"``: the released rule against a plain transcription of it, and the engine under that rule."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emulus.engine import Engine, Frame, Request, Row
from emulus.errors import EmulusError
from emulus.model import Decoder, DecoderConfig
from emulus.sampling import SamplingParams
from emulus.sequence import Document, Grammar, Image, MediaSize, SequenceLayout, Text, Video
from emulus.sequence.templates import caption, draw
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import Vocabulary

TEXT = TextTokenizer.train(["a red apple", "drawing of a cat"] * 3, size=280)
V = Vocabulary.native(text_size=TEXT.size, visual_size=20)
PLAIN = Grammar(V, TEXT)
COMPAT = Grammar(V, TEXT, compat="released")
CONTEXT = 200
WRITE = frozenset({"text"})
sides = st.integers(1, 5)


def rule(ids: Sequence[int], h: int, w: int) -> list[int]:
    """What the released helper lets follow these ids."""
    offset = len(ids) - list(ids).index(V.img)
    if offset % (w + 1) == 0:
        return [V.eol]
    if offset == (w + 1) * h + 1:
        return [V.eof]
    if offset == (w + 1) * h + 2:
        return [V.eoi]
    if offset == (w + 1) * h + 3:
        return [V.eos]
    if offset > (w + 1) * h + 3:
        return [V.pad]
    return list(range(V.visual_start, V.visual_start + V.visual_size))


def picture(h: int, w: int, seed: int = 0) -> Image:
    return Image(torch.randint(V.visual_size, (h, w), generator=torch.Generator().manual_seed(seed)))


def prompt_after(pictures: Sequence[Image], h: int, w: int) -> list[int]:
    """Words and pictures, then a picture to draw."""
    segments = [segment for each in pictures for segment in (Text("a cat"), each)]
    return PLAIN.build(Document(tuple(segments)), eos=False) + PLAIN.open_media(h=h, w=w)


def legal(allowed: Any) -> list[int]:
    return [id for start, stop in allowed.ranges for id in range(start, stop)]


# the rule


@settings(deadline=None, max_examples=200)
@given(
    before=st.lists(st.builds(picture, sides, sides), max_size=2),
    h=sides,
    w=sides,
    choose=st.randoms(use_true_random=False),
    begun=st.integers(0, 4),
)
def test_every_step_is_the_released_one(before: list[Image], h: int, w: int, choose: random.Random, begun: int) -> None:
    ids = prompt_after(before, h, w)
    for _ in range(begun):
        id = choose.choice(rule(ids, h, w))
        if id in (V.eoi, V.eos):
            break
        ids.append(id)
    state = COMPAT.start(ids)
    remaining, first = state.remaining, len(ids)
    assert state.least == (1 if remaining is None else remaining)
    for _ in range(h * (w + 1) + 12):
        expected = rule(ids, h, w)
        assert legal(state.allowed()) == expected
        assert (state.allowed().forced is None) == (len(expected) > 1)
        ids.append(choose.choice(expected))
        state.advance(ids[-1])
        if ids[-1] == V.eos:
            break
    assert state.done == (ids[-1] == V.eos)
    assert remaining == (len(ids) - first if state.done else None)
    if state.done:
        assert (state.remaining, state.least, state.position.kind) == (0, 0, "end")
        assert state.allowed().forced == V.pad
        state.advance(V.pad)
        assert state.done


@settings(deadline=None, max_examples=60)
@given(h=sides, w=st.integers(3, 6), choose=st.randoms(use_true_random=False))
def test_one_picture_wide_enough_is_drawn_by_the_grammar_alike(h: int, w: int, choose: random.Random) -> None:
    ids = prompt_after([], h, w)
    plain, compat = PLAIN.start(ids), COMPAT.start(ids)
    while not plain.done:
        assert compat.allowed() == plain.allowed()
        assert compat.position == plain.position
        assert (compat.remaining, compat.least) == (plain.remaining, plain.least)
        id = choose.choice(legal(plain.allowed()))
        for state in (plain, compat):
            state.advance(id)
    assert compat.done


@pytest.mark.parametrize(("w", "lost"), [(1, "eoi"), (2, "eos")])
def test_narrow_pictures_lose_an_id_only_where_compatible(w: int, lost: str) -> None:
    def tail(grammar: Grammar) -> list[int]:
        state, ids = grammar.start(prompt_after([], 3, w)), []
        for _ in range(3 * (w + 1) + 3):
            ids.append(state.allowed().ranges[0][0])
            state.advance(ids[-1])
        return ids[-3:]

    whole = {"eof": V.eof, "eoi": V.eoi, "eos": V.eos}
    assert tail(PLAIN) == list(whole.values())
    assert tail(COMPAT) == list((whole | {lost: V.eol}).values())


def test_by_default_the_last_picture_governs_and_compatibly_the_first_img() -> None:
    ids = prompt_after([picture(4, 4), picture(2, 5)], 2, 3)
    assert PLAIN.start(ids).remaining == PLAIN.media_length(h=2, w=3) + 1
    assert PLAIN.start(ids).allowed().kind == "visual"
    state = COMPAT.start(ids)
    assert state.allowed().forced in (V.eol, V.pad)
    assert state.remaining is None


def test_a_special_written_by_a_user_counts_as_the_first_img() -> None:
    prompt = draw(COMPAT, "<|image token|>", 2, 3)
    assert prompt.ids[1] == V.img
    state = COMPAT.start(prompt.ids)
    assert legal(state.allowed()) == rule(prompt.ids, 2, 3)
    assert state.remaining != PLAIN.start(draw(PLAIN, "<|image token|>", 2, 3).ids).remaining


def test_a_copy_goes_its_own_way() -> None:
    state = COMPAT.start(prompt_after([], 1, 3))
    other = state.copy()
    other.advance(V.visual_start)
    assert (state.position.cells, other.position.cells) == (0, 1)
    with pytest.raises(EmulusError, match=r"<\|row end\|> cannot follow"):
        other.advance(V.eol)


def test_where_words_are_to_come_everything_may() -> None:
    for prompt in ([V.bos], [V.eoi, V.img, V.visual_start]):
        state = COMPAT.start(prompt, may=WRITE)
        assert legal(state.allowed()) == list(range(V.size))
        assert (state.remaining, state.least, state.done) == (None, 1, False)
        for id in (V.img, V.visual_start, V.pad, 5):
            state.advance(id)
        assert state.position.kind == "text"
        state.advance(V.eos)
        assert state.done


# text


def test_specials_in_texts_are_specials_only_where_compatible() -> None:
    text = "a <|image start|>2*2<|image token|><|visual token 000003|><|no special|>"
    document = Document((Text(text),))
    ids = COMPAT.build(document, bos=False, eos=False)
    assert ids == TEXT.encode(text, allow_special=V.special_names)
    assert [id for id in ids if not V.is_text(id)] == [V.boi, V.img, V.visual_start + 3]
    assert all(map(V.is_text, PLAIN.build(document, bos=False, eos=False)))


def test_released_texts_with_specials(released: Grammar) -> None:
    compat = Grammar(released.vocabulary, released.text, compat="released")
    ids = compat.build(Document((Text("hi<|extra_203|><|image end|> 12"),)), bos=False, eos=False)
    assert ids == [*released.text.encode("hi"), 151_849, 151_853, *released.text.encode(" 12")]


# what is refused


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [V.bos],
        PLAIN.build(Document((picture(2, 2),)), eos=False),
        PLAIN.open_media(h=2, w=2)[:-1],
        PLAIN.open_media(t=2, h=2, w=2, fps=8),
    ],
)
def test_without_an_open_picture_there_is_nothing_to_finish(ids: list[int]) -> None:
    with pytest.raises(EmulusError, match="leaves no picture open"):
        COMPAT.start(ids)


def test_misuse_is_refused() -> None:
    with pytest.raises(EmulusError, match=r"at position 1: .* should be"):
        COMPAT.start([V.boi, V.img])
    with pytest.raises(EmulusError, match="unknown compat 'relased'; did you mean 'released'"):
        Grammar(V, TEXT, compat="relased")  # type: ignore[arg-type]
    with pytest.raises(EmulusError, match="Emu3's rule"):
        Grammar(V, TEXT, SequenceLayout.emu3_5(), compat="released")
    with pytest.raises(EmulusError, match="cannot write 'txt'"):
        COMPAT.start([V.bos], may=frozenset({"txt"}))
    assert PLAIN.start(PLAIN.open_media(t=2, h=2, w=2, fps=8)).position.size == MediaSize(t=2, h=2, w=2, fps=8.0)


# the engine under the rule


def decoder() -> Decoder:
    """An untrained decoder whose choices depend on the prompt."""
    torch.manual_seed(0)
    return Decoder(
        DecoderConfig(
            vocab_size=V.size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.2,
            rms_norm_eps=1e-5,
        )
    ).eval()


DECODER = decoder()
ENGINE = Engine(DECODER, COMPAT)
GREEDY = SamplingParams(temperature=0, max_new_tokens=40)


@pytest.fixture(scope="module")
def reference() -> Any:
    """The same weights in the `transformers` model, whose ``generate`` the released scripts call."""
    transformers = pytest.importorskip("transformers")
    c = DECODER.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        bos_token_id=V.bos,
        eos_token_id=V.eos,
        pad_token_id=V.pad,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(DECODER.state_dict(), strict=True)
    return model


@pytest.mark.parametrize(
    ("before", "h", "w"),
    [([], 3, 4), ([], 3, 1), ([], 3, 2), ([picture(1, 1)], 4, 5), ([picture(1, 2), picture(2, 1)], 4, 4)],
    ids=["plain", "one column", "two columns: EOS never comes", "after a picture", "after two pictures"],
)
def test_drawing_gives_the_tokens_of_generate_under_the_released_rule(
    reference: Any, before: list[Image], h: int, w: int
) -> None:
    ids = prompt_after(before, h, w)

    def helper(_: int, so_far: Tensor) -> list[int]:
        return rule(so_far.tolist(), h, w)

    prompt = torch.tensor([ids])
    mask = torch.ones_like(prompt)
    expected = reference.generate(
        prompt, attention_mask=mask, do_sample=False, max_new_tokens=40, prefix_allowed_tokens_fn=helper
    )
    (result,) = ENGINE.generate([Request(prompt_ids=ids, params=GREEDY)])
    assert list(result.ids) == expected[0, len(ids) :].tolist()
    assert result.truncated == (V.eos not in result.ids)
    assert result.truncated == (len(result.ids) == 40)


def test_words_are_the_tokens_of_generate_without_a_constraint(reference: Any) -> None:
    prompt = caption(COMPAT, picture(2, 2))
    ids = torch.tensor([prompt.ids])
    expected = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
    (result,) = ENGINE.generate([Request(prompt_ids=prompt.ids, may=prompt.may, params=GREEDY)])
    new = expected[0, len(prompt.ids) :].tolist()
    assert list(result.ids)[: len(new)] == new
    # At the limit the engine closes the document; the released loop just stops.
    assert list(result.ids)[len(new) :] == ([V.eos] if result.truncated else [])
    assert not all(map(V.is_text, new))


def test_what_never_ends_stops_at_the_context_and_batches_as_it_is_alone() -> None:
    endless = SamplingParams(temperature=0, max_new_tokens=10**9)
    requests = [
        Request(prompt_ids=prompt_after(before, h, w), params=endless)
        for before, h, w in [([], 3, 2), ([], 2, 4), ([picture(3, 3)], 2, 2), ([picture(1, 1)], 4, 5)]
    ]
    results = ENGINE.generate(requests)
    assert results == [ENGINE.generate([request])[0] for request in requests]
    for request, result in zip(requests, results, strict=True):
        length = len(request.prompt_ids) + len(result.ids)
        assert length == CONTEXT - 1 if result.truncated else result.ids[-1] == V.eos
    assert [result.truncated for result in results] == [True, False, True, False]


def test_rows_and_frames_of_a_single_picture_are_told() -> None:
    events = list(ENGINE.stream(Request(prompt_ids=prompt_after([], 2, 3), params=GREEDY)))
    assert [event.index for event in events if isinstance(event, Row)] == [0, 1]
    assert [len(event.codes) for event in events if isinstance(event, Frame)] == [6]


def test_a_clip_is_drawn_by_the_grammar_only() -> None:
    clip = Video(torch.zeros(1, 1, 1, dtype=torch.int64), fps=8)
    ids = PLAIN.open_media(t=2, h=1, w=1, fps=8, codes=clip.codes.flatten())
    (result,) = Engine(DECODER, PLAIN).generate([Request(prompt_ids=ids, params=GREEDY)])
    assert PLAIN.parse([*ids, *result.ids]).complete
    with pytest.raises(EmulusError, match="leaves no picture open"):
        ENGINE.generate([Request(prompt_ids=ids, params=GREEDY)])
