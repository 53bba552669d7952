"""The one kind of error that a user can mend.

Everything that is wrong with *input* (a file, a flag, a prompt, a checkpoint) raises :class:`EmulusError` with one
line that names the thing and the remedy. The command line prints that line without a traceback. A bug raises anything
else, and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EmulusError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what to do.

    Attributes:
        status: What the command line exits with.
    """

    status = 1


def at_least(low: float, **values: float) -> None:
    """Refuse numbers below ``low`` (and what is not a number).

    Raises:
        EmulusError: Names the first such value.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low:
            raise EmulusError(f"{name} must be at least {low:g}, got {value!r}")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Name the choices for an unknown word, the closest first.

    Args:
        word: What the user wrote.
        choices: What would have been right.

    Returns:
        ``"; did you mean 'x'?"`` when one is close, else ``"; choose from a, b, c"``.
    """
    known = sorted(choices)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; choose from {', '.join(known)}" if known else ""
