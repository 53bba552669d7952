"""The grammar: parity with the released prompts, round trips, broken ids, and walks that always end well."""

from __future__ import annotations

import json
import random
import re
import sys
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.sequence import (
    CELL,
    Action,
    Allowed,
    Document,
    Grammar,
    GrammarState,
    Image,
    MediaSize,
    SequenceLayout,
    Special,
    Text,
    Video,
)
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import Vocabulary

T = TypeVar("T")

CODEBOOK, ACTIONS = 50, 12
TEXT = TextTokenizer.train(["a red apple", "drawing of a cat"] * 3, size=290)
MARKS = ("<|extra_100|>", "<|extra_101|>", "<|im_start|>")


def with_marks(native: Vocabulary) -> Vocabulary:
    """A vocabulary with some specials that have no role, behind everything else."""
    names = {name: native.size + index for index, name in enumerate(MARKS)}
    values = native.to_dict()
    return Vocabulary.from_dict(values | {"special_names": values["special_names"] | names})


VOCABULARY = with_marks(Vocabulary.native(text_size=TEXT.size, visual_size=CODEBOOK, action_size=ACTIONS))
LAYOUTS = {
    "emu3": SequenceLayout(),
    "emu3.5": SequenceLayout.emu3_5(),
    "frames without rows": SequenceLayout(row_end=False),
    "own meta": SequenceLayout(image_meta="[{w} x {h}]", video_meta="{fps}/{t}/{h}x{w}", temporal_factor=1),
}
GRAMMARS = {name: Grammar(VOCABULARY, TEXT, layout, max_cells=5000) for name, layout in LAYOUTS.items()}
GRAMMAR = GRAMMARS["emu3"]
EVERYTHING = frozenset({"text", "image", "video", "action"})
ALSO_MARKS = EVERYTHING | {"special"}


def picture(h: int, w: int, seed: int = 0) -> Image:
    return Image(torch.randint(CODEBOOK, (h, w), generator=torch.Generator().manual_seed(seed)))


def clip(t: int, h: int, w: int, fps: float = 8.0, seed: int = 0) -> Video:
    return Video(torch.randint(CODEBOOK, (t, h, w), generator=torch.Generator().manual_seed(seed)), fps=fps)


def actions(n: int, seed: int = 0) -> Action:
    return Action(torch.randint(ACTIONS, (n,), generator=torch.Generator().manual_seed(seed)))


seeds = st.integers(0, 1000)
sides = st.integers(1, 6)
rates = st.integers(1, 999_999).map(lambda thousandths: thousandths / 1000)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["<|image start|>", "<|bos|><|eos|>", "<|visual token 000003|>", "8*8", "<|image token|>8*8", *MARKS]
)
media = st.builds(picture, sides, sides, seeds) | st.builds(clip, sides, sides, sides, rates, seeds)
segments = words.map(Text) | st.sampled_from(MARKS).map(Special) | media | st.builds(actions, st.integers(1, 6), seeds)
documents = st.lists(segments, max_size=6).map(lambda found: Document(tuple(found)))


def as_read_back(document: Document) -> Document:
    """Texts normalised, neighbours joined, empty ones gone: what no ids can tell apart."""
    found: list[Any] = []
    for segment in document.segments:
        if isinstance(segment, Text):
            segment = Text(unicodedata.normalize("NFC", segment.text))
            if found and isinstance(found[-1], Text):
                segment = Text(found.pop().text + segment.text)
            if not segment.text:
                continue
        found.append(segment)
    return Document(tuple(found))


# the released formats


def test_a_picture_is_written_as_released() -> None:
    v = VOCABULARY
    ids = GRAMMAR.build(Document((Text("a"), Image(torch.tensor([[1, 2, 3], [4, 5, 6]])))))
    meta = [TEXT.id_of_char(c) for c in "2*3"]
    row = [[v.visual_start + code for code in codes] for codes in ([1, 2, 3], [4, 5, 6])]
    assert ids == [
        *(v.bos, *TEXT.encode("a"), v.boi, *meta, v.img),
        *(*row[0], v.eol, *row[1], v.eol, v.eof, v.eoi, v.eos),
    ]


