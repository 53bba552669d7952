"""The engine against a naive recomputation, the released code's tokens, and its own promises."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.engine import Done, Engine, Frame, Request, Result, Row, TextPiece, Token
from emulus.engine.walk import Walk
from emulus.errors import EmulusError
from emulus.kernels import native
from emulus.model import load_decoder
from emulus.sampling import SamplingParams
from emulus.sequence.document import Document, Image, Text, Video
from emulus.sequence.grammar import Grammar
from emulus.sequence.templates import animate, caption, continue_video, draw
from emulus.tokenizer.vocabulary import Vocabulary
from tests.engine.tiny import (
    DECODER,
    GRAMMAR,
    WORDS,
    make_decoder,
    naive,
    parameters,
    random_codes,
    requests_of_every_kind,
)

ENGINE = Engine(DECODER, GRAMMAR)


def check_against_naive(request: Request, result: Result) -> None:
    expected = naive(request, len(result.ids))
    if result.truncated:
        # After the limit stands nothing but the end, which nobody chose and which cannot stand inside a medium.
        most = request.params.max_new_tokens
        assert list(result.ids[:most]) == expected[:most]
        assert result.ids[most:] in ((), (GRAMMAR.vocabulary.eos,))
    else:
        assert list(result.ids) == expected


@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**40), scale=st.sampled_from([1.0, 3.0]), temperature=st.sampled_from([0.0, 1.0]))
def test_engine_equals_naive(seed: int, scale: float, temperature: float) -> None:
    requests = requests_of_every_kind(seed, guidance_scale=scale, temperature=temperature)
    for request, result in zip(requests, ENGINE.generate(requests, batch_size=8), strict=True):
        check_against_naive(request, result)


def test_a_request_does_not_depend_on_its_neighbours() -> None:
    requests = requests_of_every_kind(5)
    alone = [ENGINE.generate([request])[0] for request in requests]
    assert ENGINE.generate(requests, batch_size=8) == alone
    assert ENGINE.generate(requests, batch_size=3) == alone
    assert ENGINE.generate(requests[::-1], batch_size=5) == alone[::-1]
    assert len({result.ids for result in alone}) > 5


SETTINGS: list[dict[str, float]] = [
    {},
    {"top_k": 2},
    {"top_k": 0},
    {"top_p": 0.3},
    {"top_p": 0.7, "top_k": 0},
    {"temperature": 0.0},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"guidance_scale": 0.5},
    {"guidance_scale": 1.0},
    {"guidance_scale": 8.0},
]


@pytest.fixture(params=["kernels", "plain"])
def way_to_choose(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the native kernels where there are some, and in plain PyTorch."""
    if request.param == "plain":
        monkeypatch.setattr("emulus.sampling.draw._kernels", lambda device: None)


@pytest.mark.usefixtures("way_to_choose")
def test_every_sampling_option_takes_effect_also_in_a_mixed_batch() -> None:
    """Requests that differ in one option only: each gives the ids of plain sampling with its own options."""
    prompt = draw(GRAMMAR, "a red apple", 4, 4)
    requests = [
        Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids, params=parameters(4, **setting))
        for setting in SETTINGS
    ]
    together = ENGINE.generate(requests, batch_size=len(requests))
    for request, result in zip(requests, together, strict=True):
        assert list(result.ids) == naive(request, len(result.ids)), request.params
    assert len({result.ids for result in together}) == len(SETTINGS), "an option without effect would go unnoticed"
    assert [ENGINE.generate([request])[0] for request in requests] == together


@pytest.mark.usefixtures("way_to_choose")
def test_written_text_obeys_its_sampling_options() -> None:
    """Text may end at any id, so its legal ids lie in several ranges."""
    prompt = caption(GRAMMAR, Image(random_codes(2, 3)))
    requests = [
        Request(prompt_ids=prompt.ids, may=prompt.may, params=parameters(2, **{"max_new_tokens": 16, **setting}))
        for setting in SETTINGS
        if "guidance_scale" not in setting
    ]
    together = ENGINE.generate(requests)
    for request, result in zip(requests, together, strict=True):
        check_against_naive(request, result)
    assert len({result.ids for result in together}) == len(requests)


