"""The scheduler: a budget that holds, a queue that moves, neighbours that do not matter."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.engine import Counts, Done, Engine, Event, Failed, Jacobi, Request, Result, Schedule, Sequential, Zipar
from emulus.engine.pace import Pace
from emulus.engine.scheduler import Scheduler
from emulus.errors import EmulusError
from emulus.sequence.document import Document, Image, Text
from emulus.sequence.templates import caption, draw
from tests.engine.tiny import (
    DECODER,
    GRAMMAR,
    make_decoder,
    naive,
    parameters,
    random_codes,
    requests_of_every_kind,
)

ENGINE = Engine(DECODER, GRAMMAR)
REQUESTS = requests_of_every_kind()
ALONE = [ENGINE.generate([request])[0] for request in REQUESTS]


def kv_bytes(request: Request) -> int:
    """What a request's keys and values take: both sequences, float32, all layers."""
    walk = ENGINE.walk(0, request)
    config = DECODER.config
    token = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_width
    return token * walk.length * (2 if request.guided else 1)


def finish(scheduler: Scheduler) -> dict[int, Result]:
    results: dict[int, Result] = {}
    while scheduler.busy:
        results |= {event.request: event.result for event in scheduler.step() if isinstance(event, Done)}
    return results


@settings(deadline=None, max_examples=15)
@given(
    trace=st.lists(st.tuples(st.integers(0, 12), st.integers(0, len(REQUESTS) - 1)), min_size=1, max_size=10),
    room=st.floats(1, 4),
    most_running=st.integers(1, 5),
    schedule=st.sampled_from([Sequential(), Jacobi(window=4)]),
)
def test_any_arrivals_keep_to_the_budget_and_all_finish(
    trace: list[tuple[int, int]], room: float, most_running: int, schedule: Schedule
) -> None:
    budget = int(room * max(map(kv_bytes, REQUESTS)))
    scheduler = Engine(DECODER, GRAMMAR, schedule=schedule, kv_budget=budget).scheduler(most_running)
    arrivals = sorted(enumerate(trace), key=lambda item: item[1][0])
    results: dict[int, Result] = {}
    numbers: dict[int, int] = {}
    turn = 0
    while arrivals or scheduler.busy:
        while arrivals and arrivals[0][1][0] <= turn:
            index, (_, which) = arrivals.pop(0)
            numbers[scheduler.submit(REQUESTS[which])] = index
        done = [event for event in scheduler.step() if isinstance(event, Done)]
        results |= {numbers[event.request]: event.result for event in done}
        assert scheduler.kv_bytes <= budget
        turn += 1
        assert turn < 2000, "somebody starves"
    assert scheduler.kv_bytes == 0
    assert results == {index: ALONE[which] for index, (_, which) in enumerate(trace)}


@settings(deadline=None, max_examples=10)
@given(
    ahead=st.integers(1, 9),
    most_running=st.integers(1, 5),
    chosen=st.lists(st.integers(0, len(REQUESTS) - 1), min_size=1, max_size=6),
)
def test_steps_handed_over_ahead_give_the_same(ahead: int, most_running: int, chosen: list[int]) -> None:
    """The device is given further steps before the host has seen what was chosen in the ones before."""
    engine = Engine(DECODER, GRAMMAR)
    scheduler = engine.scheduler(most_running, ahead=ahead)
    for which in chosen:
        scheduler.submit(REQUESTS[which])
    assert finish(scheduler) == {index: ALONE[which] for index, which in enumerate(chosen)}


def test_a_large_request_is_not_overtaken() -> None:
    """Small ones that came later wait behind it, though there would be room for them."""
    large, small = sorted(REQUESTS, key=kv_bytes)[-1], sorted(REQUESTS, key=kv_bytes)[0]
    scheduler = Engine(DECODER, GRAMMAR, kv_budget=kv_bytes(large) + kv_bytes(small)).scheduler(8)
    for request in [large, large, small, small]:
        scheduler.submit(request)
    scheduler.step()
    assert scheduler.kv_bytes == kv_bytes(large)
    order = list(finish(scheduler))
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2, 3]


@settings(deadline=None, max_examples=15)
@given(data=st.data(), schedule=st.sampled_from([Sequential(), Jacobi(window=4)]))
def test_cancelled_neighbours_leave_no_trace(data: st.DataObject, schedule: Schedule) -> None:
    scheduler = Engine(DECODER, GRAMMAR, schedule=schedule).scheduler(5)
    for request in REQUESTS:
        scheduler.submit(request)
    doomed = data.draw(st.sets(st.integers(0, len(REQUESTS) - 1)))
    when = {index: data.draw(st.integers(0, 20)) for index in doomed}
    results: dict[int, Result] = {}
    turn = 0
    while scheduler.busy:
        for index in doomed:
            if when[index] == turn:
                before = scheduler.kv_bytes
                scheduler.cancel(index)
                assert scheduler.kv_bytes <= before
        results |= {event.request: event.result for event in scheduler.step() if isinstance(event, Done)}
        turn += 1
    assert scheduler.kv_bytes == 0
    assert {index: ALONE[index] for index in results} == results
    assert set(range(len(REQUESTS))) - doomed <= set(results)