def test_a_clip_has_rows_and_frames() -> None:
    v = VOCABULARY
    ids = GRAMMAR.build(Document((Video(torch.tensor([[[1], [2]], [[3], [4]]]), fps=8),)), bos=False, eos=False)
    meta = [TEXT.id_of_char(c) for c in "2*2*1 8fps 1s"]
    one, two, three, four = (v.visual_start + code for code in (1, 2, 3, 4))
    frames = [one, v.eol, two, v.eol, v.eof, three, v.eol, four, v.eol, v.eof]
    assert ids == [v.boi, *meta, v.img, *frames, v.eoi]


def test_emu3_5_ends_neither_the_last_row_nor_the_frame() -> None:
    v = VOCABULARY
    ids = GRAMMARS["emu3.5"].build(Document((Image(torch.tensor([[1], [2]])),)), bos=False, eos=False)
    assert ids[-4:] == [v.visual_start + 1, v.eol, v.visual_start + 2, v.eoi]
    assert GRAMMARS["emu3.5"].media_length(h=55, w=73) == 55 * 74


@pytest.mark.parametrize(("h", "w", "length"), [(64, 64, 4162), (90, 90, 8192), (85, 48, 4167), (1, 1, 4), (1, 2, 5)])
def test_length_of_a_picture(h: int, w: int, length: int) -> None:
    assert Grammar(VOCABULARY, TEXT).media_length(h=h, w=w) == length == h * (w + 1) + 2


def test_length_of_a_clip() -> None:
    assert Grammar(VOCABULARY, TEXT).media_length(t=30, h=64, w=64) == 124_830 + 1


def test_released_understanding_prompts(official: Path, released: Grammar) -> None:
    for entry in json.loads((official / "expected.json").read_text())["understand_prompts"]:
        parsed = released.parse(entry["ids"])
        before, image, after = parsed.document.segments
        assert before == Text("You are a helpful assistant. USER: ")
        assert isinstance(image, Image)
        assert list(image.codes.shape) == entry["grid"]
        assert after == Text(entry["question"] + ". ASSISTANT:")
        assert released.build(parsed.document, eos=False) == entry["ids"]


class ReleasedSmallModel:
    """The few text ids of the fixture's 300-id model that the grammar asks for."""

    size = 91

    def id_of_char(self, character: str) -> int:
        return {"5": 11, "*": 12, "7": 13}.get(character, 20 + ord(character) % 50)

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def test_released_greedy_generation_is_allowed_step_by_step(official: Path) -> None:
    entry = json.loads((official / "expected.json").read_text())["greedy_generation"]
    roles = {"bos": 91, "eos": 92, "img": 93, "boi": 94, "eoi": 95, "eol": 96, "eof": 97, "pad": 98}
    vocabulary = Vocabulary(
        text_size=91,
        specials=roles,
        visual_start=entry["visual_base"],
        visual_size=200,
        special_names={f"<|{role}|>": id for role, id in roles.items()},
    )
    grammar = Grammar(vocabulary, ReleasedSmallModel())  # type: ignore[arg-type]
    for prompt in (entry["cond"], entry["uncond"]):
        state = grammar.start(prompt)
        size = state.position.size
        assert size == MediaSize(h=entry["height"], w=entry["width"])
        assert state.remaining == len(entry["tokens"])
        for id in entry["tokens"]:
            state.advance(id)
        assert state.done


# building and parsing


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(document=documents, bos=st.booleans(), eos=st.booleans())
def test_parse_gives_back_what_build_wrote(name: str, document: Document, bos: bool, eos: bool) -> None:
    grammar = GRAMMARS[name]
    ids = grammar.build(document, bos=bos, eos=eos)
    parsed = grammar.parse(ids)
    assert parsed.document == as_read_back(document)
    assert parsed.complete == eos
    assert parsed.open is None
    assert all(0 <= id < VOCABULARY.size for id in ids)