@pytest.mark.parametrize("at_once", [1, 4, 7])
def test_long_prompts_go_in_pieces(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces, and though rows of a batch end in different ones, the ids are those of whole prompts."""
    requests = requests_of_every_kind(7)
    whole = ENGINE.generate(requests)
    monkeypatch.setattr("emulus.engine.scheduler.AT_ONCE", at_once)
    assert ENGINE.generate(requests) == whole


def test_guidance_matters_and_one_is_none() -> None:
    prompt = draw(GRAMMAR, "a red apple", 3, 3)
    ids = {
        scale: ENGINE.generate(
            [
                Request(prompt_ids=prompt.ids, null_ids=null, params=parameters(guidance_scale=scale))
                for null in (prompt.null_ids, None)
            ]
        )
        for scale in (1.0, 3.0)
    }
    assert ids[1.0][0] == ids[1.0][1] == ids[3.0][1]
    assert ids[3.0][0] != ids[3.0][1]


def test_seeds_differ() -> None:
    prompt = draw(GRAMMAR, "a red apple", 3, 3)
    requests = [Request(prompt_ids=prompt.ids, params=parameters(seed)) for seed in (0, 1, 2, 0)]
    results = ENGINE.generate(requests)
    assert results[0] == results[3]
    assert len({result.ids for result in results}) == 3


class Letters:
    """The ninety text ids of the released code's small random model, of which its prompt spells a size."""

    size = 90
    _ids = {**{c: 20 + n for n, c in enumerate("012346890 fps.")}, "5": 11, "*": 12, "7": 13}  # noqa: RUF012

    def id_of_char(self, character: str) -> int:
        return self._ids[character]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"[{id}]" for id in ids)


def test_tokens_of_released_code(official: Path) -> None:
    expected = json.loads((official / "expected.json").read_text())["greedy_generation"]
    config = json.loads((official / "language_model" / "config.json").read_text())
    specials = {role: config[f"{role}_token_id"] for role in "pad bos eos boi img eoi eol eof".split()}  # noqa: SIM905
    vocabulary = Vocabulary(
        text_size=90,
        specials=specials,
        visual_start=expected["visual_base"],
        visual_size=300 - expected["visual_base"],
        special_names={f"<|{role}|>": id for role, id in specials.items()},
    )
    engine = Engine(load_decoder(official / "language_model"), Grammar(vocabulary, Letters()))  # type: ignore[arg-type]
    params = SamplingParams(temperature=0, guidance_scale=expected["guidance_scale"])
    request = Request(prompt_ids=expected["cond"], null_ids=expected["uncond"], params=params)
    (result,) = engine.generate([request])
    assert list(result.ids) == expected["tokens"]


def test_a_thousand_random_prompts_give_whole_media() -> None:
    chance = random.Random(0)
    requests, wanted = [], []
    for seed in range(1000):
        h, w, t = (chance.randint(1, 4) for _ in range(3))
        words = " ".join(chance.choices(WORDS, k=chance.randint(0, 3)))
        clip = chance.random() < 0.3
        prompt = animate(GRAMMAR, words, t, h, w, 8) if clip else draw(GRAMMAR, words, h, w)
        null = prompt.null_ids if chance.random() < 0.5 else None
        requests.append(Request(prompt_ids=prompt.ids, null_ids=null, may=prompt.may, params=parameters(seed)))
        wanted.append((t, h, w) if clip else (h, w))
    results = ENGINE.generate(requests, batch_size=125)
    for request, result, shape in zip(requests, results, wanted, strict=True):
        parsed = GRAMMAR.parse([*request.prompt_ids, *result.ids])
        medium = parsed.document.segments[-1]
        assert parsed.complete
        assert isinstance(medium, Image | Video)
        assert tuple(medium.codes.shape) == shape
        assert result.finished == "end"
    assert len({result.ids for result in results}) > 900


@settings(deadline=None, max_examples=10)
@given(
    may=st.frozensets(st.sampled_from(["text", "image", "video"]), min_size=1),
    seed=st.integers(0, 2**62),
    most=st.integers(1, 80),
)
def test_free_documents_always_parse(may: frozenset[str], seed: int, most: int) -> None:
    prompt = GRAMMAR.build(Document((Text("a red"),)), eos=False)
    requests = [Request(prompt_ids=prompt, may=may, params=parameters(seed + n, max_new_tokens=most)) for n in range(4)]
    for result in ENGINE.generate(requests):
        parsed = GRAMMAR.parse([*prompt, *result.ids])
        assert parsed.complete or result.truncated
        assert parsed.complete or parsed.open
        assert len(result.ids) <= most + 1