def test_cancelling_frees_room_at_once() -> None:
    scheduler = Engine(DECODER, GRAMMAR, kv_budget=kv_bytes(REQUESTS[0])).scheduler()
    for _ in range(2):
        scheduler.submit(REQUESTS[0])
    scheduler.step()
    assert scheduler.kv_bytes == kv_bytes(REQUESTS[0])
    scheduler.cancel(0)
    assert scheduler.kv_bytes == 0
    assert finish(scheduler) == {1: ALONE[0]}
    scheduler.cancel(7)


def test_what_can_never_fit_is_refused_before_anything_runs() -> None:
    engine = Engine(DECODER, GRAMMAR, kv_budget=kv_bytes(REQUESTS[0]) - 1)
    seen: list[object] = []
    with pytest.raises(EmulusError, match=r"ids take [\d,.]+ (MiB|bytes) on cpu.*larger kv_budget") as caught:
        engine.generate([REQUESTS[0]], on_event=seen.append)
    assert "\n" not in str(caught.value)
    assert not seen


def endless(seed: int = 0) -> Request:
    """A request whose keys and values no machine holds."""
    prompt = caption(GRAMMAR, REQUESTS_IMAGE)
    return Request(prompt_ids=prompt.ids, may=prompt.may, params=parameters(seed, max_new_tokens=2**23))


REQUESTS_IMAGE = GRAMMAR.parse([*REQUESTS[0].prompt_ids, *ALONE[0].ids]).document.segments[-1]


def test_memory_that_ends_while_others_run() -> None:
    """The one that finds no room waits until nothing else runs, then fails by itself; those around it go on."""
    decoder = make_decoder(context=2**24, num_attention_heads=128, num_key_value_heads=128, head_dim=256)
    engine = Engine(decoder, GRAMMAR, kv_budget=2**62)
    alone = [engine.generate([request])[0] for request in REQUESTS[:2]]
    scheduler = engine.scheduler()
    for request in [REQUESTS[0], endless(), REQUESTS[1]]:
        scheduler.submit(request)
    events = []
    while scheduler.busy:
        events += scheduler.step()
    (failed,) = [event for event in events if isinstance(event, Failed)]
    assert failed.request == 1
    assert "no memory for the keys and values" in failed.message
    assert {event.request: event.result for event in events if isinstance(event, Done)} == {0: alone[0], 2: alone[1]}
    assert scheduler.kv_bytes == 0
    with pytest.raises(EmulusError, match="no memory for the keys and values"):
        engine.generate([endless()])


def test_equal_prompts_are_computed_once() -> None:
    prompt = draw(GRAMMAR, "a red apple", 3, 2)
    requests = [Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids, params=parameters(seed)) for seed in range(4)]
    engine = Engine(DECODER, GRAMMAR)
    together = engine.generate(requests)
    assert engine.counts.prefilled == len(prompt.ids) + len(prompt.null_ids or ()) - 2
    assert together == [ENGINE.generate([request])[0] for request in requests]


def test_a_prompt_of_one_id_and_nothing_to_do() -> None:
    bos = GRAMMAR.vocabulary.bos
    request = Request(prompt_ids=[bos], may=frozenset({"text"}), params=parameters(max_new_tokens=5))
    assert ENGINE.generate([request, request]) == [ENGINE.generate([request])[0]] * 2
    assert not ENGINE.scheduler().busy
    assert ENGINE.scheduler().step() == []


def test_null_prompts_may_end_differently() -> None:
    prompt = draw(GRAMMAR, "a red apple", 2, 2)
    null = [*(prompt.null_ids or ())[:-1], GRAMMAR.vocabulary.bos]
    request = dataclasses.replace(REQUESTS[0], prompt_ids=prompt.ids, null_ids=null)
    (result,) = ENGINE.generate([request])
    assert list(result.ids) == naive(request, len(result.ids))