@settings(max_examples=60, deadline=None)
@given(documents)
def test_frame_rates_come_back_as_written(document: Document) -> None:
    again = GRAMMAR.build(GRAMMAR.parse(GRAMMAR.build(document)).document)
    written = [s.fps for s in document.segments if isinstance(s, Video)]
    read = [s.fps for s in GRAMMAR.parse(again).document.segments if isinstance(s, Video)]
    assert read == [round(fps, 3) for fps in written]


@settings(max_examples=150, deadline=None)
@given(words)
def test_text_never_becomes_anything_else(text: str) -> None:
    start, stop = VOCABULARY.text_range
    assert all(start <= id < stop for id in GRAMMAR.build(Document((Text(text),)), bos=False, eos=False))


def test_a_special_is_one_id_between_texts_that_stay_apart() -> None:
    document = Document((Special(MARKS[2]), Text("a"), Special(MARKS[0]), Special(MARKS[0]), Text(MARKS[1])))
    ids = GRAMMAR.build(document, bos=False, eos=False)
    mark = VOCABULARY.marks
    assert ids == [mark[MARKS[2]], *TEXT.encode("a"), mark[MARKS[0]], mark[MARKS[0]], *TEXT.encode(MARKS[1])]
    assert GRAMMAR.parse(ids).document == document


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *((VOCABULARY.surface(id), "cannot be a Special") for id in VOCABULARY.specials.values()),
        ("<|visual token 000003|>", "cannot be a Special"),
        ("<|action token 000003|>", "cannot be a Special"),
        ("<|extra_999|>", "no special is called"),
        ("im_start", "no special is called"),
        ("", "no special is called"),
        (VOCABULARY.marks[MARKS[0]], "no special is called"),
    ],
)
def test_what_is_no_special_without_a_role_is_refused(name: Any, says: str) -> None:
    said = refusal(lambda: GRAMMAR.build(Document((Special(name),))))
    assert said
    assert says in said
    assert "\n" not in said


def test_specials_in_prompts_are_passed_over_and_written_only_where_asked() -> None:
    v, text = VOCABULARY, frozenset({"text"})
    before = Document((Text("a"), picture(2, 3), Special(MARKS[0])))
    prompt = GRAMMAR.build(before, eos=False)
    for ids in (prompt, [*prompt, *TEXT.encode("b")]):
        state = GRAMMAR.start(ids, may=text)
        assert state.allowed() == GRAMMAR.start([v.bos], may=text).allowed()
        assert not any(state.allowed().contains(id) for id in v.marks.values())
    state = GRAMMAR.start(prompt, may=text | {"special"})
    state.advance(v.marks[MARKS[1]])
    state.advance(v.eos)
    assert state.done
    opened = GRAMMAR.start([*prompt, *GRAMMAR.open_media(h=1, w=2)])
    assert opened.position.size == MediaSize(h=1, w=2)
    assert not any(opened.allowed().contains(id) for id in v.marks.values())
    bare = Grammar(Vocabulary.native(text_size=TEXT.size, visual_size=4), TEXT)
    with pytest.raises(EmulusError, match="cannot write 'special'"):
        bare.start([bare.vocabulary.bos], may=frozenset({"special"}))


