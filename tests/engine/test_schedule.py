"""Schedules: the exact ones give the ids of one after another, in fewer steps; the lossy one keeps to the grammar."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emulus.engine import Engine, Jacobi, Request, Row, Schedule, Sequential, Token, Zipar
from emulus.engine.pace import Pace
from emulus.engine.scheduler import Scheduler
from emulus.engine.walk import Walk
from emulus.errors import EmulusError
from emulus.sampling import SamplingParams
from emulus.sequence.document import Image, Video
from emulus.sequence.grammar import Grammar
from emulus.sequence.layout import SequenceLayout
from emulus.sequence.templates import animate, draw
from tests.engine.tiny import DECODER, GRAMMAR, make_decoder, parameters, requests_of_every_kind

SEQUENTIAL = Engine(DECODER, GRAMMAR)


def drawing(h: int, w: int, *, guided: bool = True, **changes: float) -> Request:
    prompt = draw(GRAMMAR, "a red apple", h, w)
    return Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids if guided else None, params=parameters(**changes))


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**40),
    window=st.integers(1, 9) | st.none(),
    batch_size=st.integers(1, 8),
    scale=st.sampled_from([1.0, 3.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_jacobi_is_exact(seed: int, window: int | None, batch_size: int, scale: float, temperature: float) -> None:
    requests = requests_of_every_kind(seed, guidance_scale=scale, temperature=temperature)
    engine = Engine(DECODER, GRAMMAR, schedule=Jacobi(window=window))
    assert engine.generate(requests, batch_size=batch_size) == SEQUENTIAL.generate(requests)


@settings(deadline=None, max_examples=12)
@given(
    h=st.integers(1, 5), w=st.integers(1, 5), t=st.integers(1, 3), window=st.integers(1, 30), top_k=st.integers(1, 3)
)
def test_jacobi_is_exact_where_guesses_hold(h: int, w: int, t: int, window: int, top_k: int) -> None:
    """Few ids to choose from make many right guesses, across the ends of rows and frames."""
    prompt = animate(GRAMMAR, "a", t, h, w, 8)
    request = Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids, params=parameters(top_k=top_k))
    engine, plain = Engine(DECODER, GRAMMAR, schedule=Jacobi(window=window)), Engine(DECODER, GRAMMAR)
    assert engine.generate([request]) == plain.generate([request])
    assert engine.counts.tokens == plain.counts.tokens
    assert engine.counts.forwards <= plain.counts.forwards
    if window == 1:
        assert engine.counts.forwards == plain.counts.forwards


def test_jacobi_saves_steps() -> None:
    """A weak decoder draws nearly the same wherever it is, so guesses hold."""
    decoder = make_decoder(strength=0.02)
    request = drawing(8, 8, temperature=0.05, top_k=2)
    plain, ahead = (Engine(decoder, GRAMMAR, schedule=schedule) for schedule in (Sequential(), Jacobi(window=8)))
    assert ahead.generate([request]) == plain.generate([request])
    assert plain.counts.forwards == 64
    assert ahead.counts.forwards <= 32


def test_one_step_a_cell_and_none_for_what_is_forced() -> None:
    engine = Engine(DECODER, GRAMMAR)
    request = drawing(4, 5)
    (result,) = engine.generate([request])
    assert engine.counts.forwards == 20
    assert engine.counts.tokens == len(result.ids) == 20 + 4 + 3
    # The end of a row rides with its last cell, in both sequences; the last row's end is not computed at all.
    assert engine.counts.computed == 2 * (20 + 3)
    assert engine.counts.prefilled == len(request.prompt_ids) + len(request.null_ids or ()) - 2


@pytest.mark.parametrize("schedule", [Sequential(), Jacobi(window=3)])
def test_ids_are_drawn_as_often_as_their_probability_says(schedule: Schedule) -> None:
    """Chi-squared over seeds, against the exact distribution of whole pictures."""
    decoder, prompt = make_decoder(strength=0.1), draw(GRAMMAR, "a", 1, 3).ids
    low, high = GRAMMAR.vocabulary.visual_range

    @torch.no_grad()
    def likeliest(before: tuple[int, ...]) -> tuple[list[int], list[float]]:
        logits = decoder(torch.tensor([[*prompt, *before]]))[0, -1, low:high]
        best = logits.topk(3)
        return (best.indices + low).tolist(), best.values.softmax(-1).tolist()

    exact: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        exact = {
            (*before, id): chance * share
            for before, chance in exact.items()
            for id, share in zip(*likeliest(before), strict=True)
        }
    number = 3000
    requests = [Request(prompt_ids=prompt, params=SamplingParams(top_k=3, seed=seed)) for seed in range(number)]
    results = Engine(decoder, GRAMMAR, schedule=schedule).generate(requests, batch_size=200)
    seen = collections.Counter(result.ids[:3] for result in results)
    assert set(seen) <= set(exact)
    chi_squared = sum((seen[ids] - number * chance) ** 2 / (number * chance) for ids, chance in exact.items())
    # 26 degrees of freedom: above 64 comes once in 40,000 times.
    assert chi_squared < 64


@settings(deadline=None, max_examples=15)
@given(h=st.integers(1, 6), w=st.integers(1, 6), t=st.integers(1, 3), window=st.integers(1, 8), guided=st.booleans())
def test_zipar_gives_whole_clips_in_order(h: int, w: int, t: int, window: int, guided: bool) -> None:
    prompt = animate(GRAMMAR, "a", t, h, w, 8)
    request = Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids if guided else None, params=parameters())
    engine = Engine(DECODER, GRAMMAR, schedule=Zipar(window=window))
    events = list(engine.stream(request))
    ids = [event.id for event in events if isinstance(event, Token)]
    clip = GRAMMAR.parse([*prompt.ids, *ids]).document.segments[-1]
    assert isinstance(clip, Video)
    assert tuple(clip.codes.shape) == (t, h, w)
    assert [event.index for event in events if isinstance(event, Row)] == list(range(t * h))
    if window >= w:
        (expected,) = SEQUENTIAL.generate([request])
        assert tuple(ids) == expected.ids
    else:
        assert engine.counts.forwards == max(window * (t * h - 1) + w, 0)


@pytest.mark.parametrize(("width", "window"), [(1, 1), (2, 1), (5, 3), (6, 3)])
def test_zipar_waits_for_half_a_row_by_default(width: int, window: int) -> None:
    default, same = (Engine(DECODER, GRAMMAR, schedule=schedule) for schedule in (Zipar(), Zipar(window=window)))
    assert default.generate([drawing(4, width)]) == same.generate([drawing(4, width)])
    assert default.counts.forwards == same.counts.forwards == 3 * window + width


def test_zipar_among_others_and_where_the_prompt_breaks_off() -> None:
    """In a prompt that ends inside a row, in captions and free documents: every medium is whole, and none disturbs."""
    engine = Engine(DECODER, GRAMMAR, schedule=Zipar(window=2))
    cut = draw(GRAMMAR, "a red apple", 4, 5).ids + [GRAMMAR.vocabulary.visual_start + 3] * 2
    requests = [*requests_of_every_kind(), Request(prompt_ids=cut, params=parameters())]
    results = engine.generate(requests)
    assert [engine.generate([request])[0] for request in requests] == results
    for request, result in zip(requests, results, strict=True):
        parsed = GRAMMAR.parse([*request.prompt_ids, *result.ids])
        assert parsed.complete or result.truncated
    picture = GRAMMAR.parse([*cut, *results[-1].ids]).document.segments[-1]
    assert isinstance(picture, Image)
    assert picture.codes[0, :2].tolist() == [3, 3]


def test_zipar_is_labelled_and_the_others_are_exact() -> None:
    assert [schedule.exact for schedule in (Sequential(), Jacobi(), Zipar())] == [True, True, False]
    request = drawing(5, 5)
    lossy = Engine(DECODER, GRAMMAR, schedule=Zipar(window=1))
    assert lossy.generate([request]) != SEQUENTIAL.generate([request])


@pytest.mark.parametrize("make", [lambda: Jacobi(window=0), lambda: Zipar(window=0)])
def test_windows_have_a_size(make: object) -> None:
    with pytest.raises(EmulusError, match="window must be at least 1"):
        make()  # type: ignore[operator]
    with pytest.raises(EmulusError, match="window is 65 but must be at most 64"):
        Jacobi(window=65)


@pytest.mark.parametrize(
    ("chance", "cost", "best"),
    [
        (0.9, lambda tokens: 1.0, {16, 32}),
        (0.9, lambda tokens: tokens, {1}),
        (0.0, lambda tokens: 10.0 + tokens, {1}),
        (0.8, lambda tokens: 10.0 + 2 * tokens, {4, 8}),
    ],
)
def test_pace_finds_the_fastest_window(chance: float, cost: Callable[[int], float], best: set[int]) -> None:
    pace, luck = Pace(), random.Random(0)
    used: collections.Counter[int] = collections.Counter()
    for step in range(3000):
        window = pace.window()
        right = 1
        while right < window and luck.random() < chance:
            right += 1
        pace.made(right, cost(window), lanes=2)
        used[window] += step >= 600
    assert sum(used[window] for window in best) > 0.6 * used.total()


def test_pace_learns_anew_when_the_batch_grows() -> None:
    pace = Pace()
    for _ in range(600):
        pace.made(pace.window(), 1.0, lanes=2)
    assert pace.window() >= 16
    for _ in range(600):
        pace.made(1, float(pace.window()), lanes=16)
    assert pace.window() <= 2


def test_one_slow_trial_does_not_move_the_window() -> None:
    """A window's rate is mostly what it was before: pictures and machines have moods."""
    pace = Pace()

    def trial(seconds: float) -> int:
        window = pace.window()
        for _ in range(12):
            pace.made(1, seconds, lanes=2)
        return window

    best, used = 0.01, {}
    for _ in range(60):
        window = pace.window()
        used[window] = trial(best if window == 4 else best * 1.25)
    while pace.window() != 4:
        trial(best * 1.25)
    # Alone it would be slower than its neighbours; weighed with what is known it is not.
    trial(best * 1.4)
    following = [trial(best if pace.window() == 4 else best * 1.25) for _ in range(6)]
    assert following.count(4) >= 5