def test_a_kept_traceback_holds_no_memory() -> None:
    """As in a notebook, which keeps the last error with all that its frames refer to."""
    stream = ENGINE.events(REQUESTS)
    next(stream)
    frame = stream.gi_frame
    assert frame is not None
    scheduler = frame.f_locals["scheduler"]
    lanes = [track.lane for running in scheduler._running for track in running.tracks]
    assert any(lane.memory for lane in lanes)
    with pytest.raises(KeyboardInterrupt) as caught:
        stream.throw(KeyboardInterrupt())
    assert not any(lane.memory for lane in lanes)
    assert scheduler.kv_bytes == 0
    assert caught.tb is not None


def test_long_equal_prompts_are_computed_once_too() -> None:
    """Longer than a piece, and though the first of them is cancelled half way."""
    engine = Engine(make_decoder(context=2048), GRAMMAR)
    ids = GRAMMAR.build(Document((Text("a red apple " * 150),)), eos=False)
    requests = [Request(prompt_ids=ids, may=frozenset({"text"}), params=parameters(seed)) for seed in range(3)]
    assert len(ids) > 700
    together = engine.generate(requests)
    assert engine.counts.prefilled == len(ids) - 1
    assert together == [engine.generate([request])[0] for request in requests]
    scheduler = engine.scheduler()
    for request in requests:
        scheduler.submit(request)
    scheduler.step()
    scheduler.cancel(0)
    assert finish(scheduler) == {1: together[1], 2: together[2]}