def test_any_released_special_without_a_role_can_stand_in_a_document(released: Grammar) -> None:
    document = Document(tuple(map(Special, released.vocabulary.marks)))
    ids = released.build(document)
    assert len(ids) == len(released.vocabulary.marks) + 2
    assert released.parse(ids).document == document


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(document=documents, cut=st.floats(0, 1))
def test_ids_may_end_anywhere(name: str, document: Document, cut: float) -> None:
    grammar = GRAMMARS[name]
    ids = grammar.build(document)
    parsed = grammar.parse(ids[: int(cut * len(ids))])
    whole = as_read_back(document).segments
    found = parsed.document.segments
    last_is_text = bool(found) and isinstance(found[-1], Text)
    assert found[: len(found) - last_is_text] == whole[: len(found) - last_is_text]
    if parsed.open and parsed.open.size:
        segment = whole[len(found)]
        assert isinstance(segment, Image | Video)
        assert parsed.open.size == segment.size
        assert torch.equal(parsed.open.codes, segment.codes.flatten()[: len(parsed.open.codes)])


def test_what_is_open_is_told() -> None:
    ids = GRAMMAR.build(Document((Text("a cat"), picture(3, 2))))
    start = ids.index(VOCABULARY.img) + 1
    parsed = GRAMMAR.parse(ids[: start + 4])
    assert parsed.open
    assert (parsed.open.kind, parsed.open.size, parsed.open.offset) == ("image", MediaSize(h=3, w=2), 4)
    assert parsed.open.whole() == Image(picture(3, 2).codes[:1])
    parsed = GRAMMAR.parse(ids[: start - 2])
    assert parsed.open
    assert (parsed.open.kind, parsed.open.meta) == ("meta", "3*")
    parsed = GRAMMAR.parse(GRAMMAR.build(Document((actions(3),)))[:4])
    assert parsed.open
    assert (parsed.open.kind, parsed.open.offset) == ("action", 2)


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, np.array])
def test_ids_come_in_many_forms_and_may_be_padded(form: Any) -> None:
    document = Document((Text("a"), picture(2, 2)))
    ids = [*GRAMMAR.build(document), VOCABULARY.pad, VOCABULARY.pad]
    assert GRAMMAR.parse(form(ids)).document == document
    assert GRAMMAR.parse(form([])).document == Document()


IDS = GRAMMAR.build(Document((Text("a"), Image(torch.tensor([[1, 2], [3, 4]])), Text("b"))))
START = IDS.index(VOCABULARY.img) + 1


def refusal(call: Callable[[], object]) -> str | None:
    """What a call refuses with; None if it does not."""
    try:
        call()
    except EmulusError as error:
        return str(error)
    return None


def changed(position: int, *ids: int) -> list[int]:
    return [*IDS[:position], *ids, *IDS[position + 1 :]]


def meta(text: str) -> list[int]:
    return [VOCABULARY.bos, VOCABULARY.boi, *(TEXT.id_of_char(c) for c in text), VOCABULARY.img]


@pytest.mark.parametrize(
    ("ids", "position"),
    [
        ([VOCABULARY.eoi], 0),
        ([VOCABULARY.bos, VOCABULARY.bos], 1),
        ([VOCABULARY.bos, VOCABULARY.pad], 1),
        ([VOCABULARY.bos, VOCABULARY.img], 1),
        (changed(1, VOCABULARY.visual_start), 1),
        (changed(1, VOCABULARY.size), 1),
        (changed(1, -1), 1),
        (changed(START + 1), START + 1),
        (changed(START + 2), START + 2),
        (changed(START + 2, VOCABULARY.visual_start), START + 2),
        (changed(START, 5), START),
        (changed(START, VOCABULARY.eol), START),
        (changed(START + 6, VOCABULARY.eoi), START + 6),
        (changed(START + 7, VOCABULARY.eos), START + 7),
        ([*IDS, 5], len(IDS)),
        ([*IDS, VOCABULARY.pad, VOCABULARY.eos], len(IDS) + 1),
        (meta(""), 2),
        (meta("2*"), 4),
        (meta("02*2"), 2),
        (meta("9999*9999"), 5),
        (meta("5000*2"), 7),
        (meta("1*8*8 8fps 1s"), 13),
        (meta("1*8*8 8.0fps 0.5s"), 11),
        ([VOCABULARY.boi, *TEXT.encode("cat")], 1),
        ([VOCABULARY.boa, VOCABULARY.eoa], 1),
        ([VOCABULARY.boa, VOCABULARY.action_start, 5], 2),
    ],
)
def test_broken_ids_are_refused_where_they_break(ids: list[int], position: int) -> None:
    with pytest.raises(EmulusError, match=rf"at position {position}: .* should be"):
        GRAMMAR.parse(ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-2, VOCABULARY.size), max_size=30), st.integers(0, len(IDS)))