@settings(deadline=None, max_examples=20)
@given(
    width=st.integers(1, 12),
    windows=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    top_k=st.integers(1, 3),
    temperature=st.sampled_from([0.3, 1.0]),
    seed=st.integers(0, 100),
)
@example(width=12, windows=[8, 2], top_k=2, temperature=1.0, seed=0)
@example(width=12, windows=[6, 3, 1], top_k=1, temperature=1.0, seed=1)
def test_guesses_are_kept_in_their_places(
    width: int, windows: list[int], top_k: int, temperature: float, seed: int
) -> None:
    """As many steps as the algorithm takes when it is played by hand, though the window changes on the way."""

    class Scripted(Pace):
        _turns = itertools.cycle(windows)

        def window(self) -> int:
            return next(self._turns)

    request = drawing(1, width, guided=False, top_k=top_k, temperature=temperature, seed=seed)
    scheduler = Scheduler(SEQUENTIAL.runner, GRAMMAR, Jacobi(), most_running=1, pace=Scripted())
    scheduler.submit(request)
    ids = []
    while scheduler.busy:
        ids += [event.id for event in scheduler.step() if isinstance(event, Token)]
    assert scheduler.counts.forwards == jacobi_steps(request, ids[:width], windows)


def jacobi_steps(request: Request, right: list[int], windows: Sequence[int]) -> int:
    """Steps that it takes to find these cells of a picture of one row, each after whatever is guessed before it."""

    def chosen_after(before: list[int]) -> int:
        cut = dataclasses.replace(request, prompt_ids=[*request.prompt_ids, *before])
        return next(event.id for event in SEQUENTIAL.stream(cut) if isinstance(event, Token))

    steps, done = 0, 0
    guesses: dict[int, int] = {}
    while done < len(right):
        places = range(done, min(done + windows[steps % len(windows)], len(right)))
        steps += 1
        for place in places[:-1]:
            # The cell to the left, as far as it is known or guessed; the first code where there is none.
            left = right[done - 1] if place == done else guesses[place - 1]
            guesses.setdefault(place, left if place else GRAMMAR.vocabulary.visual_start)
        found = [chosen_after([*right[:done], *(guesses[p] for p in places[:n])]) for n in range(len(places))]
        held = next((n for n, id in enumerate(found[:-1]) if guesses[places[n]] != id), len(found) - 1)
        guesses |= dict(zip(places[held + 1 :], found[held + 1 :], strict=True))
        done += held + 1
    return steps


