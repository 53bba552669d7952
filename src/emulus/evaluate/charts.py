"""Line charts as SVG that takes its colours from the page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 38
_MOST_POINTS = 80


@dataclass(frozen=True, kw_only=True)
class Line:
    """Some figure over the steps.

    Attributes:
        name: For the legend.
        points: ``(x, y)`` in order of x; what is not finite is left out.
        dots: Whether to mark single points, for figures that were taken rarely.
        colour: 0 to 3, of the page's palette.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    dots: bool = False
    colour: int = 0


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines on one pair of axes.

    Attributes:
        title: What is shown.
        x: Name of the horizontal axis.
        y: Name and unit of the vertical axis.
        lines: At least one with a point.
    """

    title: str
    x: str
    y: str
    lines: tuple[Line, ...]


def draw_chart(chart: Chart) -> str:
    """Draw a chart.

    Returns:
        An ``<svg>`` element. Its classes (``axis``, ``grid``, ``line c0`` ...) are styled by the page.
    """
    lines = [(line, thinned([p for p in line.points if math.isfinite(p[1])])) for line in chart.lines]
    points = [point for _, kept in lines for point in kept]
    if not points:
        return f"<p>{html.escape(chart.title)}: no figures yet.</p>"
    xs, ys = _span([0.0, *(x for x, _ in points)]), _span([y for _, y in points])
    marks_x, marks_y = ticks(*xs), ticks(*ys)
    low, high = min(ys[0], marks_y[0]), max(ys[1], marks_y[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[1] - xs[0]) * (WIDTH - _LEFT - _RIGHT)
        up = (y - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(HEIGHT - _BOTTOM - up, 1)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(chart.title)}">']
    for mark in marks_y:
        y = at(xs[0], mark)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{y + 4}">{_number(mark)}</text>')
    for mark in marks_x:
        if xs[0] <= mark <= xs[1]:
            x = at(mark, low)[0]
            parts.append(f'<text class="tick middle" x="{x}" y="{HEIGHT - _BOTTOM + 16}">{_number(mark)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick middle" x="{middle}" y="{HEIGHT - 4}">{html.escape(chart.x)}</text>')
    for line, kept in lines:
        places = [at(x, y) for x, y in kept]
        if line.dots:
            parts += [f'<circle class="dot c{line.colour}" cx="{x}" cy="{y}" r="4.5"/>' for x, y in places]
        elif places:
            path = " ".join(f"{x},{y}" for x, y in places)
            parts.append(f'<polyline class="line c{line.colour}" points="{path}"/>')
    return "".join([*parts, "</svg>"])


def thinned(points: Sequence[tuple[float, float]], most: int = _MOST_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points, each the mean of a run of neighbours: the noise of single steps hides the course."""
    size = math.ceil(len(points) / most)
    runs = [points[start : start + size] for start in range(0, len(points), max(size, 1))]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from at most ``low`` to at least ``high``."""
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest; never the same, so that there is something to divide by."""
    low, high = min(values), max(values)
    room = max(0.5, 1e-6 * abs(low))
    return (low, high) if high - low > 1e-9 * max(abs(low), abs(high), 1e-9) else (low - room, high + room)


def _number(value: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:g} {letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