@pytest.mark.parametrize("schedule", [Sequential(), Jacobi(window=3), Zipar(window=1)])
def test_a_step_that_failed_can_be_made_again(schedule: Schedule, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when memory runs out that others took."""
    engine = Engine(DECODER, GRAMMAR, schedule=schedule)
    (expected,) = engine.generate(REQUESTS[2:3])
    scheduler = engine.scheduler()
    scheduler.submit(REQUESTS[2])
    for _ in range(4):
        scheduler.step()
    with monkeypatch.context() as patch:
        patch.setattr("emulus.engine.scheduler.choose", _no_memory)
        with pytest.raises(MemoryError):
            scheduler.step()
    assert finish(scheduler) == {0: expected}


def _no_memory(*_: object) -> None:
    raise MemoryError


# Nothing is left to be chosen after this prompt: it is done when it is let in.
WHOLE = Request(prompt_ids=GRAMMAR.build(Document((Text("a"), Image(random_codes(2, 3)))), eos=False))


class _Fails:
    """A function that raises the first time that its ``turn``-th call is made, before or after its work."""

    def __init__(self, function: Callable[..., Any], turn: int, *, after: bool) -> None:
        self.function, self.turn, self.after, self.calls = function, turn, after, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls != self.turn:
            return self.function(*args, **options)
        if self.after:
            self.function(*args, **options)
        raise RuntimeError("no memory, once")


def _told(
    schedule: Schedule, ahead: int, fails: Callable[[Callable[..., Any]], _Fails] | None, where: str
) -> tuple[dict[int, list[Event]], Counts, int]:
    """Each request's events, what was counted, and how often the function was called, whose failures are overcome."""
    scheduler = Engine(DECODER, GRAMMAR, schedule=schedule).scheduler(2, ahead=ahead)
    owner: Any = scheduler if where == "choose" else scheduler._runner
    function = fails(getattr(owner, "_" * (owner is scheduler) + where)) if fails else None
    if function:
        setattr(owner, "_" * (owner is scheduler) + where, function)
    for request in (REQUESTS[0], WHOLE, REQUESTS[4], WHOLE, REQUESTS[2]):
        scheduler.submit(request)
    events: dict[int, list[Event]] = {}
    failures = 0
    while scheduler.busy:
        try:
            for event in scheduler.step():
                events.setdefault(event.request, []).append(event)
        except RuntimeError:
            failures += 1
    assert failures == int(function is not None and function.calls >= function.turn)
    assert scheduler.kv_bytes == 0
    return events, scheduler.counts, failures


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("where", ["forward", "new_lane", "choose", "logits"])
@pytest.mark.parametrize(
    ("schedule", "ahead"), [(Sequential(), 0), (Sequential(), 5), (Jacobi(window=3), 0), (Zipar(window=1), 0)]
)
def test_a_step_that_fails_anywhere_loses_and_repeats_nothing(
    schedule: Schedule, ahead: int, where: str, after: bool
) -> None:
    undisturbed, counts, _ = _told(schedule, ahead, None, where)
    assert {Done} <= {type(events[-1]) for events in undisturbed.values()}
    for turn in (1, 2, 3, 4, 5, 7, 11, 19):
        told, counted, failures = _told(schedule, ahead, lambda f, turn=turn: _Fails(f, turn, after=after), where)
        assert told == undisturbed
        assert counted.tokens == counts.tokens
        assert counted.prefilled == counts.prefilled
        if schedule.exact and not failures:
            assert counted == counts
        assert counted.forwards <= counts.forwards + 1


def test_what_could_not_be_begun_is_told_though_the_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Engine(DECODER, GRAMMAR).scheduler()
    first, second = scheduler.submit(REQUESTS[0]), scheduler.submit(REQUESTS[2])
    new_lane = scheduler._runner.new_lane
    refusals = [EmulusError("no memory for it")]

    def refuse(capacity: int) -> Any:
        if refusals:
            raise refusals.pop()
        return new_lane(capacity)

    monkeypatch.setattr(scheduler._runner, "new_lane", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler._runner, "forward", _no_memory)
        with pytest.raises((MemoryError, TypeError)):
            scheduler.step()
    told = [event for event in scheduler.step() if isinstance(event, Failed)]
    assert told == [Failed(request=first, message="no memory for it")]
    assert set(finish(scheduler)) == {second}


def test_what_happened_to_a_cancelled_request_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Engine(DECODER, GRAMMAR).scheduler()
    done, other = scheduler.submit(WHOLE), scheduler.submit(REQUESTS[0])
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_prefill", _no_memory)
        with pytest.raises(MemoryError):
            scheduler.step()
    scheduler.cancel(done)
    assert {event.request for event in scheduler.step()} == {other}
    scheduler.close()
    assert not scheduler.busy


def test_two_schedulers_share_one_budget() -> None:
    request = REQUESTS[0]
    engine = Engine(DECODER, GRAMMAR, kv_budget=int(1.5 * kv_bytes(request)))
    one, two = engine.scheduler(), engine.scheduler()
    for scheduler in (one, one, two, two):
        scheduler.submit(request)
    one.step()
    two.step()  # it runs nothing yet, and whoever has the memory may be waiting for it: so one is let in
    assert one.kv_bytes == two.kv_bytes == kv_bytes(request)
    one.step()
    two.step()
    assert one.kv_bytes == two.kv_bytes == kv_bytes(request), "there is no room for a second one in either"
    assert finish(two) == {0: ALONE[0], 1: ALONE[0]}
    assert finish(one) == {0: ALONE[0], 1: ALONE[0]}
    assert engine.scheduler()._budget.used(DECODER.model.norm.weight.device) == 0


def test_cancelled_from_another_thread() -> None:
    """Whoever cancels waits until the step is made: what it computes with is not taken away under it."""
    scheduler = ENGINE.scheduler()
    for _ in range(8):
        scheduler.submit(REQUESTS[0])
    canceller = threading.Thread(target=lambda: [scheduler.cancel(index) for index in range(1, 8)])
    canceller.start()
    results = finish(scheduler)
    canceller.join()
    assert results[0] == ALONE[0]
    assert set(results.values()) == {ALONE[0]}
    assert scheduler.kv_bytes == 0


def test_pace_is_told_ids_and_sequences_of_every_step() -> None:
    """A guided request is two sequences, and ids that the grammar forces are ids, too."""
    told: list[tuple[int, int]] = []

    class Listening(Pace):
        def made(self, ids: int, seconds: float, lanes: int) -> None:
            told.append((ids, lanes))
            super().made(ids, seconds, lanes)

    scheduler = Scheduler(ENGINE.runner, GRAMMAR, Sequential(), most_running=8, pace=Listening())
    prompt = draw(GRAMMAR, "a red apple", 2, 2)
    for null in (prompt.null_ids, None, prompt.null_ids):
        scheduler.submit(Request(prompt_ids=prompt.ids, null_ids=null, params=parameters()))
    results = finish(scheduler)
    assert [lanes for _, lanes in told] == [5] * 4
    assert sum(ids for ids, _ in told) == scheduler.counts.tokens == sum(len(result.ids) for result in results.values())


def test_ids_that_are_forced_before_the_first_step_count() -> None:
    ids = [*draw(GRAMMAR, "a", 2, 1).ids, GRAMMAR.vocabulary.visual_start]  # the end of the first row must come
    scheduler = Engine(DECODER, GRAMMAR).scheduler()
    scheduler.submit(Request(prompt_ids=ids, params=parameters()))
    (result,) = finish(scheduler).values()
    assert result.ids[0] == GRAMMAR.vocabulary.eol
    assert scheduler.counts.tokens == len(result.ids)


def test_a_null_prompt_that_is_not_used_takes_no_room() -> None:
    prompt = draw(GRAMMAR, "a red apple", 2, 2)
    long = [*GRAMMAR.build(Document((Text("a red " * 100),)), eos=False), *prompt.ids[-5:]]
    request = Request(prompt_ids=prompt.ids, null_ids=long, params=parameters(guidance_scale=1.0))
    assert ENGINE.walk(0, request).length == len(prompt.ids) + 2 * 3 + 3
