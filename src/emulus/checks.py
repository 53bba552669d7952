"""Options as callers give them -> plain values, or one line that names the option.

NumPy scalars and tensors without axes count as the numbers that they hold; True and False are no numbers. Imports
neither of the two libraries.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from emulus.errors import EmulusError, did_you_mean

_MOST_SHOWN = 60


def whole(name: str, value: Any, *, least: int = 0, most: int | None = None) -> int:
    """A whole number from ``least`` to ``most``.

    Args:
        name: The option, as callers write it.
        value: What was given.
        least: The smallest number allowed.
        most: The largest; None for no bound.

    Raises:
        EmulusError: It is no such number. 2.0 is not one either: it is the result of a division more often than meant.
    """
    number_ = _scalar(value)
    fine = isinstance(number_, numbers.Integral) and not isinstance(number_, bool)
    if not fine or number_ < least or (most is not None and number_ > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise EmulusError(f"{name} is {shown(value)} but must be a whole number {bounds}")
    return int(number_)


def number(
    name: str, value: Any, *, least: float = -math.inf, most: float = math.inf, above: float = -math.inf
) -> float:
    """A finite number from ``least`` to ``most`` and above ``above``.

    Raises:
        EmulusError: It is no such number.
    """
    given = _scalar(value)
    found = math.nan
    if isinstance(given, numbers.Real) and not isinstance(given, bool):
        try:
            found = float(given)
        except OverflowError:  # an int of more digits than a float can have
            found = math.inf
    if not (math.isfinite(found) and least <= found <= most and found > above):
        bounds = [("above", above), ("of at least", least), ("of at most", most)]
        said = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
        raise EmulusError(f"{name} is {shown(value)} but must be a number {said}".rstrip())
    return found


def text(name: str, value: Any) -> str:
    """A string, which may be empty.

    Raises:
        EmulusError: It is something else.
    """
    if not isinstance(value, str):
        raise EmulusError(f"{name} is {shown(value)} but must be text (a str)")
    return str(value)


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        EmulusError: It is something else: of most values it is not clear which they would be.
    """
    given = _scalar(value)
    if not isinstance(given, bool):
        raise EmulusError(f"{name} is {shown(value)} but must be True or False")
    return given


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of some words.

    Raises:
        EmulusError: It is something else.
    """
    if not isinstance(value, str):
        raise EmulusError(f"{name} is {shown(value)} but must be one of {', '.join(choices)}")
    if value not in choices:
        raise EmulusError(f"there is no {name} {shown(value)}{did_you_mean(value[:_MOST_SHOWN], choices)}")
    return value


def several(name: str, value: Any, single: Any) -> Sequence[Any]:
    """A list or another sequence, which a single item is not.

    Args:
        name: The argument.
        value: What was given.
        single: Types of single items that are sequences, too, and would be taken apart.

    Raises:
        EmulusError: It is a single item, or nothing that has an order.
    """
    if isinstance(value, single | Mapping) or not isinstance(value, Sequence):
        raise EmulusError(f"{name} is {shown(value)} but must be a list: if it is a single item, put it into a list")
    return value


def shown(value: Any) -> str:
    """A value as a message shows it: short, whatever it is."""
    scalar = _scalar(value)
    value = value if scalar is None else scalar
    if isinstance(value, str | bytes):
        short = repr(value[:_MOST_SHOWN])
        return short if len(value) <= _MOST_SHOWN else f"{short}..."
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, numbers.Number):
        return repr(value)[:_MOST_SHOWN]
    return f"{'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}"[:_MOST_SHOWN]


def _scalar(value: Any) -> Any:
    """The number in a NumPy scalar or a tensor without axes."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            return value.item()
        except Exception:  # a tensor of the meta device holds none
            return None
    return value
