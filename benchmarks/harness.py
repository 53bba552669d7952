"""How a benchmark is run: two ways of the same thing in turn, in one process, and one JSON object per case.

A case first checks that both ways give the same, then times them A B A B and says how many times faster the second
is, with what it takes to judge the number: sizes, machine, versions, the clock, and what else the machine was doing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from emulus.errors import EmulusError

Clock = Literal["cpu", "wall"]


class Unequal(EmulusError):
    """The two ways that were to be timed give different results."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the cases are to be run.

    Attributes:
        pairs: How often each way is timed.
        threads: CPU threads that PyTorch and the kernels may use.
        clock: CPU-seconds of this process, which other work on the machine hardly moves, or the wall's.
        toy: Whether everything is to be tiny, to see that it works.
        settings: Whole numbers of the one benchmark, by name.
    """

    pairs: int = 5
    threads: int = 1
    clock: Clock = "cpu"
    toy: bool = False
    settings: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a case found.

    Attributes:
        case: Its name.
        ratio: How many times faster (or fewer, or smaller) ours is; more is better.
        spread: Smallest and largest ratio of a pair.
        conditions: What the number holds for.
    """

    case: str
    ratio: float
    spread: tuple[float, float]
    conditions: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds of two ways that were timed in turn.

    Attributes:
        baseline: Of the way that is compared with, in order.
        ours: Of ours, in order.
        others: How many CPUs other processes kept busy meanwhile; None where the system does not say.
    """

    baseline: list[float]
    ours: list[float]
    others: float | None = None

    @property
    def ratios(self) -> list[float]:
        """How many times faster ours is, pair by pair."""
        return [before / after for before, after in zip(self.baseline, self.ours, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the pairs' ratios."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio of a pair."""
        return min(self.ratios), max(self.ratios)


def interleave(
    baseline: Callable[[], object], ours: Callable[[], object], *, pairs: int, clock: Clock = "cpu"
) -> Timings:
    """Time two ways in turn: A B A B.

    Neither is warmed up: whoever calls has run both for the check of equality.

    Args:
        baseline: The way that is compared with.
        ours: Our way.
        pairs: How often each is run.
        clock: CPU-seconds of this process or wall time.

    Raises:
        EmulusError: No pair is asked for.
    """
    return interleave_measured(lambda: timed(baseline, clock), lambda: timed(ours, clock), pairs=pairs)


def interleave_measured(baseline: Callable[[], float], ours: Callable[[], float], *, pairs: int) -> Timings:
    """Like :func:`interleave`, of ways that return the seconds themselves, for some part of what they do.

    Raises:
        EmulusError: No pair is asked for.
    """
    return interleave_all(baseline, {"ours": ours}, pairs=pairs)["ours"]


def interleave_all(
    baseline: Callable[[], float], ours: Mapping[str, Callable[[], float]], *, pairs: int
) -> dict[str, Timings]:
    """Time several ways against one that takes long, in turn: A B C D A B C D.

    Args:
        baseline: The way that is compared with; returns its seconds.
        ours: Our ways; each returns its seconds.
        pairs: How often each is run.

    Raises:
        EmulusError: No pair is asked for.
    """
    if pairs < 1:
        raise EmulusError(f"{pairs} pairs would time nothing; ask for at least 1")
    before = _Busy.now()
    rounds = [(baseline(), {name: way() for name, way in ours.items()}) for _ in range(pairs)]
    others = before.others_since()
    slow = [seconds for seconds, _ in rounds]
    return {name: Timings(baseline=slow, ours=[each[name] for _, each in rounds], others=others) for name in ours}


def timed(way: Callable[[], object], clock: Clock = "cpu") -> float:
    """Seconds that one call takes."""
    read = time.process_time if clock == "cpu" else time.perf_counter
    start = read()
    way()
    # A clock of coarse ticks must not make a call that took no time infinitely fast.
    return max(read() - start, 1e-9)


