"""metrics.jsonl -> charts of how a run went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emulus.evaluate.charts import Chart, Line
from emulus.evaluate.report import Curves
from emulus.train.metrics import read_metrics


@dataclass(frozen=True, kw_only=True)
class _Series:
    """One figure, by the names it goes by while training and when held-out data are measured."""

    name: str
    train: str
    held_out: str
    unit: float = 1.0


_BIT = 1 / math.log(2)
# A chart is drawn where a run has any of its figures.
_CHARTS: Mapping[tuple[str, str], Sequence[_Series]] = {
    ("Visual ids", "bits per id"): (_Series(name="visual", train="visual", held_out="visual_bits", unit=_BIT),),
    ("Text ids", "bits per id"): (_Series(name="text", train="text", held_out="text_bits", unit=_BIT),),
    ("Reconstruction", "PSNR in dB"): (
        _Series(name="pictures", train="picture_psnr", held_out="picture_psnr"),
        _Series(name="clips", train="clip_psnr", held_out="clip_psnr"),
    ),
    ("Codebook in use", "share of the codes"): (_Series(name="usage", train="", held_out="usage"),),
}


def curves_of(run: Path) -> Curves | None:
    """Charts of a training run's figures, split by modality: a line for training, points for held-out data.

    Args:
        run: A folder with ``metrics.jsonl``, of a tokenizer or of a decoder.

    Returns:
        The charts, or ``None`` where there are no figures.
    """
    lines = read_metrics(run)
    charts = []
    for (title, unit), series in _CHARTS.items():
        drawn = [line for colour, figure in enumerate(series) for line in _lines(figure, lines, colour)]
        if drawn:
            charts.append(Chart(title=title, x="step", y=unit, lines=tuple(drawn)))
    return Curves(charts=tuple(charts)) if charts else None


def _lines(series: _Series, lines: Sequence[Mapping[str, Any]], colour: int) -> list[Line]:
    train = _points(lines, "train", series.train, series.unit)
    held_out = _points(lines, "evaluation", series.held_out, 1.0)
    both = (
        Line(name=f"{series.name}, training", points=train, colour=colour),
        Line(name=f"{series.name}, held out", points=held_out, dots=True, colour=colour),
    )
    return [line for line in both if line.points]


def _points(lines: Sequence[Mapping[str, Any]], kind: str, name: str, unit: float) -> tuple[tuple[float, float], ...]:
    return tuple((float(line["step"]), line[name] * unit) for line in lines if line["kind"] == kind and name in line)
