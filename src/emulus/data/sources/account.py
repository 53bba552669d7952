"""What a data set holds that is not used, by reason: nothing that was seen goes missing without a word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from emulus.errors import EmulusError, shown

Unit = Literal["file", "folder", "row", "sample"]

MAX_REASONS = 40
"""Reasons that are kept apart. A reason may quote a value, and values from outside can all differ."""
EXAMPLES = 3
_OTHER = "other reasons"


class LeftOutError(EmulusError):
    """One row, sample or file cannot be used; the rest of the data set can.

    Attributes:
        reason: The short reason it is counted under.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnfitError(EmulusError):
    """A table is sound, and neither one of media with words nor one of texts."""


@dataclass(kw_only=True)
class LeftOut:
    """Things that are left out for one reason.

    Attributes:
        unit: What is counted.
        reason: Why.
        count: How many.
        examples: The names of the first few.
    """

    unit: Unit
    reason: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line, such as ``2 files: no caption beside them (a.png, b.png)``."""
        named = ", ".join(shown(name, quote=False) for name in self.examples)
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{self.count:,} {self.unit}{'s' if self.count != 1 else ''}: {self.reason} ({named}{more})"


class Account:
    """Counts what a data set holds that does not become a usable item.

    Two things are kept apart: what is *left out* although it could have been data, and what is *passed over* because it
    never is (hidden files, README, folders that Emulus wrote).
    """

    def __init__(self) -> None:
        self._left_out: dict[tuple[str, str], LeftOut] = {}
        self._passed_over: dict[tuple[str, str], LeftOut] = {}
        self.notes: list[str] = []
        """Decisions that concern the data set as a whole, such as where its splits come from."""

    def leave_out(self, reason: str, name: object, unit: Unit = "file") -> None:
        """Count a thing that could have been data.

        Args:
            reason: Why it is not used, the same text for the same kind of reason.
            name: Names the thing; the first few are kept.
            unit: What it is.
        """
        _count(self._left_out, unit, reason, name)

    def pass_over(self, reason: str, name: object, unit: Unit = "file") -> None:
        """Count a thing that never is data (arguments as in :meth:`leave_out`)."""
        _count(self._passed_over, unit, reason, name)

    def note(self, line: str) -> None:
        """Record a decision about the whole data set."""
        if line not in self.notes:
            self.notes.append(line)

    def add(self, other: Account) -> None:
        """Take over all that another account counted."""
        for mine, theirs in ((self._left_out, other._left_out), (self._passed_over, other._passed_over)):
            for entry in theirs.values():
                for name in entry.examples:
                    _count(mine, entry.unit, entry.reason, name)
                _count(mine, entry.unit, entry.reason, None, entry.count - len(entry.examples))
        for line in other.notes:
            self.note(line)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What is left out, by reason, the most frequent first."""
        return tuple(sorted(self._left_out.values(), key=lambda entry: -entry.count))

    @property
    def passed_over(self) -> tuple[LeftOut, ...]:
        """What never is data, by reason."""
        return tuple(self._passed_over.values())

    def lines(self) -> Iterator[str]:
        """The account for people: the notes, then one line for each reason that something was left out."""
        yield from self.notes
        for entry in self.left_out:
            yield f"left out {entry}"

    def summary(self) -> str:
        """The first reasons on one line, for an error about a data set of which nothing can be used."""
        return "; ".join(f"left out {entry}" for entry in self.left_out[:3])


def _count(entries: dict[tuple[str, str], LeftOut], unit: Unit, reason: str, name: object, count: int = 1) -> None:
    if (unit, reason) not in entries and len(entries) >= MAX_REASONS:
        reason = _OTHER
    if count:
        entry = entries.setdefault((unit, reason), LeftOut(unit=unit, reason=reason))
        entry.count += count
        if name is not None and len(entry.examples) < EXAMPLES:
            entry.examples.append(str(name))
