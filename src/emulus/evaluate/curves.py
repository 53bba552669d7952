"""metrics.jsonl -> charts of how a run went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from emulus.evaluate.charts import Chart, Line
from emulus.evaluate.report import Curves
from emulus.train.metrics import read_metrics

Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Series:
    """One figure, by the names it goes by while training and when held-out data are measured."""

    name: str
    train: str
    held_out: str = ""
    unit: float = 1.0


_Charts = Mapping[tuple[str, str], Sequence[_Series]]

_BIT = 1 / math.log(2)
# A chart is drawn where a run has any of its figures.
_LEARNT: _Charts = {
    ("Visual ids", "bits per id"): (_Series(name="visual", train="visual", held_out="visual_bits", unit=_BIT),),
    ("Text ids", "bits per id"): (_Series(name="text", train="text", held_out="text_bits", unit=_BIT),),
    ("Reconstruction", "PSNR in dB"): (
        _Series(name="pictures", train="picture_psnr", held_out="picture_psnr"),
        _Series(name="clips", train="clip_psnr", held_out="clip_psnr"),
    ),
    ("Codebook in use", "share of the codes"): (_Series(name="usage", train="", held_out="usage"),),
}
_STEPS: _Charts = {
    ("Loss", "as it is minimised"): (_Series(name="loss", train="loss"),),
    ("Gradient norm", "before clipping"): (_Series(name="norm", train="grad_norm"),),
    ("Learning rate", ""): (_Series(name="rate", train="learning_rate"),),
    ("Speed", "tokens a second"): (_Series(name="tokens", train="tokens_per_second"),),
    ("Speed", "frames a second"): (_Series(name="frames", train="frames_per_second"),),
    ("Utilisation", "% of the device's peak (MFU)"): (_Series(name="MFU", train="mfu", unit=100),),
    ("Waiting for data", "% of the time"): (_Series(name="waiting", train="wait", unit=100),),
    ("Memory", "GiB, most so far"): (_Series(name="memory", train="memory"),),
}


def curves_of(run: Path) -> Curves | None:
    """Charts of a training run's figures, split by modality: a line for training, points for held-out data.

    Args:
        run: A folder with ``metrics.jsonl``, of a tokenizer or of a decoder.

    Returns:
        The charts, or ``None`` where there are no figures.
    """
    return learning_curves(read_metrics(run))


def learning_curves(lines: Lines, unit: str = "") -> Curves | None:
    """Charts of what was learnt, by modality.

    Args:
        lines: A run's figures.
        unit: Draw over the ``tokens`` or ``frames`` seen so far, instead of over steps.

    Returns:
        The charts, or ``None`` where there are no figures, or no count of the unit.
    """
    return _curves(_LEARNT, lines, unit)


def step_curves(lines: Lines) -> Curves | None:
    """Charts of how the steps went: loss, norm, rate, speed, memory."""
    return _curves(_STEPS, lines, "")


def _curves(kinds: _Charts, lines: Lines, unit: str) -> Curves | None:
    places = _places(lines, unit)
    charts = []
    for (title, y), series in kinds.items():
        drawn = [line for colour, figure in enumerate(series) for line in _lines(figure, lines, places, colour)]
        if drawn:
            whole = f"{title} over {unit}" if unit else title
            charts.append(Chart(title=whole, x=unit or "step", y=y, lines=tuple(drawn)))
    return Curves(charts=tuple(charts)) if charts else None


def _places(lines: Lines, unit: str) -> Mapping[int, float]:
    """Where each step lies on the horizontal axis."""
    if not unit:
        return {line["step"]: float(line["step"]) for line in lines}
    train = [line for line in lines if line["kind"] == "train" and unit in line]
    return dict(zip((line["step"] for line in train), accumulate(line[unit] for line in train), strict=True))


def _lines(series: _Series, lines: Lines, places: Mapping[int, float], colour: int) -> list[Line]:
    train = _points(lines, "train", series.train, series.unit, places)
    held_out = _points(lines, "evaluation", series.held_out, 1.0, places)
    both = (
        Line(name=f"{series.name}, training", points=train, colour=colour),
        Line(name=f"{series.name}, held out", points=held_out, dots=True, colour=colour),
    )
    return [line for line in both if line.points]


def _points(
    lines: Lines, kind: str, name: str, unit: float, places: Mapping[int, float]
) -> tuple[tuple[float, float], ...]:
    return tuple(
        (places[line["step"]], line[name] * unit)
        for line in lines
        if line["kind"] == kind and name in line and line["step"] in places
    )
