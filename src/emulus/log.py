"""What Emulus tells people: results on stdout, everything else on stderr."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from emulus.errors import one_line

T = TypeVar("T")

# Always a rate, where tqdm would turn a slow one into seconds for each.
_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"

_MOST_WHAT = 60
"""Letters before a bar."""

logger = logging.getLogger("emulus")


class _OneLine(logging.Formatter):
    """Names from outside must not break a line or move the cursor."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(record.getMessage())


def set_up_logging() -> None:
    """Send the package's messages to stderr, one plain line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Libraries warn in several lines, with a line of their own source."""
    logger.warning("%s: %s", category.__name__, message)


def progress_bar(total: int, *, what: str, unit: str) -> "tqdm[Any]":
    """A bar on stderr to be moved by hand, with a rate and the time that is left; shown only on a terminal."""
    # miniters: what comes in bursts is shown as it comes.
    on_terminal = sys.stderr.isatty()
    what = one_line(what, _MOST_WHAT)
    return tqdm(total=total, desc=what, unit=unit, bar_format=_BAR, miniters=1, disable=not on_terminal, leave=False)


def progress(items: Iterable[T], *, what: str, total: int | None = None) -> Iterator[T]:
    """Iterate with a progress bar on stderr, shown only on a terminal."""
    return iter(tqdm(items, desc=one_line(what, _MOST_WHAT), total=total, disable=not sys.stderr.isatty(), leave=False))
