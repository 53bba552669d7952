"""CPU threads beside other processes: how long they wait awake, and how many are used.

A step of a small model is some hundred parallel loops of tens of microseconds. Threads wait for the next one awake
(spinning), since waking up takes longer than the loop. On a busy machine that backfires: a loop ends when its last
thread does, the last thread waits for a CPU that another process has, and the others burn theirs meanwhile. So
spinning is bounded, and where results do not depend on the number of threads, busy CPUs are left alone.

Imports no torch.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SPIN_COUNT = "5000"
"""Rounds of GNU OpenMP's waiting loop, some 0.1 ms: as quick as any longer wait on a quiet machine."""
PRIMITIVES = "128"
"""Products that oneDNN and torch's layer above it keep compiled, each for one shape. A row of training has some hundred
shapes, a new one for each length of a document; by default 1,024 stay, of 0.5 MB each, in every thread."""
_LOOK_EVERY = 0.25
"""Seconds between two looks at the machine's load: the counters have a resolution of 0.01 s."""
_STAT = Path("/proc/stat")


def set_library_defaults() -> None:
    """Bound what the libraries below torch take of a machine, unless the environment has settings of its own.

    That is how long OpenMP's threads wait awake, how many there are in a container, and how many compiled products
    oneDNN keeps. OpenMP reads the environment when it is loaded, so torch must be imported later; oneDNN when it is
    first used.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, PRIMITIVES)
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
        os.environ["KMP_BLOCKTIME"] = "1"  # LLVM's and Intel's OpenMP: milliseconds instead of 200
    quota = cpu_quota()
    if "OMP_NUM_THREADS" not in os.environ and quota is not None and quota < len(_usable_cpus()):
        # Otherwise there is a thread for each CPU of the host, and the container is stopped for most of the time.
        os.environ["OMP_NUM_THREADS"] = str(max(1, round(quota)))


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs' worth of time that a container may use (its cgroup's quota); None if there is no limit.

    Args:
        root: Where the control groups are mounted.
    """
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()[:2]
        else:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        found = int(quota) / int(period)  # "max" and -1: no limit
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return found if found > 0 else None


class CpuLoad:
    """Watches how many of the CPUs that this process may use others keep busy (Linux; elsewhere it knows nothing)."""

    def __init__(self) -> None:
        self._cpus = _usable_cpus()
        self._others: float | None = None
        self._lock = threading.Lock()
        self._seen = self._look()

    def spare(self, most: int) -> int:
        """How many threads to use now: one for each CPU that others leave idle.

        Args:
            most: Threads that may be used at most.

        Returns:
            A number from 1 to ``most``; ``most`` where the load is not known.
        """
        with self._lock:
            before = self._seen
            if before is not None and time.monotonic() - before[0] >= _LOOK_EVERY:
                now = self._look()
                if now is not None:
                    busy, own = now[1] - before[1], now[2] - before[2]
                    self._others = max(0.0, (busy - own) / (now[0] - before[0]))
                    self._seen = now
        if self._others is None or most <= 1:
            return most
        return max(1, min(most, round(len(self._cpus) - self._others)))

    def _look(self) -> tuple[float, float, float] | None:
        """Now, busy seconds of the usable CPUs since boot, and those of this process; None if they are not known."""
        try:
            text = _STAT.read_text()
            # What runs with a lower priority than this process gives way to it.
            niced = os.getpriority(os.PRIO_PROCESS, 0) > 0
        except (OSError, AttributeError):
            return None
        times = os.times()
        return time.monotonic(), busy_seconds(text, self._cpus, niced=niced), times.user + times.system


def busy_seconds(stat: str, cpus: frozenset[int], *, niced: bool) -> float:
    """Seconds that some CPUs have been busy since boot.

    Args:
        stat: Content of ``/proc/stat``.
        cpus: Numbers of the CPUs that count.
        niced: Whether time of processes of lower priority counts as well.
    """
    ticks = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if not name.startswith("cpu"):
            break  # the CPUs come first
        if name[3:].isdigit() and int(name[3:]) in cpus and len(fields) >= 8:
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            ticks += user + system + irq + softirq + steal + (nice if niced else 0)
    return ticks / os.sysconf("SC_CLK_TCK")


def _usable_cpus() -> frozenset[int]:
    try:
        return frozenset(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return frozenset(range(os.cpu_count() or 1))


_load = CpuLoad()


@contextmanager
def spare_threads() -> Iterator[int]:
    """Let torch use only as many threads as the machine has CPUs to spare, in this thread of Python.

    For work of which the result does not depend on the number of threads, in stretches of well below a second.

    Yields:
        The number of threads. Afterwards it is as before.
    """
    import torch

    with _num_threads(_load.spare(torch.get_num_threads())) as count:
        yield count


@contextmanager
def one_thread(when: bool = True) -> Iterator[None]:
    """Let torch use one thread only, in this thread of Python, for work so small that others do not pay.

    Args:
        when: Whether to; else nothing changes.
    """
    if not when:
        yield
        return
    with _num_threads(1):
        yield


@contextmanager
def _num_threads(count: int) -> Iterator[int]:
    import torch

    usual = torch.get_num_threads()
    if count == usual:
        yield count
        return
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(usual)
