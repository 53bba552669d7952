"""findings -> a page with the measured losses, the fitted curves, and the foretold run beside the measured one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from emulus.evaluate.charts import Chart, Line
from emulus.evaluate.report import Block, Curves, Figure, Figures, Report, Section, write_report
from emulus.scaling.fit import Fit, Interval
from emulus.scaling.run import Findings, Foretold, Measured, ScalingConfig

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
    return Section(title=f"Bits per {modality} id", blocks=blocks)


def _fitted_chart(runs: Sequence[Measured], sizes: Sequence[str], modality: str, law: Fit) -> Chart:
    most = max(run.tokens for run in runs)
    lines = []
    for colour, size in enumerate(sizes):
        own = sorted((run for run in runs if run.size == size), key=lambda run: run.tokens)
        curve = _curve(own[0].parameters, min(run.tokens for run in runs), most, law)
        points = tuple((run.tokens / _MILLION, run.losses[modality]) for run in own)
        lines += [
            Line(name=size, points=points, dots=True, colour=colour),
            Line(name=f"{size}, fitted", points=curve, colour=colour),
        ]
    return Chart(title="Measured and fitted", x="million ids seen", y="bits per id", lines=tuple(lines))


def _foretold_chart(config: ScalingConfig, findings: Findings, modality: str, found: Foretold) -> Chart:
    run, least = findings.held_out, min(each.tokens for each in findings.fitted)
    expected = found.predicted
    here = run.tokens / _MILLION
    lines = [
        Line(name="foretold", points=_curve(run.parameters, min(least, run.tokens), run.tokens, found.fit)),
        Line(
            name=f"{_percent(config.level)} interval for one run",
            points=((here, expected.low), (here, expected.high)),
            colour=1,
        ),
    ]
    if found.measured is not None:
        lines.append(Line(name="measured", points=((here, found.measured),), dots=True, colour=2))
    nearest = max(findings.fitted, key=lambda each: (each.parameters, each.tokens))
    name = f"{nearest.size}, the largest fitted"
    points = tuple(
        (each.tokens / _MILLION, each.losses[modality]) for each in findings.fitted if each.size == nearest.size
    )
    lines.append(Line(name=name, points=points, dots=True, colour=3))
    return Chart(title=f"Foretold: {run.size}", x="million ids seen", y="bits per id", lines=tuple(lines))


def _curve(parameters: float, first: float, last: float, law: Fit) -> tuple[tuple[float, float], ...]:
    """The law over the ids seen; evenly spaced in their logarithm, since it bends most at the left."""
    steps = [first * (last / first) ** (place / _POINTS) for place in range(_POINTS + 1)]
    return tuple((tokens / _MILLION, law.law.loss(parameters, tokens)) for tokens in steps)


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
            name=f"{run.size} after {run.tokens / _MILLION:.1f} million ids, foretold",
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
