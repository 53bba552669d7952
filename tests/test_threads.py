"""CPU threads beside other processes: the environment's settings, reading the machine's load, using what is spare."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from emulus import threads
from emulus.threads import CpuLoad, busy_seconds, cpu_quota, spare_threads

STAT = """cpu  100 50 30 1000 5 1 2 3 0 0
cpu0 60 20 10 500 5 1 1 1 0 0
cpu1 40 30 20 500 0 0 1 2 0 0
cpu2 900 0 0 0 0 0 0 0 0 0
intr 12345 0 0
ctxt 99
"""
TICK = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


OWN = ("OMP_", "GOMP_", "KMP_", "ONEDNN_", "LRU_")


def environment_of(code: str, **more: str) -> str:
    """What a fresh process prints; its environment has no settings of these libraries but ``more``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OWN)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, **more}, check=True
    )
    return done.stdout.strip()


SHOW = "import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'))"


def test_waiting_is_bounded_before_torch_is_loaded_and_torch_is_not_imported() -> None:
    code = f"import emulus, sys; assert 'torch' not in sys.modules; {SHOW}"
    assert environment_of(code) == f"{threads.SPIN_COUNT} 1"


def test_what_the_environment_says_holds() -> None:
    assert environment_of(f"import emulus; {SHOW}", GOMP_SPINCOUNT="7") == "7 None"
    assert environment_of(f"import emulus; {SHOW}", OMP_WAIT_POLICY="active") == "None None"


def test_nothing_is_set_once_torch_is_there() -> None:
    assert environment_of(f"import sys; sys.modules['torch'] = sys; import emulus; {SHOW}") == "None None"


MANY_LENGTHS = """
import emulus, torch
from pathlib import Path

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024

torch.set_num_threads(1)
layer = torch.nn.Linear(256, 704, bias=False)
sizes = []
for tokens in range(600, 1500, 3):
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.ones(1, tokens, 256, requires_grad=True)).sum().backward()
    sizes.append(held())
print(sizes[-1] - sizes[len(sizes) // 3])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory is held")
def test_memory_does_not_grow_with_the_lengths_of_what_is_trained_on() -> None:
    grown = float(environment_of(MANY_LENGTHS))
    assert grown < 300, f"{grown:.0f} MiB more for 200 further lengths"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "200000 100000\n"}, 2.0),
        ({"cpu.max": "50000 100000\n"}, 0.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "1 0\n"}, None),
        ({"cpu.max": ""}, None),
        ({}, None),
    ],
)
def test_a_containers_quota(files: dict[str, str], cpus: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == cpus


def test_only_usable_cpus_and_rivals_of_the_same_priority_count() -> None:
    assert busy_seconds(STAT, frozenset({0, 1}), niced=False) * TICK == (60 + 10 + 1 + 1 + 1) + (40 + 20 + 0 + 1 + 2)
    assert busy_seconds(STAT, frozenset({0, 1}), niced=True) * TICK == 136 + 50
    assert busy_seconds(STAT, frozenset({2}), niced=True) * TICK == 900
    assert busy_seconds("no such thing", frozenset({0}), niced=True) == 0


@pytest.mark.parametrize(
    ("busy", "own", "most", "spare"),
    [
        (8.0, 8.0, 4, 4),  # all of it is this process itself
        (0.1, 0.0, 4, 4),
        (1.0, 0.0, 4, 3),
        (4.0, 2.6, 4, 3),
        (4.0, 1.0, 4, 1),
        (4.0, 0.0, 4, 1),
        (4.0, 4.2, 4, 4),
        (4.0, 0.0, 1, 1),
        (1.0, 0.0, 2, 2),  # fewer threads than CPUs are wanted, and there is room for them
    ],
)
def test_threads_are_as_many_as_cpus_are_idle(
    busy: float, own: float, most: int, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two looks one second apart, on a machine of four CPUs.
    looks = iter([(threads.time.monotonic() - 10, 5.0, 1.0), (threads.time.monotonic() - 9, 5.0 + busy, 1.0 + own)])
    monkeypatch.setattr(threads, "_usable_cpus", lambda: frozenset(range(4)))
    monkeypatch.setattr(CpuLoad, "_look", lambda self: next(looks, None))
    load = CpuLoad()
    assert load.spare(most) == spare
    assert load.spare(most) == spare


def test_all_threads_are_used_where_the_load_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_STAT", Path("/nowhere/stat"))
    assert CpuLoad().spare(64) == 64


def test_torch_uses_the_spare_threads_within_and_all_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        monkeypatch.setattr(CpuLoad, "spare", lambda self, most: most - 2)
        with spare_threads() as count:
            assert count == torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(usual)
