"""The page is whole, needs nothing else, and shows what it was given."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emulus.evaluate.charts import Chart, Line, draw_chart, thinned, ticks
from emulus.evaluate.curves import curves_of
from emulus.evaluate.report import Curves, Figure, Figures, Gallery, Report, Section, Shot, Text, Tile, write_report
from emulus.media import Clip

NASTY = "<script>alert('&\"')</script> café 🍎"


def test_everything_is_on_the_page(tmp_path: Path, check_page: Callable[[Path], Any]) -> None:
    small, large = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (400, 300), "blue")
    clip = Clip(tuple(Image.new("RGB", (32, 32), (9 * n, 0, 0)) for n in range(8)), fps=8.0)
    report = Report(
        title=f"A {NASTY}",
        text="what it is",
        sections=(
            Section(title="One", text=NASTY, blocks=(Figures(rows=(Figure(name=NASTY, value="1 dB", group="g"),)),)),
            Section(
                title="Two",
                blocks=(
                    Text(text="words"),
                    Gallery(
                        tiles=(
                            Tile(shots=(Shot(media=small, label="true", small=True), Shot(media=large)), text=NASTY),
                            Tile(shots=(Shot(media=clip),), text="moves", note="note"),
                        )
                    ),
                ),
            ),
        ),
    )
    write_report(report, tmp_path / "deep" / "report.html")
    page = check_page(tmp_path / "deep" / "report.html")
    assert "script" not in page.tags
    words = "".join(page.words)
    assert words.count(NASTY) == 5
    first, second, third = page.images
    assert (first.size, first.getpixel((0, 0))) == ((64, 64), (255, 0, 0))
    assert second.size == (400, 300)
    assert third.n_frames == 8
    durations = []
    for frame in range(8):
        third.seek(frame)
        third.load()
        durations.append(third.info["duration"])
    assert sum(durations) == 1000


def test_chart_holds_its_lines(tmp_path: Path, check_page: Callable[[Path], Any]) -> None:
    line = Line(name="train <b>", points=tuple((step, 9 / step) for step in range(1, 1001)))
    dots = Line(name="held out", points=((100, 3.0), (500, math.nan), (900, 1.0)), dots=True, colour=1)
    chart = Chart(title="bits & pieces", x="step", y="bits", lines=(line, dots))
    write_report(
        Report(title="t", sections=(Section(title="s", blocks=(Curves(charts=(chart,)),)),)), tmp_path / "r.html"
    )
    check_page(tmp_path / "r.html")
    svg = draw_chart(chart)
    assert svg.count("<circle") == 2
    assert svg.count("<polyline") == 1
    places = [tuple(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", svg)]
    assert len(places) == 77
    assert all(0 <= x <= 520 and 0 <= y <= 260 for x, y in places)
    # The figure falls, so the line goes down: y grows downwards.
    assert places[0][1] < places[-1][1]


def test_chart_without_figures() -> None:
    assert "no figures yet" in draw_chart(Chart(title="t", x="", y="", lines=(Line(name="n", points=()),)))


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_enclose(low: float, width: float) -> None:
    marks = ticks(low, low + width)
    assert 2 <= len(marks) <= 13
    slack = 1e-6 * (width + abs(low))
    assert marks[0] <= low + slack
    assert marks[-1] >= low + width - slack


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=900), st.integers(1, 50))
def test_thinning_keeps_the_mean(values: list[float], most: int) -> None:
    points = [(float(place), value) for place, value in enumerate(values)]
    found = thinned(points, most)
    assert len(found) <= most
    if len(points) % math.ceil(len(points) / most) == 0:
        assert sum(y for _, y in found) / len(found) == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_curves_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "kind": "train", "loss": 5, "visual": 0.6931471805599453, "text": 2}\n'
        '{"step": 2, "kind": "train", "loss": 4, "visual": 1.3862943611198906}\n'
        '{"step": 2, "kind": "evaluation", "visual_bits": 1.5, "text_bits": 3}\n'
    )
    curves = curves_of(tmp_path)
    assert curves is not None
    assert [chart.title for chart in curves.charts] == ["Visual ids", "Text ids"]
    train, held_out = curves.charts[0].lines
    assert np.array(train.points) == pytest.approx(np.array([(1, 1.0), (2, 2.0)]))
    assert held_out.points == ((2, 1.5),)
    assert held_out.dots
    assert curves_of(tmp_path / "nowhere") is None
