"""A training run as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from emulus.commands.out import check_out
from emulus.evaluate.report import write_report
from emulus.evaluate.run_report import run_report
from emulus.flags import parse_flags


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write a page about a training run: curves, held-out figures, samples, what went wrong.

    Attributes:
        run: Its folder; the run may still be going on.
        out: The page; by default ``report.html`` in that folder.
    """

    run: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None


def report(arguments: Sequence[str]) -> None:
    """``emulus report RUN [--out FILE]``: prints the page's path."""
    options = parse_flags(ReportOptions, arguments, program="emulus report")
    out = options.out or options.run / "report.html"
    check_out(out, "file")
    write_report(run_report(options.run), out)
    print(out)
