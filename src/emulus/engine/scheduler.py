"""Which requests are computed together: a queue, a budget of memory, and one step for all that are running."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from emulus.device import to_host
from emulus.engine.budget import Budget, fits
from emulus.engine.cache import Lane
from emulus.engine.pace import Pace
from emulus.engine.request import Counts, Event, Failed, Request
from emulus.engine.runner import AT_ONCE, Runner
from emulus.engine.schedule import Ask, Course, Schedule
from emulus.engine.step import Feed, rows_of
from emulus.engine.walk import Walk
from emulus.errors import EmulusError
from emulus.placement import free_memory
from emulus.sampling.draw import Question, Ranges, choose
from emulus.sequence.grammar import Grammar
from emulus.threads import spare_threads

# What is left to others of the memory that is free when the engine begins.
_SHARE = 0.9

# Steps that a GPU is given beyond the one that it computes: a quarter of a row of a large picture.
_AHEAD = 24

# Steps that the host looks at together, while the device computes those after them.
_AT_A_TIME = 5


@dataclass(kw_only=True, eq=False)
class _Track:
    """One sequence of a request: its prompt or its null prompt, and what follows.

    Attributes:
        lane: Its keys and values.
        prompt: The ids before what is generated; the last of them is computed with the first step.
        started: Whether that has happened.
    """

    lane: Lane
    prompt: tuple[int, ...]
    started: bool = False

    @property
    def missing(self) -> int:
        """Ids of the prompt that are to be computed before the first step."""
        return 0 if self.started else len(self.prompt) - 1 - self.lane.length

    def feed(self, ask: Ask) -> Feed:
        """Put what a course asks into this sequence."""
        # The course knows the prompt only; the null prompt may end with another id.
        ids = ask.ids if self.started else [self.prompt[-1], *ask.ids[1:]]
        if ask.offsets is None:
            self.lane.ready = None
            return Feed(lane=self.lane, ids=ids, wanted=ask.wanted)
        positions = [self.lane.length + offset for offset in ask.offsets]
        if self.lane.ready is None:
            self.lane.watch()
        self.lane.mark(positions)
        return Feed(lane=self.lane, ids=ids, positions=positions, wanted=ask.wanted)


@dataclass(kw_only=True, eq=False)
class _Running:
    """A request that has been let in."""

    walk: Walk
    course: Course
    tracks: list[_Track]

    @property
    def ready(self) -> bool:
        """Whether its prompts are computed."""
        return not any(track.missing for track in self.tracks)


class Scheduler:
    """Runs requests of all sizes, kinds and ages together.

    Requests are let in as they came, when there is room for all the keys and values they can need: none overtakes
    another, so none waits for ever, and none that runs can run out of memory.

    Attributes:
        counts: What has been done so far.
    """

    def __init__(
        self,
        runner: Runner,
        grammar: Grammar,
        schedule: Schedule,
        *,
        most_running: int,
        kv_budget: int | None = None,
        ahead: int | None = None,
        pace: Pace | None = None,
        counts: Counts | None = None,
        budget: Budget | None = None,
    ) -> None:
        """Begin with nothing to do.

        Args:
            runner: Computes.
            grammar: Says what may follow.
            schedule: In which order ids are computed.
            most_running: Most requests at once.
            kv_budget: Bytes for keys and values on each device; by default nine tenths of what is free.
            ahead: Most further steps that are handed to the device before the host looks at what was chosen; by default
                none, but on a GPU.
            pace: What is known of the cost of steps.
            counts: Where to count; by default anew.
            budget: What others that run beside this one have taken; by default nothing.
        """
        self.counts = counts if counts is not None else Counts()
        self._runner = runner
        self._grammar = grammar
        self._numbers = itertools.count()
        self._schedule = schedule
        self._most_running = most_running
        self._pace = pace or Pace()
        self._ahead = (_AHEAD if runner.device.type == "cuda" else 0) if ahead is None else ahead
        free = {} if kv_budget is not None else free_memory()
        self._budget = budget or Budget()
        self._limit = {
            device: kv_budget if kv_budget is not None else self._share(device, free.get(device, 0))
            for device in runner.layout.devices
        }
        # A step computes with bare addresses of the lanes, so nothing may be freed meanwhile.
        self._lock = threading.RLock()
        self._queue: deque[Walk] = deque()
        self._running: list[_Running] = []
        # What has happened and was not given out yet: it outlives a step that fails.
        self._events: list[Event] = []

    @property
    def busy(self) -> bool:
        """Whether anything is running or waiting, or has happened and was not told yet."""
        return bool(self._queue or self._running or self._events)

    @property
    def kv_bytes(self) -> int:
        """Memory that the running requests' keys and values take."""
        return sum(size for running in self._running for size in self._need(running.walk).values())

    def submit(self, request: Request) -> int:
        """Put a request at the end of the queue.

        Returns:
            What its events call it, counted from 0: also what :meth:`cancel` takes.

        Raises:
            EmulusError: It is broken or too long, or needs more memory than the whole budget.
        """
        number = next(self._numbers)
        walk = Walk(number, request, self._grammar, self._runner.config.max_position_embeddings)
        need = self._need(walk)
        if not fits(need, self._limit):
            short = next(device for device, size in need.items() if size > self._limit.get(device, 0))
            wanted, limit = (_mib(sizes.get(short, 0)) for sizes in (need, self._limit))
            raise EmulusError(
                f"the keys and values of {walk.length} ids take {wanted} on {short}, but there are {limit} for them; "
                "ask for something smaller, or give the engine a larger kv_budget"
            )
        with self._lock:
            self._queue.append(walk)
        return number

    def cancel(self, request: int) -> None:
        """Forget a request, running or waiting; its memory is free at once. An unknown one is no error."""
        with self._lock:
            self._events = [event for event in self._events if event.request != request]
            self._queue = deque(walk for walk in self._queue if walk.index != request)
            for running in [each for each in self._running if each.walk.index == request]:
                self._release(running)

    def close(self) -> None:
        """Forget all requests, and free their memory even where somebody still holds on to what they were."""
        with self._lock:
            self._events.clear()
            self._queue.clear()
            for running in list(self._running):
                self._release(running)

    def step(self) -> list[Event]:
        """Let requests in, compute a part of their prompts, and one step of all whose prompts are computed.

        Another thread may submit and cancel meanwhile; it waits until the step is made. Should a step fail (memory that
        others took), nothing is lost: it can be made again, and then tells what had happened before it failed, too; or
        :meth:`close` gives everything back.
        """
        device = self._runner.device.type
        # Busy CPUs are left to others where ids do not depend on the number of threads.
        threads = spare_threads() if self._runner.steady else nullcontext()
        with self._lock, threads, torch.autocast(device if device in ("cpu", "cuda") else "cpu", enabled=False):
            self._step()
            events, self._events = self._events, []
            return events

    def _step(self) -> None:
        self._admit()
        self._prefill()
        going = [running for running in self._running if running.ready]
        if going:
            started, before = time.perf_counter(), self.counts.tokens
            lanes = sum(len(running.tracks) for running in going)
            self._decode(going)
            self._pace.made(self.counts.tokens - before, time.perf_counter() - started, lanes)

    def _decode(self, going: Sequence[_Running]) -> None:
        """One turn of every course; or several, where what is asked in the next does not hang on what is chosen now.

        Then the host hands the device its work without waiting for what comes of it.
        """
        asks = first = [running.course.ask() for running in going]
        # As many turns as every course foresees: the shortest decides.
        follows = list(zip(*(running.course.foreseen(self._ahead) for running in going), strict=False))
        feeds = [track.feed(ask) for running, ask in zip(going, asks, strict=True) for track in running.tracks]
        rows = [row for row, running in enumerate(going) for _ in running.tracks]
        turns = [self._choose(going, asks, self._runner.forward(feeds))]
        parts: list[Callable[[], Tensor]] = []
        computed = sum(len(feed.ids) for feed in feeds)
        chosen = turns[0]
        for follow in follows:
            if len(turns) == _AT_A_TIME:
                parts.append(to_host(torch.stack(turns)))
                turns = []
            asks = [_next(ask, len(forced)) for ask, forced in zip(asks, follow, strict=True)]
            feeds = [_after(feed, follow[row]) for feed, row in zip(feeds, rows, strict=True)]
            chosen = self._choose(going, asks, self._runner.forward(feeds, chosen=chosen, firsts=rows))
            turns.append(chosen)
            computed += sum(len(feed.ids) for feed in feeds)
        parts.append(to_host(torch.stack(turns)))
        self.counts.forwards += 1 + len(follows)
        self.counts.computed += computed
        # Each part is told of while the device computes the next. Nothing can fail from here on: what is counted and
        # taken is done, and is not done again.
        for turn, ids in enumerate(ids for part in parts for ids in part().tolist()):
            self._take(going, [running.course.ask() for running in going] if turn else first, iter(ids))

    def _choose(self, going: Sequence[_Running], asks: Sequence[Ask], hidden: Tensor) -> Tensor:
        def logits(rows: list[int], ranges: Ranges) -> Tensor:
            return self._runner.logits(rows_of(hidden, rows), ranges)

        return choose(logits, list(_questions(going, asks)))

    def _take(self, going: Sequence[_Running], asks: Sequence[Ask], chosen: Iterator[int]) -> None:
        """Hand every request the ids that were chosen for it."""
        for running, ask in zip(going, asks, strict=True):
            before = running.walk.position
            happened, kept = running.course.take([next(chosen) for _ in ask.wanted])
            self._events += happened
            self.counts.tokens += running.walk.position - before
            for track in running.tracks:
                track.lane.length += kept
                track.started = True
            if running.walk.finished:
                self._release(running)

    def _admit(self) -> None:
        """Let in as many of the waiting as there is room for, first come first served."""
        while self._queue and len(self._running) < self._most_running:
            walk = self._queue[0]
            before = walk.position
            self._events += walk.run_forced()
            self.counts.tokens += walk.position - before
            if walk.finished:
                self._queue.popleft()
                continue
            need = self._need(walk)
            # If nothing runs here, others have the memory. They may be of this very thread, which stands here until the
            # request is done; so it is tried, and if there really is no memory, that is told.
            if not self._budget.take(need, self._limit, anyway=not self._running):
                break
            try:
                lanes = [self._runner.new_lane(walk.length) for _ in _prompts(walk)]
            except BaseException as error:
                self._budget.give_back(need)
                if not isinstance(error, EmulusError):
                    raise
                if self._running:
                    break  # it is asked again when one of them is done
                self._queue.popleft()
                self._events.append(Failed(request=walk.index, message=str(error)))
                continue
            self._queue.popleft()
            tracks = [
                _Track(lane=lane, prompt=tuple(prompt)) for lane, prompt in zip(lanes, _prompts(walk), strict=True)
            ]
            course = self._schedule.course(walk, self._pace)
            self._running.append(_Running(walk=walk, course=course, tracks=tracks))

    def _prefill(self) -> None:
        """Compute one piece of every prompt that is not computed yet; of equal prompts only one, the others wait."""
        tracks = [track for running in self._running for track in running.tracks]
        missing = [track for track in tracks if track.missing]
        if not missing:
            return
        leaders = {track.prompt: track for track in tracks if not track.missing}
        for track in missing:
            leader = leaders.setdefault(track.prompt, track)
            if leader is track or track.lane.length:
                self._compute_piece(track)
            elif not leader.missing:
                track.lane.begin_like(leader.lane, len(track.prompt) - 1)

    def _compute_piece(self, track: _Track) -> None:
        # Pieces begin at multiples of their size, and each is computed by itself: what comes out depends on the prompt
        # alone, to the bit.
        start = track.lane.length
        piece = track.prompt[start : min(start + AT_ONCE, len(track.prompt) - 1)]
        self._runner.forward([Feed(lane=track.lane, ids=piece, wanted=[])])
        track.lane.length += len(piece)
        self.counts.prefilled += len(piece)

    def _share(self, device: torch.device, free: int) -> int:
        """Most that keys and values may take, if so much is free beside those that are there."""
        # On a CPU memory counts as free until it is first written to, so what was taken may still be in ``free``.
        return int(_SHARE * free) + (self._budget.used(device) if device.type == "cuda" else 0)

    def _need(self, walk: Walk) -> dict[torch.device, int]:
        sizes = self._runner.layout.bytes(walk.length)
        return {device: size * len(_prompts(walk)) for device, size in sizes.items()}

    def _release(self, running: _Running) -> None:
        self._running.remove(running)
        self._budget.give_back(self._need(running.walk))
        for track in running.tracks:
            track.lane.free()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**17 else f"{size:,} bytes"


