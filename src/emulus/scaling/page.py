"""findings -> a page with the measured losses, the fitted curves, and the foretold run beside the measured one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from emulus.evaluate.charts import Chart, Line
from emulus.evaluate.report import Block, Curves, Figure, Figures, Report, Section, write_report
from emulus.scaling.fit import Fit, Interval
from emulus.scaling.ladder import ALL, Findings, Foretold, Measured, ScalingConfig

_MILLION = 1e6
_POINTS = 60
_COLOURS = 4
_MEANINGS = {
    "e": "bits that no size and no number of ids takes away",
    "a": "with alpha: what a small model loses",
    "b": "with beta: what few ids lose",
    "alpha": "how fast losses fall with the size N",
    "beta": "how fast losses fall with the ids seen D",
}


def write_page(config: ScalingConfig, findings: Findings, path: Path) -> None:
    """Write the page.

    Args:
        config: Of the ladder.
        findings: Of the same.
        path: Of the page.
    """
    sections = tuple(_section(config, findings, modality, found) for modality, found in findings.foretold.items())
    report = Report(
        title="Scaling law",
        text=(
            "Held-out loss of models of several sizes, each trained from scratch on several numbers of ids, and "
            "L(N, D) = E + A / N^alpha + B / D^beta fitted to them. N counts the blocks' matrices and the output head. "
            f"{findings.held_out.name} was left out of the fit. {_missing(findings)}"
        ),
        sections=sections,
    )
    write_report(report, path)


def _missing(findings: Findings) -> str:
    if not findings.missing:
        return "All runs of the ladder are finished."
    return f"{len(findings.missing)} runs of the ladder are missing: {', '.join(findings.missing)}."


def _section(config: ScalingConfig, findings: Findings, modality: str, found: Foretold) -> Section:
    sizes = list(dict.fromkeys(run.size for run in sorted(findings.fitted, key=lambda run: run.parameters)))
    # A chart has four colours.
    groups = [sizes[start : start + _COLOURS] for start in range(0, len(sizes), _COLOURS)]
    charts = [_fitted_chart(findings.fitted, group, modality, found.fit) for group in groups]
    blocks: tuple[Block, ...] = (
        Curves(charts=(*charts, _foretold_chart(config, findings, modality, found))),
        Figures(rows=_rows(config, findings, found)),
    )
    title = "Bits per id, visual and text together" if modality == ALL else f"Bits per {modality} id"
    return Section(title=title, blocks=blocks)


def _fitted_chart(runs: Sequence[Measured], sizes: Sequence[str], modality: str, law: Fit) -> Chart:
    """Losses over the ids seen, in doublings of the fewest, which spread evenly."""
    least, most = min(run.tokens for run in runs), max(run.tokens for run in runs)
    lines = []
    for colour, size in enumerate(sizes):
        own = sorted((run for run in runs if run.size == size), key=lambda run: run.tokens)
        seen = _between(least, most)
        curve = tuple((math.log2(tokens / least), law.law.loss(own[0].parameters, tokens)) for tokens in seen)
        points = tuple((math.log2(run.tokens / least), run.losses[modality]) for run in own)
        lines += [
            Line(name=size, points=points, dots=True, colour=colour),
            Line(name=f"{size}, fitted", points=curve, colour=colour),
        ]
    x = f"doublings of {least / _MILLION:.2g} million ids seen"
    return Chart(title="Measured and fitted", x=x, y="bits per id", lines=tuple(lines))


def _foretold_chart(config: ScalingConfig, findings: Findings, modality: str, found: Foretold) -> Chart:
    """Losses over the size, after as many ids as the held-out run sees."""
    run = findings.held_out
    sizes = _between(min(each.parameters for each in findings.fitted), 1.1 * run.parameters)
    expected = [(size / _MILLION, found.fit.predict(size, run.tokens)) for size in sizes]
    lines = [
        Line(name="fitted", points=tuple((size, each.value) for size, each in expected)),
        Line(
            name=f"{_percent(config.level)} of single runs, at least",
            points=tuple((size, each.low) for size, each in expected),
            colour=1,
        ),
        Line(name="at most", points=tuple((size, each.high) for size, each in expected), colour=1),
    ]
    fitted = tuple(
        (each.parameters / _MILLION, each.losses[modality])
        for each in findings.fitted
        if abs(each.tokens - run.tokens) < 0.01 * run.tokens
    )
    lines.append(Line(name="measured, fitted", points=fitted, dots=True, colour=3))
    if found.measured is not None:
        here = (run.parameters / _MILLION, found.measured)
        lines.append(Line(name=f"measured, held out: {run.size}", points=(here,), dots=True, colour=2))
    return Chart(
        title=f"Foretold, after {run.tokens / _MILLION:.2g} million ids",
        x="million parameters (N)",
        y="bits per id",
        lines=tuple(lines),
    )


def _between(first: float, last: float) -> list[float]:
    """Numbers evenly spaced in their logarithm."""
    return [first * (last / first) ** (place / _POINTS) for place in range(_POINTS + 1)]


def _rows(config: ScalingConfig, findings: Findings, found: Foretold) -> tuple[Figure, ...]:
    run, expected = findings.held_out, found.predicted
    measured = "not measured yet"
    if found.measured is not None:
        off = expected.value / found.measured - 1
        place = "inside" if found.inside else "outside"
        measured = f"measured {found.measured:.3f}: {place} the interval, {off:+.1%}"
    level = _percent(config.level)
    return (
        Figure(
            name=f"{run.size} after {run.tokens / _MILLION:.2g} million ids, foretold",
            value=f"{expected.value:.3f} [{expected.low:.3f}, {expected.high:.3f}]",
            beside=measured,
            meaning=f"N = {run.parameters:,}; bits per held-out id; in brackets where {level} of such runs should be",
        ),
        *(
            Figure(name=_LETTERS[name], value=_shown(value.value), beside=_range(value, level), meaning=_MEANINGS[name])
            for name, value in found.fit.constants().items()
        ),
        Figure(
            name="Scatter of the runs around the law",
            value=f"{100 * math.sqrt(sum(each**2 for each in found.fit.residuals) / len(found.fit.residuals)):.2f} %",
            beside=f"{len(findings.fitted)} runs",
            meaning="root mean square, widened for the five constants fitted to them",
        ),
    )


_LETTERS = {"e": "E", "a": "A", "b": "B", "alpha": "alpha", "beta": "beta"}


def _range(value: Interval, level: str) -> str:
    return f"{level}: {_shown(value.low)} to {_shown(value.high)}"


def _shown(value: float) -> str:
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"
