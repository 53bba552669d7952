"""Mixtures and loaders: which documents, in which rows, on which process."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.data.loader import (
    CAPTION_FIRST,
    CAPTION_LAST,
    NO_WORDS,
    QUESTION,
    TEXT,
    Chosen,
    Documents,
    Loader,
    Planner,
    Reader,
    ReadingConfig,
    StepRows,
    held_out,
    lengths_of,
)
from emulus.data.mixture import Longest, Mixture, Part, parse_part
from emulus.data.records import MANIFEST, ShardLine, add_to_manifest, lengths_path, shard_name, write_shard
from emulus.data.source import even
from emulus.errors import EmulusError
from emulus.sequence import Batch, Document, Text, caption_first, caption_last, conversation, pack, question_answer
from tests.data.folders import Thing, documents_of, grammar_of_things, make_folder, make_things, to_record

GRAMMAR = grammar_of_things()
MEDIA = {
    (split, kind): make_things(kind, count, f"{split}/{kind}")
    for split, kind, count in [
        ("train", "image", 60),
        ("train", "video", 20),
        ("validation", "image", 12),
        ("validation", "video", 4),
    ]
}
WORDS = {("train", "text"): make_things("text", 40, "train/text")}
THINGS = {thing.id: thing for things in [*MEDIA.values(), *WORDS.values()] for thing in things}
TALKS = {
    ("train", "image"): [
        replace(
            thing, questions=tuple((f"what is {place}?", f"it is {place}, {number}") for place in range(number % 7))
        )
        for number, thing in enumerate(make_things("image", 28, "talks"))
    ]
}
THINGS |= {thing.id: thing for thing in TALKS["train", "image"]}
ROW = 320


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("media") / "tokens", MEDIA, shards=3)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("words") / "tokens", WORDS, vision="")


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return Mixture.open([str(make_folder(tmp_path_factory.mktemp("talks") / "tokens", TALKS))])


@pytest.fixture(scope="module")
def mixture(media: Path, words: Path) -> Mixture:
    return Mixture.open([f"{media}:image=0.5", f"{media}:video=0.2", f"{words}=0.3"])


def make_loader(mixture: Mixture, reading: ReadingConfig | None = None, **changes: Any) -> Loader:
    values: dict[str, Any] = {"seed": 3, "row_tokens": ROW, "rows_per_step": 4, "window": 32, "threads": 0, **changes}
    return Loader(mixture, reading or ReadingConfig(), **values)


def equal(left: Batch, right: Batch) -> bool:
    tensors = ("input_ids", "targets", "loss_weights", "position_ids")
    return left.document_lengths == right.document_lengths and all(
        torch.equal(getattr(left, name), getattr(right, name)) for name in tensors
    )


def same_steps(left: StepRows, right: StepRows) -> bool:
    rows = zip(left.rows, right.rows, strict=True)
    return all(equal(*pair) for pair in rows) and dataclasses.replace(left, rows=[]) == dataclasses.replace(
        right, rows=[]
    )


def planner_of(mixture: Mixture, seed: int = 3, **reading: float) -> Planner:
    return Planner(mixture, ReadingConfig(**reading), seed=seed, row_tokens=ROW, window=32)


# documents


def test_documents_are_what_the_grammar_builds(mixture: Mixture) -> None:
    documents = planner_of(mixture, question=0.5, null_caption=0.3).documents(np.arange(400))
    reader = Reader(mixture, ReadingConfig())
    seen = Counter[int]()
    for number in range(400):
        thing = thing_at(mixture, int(documents.source[number]), int(documents.record[number]))
        task, span = int(documents.task[number]), int(documents.words[number])
        batch = reader.row(documents, [number])
        assert batch.input_ids.tolist() == GRAMMAR.build(expected(thing, task, span))
        assert batch.document_lengths == [documents.lengths[number]]
        seen[task] += 1
    assert set(seen) == {TEXT, CAPTION_FIRST, CAPTION_LAST, QUESTION}


def thing_at(mixture: Mixture, source: int, record: int) -> Thing:
    return THINGS[mixture.read(source, [record])[0].id]


def expected(thing: Thing, task: int, span: int) -> Document:
    if thing.media is None:
        assert (task, span) == (TEXT, 0)
        return Document((Text(thing.text),))
    if task == QUESTION:
        number, odd = divmod(span - len(thing.captions), 2)
        assert not odd
        return question_answer(thing.media, *thing.questions[number])
    caption = "" if span == NO_WORDS else thing.captions[span]
    return caption_last(thing.media, caption) if task == CAPTION_LAST else caption_first(caption, thing.media)


def test_only_the_question_is_not_learned(mixture: Mixture) -> None:
    documents = planner_of(mixture, question=1).documents(np.arange(60))
    reader = Reader(mixture, ReadingConfig(visual_weight=0.25, answer_weight=3))
    for number in np.flatnonzero(documents.task == QUESTION).tolist():
        batch = reader.row(documents, [number])
        thing = thing_at(mixture, int(documents.source[number]), int(documents.record[number]))
        pair = (int(documents.words[number]) - len(thing.captions)) // 2
        asked = GRAMMAR.text.encode(f"Question: {thing.questions[pair][0]}\nAnswer:")
        unlearned = batch.targets[batch.loss_weights == 0].tolist()
        assert unlearned == [*asked, GRAMMAR.vocabulary.pad]
        answer = [*GRAMMAR.text.encode(f" {thing.questions[pair][1]}"), GRAMMAR.vocabulary.eos]
        weights = batch.loss_weights[-len(answer) - 1 :].tolist()
        assert batch.targets[-len(answer) - 1 : -1].tolist() == answer
        assert weights == [3] * (len(answer) - 1) + [1, 0]
        assert set(batch.loss_weights.tolist()) == {0, 0.25, 1, 3}


@given(st.integers(1, 8), st.integers(0, 5), st.integers(60, ROW))
@settings(max_examples=8, deadline=None)
def test_conversations_are_what_the_grammar_builds(talks: Mixture, turns: int, seed: int, row: int) -> None:
    reading = ReadingConfig(question=1, turns=turns)
    documents = Planner(talks, reading, seed=seed, row_tokens=row, window=32).documents(np.arange(28))
    reader = Reader(talks, ReadingConfig())
    for number in np.flatnonzero(documents.task == QUESTION).tolist():
        thing = thing_at(talks, 0, int(documents.record[number]))
        assert thing.media is not None
        start = (int(documents.words[number]) - len(thing.captions)) // 2
        places = start + np.arange(documents.turns[number]) * documents.stride[number]
        pairs = [thing.questions[place % len(thing.questions)] for place in places.tolist()]
        assert len(set(pairs)) == len(pairs) <= min(turns, len(thing.questions))
        batch = reader.row(documents, [number])
        assert batch.input_ids.tolist() == GRAMMAR.build(conversation(thing.media, pairs))
        assert batch.document_lengths == [documents.lengths[number]]
        assert len(pairs) == 1 or documents.lengths[number] <= row
        asked = "\n".join(f"Question: {question}\nAnswer:" for question, _ in pairs)
        unlearned = batch.targets[batch.loss_weights == 0].tolist()
        assert (GRAMMAR.text.decode(unlearned[:-1]), unlearned[-1]) == (asked, GRAMMAR.vocabulary.pad)


def test_conversations_are_as_long_as_asked_and_begin_anywhere(talks: Mixture) -> None:
    def documents(**reading: int) -> Documents:
        config = ReadingConfig(question=1, **reading)
        return Planner(talks, config, seed=0, row_tokens=ROW, window=32).documents(np.arange(4000))

    questions = talks.sources[0].spans.questions
    found = documents(turns=3)
    six = questions[found.record] == 6
    assert np.allclose(np.bincount(found.turns[six])[1:] / six.sum(), 1 / 3, atol=0.06)
    assert set(found.stride[six].tolist()) == {1, 5}
    first = (found.words - talks.sources[0].spans.captions[found.record])[six] // 2
    assert np.allclose(np.bincount(first, minlength=6) / six.sum(), 1 / 6, atol=0.06)
    assert set(found.turns[questions[found.record] == 1].tolist()) == {1}
    assert max(documents(turns=9).turns) == 6
    # What else is drawn does not depend on the number of turns.
    alone = documents(turns=1)
    for name in ("record", "task", "words"):
        assert getattr(alone, name).tolist() == getattr(found, name).tolist()
    assert set(alone.turns.tolist()) == {1}


def test_a_conversation_is_cut_only_where_it_would_not_fit(talks: Mixture) -> None:
    spans, between = talks.sources[0].spans, len(talks.between)
    whole = Planner(talks, ReadingConfig(question=1, turns=6), seed=0, row_tokens=10_000, window=32)
    documents = whole.documents(np.arange(60))
    several = np.flatnonzero(documents.turns > 1)
    assert len(several) > 20
    for number in several.tolist():
        one = slice(number, number + 1)
        chosen = Chosen(*(getattr(documents, name)[one] for name in Chosen._fields))
        length, turns = int(documents.lengths[number]), int(documents.turns[number])
        fits = lengths_of(spans, documents.record[one], chosen, between=between, most=length)
        cut = lengths_of(spans, documents.record[one], chosen, between=between, most=length - 1)
        assert [each.tolist() for each in fits] == [[length], [turns]]
        assert cut[0] < length
        assert cut[1] == turns - 1


def test_draws_come_as_often_as_asked(mixture: Mixture) -> None:
    reading = ReadingConfig(caption_first=0.7, null_caption=0.2, question=0.4)
    documents = Planner(mixture, reading, seed=0, row_tokens=ROW, window=32).documents(np.arange(6000))
    spans = [source.spans for source in mixture.sources]
    captions, questions = (
        np.array([getattr(spans[s], name)[r] for s, r in zip(documents.source, documents.record, strict=True)])
        for name in ("captions", "questions")
    )
    assert (documents.task[questions > 0] == QUESTION).mean() == pytest.approx(0.4, abs=0.03)
    told = (captions > 0) & ((documents.task == CAPTION_FIRST) | (documents.task == CAPTION_LAST))
    assert (documents.task[told] == CAPTION_FIRST).mean() == pytest.approx(0.7, abs=0.03)
    drawn = told & (documents.task == CAPTION_FIRST)
    assert (documents.words[drawn] == NO_WORDS).mean() == pytest.approx(0.2, abs=0.03)
    # Each of three captions as often as the others.
    chosen = documents.words[told & (captions == 3) & (documents.words != NO_WORDS)]
    assert np.allclose(np.bincount(chosen) / len(chosen), 1 / 3, atol=0.05)


def test_only_what_is_drawn_from_nothing_has_no_caption(mixture: Mixture) -> None:
    """Guidance learns from pictures without a caption; a picture that is to be described always has one."""
    documents = planner_of(mixture, question=0, null_caption=1).documents(np.arange(600))
    captions = np.array(
        [mixture.sources[s].spans.captions[r] for s, r in zip(documents.source, documents.record, strict=True)]
    )
    described, drawn = (documents.task == task for task in (CAPTION_LAST, CAPTION_FIRST))
    assert described.sum() > 100
    assert (documents.words[drawn] == NO_WORDS).all()
    assert (documents.words[described] != NO_WORDS).all()
    assert (captions[described] > 0).all()


def test_shares_are_those_asked_for(mixture: Mixture, media: Path, words: Path) -> None:
    assert [branch.share for branch in mixture.tree()] == pytest.approx([0.5, 0.2, 0.3])
    source = planner_of(mixture).documents(np.arange(1000)).source
    assert np.bincount(source).tolist() == [500, 200, 300]
    by_rows = Mixture.open([str(media), str(words)])
    assert [(branch.name, branch.rows) for branch in by_rows.tree()] == [(str(media), 80), (str(words), 40)]
    assert np.bincount(planner_of(by_rows).documents(np.arange(1200)).source).tolist() == [800, 400]
    assert sum(branch.tokens for branch in by_rows.tree()) == sum(
        len(to_record(GRAMMAR, thing).ids) for id, thing in THINGS.items() if id.startswith("train")
    )


def test_every_record_comes_once_in_an_epoch_of_its_part(mixture: Mixture) -> None:
    documents = planner_of(mixture).documents(np.arange(1000))
    for number, source in enumerate(mixture.sources):
        records = documents.record[documents.source == number]
        epochs = [records[start : start + len(source)] for start in range(0, len(records), len(source))]
        assert all(sorted(epoch.tolist()) == list(range(len(source))) for epoch in epochs[:-1])
        assert epochs[0].tolist() != epochs[1].tolist()


# rows and steps


def test_rows_hold_the_windows_documents_once(mixture: Mixture) -> None:
    planner = planner_of(mixture)
    for window in range(4):
        plan = planner.plan(window)
        assert sorted(number for row in plan.rows for number in row) == list(range(32))
        assert all(plan.documents.lengths[row].sum() <= ROW for row in plan.rows)
    assert planner.plan(0).documents.lengths.tolist() == planner.documents(np.arange(32)).lengths.tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_same_steps(mixture: Mixture, world: int) -> None:
    alone = make_loader(mixture)
    ranks = [make_loader(mixture, rank=rank, world=world) for rank in range(world)]
    for step in range(6):
        whole, parts = alone.step(step), [loader.step(step) for loader in ranks]
        rows = {number: row for part in parts for number, row in zip(part.numbers, part.rows, strict=True)}
        assert sorted(rows) == whole.numbers == [0, 1, 2, 3]
        assert all(equal(whole.rows[number], row) for number, row in rows.items())
        assert sum(part.documents for part in parts) == whole.documents
        assert sum((Counter(part.sources) for part in parts), Counter()) == Counter(whole.sources)
        assert sum(whole.sources.values()) == sum(len(row.input_ids) for row in whole.rows)


def test_steps_do_not_depend_on_what_was_read_before(mixture: Mixture) -> None:
    in_order = [make_loader(mixture).step(step) for step in range(12)]
    loader = make_loader(mixture)
    for step in np.random.default_rng(0).permutation(12).tolist():
        assert same_steps(loader.step(step), in_order[step])
    ahead = make_loader(mixture, threads=2)
    for step in [0, 1, 2, 3, 9, 10, 11, 4, 5, 5, 6]:
        assert same_steps(ahead.step(step), in_order[step])
    ahead.close()


@given(st.integers(0, 12), st.integers(0, 5), st.integers(2, 60), st.sampled_from([1, 2, 6]))
@settings(max_examples=15, deadline=None)
def test_a_resumed_loader_goes_on_as_if_never_stopped(
    mixture: Mixture, step: int, seed: int, window: int, world: int
) -> None:
    whole = make_loader(mixture, seed=seed, window=window, rows_per_step=6)
    state = json.loads(json.dumps(whole.state(step)))
    with mock.patch.object(Planner, "_make", autospec=True, side_effect=Planner._make) as planned:
        resumed = make_loader(mixture, seed=seed, window=window, rows_per_step=6, world=world, state=state)
        steps = [resumed.step(number) for number in range(step, step + 3)]
    assert min(call.args[1] for call in planned.call_args_list) == state["window"]
    for number, found in enumerate(steps, start=step):
        expected = whole.step(number)
        assert all(equal(expected.rows[n], row) for n, row in zip(found.numbers, found.rows, strict=True))
        assert resumed.state(number) == whole.state(number)
    if step:
        assert equal(resumed.step(0).rows[0], whole.step(0).rows[0])


def test_order_and_draws_both_follow_the_seed(mixture: Mixture) -> None:
    first, other = (planner_of(mixture, seed, question=0).documents(np.arange(2000)) for seed in (3, 4))
    assert (first.source == other.source).all()
    assert (first.record != other.record).mean() > 0.9
    # Where both have captions, nothing but the draw of the place says whether they come first.
    captioned = np.logical_and(*(captions_of(mixture, each) > 0 for each in (first, other)))
    assert (first.task == other.task)[captioned].mean() == pytest.approx(0.5, abs=0.06)


def captions_of(mixture: Mixture, documents: Documents) -> np.ndarray:
    places = zip(documents.source, documents.record, strict=True)
    return np.array([mixture.sources[source].spans.captions[record] for source, record in places])


def test_neighbouring_places_draw_by_themselves(mixture: Mixture) -> None:
    documents = planner_of(mixture, question=0).documents(np.arange(4000))
    first = (documents.task == CAPTION_FIRST)[captions_of(mixture, documents) > 0]
    for distance in range(1, 6):
        assert (first[distance:] == first[:-distance]).mean() == pytest.approx(0.5, abs=0.05)


def test_parts_of_one_size_have_orders_of_their_own(words: Path, tmp_path: Path) -> None:
    """Else their records would meet in the same pairs in every epoch."""
    other = make_folder(tmp_path / "other", {("train", "text"): make_things("text", 40, "other")}, vision="")
    documents = planner_of(Mixture.open([str(words), str(other)])).documents(np.arange(80))
    orders = [documents.record[documents.source == source].tolist() for source in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(40))
    assert orders[0] != orders[1]


def test_rows_of_a_window_are_shuffled(mixture: Mixture) -> None:
    """Packing begins with the longest documents, but the first step of a window is no other than the last."""
    seen = Counter[tuple[int, ...]]()
    for seed in range(3):
        planner = Planner(mixture, ReadingConfig(), seed=seed, row_tokens=ROW, window=64)
        for window in range(4):
            plan = planner.plan(window)
            packed = pack(plan.documents.lengths.tolist(), ROW)
            assert sorted(map(sorted, plan.rows)) == sorted(map(sorted, packed))
            seen[tuple(packed.index(row) for row in plan.rows)] += 1
    assert len(seen) == 12
    assert not any(order == tuple(sorted(order)) for order in seen)


def test_seeds_give_other_steps(mixture: Mixture) -> None:
    ids = {make_loader(mixture, seed=seed).step(0).rows[0].input_ids.numpy().tobytes() for seed in range(5)}
    assert len(ids) == 5


# held-out data


def test_held_out_documents_are_always_the_same(mixture: Mixture) -> None:
    rows = held_out(mixture, 10, ReadingConfig(), ROW)
    assert all(equal(*pair) for pair in zip(rows, held_out(mixture, 10, ReadingConfig(), ROW), strict=True))
    found = [ids.tolist() for row in rows for ids in row.input_ids.split(row.document_lengths)]
    things = [thing for (split, _), chosen in MEDIA.items() if split == "validation" for thing in chosen]
    begins = {tuple(GRAMMAR.build(caption_first(t.captions[0], t.media))) for t in things if t.captions and t.media}
    ends = {tuple(GRAMMAR.build(caption_last(t.media, t.captions[0]))) for t in things if t.captions and t.media}
    # Seven pictures and three clips, as their weights are 0.5 and 0.2, in turn.
    assert len({tuple(ids) for ids in found}) == 10
    assert sum(tuple(ids) in begins for ids in found) == 4
    assert sum(tuple(ids) in ends for ids in found) == 6


def test_held_out_rows_weigh_as_training_ones_do(mixture: Mixture) -> None:
    for weight in (0.25, 1.0):
        rows = held_out(mixture, 10, ReadingConfig(visual_weight=weight), ROW)
        for row in rows:
            visual = row.targets >= GRAMMAR.vocabulary.visual_start
            assert visual.any()
            assert set(row.loss_weights[visual].tolist()) == {weight}


def test_held_out_items_are_evenly_spread(mixture: Mixture) -> None:
    every = [item.id for item in mixture.items("validation", 100)]
    assert len(every) == 16
    assert [item.id for item in mixture.items("validation", 5)] == even(every, 5)


def test_held_out_pictures_have_captions(mixture: Mixture, words: Path) -> None:
    found = mixture.pictures("validation", 5)
    assert len(found) == 5
    for item in found:
        assert (item.captions, item.media) == (THINGS[item.id].captions, THINGS[item.id].media)
        assert item.captions
        assert item.id.startswith("validation/image")
    assert held_out(Mixture.open([str(words)]), 10, ReadingConfig(), ROW) == []
    assert Mixture.open([str(words)]).pictures("validation", 5) == []


# what is refused


def test_parts_are_read() -> None:
    assert parse_part("runs/tokens") == Part(folder=Path("runs/tokens"))
    assert parse_part("runs/tokens:image=0.7") == Part(folder=Path("runs/tokens"), kind="image", weight=0.7)
    assert parse_part("/a=b/c:d/e:text=2") == Part(folder=Path("/a=b/c:d/e"), kind="text", weight=2)
    assert parse_part("a:video").name == "a:video"
    assert parse_part("a:all=1").name == "a"
    assert parse_part("date=2024-01/tokens") == Part(folder=Path("date=2024-01/tokens"))


def test_a_path_that_exists_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("lr=0.1-tokens", "date=2024-01/tokens", "t:v2", "mine=2", "mine", "a:image", "b:text=3", "c=much")
    for name in names:
        Path(name).mkdir(parents=True)
        assert parse_part(name) == Part(folder=Path(name))
        assert parse_part(f"{name}=0.5") == Part(folder=Path(name), weight=0.5)
        assert parse_part(f"{name}:video=0.5") == Part(folder=Path(name), kind="video", weight=0.5)
        assert parse_part(f"{name}:image") == Part(folder=Path(name), kind="image")
        assert parse_part(str(tmp_path / name)).folder == tmp_path / name
    assert parse_part("mine=2.0") == Part(folder=Path("mine"), weight=2)
    for text, says in [
        ("no=way", "there is no folder 'no=way', and 'way' is not a weight"),
        ("no:v2", "there is no folder 'no:v2', and no records of kind 'v2'"),
        ("no:v2=1", "there is no folder 'no:v2', and no records of kind 'v2'"),
        ("", "without a name"),
        ("no\udcff", "is not UTF-8"),
    ]:
        with pytest.raises(EmulusError, match=says):
            parse_part(text)
    for text, says in [("no=2", "neither 'no=2' nor 'no' is a folder"), ("no:text", "neither 'no:text' nor 'no'")]:
        with pytest.raises(EmulusError, match=says):
            Mixture.open([text])


@pytest.mark.parametrize(
    ("longest", "says", "not_said"),
    [
        (Longest(4529, "x", "image", 4500), "4500 of them are words: shorten those, or leave such", "--size"),
        (Longest(4529, "x", "image", 20), "a smaller --size (or --area), or leave such", "words"),
        (Longest(4529, "x", "video", 20), "or fewer --max-frames, or leave such", "words"),
        (Longest(600, "x", "image", 300), "shorten its 300 ids of words and tokenize at a smaller --size", "frames"),
        (Longest(4529, "x", "text", 4527), "--max-text-ids 510, or leave such", "--size"),
    ],
)
def test_remedies_for_long_documents_name_what_is_long(longest: Longest, says: str, not_said: str) -> None:
    text = longest.remedy(512)
    assert says in text
    assert not_said not in text
    assert text.endswith("items out with emulus tokenize --max-ids 512")


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([], "nothing to read"),
        (["{media}:picture"], "no records of kind 'picture'"),
        (["{media}=-1"], "a number of 0 or more"),
        (["{media}=nan"], "a number of 0 or more"),
        (["{media}=inf"], "a number of 0 or more"),
        (["{media}=much"], "'much' is not a weight"),
        (["=1"], "names no folder"),
        (["{media}=0", "{words}=0"], "sum to zero"),
        (["{media}=1", "{words}"], "give all of them one, or none"),
        (["{media}", "{media}:all"], "named twice"),
        (["{words}:image"], "has no records to train on"),
        (["{words}/nowhere"], "holds no tokens"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(media: Path, words: Path, parts: list[str], says: str) -> None:
    with pytest.raises(EmulusError, match=says):
        Mixture.open([part.format(media=media, words=words) for part in parts])


def test_a_part_of_weight_zero_is_not_read(media: Path, words: Path) -> None:
    mixture = Mixture.open([f"{media}=0", f"{words}=2"])
    assert [(branch.name, branch.share) for branch in mixture.tree()] == [(str(words), 1)]
    assert mixture.folder == media


def test_folders_of_other_tokenizers_are_refused(media: Path, words: Path, tmp_path: Path) -> None:
    things = {("train", "text"): make_things("text", 3, "x")}
    other = make_folder(tmp_path / "other", things, seed=1)
    with pytest.raises(EmulusError, match=f"{other} has another vocabulary than {media}"):
        Mixture.open([str(media), str(other)])
    blind = make_folder(tmp_path / "blind", things, vision="other eyes")
    with pytest.raises(EmulusError, match=f"{blind} was made by another vision tokenizer than {media}"):
        Mixture.open([str(words), str(media), str(blind)])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"row_tokens": 40}, "makes a document of .* ids but a row holds 40: raise --row-tokens"),
        ({"world": 3}, "4 rows per step cannot be shared by 3 processes"),
        ({"world": 2, "rank": 2}, "cannot be shared"),
        ({"rows_per_step": 0}, "rows_per_step must be at least 1"),
        ({"window": 0}, "window must be at least 1"),
        (
            {"state": {"step": 1, "window": 2, "row": 0, "window_size": 64, "row_tokens": ROW}},
            "window was 64 in this run",
        ),
        (
            {"state": {"step": 1, "window": 2, "row": 0, "window_size": 32, "row_tokens": 9}},
            "row_tokens was 9 in this run",
        ),
        ({"state": {"step": 1, "window": 0}}, "no state of a loader"),
        ({"state": {"step": 1, "window": 0, "row": "2"}}, "no state of a loader"),
    ],
)
def test_loaders_that_cannot_be_are_refused(mixture: Mixture, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(EmulusError, match=says):
        make_loader(mixture, **changes)


def test_the_longest_document_is_found(mixture: Mixture, words: Path) -> None:
    training = [thing for id, thing in THINGS.items() if id.startswith("train")]
    length = {thing.id: max(len(GRAMMAR.build(document)) for document in documents_of(thing)) for thing in training}
    longest = mixture.longest()
    assert longest.tokens == max(length.values())
    assert length[longest.name.split(" of ")[0]] == longest.tokens
    with pytest.raises(EmulusError, match="there are no records of the split validation"):
        make_loader(Mixture.open([str(words)], "validation"))
    with pytest.raises(EmulusError, match="which is held out, makes a document"):
        held_out(mixture, 10, ReadingConfig(), 20)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_of_documents_are_shares(share: float) -> None:
    for name in ("caption_first", "null_caption", "question"):
        with pytest.raises(EmulusError, match=name):
            ReadingConfig(**{name: share})


def test_no_turns_are_refused() -> None:
    with pytest.raises(EmulusError, match="turns must be at least 1"):
        ReadingConfig(turns=0)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "tokens", {("train", "image"): make_things("image", 8, "train/image")}, shards=1)


def test_a_shard_that_is_not_the_manifests_is_refused(broken: Path) -> None:
    shard = broken / shard_name("train", "image", 0)
    whole = shard.read_bytes()
    for content in (whole[:-1], b"", whole + b"x"):
        shard.write_bytes(content)
        with pytest.raises(EmulusError, match="missing or cut off"):
            Mixture.open([str(broken)])
    shard.unlink()
    with pytest.raises(EmulusError, match="missing or cut off"):
        Mixture.open([str(broken)])
    shard.write_bytes(whole[:100] + b"x" * (len(whole) - 100))
    with pytest.raises(EmulusError, match="damaged"):
        Mixture.open([str(broken)]).longest()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_record_is_named(broken: Path, threads: int) -> None:
    shard = broken / shard_name("train", "image", 0)
    loader = make_loader(Mixture.open([str(broken)]), threads=threads)
    shard.write_bytes(b"x" * shard.stat().st_size)
    loader.mixture._open.clear()
    with pytest.raises(EmulusError, match=f"{shard} is cut off, damaged or no ArrayRecord file; delete it"):
        loader.step(0)


def rewrite(folder: Path, kind: str, things: list[Thing], keep_lengths: bool) -> None:
    """Put another shard in the place of the first, with a line of its own."""
    shard = folder / shard_name("train", "image", 0)
    lengths = lengths_path(shard).read_bytes()
    figures = write_shard(shard, [to_record(GRAMMAR, thing) for thing in things])
    size, tokens = figures.bytes, figures.tokens
    if keep_lengths:
        size += len(lengths) - lengths_path(shard).stat().st_size
        lengths_path(shard).write_bytes(lengths)
        tokens = json.loads((folder / MANIFEST).read_text().splitlines()[0])["tokens"]
    line = ShardLine(name=shard.name, sha256=figures.sha256, bytes=size, rows=figures.rows, tokens=tokens)
    add_to_manifest(folder, line)


def test_foreign_shards_are_refused(broken: Path) -> None:
    other = make_things("image", 8, "other")
    rewrite(broken, "image", other, keep_lengths=True)
    loader = make_loader(Mixture.open([str(broken)]), rows_per_step=4)
    with pytest.raises(EmulusError, match="do not belong together"):
        loader.step(0)
    rewrite(broken, "text", make_things("text", 8, "words"), keep_lengths=False)
    with pytest.raises(EmulusError, match="not of the kind image"):
        Mixture.open([str(broken)])
    rewrite(broken, "image", other[:5], keep_lengths=False)
    line = json.loads((broken / MANIFEST).read_text().splitlines()[-1])
    (broken / MANIFEST).write_text(json.dumps({**line, "rows": 6}) + "\n")
    with pytest.raises(EmulusError, match="not those of the manifest"):
        Mixture.open([str(broken)])


def test_ids_outside_the_vocabulary_are_refused(broken: Path) -> None:
    values = json.loads((broken / "vocabulary.json").read_text())
    (broken / "vocabulary.json").write_text(json.dumps({**values, "visual_size": 3}))
    with pytest.raises(EmulusError, match="but the vocabulary has"):
        make_loader(Mixture.open([str(broken)])).step(0)


def test_the_digest_tells_shares_and_tokenizers_apart(media: Path, words: Path, tmp_path: Path) -> None:
    shares = [Mixture.open([f"{media}={weight}", f"{words}=1"]).digest() for weight in (1, 2)]
    assert len(set(shares)) == 2
    things = {("train", "image"): make_things("image", 4, "train/image")}
    folders = [make_folder(tmp_path / vision, things, vision=vision) for vision in ("eyes", "glasses")]
    lines = [Mixture.open([str(folder)]).sources[0].lines for folder in folders]
    assert lines[0] == lines[1]
    assert len({Mixture.open([str(folder)]).digest() for folder in folders}) == 2


def test_a_mixture_stands_for_the_folder_that_can_see(media: Path, words: Path) -> None:
    assert Mixture.open([str(words), str(media)]).folder == Mixture.open([str(media), str(words)]).folder == media


def test_the_digest_tells_data_apart(media: Path, words: Path) -> None:
    digests = [Mixture.open(parts).digest() for parts in ([str(media)], [str(words)], [f"{media}:image"])]
    assert len(set(digests)) == 3
    assert Mixture.open([f"{media}:all=3"]).digest() == digests[0]