def test_text_is_cut_at_the_limit_and_ended() -> None:
    prompt = caption(GRAMMAR, Image(random_codes(2, 2)))
    request = Request(prompt_ids=prompt.ids, may=prompt.may, params=parameters(max_new_tokens=3))
    (result,) = ENGINE.generate([request])
    assert result.truncated
    assert len(result.ids) == 4
    assert result.ids[-1] == GRAMMAR.vocabulary.eos


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.sampled_from(["image", "video"]), st.randoms(use_true_random=False))
def test_no_medium_begins_of_more_cells_than_ids_may_come(most: int, kind: str, chance: random.Random) -> None:
    """Whatever size a model writes, the cells fit into ``max_new_tokens``."""
    prompt = GRAMMAR.build(Document((Text("a"),)), eos=False)
    request = Request(prompt_ids=prompt, may=frozenset({kind}), params=parameters(max_new_tokens=most))
    walk = Walk(0, request, GRAMMAR, 4096)
    ids = list(prompt)
    while GRAMMAR.vocabulary.img not in ids:
        legal = {id for each in walk.allowed().ranges for id in range(*each)} - {GRAMMAR.vocabulary.eos}
        ids.append(chance.choice(sorted(legal)))
        list(walk.take(ids[-1]))
    opened = GRAMMAR.parse(ids).open
    assert opened is not None
    assert opened.size is not None
    assert 1 <= opened.size.cells <= most


def test_text_stops_at_the_end_of_the_context() -> None:
    prompt = caption(GRAMMAR, Image(random_codes(2, 2)))
    context = len(prompt.ids) + 5
    engine = Engine(make_decoder(context), GRAMMAR)
    request = Request(prompt_ids=prompt.ids, may=prompt.may, params=parameters(max_new_tokens=100))
    (result,) = engine.generate([request])
    assert result.truncated
    assert len(prompt.ids) + len(result.ids) == context


def test_a_size_text_left_open_is_finished() -> None:
    ids = draw(GRAMMAR, "a", 2, 2).ids[:-2]  # "2*", without the width and IMG
    (result,) = ENGINE.generate([Request(prompt_ids=ids, params=parameters(max_new_tokens=60))])
    parsed = GRAMMAR.parse([*ids, *result.ids])
    assert parsed.complete or result.truncated


def test_events_tell_everything_in_order() -> None:
    clip = Video(random_codes(2, 2, 3), fps=8)
    prompt = continue_video(GRAMMAR, "a", clip, 4)
    cut = [*prompt.ids, GRAMMAR.vocabulary.visual_start + 7]  # inside the third frame's first row
    request = Request(prompt_ids=cut, null_ids=None, params=parameters())
    events = list(ENGINE.stream(request))
    result = events[-1].result if isinstance(events[-1], Done) else None
    assert result is not None
    assert [event.id for event in events if isinstance(event, Token)] == list(result.ids)
    video = GRAMMAR.parse([*cut, *result.ids]).document.segments[-1]
    assert isinstance(video, Video)
    rows = [event for event in events if isinstance(event, Row)]
    assert [row.index for row in rows] == [4, 5, 6, 7]
    assert rows[0].codes[0] == 7
    assert [list(row.codes) for row in rows] == video.codes.reshape(8, 3)[4:].tolist()
    frames = [event for event in events if isinstance(event, Frame)]
    assert [frame.index for frame in frames] == [2, 3]
    assert [list(frame.codes) for frame in frames] == video.codes.reshape(4, 6)[2:].tolist()
    assert ENGINE.most_new_tokens([request]) == len(result.ids)


@pytest.mark.parametrize("seed", range(4))
def test_text_pieces_are_the_text(seed: int) -> None:
    prompt = caption(GRAMMAR, Image(random_codes(2, 2)))
    request = Request(prompt_ids=prompt.ids, may=prompt.may, params=parameters(seed))
    events = list(ENGINE.stream(request))
    pieces = [event.text for event in events if isinstance(event, TextPiece)]
    text = [event.id for event in events if isinstance(event, Token) and GRAMMAR.vocabulary.is_text(event.id)]
    # An untrained model writes broken characters, which may count differently when read apart.
    assert "".join(pieces).replace("\ufffd", "") == GRAMMAR.text.decode(text).replace("\ufffd", "")
    assert len(pieces) > 5