def case(name: str, timings: Timings, options: Options, **sizes: Any) -> Case:
    """Put a case together from its timings.

    Args:
        name: Of the case.
        timings: Of its pairs.
        options: It was run with.
        **sizes: What else the number holds for.
    """
    medians = {
        "baseline_s": round(statistics.median(timings.baseline), 6),
        "ours_s": round(statistics.median(timings.ours), 6),
        "others": None if timings.others is None else round(timings.others, 2),
    }
    about = {**sizes, **medians, **conditions(options)}
    return Case(case=name, ratio=timings.ratio, spread=timings.spread, conditions=about)


def conditions(options: Options) -> dict[str, Any]:
    """What every case says of machine, versions and ways of timing."""
    return {
        "clock": options.clock,
        "pairs": options.pairs,
        "threads": options.threads,
        "toy": options.toy,
        "machine": machine(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
    }


def machine() -> str:
    """The CPU's name and how many of its threads there are."""
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return f"{name}, {os.cpu_count()} CPUs"


def require(equal: bool, what: str) -> None:
    """Let nothing be timed that does not give the same.

    Args:
        equal: Whether it does.
        what: What was compared, and how far apart it is.

    Raises:
        Unequal: It does not.
    """
    if not equal:
        raise Unequal(what)


def held(which: str) -> int:
    """Bytes of memory of this process: ``VmRSS`` now, ``VmHWM`` at most; ``getrusage`` may tell the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def main(
    cases: Mapping[str, Callable[[Options], Case | Sequence[Case]]],
    argv: Sequence[str] | None = None,
    *,
    settings: Mapping[str, tuple[int, str]] | None = None,
) -> int:
    """Run a benchmark's cases from the command line.

    Args:
        cases: What runs each, or several that share a baseline, by name.
        argv: Arguments; those of the process where not given.
        settings: Whole numbers of this benchmark, each with its default and a line of help: ``rows`` becomes
            ``--rows``.

    Returns:
        0, or 1 when a case failed: the others are run all the same.
    """
    settings = settings or {}
    given = _parser(cases, settings).parse_args(argv)
    options = Options(
        pairs=given.pairs,
        threads=given.threads,
        clock=given.clock,
        toy=given.toy,
        settings={name: getattr(given, name.replace("-", "_")) for name in settings},
    )
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        failed = [name for name in given.only or cases if not _run(cases[name], name, options, as_json=given.json)]
    finally:
        torch.set_num_threads(before)
    return 1 if failed else 0


def _run(run: Callable[[Options], Case | Sequence[Case]], name: str, options: Options, *, as_json: bool) -> bool:
    """Run one case and print it; whether it came to an end."""
    try:
        found = run(options)
    except EmulusError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return False
    for each in [found] if isinstance(found, Case) else found:
        print(json.dumps(asdict(each)) if as_json else _line(each), flush=True)
    return True


def _line(found: Case) -> str:
    about = found.conditions
    seconds = [f"{about[key]:.4g} s" for key in ("baseline_s", "ours_s") if key in about]
    low, high = found.spread
    if "time_ratio" in about:
        seconds.append(f"{about['time_ratio']:.2f}x in time")
    return f"{found.case:28} {found.ratio:7.2f}x  [{low:.2f} to {high:.2f}]  {' -> '.join(seconds)}"


def _parser(cases: Mapping[str, Any], settings: Mapping[str, tuple[int, str]]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object per case instead of a table")
    parser.add_argument(
        "--only", action="append", choices=[*cases], metavar="CASE", help="run this case, and others so named"
    )
    parser.add_argument("--pairs", type=int, default=5, help="how often each way is timed")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="seconds of the process or of the wall")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that everything works")
    for name, (default, about) in settings.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=about)
    return parser


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True, kw_only=True)
class _Busy:
    """CPU-seconds spent so far: by this process, and by the whole machine where it says so."""

    wall: float
    own: float
    all: float | None

    @classmethod
    def now(cls) -> _Busy:
        return cls(wall=time.perf_counter(), own=_own_seconds(), all=_all_seconds())

    def others_since(self) -> float | None:
        """CPUs kept busy by others since then."""
        now = _Busy.now()
        if now.all is None or self.all is None:
            return None
        return max(0.0, (now.all - self.all) - (now.own - self.own)) / max(now.wall - self.wall, 1e-9)


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _all_seconds() -> float | None:
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    # user nice system idle iowait irq softirq steal: all but the two of waiting.
    ticks = [int(each) for each in stat.read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
