"""The one kind of error that a user can mend.

Everything that is wrong with *input* (a file, a flag, a prompt, a checkpoint) raises :class:`EmulusError` with one
line that names the thing and the remedy. The command line prints that line without a traceback. A bug raises anything
else, and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

MAX_MESSAGE = 900
"""Letters of a message. What is longer loses its middle, since the remedy stands at the end."""
MAX_SHOWN = 100
"""Letters of a value from outside that a message repeats."""

_BREAKS = re.compile(r" *[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+[ \t]*")
# Unicode's "other" characters: controls, halves of characters, marks that turn the direction of all text behind them,
# and what is not seen at all. The joiners that emoji and some scripts are written with stay.
_OTHER = ("Cc", "Cf", "Cs", "Cn", "Co")
_JOINERS = "\u200c\u200d"


class EmulusError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what to do.

    Names and values from outside go into the message as they are: ``str()`` makes it one line of bounded length.

    Attributes:
        status: What the command line exits with.
    """

    status = 1

    def __str__(self) -> str:
        """The message as people see it, cleaned by :func:`one_line`."""
        return one_line(super().__str__())


class UsageError(EmulusError):
    """A command line that cannot be understood: an unknown flag, a value that is not of the flag's type."""

    status = 2


def one_line(text: str, most: int = MAX_MESSAGE) -> str:
    """Text that is safe to print: one line, no control characters, at most ``most`` letters.

    Line breaks become blanks, control characters are spelt as escapes, and of a long text the middle is left out.
    """
    # Cut before it is cleaned as well: a text may have megabytes.
    text = _BREAKS.sub(" ", _cut(text, 4 * most))
    if not text.isprintable():
        text = "".join(repr(letter)[1:-1] if _is_hidden(letter) else letter for letter in text)
    return _cut(text.strip(), most)


def _is_hidden(letter: str) -> bool:
    return not letter.isprintable() and letter not in _JOINERS and unicodedata.category(letter) in _OTHER


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"


def shown(value: object, *, quote: bool = True) -> str:
    """A value from outside for a message: on one line, at most :data:`MAX_SHOWN` letters.

    Args:
        value: Anything; texts are quoted.
        quote: Whether to quote a text.
    """
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception:  # numbers of thousands of digits, objects whose text fails
        text = f"a value of type {type(value).__name__}"
    text = one_line(text, MAX_SHOWN)
    return f"'{text}'" if quote and isinstance(value, str) else text


def at_least(low: float, **values: float) -> None:
    """Refuse numbers below ``low`` (and what is not a number).

    Raises:
        EmulusError: Names the first such value.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= low:
            raise EmulusError(f"{name} must be at least {low:g}, got {shown(value)}")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Name the choices for an unknown word, the closest first.

    Args:
        word: What the user wrote.
        choices: What would have been right.

    Returns:
        ``"; did you mean 'x'?"`` when one is close, else ``"; choose from a, b, c"``.
    """
    known = sorted(choices)
    # Comparing takes time by the product of the lengths.
    close = difflib.get_close_matches(word[:MAX_SHOWN], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; choose from {', '.join(known)}" if known else ""