def test_cells_are_guessed_from_the_frame_before_then_from_above_then_from_the_left() -> None:
    start = GRAMMAR.vocabulary.visual_start
    prompt = animate(GRAMMAR, "a", 2, 2, 3, 8).ids
    walk = Walk(0, Request(prompt_ids=prompt, params=parameters()), GRAMMAR, 256)
    assert walk.nearby([], 4) == [start, start, start, start]
    for id in [start + 5, start + 6]:
        list(walk.take(id))
    # Known are two cells of the first row; its third is guessed as the second, and so on from there.
    assert walk.nearby([], 4) == [start + 6, start + 5, start + 6, start + 6]
    assert walk.nearby([start + 9], 3) == [start + 5, start + 6, start + 9]
    for id in [start + 7, start + 1, start + 2, start + 3]:
        list(walk.take(id))
        list(walk.run_forced())
    assert walk.nearby([], 4) == [start + 5, start + 6, start + 7, start + 1]
    assert walk.nearby([start + 9], 2) == [start + 6, start + 7]


EMU3_5 = Grammar(GRAMMAR.vocabulary, GRAMMAR.text, SequenceLayout.emu3_5())


@pytest.mark.parametrize("schedule", [Jacobi(window=5), Zipar(window=1), Zipar(window=9)])
@pytest.mark.parametrize("t", [None, 2])
def test_where_nothing_stands_between_frames(schedule: Schedule, t: int | None) -> None:
    """Emu3.5 ends no last row: there several rows at once are possible within pictures only."""
    prompt = draw(EMU3_5, "a", 3, 3) if t is None else animate(EMU3_5, "a", t, 2, 3, 8)
    request = Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids, params=parameters())
    (result,) = Engine(DECODER, EMU3_5, schedule=schedule).generate([request])
    assert EMU3_5.parse([*prompt.ids, *result.ids]).complete
    if schedule.exact or schedule == Zipar(window=9):
        assert [result] == Engine(DECODER, EMU3_5).generate([request])


def test_many_forced_ids_do_not_make_a_step_too_wide() -> None:
    """Clips of one cell a frame: every guess brings two ends with it."""
    prompt = animate(GRAMMAR, "a", 60, 1, 1, 8)
    request = Request(prompt_ids=prompt.ids, params=parameters(top_k=1))
    engine = Engine(DECODER, GRAMMAR, schedule=Jacobi(window=64))
    assert engine.generate([request]) == SEQUENTIAL.generate([request])
    assert engine.counts.computed <= 122 * engine.counts.forwards
