"""Every test has a time limit, and none depends on the clock otherwise.

pytest-timeout fails a test that takes longer than ``timeout`` of pyproject.toml, and the run goes on. It does so from
Python, so it cannot interrupt compiled code that does not return, nor a test that waits again on its way out. After
twice the limit the interpreter's own watchdog, which needs neither pytest-timeout nor the interpreter's lock, prints
where every thread is and ends the run.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator
from pathlib import Path

import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass  # the tests on a GPU do without
else:
    # How long an example takes says nothing on a machine that does other work, too.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")

# Seconds, of tests with this mark: the first GPU test also compiles kernels.
LIMITS = {"slow": 3600, "gpu": 900}
STDERR = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Know the option also where pytest-timeout is not installed."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds that a test may take")


def pytest_configure(config: pytest.Config) -> None:
    """Know the mark likewise, and keep the real stderr: while a test runs it is captured."""
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): how long a test may take")
    config.stash[STDERR] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close it."""
    os.close(config.stash[STDERR])


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu`` read the tests for GPUs only, since the others' packages may not be on such a machine."""
    is_other = collection_path.match("test_*.py") and "pytest.mark.gpu" not in collection_path.read_text()
    return True if config.option.markexpr == "gpu" and is_other else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give marked tests their longer limits."""
    for item in items:
        for mark, seconds in LIMITS.items():
            if item.get_closest_marker(mark) and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(seconds))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Watch over a test with its fixtures, unless somebody debugs it."""
    if not item.config.getoption("usepdb"):
        faulthandler.dump_traceback_later(2 * limit(item), exit=True, file=item.config.stash[STDERR])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def limit(item: pytest.Item) -> float:
    """Seconds that a test may take."""
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0] if mark else item.config.getini("timeout"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say that time limits are only half there."""
    if not config.pluginmanager.hasplugin("timeout"):
        terminalreporter.write_line(
            "pytest-timeout is not installed: a test that hangs ends the whole run, after twice its time limit "
            "(pip install pytest-timeout)"
        )