def test_characters_of_several_ids_are_not_torn() -> None:
    prompt = caption(GRAMMAR, Image(random_codes(2, 2)))
    request = Request(prompt_ids=prompt.ids, may=prompt.may, params=parameters())
    walk = Walk(0, request, GRAMMAR, 256)
    ids = GRAMMAR.text.encode("é😀x語")
    pieces = [event.text for id in ids for event in walk.take(id) if isinstance(event, TextPiece)]
    assert "".join(pieces) == "é😀x語"
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > 4


def test_a_closed_stream_leaves_everything_as_it_was() -> None:
    request = requests_of_every_kind()[0]
    stream = ENGINE.stream(request)
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    stream.close()
    assert ENGINE.generate([request]) == ENGINE.generate([request])


def test_nothing_to_generate() -> None:
    assert ENGINE.generate([]) == []
    whole = GRAMMAR.build(Document((Image(random_codes(1, 1)),)), eos=False)
    (result,) = ENGINE.generate([Request(prompt_ids=whole)])
    assert result.ids == (GRAMMAR.vocabulary.eos,)


@pytest.mark.parametrize(
    ("ids", "null", "message"),
    [
        ([], None, "prompt is empty"),
        ([1, 2], [], "prompt is empty"),
        ([1, 9999], None, "holds id 9999, but there are"),
        ([1, -1], None, "holds id -1"),
        (GRAMMAR.build(Document((Text("a"),))), None, "ended already"),
        (draw(GRAMMAR, "a", 16, 16).ids, None, r"276 more for the 16\*16 cells .* make 28\d, .* is 256"),
        ([GRAMMAR.vocabulary.bos, *[1] * 255], None, "longest sequence is 256"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_generated(
    ids: list[int], null: list[int] | None, message: str
) -> None:
    seen: list[object] = []
    bad = Request(prompt_ids=ids, null_ids=null, may=frozenset({"text"}))
    with pytest.raises(EmulusError, match=message) as caught:
        ENGINE.generate([requests_of_every_kind()[0], bad], on_event=seen.append)
    assert "\n" not in str(caught.value)
    assert not seen


def test_the_type_of_keys_and_values_is_the_one_asked_for() -> None:
    assert Engine(DECODER, GRAMMAR).runner.layout.dtype == torch.float32
    if native.available():
        engine = Engine(DECODER, GRAMMAR, kv_dtype=torch.bfloat16)
        assert engine.runner.layout.dtype == torch.bfloat16
        engine.decoder = make_decoder(seed=1)
        assert engine.runner.layout.dtype == torch.bfloat16, "also after the weights were moved"


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_requests_run_at_once_than_asked_for(most: int) -> None:
    requests, running, together = requests_of_every_kind()[:5], set[int](), 0
    for event in ENGINE.events(requests, batch_size=most):
        running = running - {event.request} if isinstance(event, Done) else running | {event.request}
        together = max(together, len(running))
    assert together == most
    seen: list[int] = []
    ENGINE.generate(requests, batch_size=most, on_event=lambda event: seen.append(event.request))
    assert set(seen[: seen.index(most)]) == set(range(most)), "the next one comes when the first ones have begun"


def test_other_misuse() -> None:
    with pytest.raises(EmulusError, match="batch_size"):
        ENGINE.generate(requests_of_every_kind(), batch_size=0)
    other = Grammar(Vocabulary.native(text_size=GRAMMAR.text.size, visual_size=41), GRAMMAR.text)
    with pytest.raises(EmulusError, match="take both from the same checkpoint"):
        Engine(DECODER, other)


@pytest.mark.skipif(not native.available(), reason="plain PyTorch may add up in another order")
def test_ids_do_not_depend_on_the_number_of_threads() -> None:
    requests, usual = requests_of_every_kind(9), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(ENGINE.generate(requests))
    finally:
        torch.set_num_threads(usual)
    assert found[0] == found[1] == found[2]