def test_any_ids_parse_or_are_refused_in_one_line(ids: list[int], kept: int) -> None:
    refused = refusal(lambda: GRAMMAR.parse(IDS[:kept] + ids))
    assert refused is None or re.fullmatch(r"broken ids at position \d+: .* should be; .*", refused)


@pytest.mark.parametrize("ids", [[1.5], [[1, 2]], ["a"], [2**70]])
def test_what_are_no_ids_is_refused(ids: Any) -> None:
    with pytest.raises(EmulusError, match="row of whole numbers"):
        GRAMMAR.parse(ids)


def test_codes_of_another_codebook_are_refused() -> None:
    with pytest.raises(EmulusError, match="not within 0 to 49"):
        GRAMMAR.build(Document((Image(torch.tensor([[CODEBOOK]])),)))
    with pytest.raises(EmulusError, match="not within 0 to 11"):
        GRAMMAR.build(Document((Action(torch.tensor([ACTIONS])),)))
    with pytest.raises(EmulusError, match="not within 0 to 49"):
        GRAMMAR.open_media(h=1, w=2, codes=torch.tensor([-1]))
    with pytest.raises(EmulusError, match="do not fit"):
        GRAMMAR.open_media(h=1, w=2, codes=torch.tensor([1, 2, 3]))


def test_what_is_too_large_is_refused_before_memory_is_taken() -> None:
    with pytest.raises(EmulusError, match="more than 5000 cells"):
        GRAMMAR.open_media(h=10**9, w=10**9)


def test_a_tokenizer_of_another_size_is_refused() -> None:
    with pytest.raises(EmulusError, match="from the same checkpoint"):
        Grammar(Vocabulary.native(text_size=TEXT.size + 1, visual_size=4), TEXT)


def test_a_long_clip_is_built_and_parsed_without_a_loop_over_its_cells() -> None:
    grammar = Grammar(Vocabulary.native(text_size=TEXT.size, visual_size=CODEBOOK), TEXT)
    small, large = (Document((clip(t, h, w, fps=24),)) for t, h, w in ((10, 11, 12), (30, 64, 65)))
    few, ids = operations(grammar.build, small)
    many, more_ids = operations(grammar.build, large)
    assert len(more_ids) > 80 * len(ids)
    assert 0 < many < 1.5 * few
    few, parsed = operations(grammar.parse, ids)
    many, more_parsed = operations(grammar.parse, more_ids)
    assert (parsed.document, more_parsed.document) == (small, large)
    assert 0 < many < 1.5 * few