def _next(ask: Ask, forced: int) -> Ask:
    """The ask that will come after a choice and what the grammar forces behind it."""
    return replace(ask, wanted=[0], positions=[ask.positions[0] + 1 + forced])


def _after(feed: Feed, forced: Sequence[int]) -> Feed:
    """What follows a feed: an id that the host does not know yet, and what the grammar forces behind it."""
    start = feed.slots[-1] + 1
    return Feed(lane=feed.lane, ids=[0, *forced], positions=range(start, start + 1 + len(forced)))


def _prompts(walk: Walk) -> list[Sequence[int]]:
    request = walk.request
    null = [request.null_ids] if request.guided and request.null_ids is not None else []
    return [request.prompt_ids, *null]


def _questions(going: Sequence[_Running], asks: Sequence[Ask]) -> Iterator[Question]:
    """Which ids are to be chosen, and which hidden states tell."""
    row = 0
    for running, ask in zip(going, asks, strict=True):
        request, count = running.walk.request, len(ask.wanted)
        ranges = running.walk.allowed().ranges
        for index, position in enumerate(ask.positions):
            yield Question(
                ranges=ranges,
                params=request.params,
                position=position,
                cond=row + index,
                null=row + count + index if len(running.tracks) > 1 else None,
            )
        row += count * len(running.tracks)
