"""Which requests are computed together: a queue, a budget of memory, and one step for all that are running."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from emulus.device import numbers
from emulus.engine.cache import Lane
from emulus.engine.pace import Pace
from emulus.engine.request import Counts, Event, Failed, Request
from emulus.engine.runner import AT_ONCE, Feed, Runner
from emulus.engine.schedule import Ask, Course, Schedule
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


@dataclass
class _Budget:
    """Memory for keys and values on each device."""

    limit: Mapping[torch.device, int]
    used: dict[torch.device, int] = field(default_factory=dict)

    def fits(self, need: Mapping[torch.device, int], *, empty: bool = False) -> bool:
        """Whether there is room now, or would be if nothing else ran."""
        taken = {} if empty else self.used
        return all(taken.get(device, 0) + size <= self.limit.get(device, 0) for device, size in need.items())

    def take(self, need: Mapping[torch.device, int], sign: int = 1) -> None:
        """Count memory in, or with ``sign`` -1 out."""
        for device, size in need.items():
            self.used[device] = self.used.get(device, 0) + sign * size


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
        limit = {
            device: kv_budget if kv_budget is not None else int(_SHARE * free.get(device, 0))
            for device in runner.layout.devices
        }
        self._budget = _Budget(limit)
        # A step computes with bare addresses of the lanes, so nothing may be freed meanwhile.
        self._lock = threading.RLock()
        self._queue: deque[Walk] = deque()
        self._running: list[_Running] = []

    @property
    def busy(self) -> bool:
        """Whether anything is running or waiting."""
        return bool(self._queue or self._running)

    @property
    def kv_bytes(self) -> int:
        """Memory that the running requests' keys and values take."""
        return sum(self._budget.used.values())

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
        if not self._budget.fits(need, empty=True):
            short = next(device for device, size in need.items() if size > self._budget.limit.get(device, 0))
            wanted, limit = (_mib(sizes.get(short, 0)) for sizes in (need, self._budget.limit))
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
            self._queue = deque(walk for walk in self._queue if walk.index != request)
            for running in [each for each in self._running if each.walk.index == request]:
                self._release(running)

    def close(self) -> None:
        """Forget all requests, and free their memory even where somebody still holds on to what they were."""
        with self._lock:
            self._queue.clear()
            for running in list(self._running):
                self._release(running)

    def step(self) -> list[Event]:
        """Let requests in, compute a part of their prompts, and one step of all whose prompts are computed.

        Another thread may submit and cancel meanwhile; it waits until the step is made. Should a step fail (memory that
        others took), nothing of it has happened: it can be made again, or :meth:`close` gives everything back.
        """
        device = self._runner.device.type
        # Busy CPUs are left to others where ids do not depend on the number of threads.
        threads = spare_threads() if self._runner.steady else nullcontext()
        with self._lock, threads, torch.autocast(device if device in ("cpu", "cuda") else "cpu", enabled=False):
            return self._step()

    def _step(self) -> list[Event]:
        events = self._admit()
        self._prefill()
        going = [running for running in self._running if running.ready]
        if going:
            started, before = time.perf_counter(), self.counts.tokens
            events += self._decode(going)
            lanes = sum(len(running.tracks) for running in going)
            self._pace.made(self.counts.tokens - before, time.perf_counter() - started, lanes)
        return events

    def _decode(self, going: Sequence[_Running]) -> list[Event]:
        """One turn of every course; or several, where what is asked in the next does not hang on what is chosen now.

        Then the host hands the device its work without waiting for what comes of it.
        """
        asks = [running.course.ask() for running in going]
        # As many turns as every course foresees: the shortest decides.
        follows = list(zip(*(running.course.foreseen(self._ahead) for running in going), strict=False))
        feeds = [track.feed(ask) for running, ask in zip(going, asks, strict=True) for track in running.tracks]
        rows = [row for row, running in enumerate(going) for _ in running.tracks]
        turns = [self._choose(going, asks, self._compute(feeds))]
        for follow in follows:
            asks = [_next(ask, len(forced)) for ask, forced in zip(asks, follow, strict=True)]
            feeds = [_after(feed, follow[row]) for feed, row in zip(feeds, rows, strict=True)]
            chosen = turns[-1][numbers(rows, turns[-1].device)]
            turns.append(self._choose(going, asks, self._compute(feeds, chosen)))
        events: list[Event] = []
        for turn, chosen in enumerate(torch.stack(turns).tolist() if follows else [turns[0].tolist()]):
            asks = [running.course.ask() for running in going] if turn else asks
            events += self._take(going, asks, iter(chosen))
        return events

    def _compute(self, feeds: Sequence[Feed], chosen: Tensor | None = None) -> Tensor:
        """Hidden states of one step; with ``chosen``, each feed begins with an id that only the device knows."""
        self.counts.forwards += 1
        self.counts.computed += sum(len(feed.ids) for feed in feeds)
        holes = list(accumulate([0, *(len(feed.ids) for feed in feeds[:-1])])) if chosen is not None else ()
        return self._runner.forward(feeds, chosen=chosen, holes=holes)

    def _choose(self, going: Sequence[_Running], asks: Sequence[Ask], hidden: Tensor) -> Tensor:
        def logits(rows: list[int], ranges: Ranges) -> Tensor:
            return self._runner.logits(hidden[numbers(rows, hidden.device)], ranges)

        return choose(logits, list(_questions(going, asks)))

    def _take(self, going: Sequence[_Running], asks: Sequence[Ask], chosen: Iterator[int]) -> list[Event]:
        """Hand every request the ids that were chosen for it."""
        events: list[Event] = []
        for running, ask in zip(going, asks, strict=True):
            before = running.walk.position
            happened, kept = running.course.take([next(chosen) for _ in ask.wanted])
            events += happened
            self.counts.tokens += running.walk.position - before
            for track in running.tracks:
                track.lane.length += kept
                track.started = True
            if running.walk.finished:
                self._release(running)
        return events

    def _admit(self) -> list[Event]:
        """Let in as many of the waiting as there is room for, first come first served."""
        events: list[Event] = []
        while self._queue and len(self._running) < self._most_running:
            walk = self._queue[0]
            before = walk.position
            events += walk.run_forced()
            self.counts.tokens += walk.position - before
            if walk.finished:
                self._queue.popleft()
                continue
            need = self._need(walk)
            if not self._budget.fits(need):
                break
            try:
                lanes = [self._runner.new_lane(walk.length) for _ in _prompts(walk)]
            except EmulusError as error:
                if self._running:
                    break  # it is asked again when one of them is done
                self._queue.popleft()
                events.append(Failed(request=walk.index, message=str(error)))
                continue
            self._queue.popleft()
            self._budget.take(need)
            tracks = [
                _Track(lane=lane, prompt=tuple(prompt)) for lane, prompt in zip(lanes, _prompts(walk), strict=True)
            ]
            course = self._schedule.course(walk, self._pace)
            self._running.append(_Running(walk=walk, course=course, tracks=tracks))
        return events

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

    def _need(self, walk: Walk) -> dict[torch.device, int]:
        sizes = self._runner.layout.bytes(walk.length)
        return {device: size * len(_prompts(walk)) for device, size in sizes.items()}

    def _release(self, running: _Running) -> None:
        self._running.remove(running)
        self._budget.take(self._need(running.walk), sign=-1)
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