def operations(work: Callable[[Any], T], given: object) -> tuple[int, T]:
    """How many operations the interpreter does, which is the same on every machine, and what comes of it."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Callable:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    # Python 3.12 looks only when tracing begins whether anyone wants operations.
    sys._getframe().f_trace_opcodes = True
    sys.settrace(trace)
    try:
        result = work(given)
    finally:
        sys.settrace(before)
    return count, result


# what may come next


def walk(state: GrammarState, choose: random.Random, limit: int) -> list[int]:
    """Take random allowed ids to the end; the end is taken whenever the limit is passed."""
    ids: list[int] = []
    while not state.done:
        allowed = state.allowed()
        start, stop = choose.choice(allowed.ranges)
        id = choose.randrange(start, stop)
        if allowed.forced is not None:
            assert id == allowed.forced
        elif len(ids) > limit and allowed.contains(VOCABULARY.eos):
            id = VOCABULARY.eos
        state.advance(id)
        ids.append(id)
    return ids


def test_a_thousand_random_walks_parse_into_whole_media() -> None:
    choose = random.Random(0)
    for trial in range(1000):
        grammar = GRAMMARS[choose.choice(list(GRAMMARS))]
        h, w = choose.randint(1, 9), choose.randint(1, 9)
        t, fps = choose.choice([(None, None), (choose.randint(1, 5), choose.choice([8, 23.976, 0.5]))])
        before = Document((Text("a cat"), picture(2, 3)) if trial % 2 else ())
        prompt = grammar.build(before, eos=False) + grammar.open_media(h=h, w=w, t=t, fps=fps)
        state = grammar.start(prompt)
        assert state.remaining == grammar.media_length(h=h, w=w, t=t) + 1
        ids = walk(state, choose, limit=0)
        assert len(ids) == grammar.media_length(h=h, w=w, t=t) + 1
        frames, layout = t or 1, grammar.layout
        assert ids.count(VOCABULARY.eol) == layout.row_end * frames * (h - (not layout.last_row_end))
        assert ids.count(VOCABULARY.eof) == layout.frame_end * frames
        assert ids[-2:] == [VOCABULARY.eoi, VOCABULARY.eos]
        assert sum(map(VOCABULARY.is_visual, ids)) == frames * h * w
        parsed = grammar.parse(prompt + ids)
        drawn = parsed.document.segments[-1]
        assert parsed.complete
        assert isinstance(drawn, Image | Video)
        assert drawn.size == MediaSize(h=h, w=w, t=t, fps=fps)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=50, deadline=None)
@given(
    choose=st.randoms(use_true_random=False),
    may=st.sets(st.sampled_from(sorted(ALSO_MARKS))).map(frozenset),
    document=documents,
    cut=st.floats(0, 1),
    max_cells=st.integers(1, 60),
)
def test_walks_after_any_prompt_parse_into_whole_media(
    name: str, choose: random.Random, may: frozenset[str], document: Document, cut: float, max_cells: int
) -> None:
    grammar = GRAMMARS[name]
    prompt = grammar.build(document, eos=False)
    prompt = prompt[: int(cut * len(prompt))]
    opened = grammar.parse(prompt).open
    refused = refusal(lambda: grammar.start(prompt, may=may, max_cells=max_cells))
    if refused:
        assert opened
        assert opened.kind == "meta"
        assert "cannot become a size" in refused
        return
    state = grammar.start(prompt, may=may, max_cells=max_cells)
    least, remaining = state.least, state.remaining
    ids = walk(state, choose, limit=40)
    assert len(ids) >= least
    assert remaining in (None, len(ids))
    parsed = grammar.parse(prompt + ids)
    assert parsed.complete
    assert parsed.open is None
    before = grammar.parse(prompt).document.segments
    written = parsed.document.segments[len(before) + (opened is not None) :]
    assert {type(segment).__name__.lower() for segment in written} <= may
    assert all(s.size.cells <= max_cells for s in written if isinstance(s, Image | Video))


def test_positions_tell_rows_and_frames() -> None:
    state = GRAMMAR.start(GRAMMAR.open_media(t=2, h=2, w=3, fps=8))
    seen = []
    while not state.done:
        allowed, position = state.allowed(), state.position
        if allowed.kind == "visual":
            assert position.kind == "video"
            seen.append((position.frames, position.row, position.column))
        state.advance(allowed.ranges[0][0])
    assert seen == [(t, row, column) for t in range(2) for row in range(2) for column in range(3)]
    assert state.position.kind == "end"


def test_a_prompt_may_break_off_within_a_clip() -> None:
    whole = clip(3, 2, 2)
    ids = GRAMMAR.build(Document((whole,)))
    prompt = GRAMMAR.open_media(t=3, h=2, w=2, fps=8.0, codes=whole.codes[:1].flatten())
    assert prompt == ids[1 : 1 + len(prompt)]
    assert prompt[-1] == VOCABULARY.eof
    state = GRAMMAR.start(prompt)
    assert (state.position.frames, state.position.rows, state.remaining) == (1, 2, 2 * 7 + 2)
    assert state.allowed().kind == "visual"


def test_a_copy_goes_its_own_way() -> None:
    state = GRAMMAR.start(GRAMMAR.open_media(h=1, w=2))
    state.advance(VOCABULARY.visual_start)
    other = state.copy()
    other.advance(VOCABULARY.visual_start)
    assert state.position.cells == 1
    assert other.position.cells == 2
    assert other.allowed().forced == VOCABULARY.eol
    assert state.allowed().forced is None


def test_what_may_be_written_outside_media() -> None:
    v, prompt = VOCABULARY, GRAMMAR.build(Document((Text("a"),)), eos=False)
    assert GRAMMAR.start(prompt).allowed() == Allowed("forced", ((v.eos, v.eos + 1),))
    text = GRAMMAR.start(prompt, may=frozenset({"text"})).allowed()
    assert (text.kind, text.ranges, text.forced) == ("text", (v.text_range, (v.eos, v.eos + 1)), None)
    everything = GRAMMAR.start(prompt, may=EVERYTHING).allowed()
    assert [id for id in range(v.size) if everything.contains(id)] == [*range(v.text_size), v.eos, v.boi, v.boa]
    for (_, stop), (start, _) in pairwise(everything.ranges):
        assert stop < start


def test_after_the_end_comes_only_padding() -> None:
    state = GRAMMAR.start([VOCABULARY.bos])
    state.advance(VOCABULARY.eos)
    assert state.done
    assert state.allowed().forced == VOCABULARY.pad
    state.advance(VOCABULARY.pad)
    assert state.done
    assert state.remaining == 0


def test_a_size_begun_by_the_prompt_is_finished_as_what_may_follow() -> None:
    prompt = [VOCABULARY.bos, VOCABULARY.boi, *(TEXT.id_of_char(c) for c in "2*2")]
    space = TEXT.id_of_char(" ")
    pictures = GRAMMAR.start([*prompt], may=frozenset({"image"}))
    assert pictures.allowed().contains(VOCABULARY.img)
    clips = GRAMMAR.start([*prompt, TEXT.id_of_char("*"), TEXT.id_of_char("3")], may=frozenset({"video"}))
    assert clips.allowed().contains(space)
    assert not clips.allowed().contains(VOCABULARY.img)
    with pytest.raises(EmulusError, match="cannot become a size"):
        GRAMMAR.start([*prompt, TEXT.id_of_char("*")], may=frozenset({"image"}))


def test_wrong_steps_and_prompts_are_refused() -> None:
    state = GRAMMAR.start(GRAMMAR.open_media(h=2, w=2))
    with pytest.raises(EmulusError, match=r"<\|row end\|> cannot follow in image"):
        state.advance(VOCABULARY.eol)
    with pytest.raises(EmulusError, match="ended already"):
        GRAMMAR.start([VOCABULARY.bos, VOCABULARY.eos])
    with pytest.raises(EmulusError, match="'images'; did you mean 'image'"):
        GRAMMAR.start([VOCABULARY.bos], may=frozenset({"images"}))
    no_actions = Grammar(Vocabulary.native(text_size=TEXT.size, visual_size=4), TEXT)
    with pytest.raises(EmulusError, match="cannot write 'action'"):
        no_actions.start([no_actions.vocabulary.bos], may=EVERYTHING)


def test_blocks_are_shared_and_cannot_be_changed() -> None:
    block = GRAMMAR.block(MediaSize(h=2, w=2))
    assert block.tolist() == [CELL, CELL, VOCABULARY.eol] * 2 + [VOCABULARY.eof, VOCABULARY.eoi]
    with pytest.raises(ValueError, match="read-only"):
        block[0] = 1
