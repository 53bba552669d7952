"""How drawings depend on guidance, temperature and top-k, and what the model's defaults are among these."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from emulus.data.source import even
from emulus.dual import DualEncoder
from emulus.errors import EmulusError, at_least
from emulus.evaluate.charts import Chart, Line
from emulus.evaluate.drawing import draw, lookalikes, pixels_of, retrieval
from emulus.evaluate.drawing_section import Found
from emulus.evaluate.features import Pixels, Space, dual_space, vgg_space
from emulus.evaluate.frechet import frechet_distance
from emulus.evaluate.held_out import Example
from emulus.evaluate.report import Curves, Section, Table, Text
from emulus.log import logger
from emulus.pipeline import Emulus
from emulus.sequence import Image

GUIDANCE, TEMPERATURE, TOP_K, BEST_OF = "guidance_scale", "temperature", "top_k", "best_of"
_MOST_OTHERS = 512
"""Real pictures that drawings are compared with."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What is tried; the model's own settings are tried in any case, and each setting is changed by itself.

    One picture is drawn at a time, but where the model chooses among several.

    Attributes:
        drawings: Captions that are drawn at each point.
        guidance_scales: Strengths of guidance; 1 is none.
        temperatures: Divide the logits; 0 takes the likeliest id.
        top_ks: How many ids may be drawn; 0 is all.
        best_ofs: Of how many drawings the model keeps one.
    """

    drawings: int = 12
    guidance_scales: tuple[float, ...] = (1.0, 2.0, 5.0, 8.0)
    temperatures: tuple[float, ...] = (0.6, 0.8, 1.2)
    top_ks: tuple[int, ...] = (16, 128, 0)
    best_ofs: tuple[int, ...] = (1, 2, 4, 8)

    def __post_init__(self) -> None:
        at_least(2, drawings=self.drawings)
        for value in self.best_ofs:
            at_least(1, best_ofs=value)


@dataclass(frozen=True, kw_only=True)
class Point:
    """Drawings at one value of one setting, all others being the model's own.

    Attributes:
        setting: Which.
        value: Of it.
        found: How often the dual encoder finds the right name, by other held-out pictures of it, or by words where
            there are none; ``None`` without a dual encoder.
        distance: Fréchet distance to real held-out pictures, lower is better.
    """

    setting: str
    value: float
    found: Found | None
    distance: float


@dataclass(frozen=True, kw_only=True)
class Sweeps:
    """What comes of other settings.

    Attributes:
        count: Drawings at each point, always of the same captions with the same seeds.
        names: Held-out names that the dual encoder chose from; 0 without one.
        features: What Fréchet distances are measured in.
        others: Real pictures they are measured from.
        real: The distance of as many real pictures as there are drawings: the floor.
        defaults: The model's own settings.
        best: Of each setting the value that was best here: by names found among ten, then by distance.
        points: In order of the settings and values; the model's own value of each is among them.
    """

    count: int
    names: int
    features: str
    others: int
    real: float
    defaults: Mapping[str, float]
    best: Mapping[str, float] = field(default_factory=dict)
    points: tuple[Point, ...] = ()


def sweeps(
    model: Emulus, examples: Sequence[Example], dual: DualEncoder | None, config: SweepConfig, *, seed: int = 0
) -> Sweeps | None:
    """Draw held-out captions at other settings.

    Args:
        model: A whole model.
        examples: Held-out items, of which pictures are used.
        dual: Judges what a drawing shows.
        config: What to try.
        seed: Of everything drawn.

    Returns:
        The figures; ``None`` where there are too few pictures.

    Raises:
        EmulusError: There is neither a dual encoder nor the extra ``emulus[perceptual]``, so nothing could be measured.
    """
    pictures = [example for example in examples if isinstance(example.media, Image)]
    asked = even(pictures, min(config.drawings, len(pictures) // 2))
    if len(asked) < 2:
        return None
    space = dual_space(dual) if dual is not None else vgg_space(model.vision.device)
    if space is None:
        raise EmulusError("sweeps need a dual encoder (--dual) or pip install 'emulus[perceptual]' to judge drawings")
    taken = {example.item.id for example in asked}
    others = even([example for example in pictures if example.item.id not in taken], _MOST_OTHERS)
    judge = _Judge(dual=dual, space=space, held_out=pictures, asked=asked, reference=pixels_of(others))
    defaults = {name: float(getattr(model.defaults, name)) for name in (GUIDANCE, TEMPERATURE)}
    size = model.vision.config.codebook_size
    # As many as there are is the same as all.
    defaults[TOP_K], *top_ks = (
        0.0 if value >= size else float(value) for value in (model.defaults.top_k, *config.top_ks)
    )
    once = {**defaults, BEST_OF: 1.0}
    defaults[BEST_OF] = float(model.defaults.best_of)
    tried = {
        GUIDANCE: config.guidance_scales,
        TEMPERATURE: config.temperatures,
        TOP_K: top_ks,
        BEST_OF: config.best_ofs,
    }
    points: list[Point] = []
    own: Point | None = None
    for setting, values in tried.items():
        for value in sorted({*values, defaults[setting]}, key=lambda value: _axis(setting, value, size)):
            if own is not None and value == once[setting]:
                points.append(dataclasses.replace(own, setting=setting, value=value))
                continue
            logger.info(f"drawing {len(asked)} captions at {setting.replace('_', ' ')} {value:g}")
            changed: dict[str, Any] = {BEST_OF: 1, setting: int(value) if setting in (TOP_K, BEST_OF) else value}
            drawn = draw(model, [example.caption for example in asked], seed=seed, **changed).pixels
            points.append(judge.point(setting, value, drawn))
            own = points[-1] if value == once[setting] else own
    return Sweeps(
        count=len(asked),
        names=judge.names,
        features=space.name,
        others=len(others),
        real=judge.distance(pixels_of(asked)),
        defaults=defaults,
        best={setting: min((p for p in points if p.setting == setting), key=_worth).value for setting in tried},
        points=tuple(points),
    )


class _Judge:
    """Measures drawings of the same captions."""

    def __init__(
        self,
        *,
        dual: DualEncoder | None,
        space: Space,
        held_out: Sequence[Example],
        asked: Sequence[Example],
        reference: Pixels,
    ) -> None:
        self.dual = dual
        self.space = space
        self.held_out = held_out
        self.asked = asked
        self.reference = space.vectors(reference)
        self.names = 0

    def point(self, setting: str, value: float, drawn: Pixels) -> Point:
        found: Found | None = None
        if self.dual is not None:
            asked = self.dual, self.held_out, self.asked, {"drawn": drawn}
            # By pictures of that name where there are any, which is sharper than by its words.
            figures = lookalikes(*asked) or retrieval(*asked)
            found, self.names = figures.found["drawn"], figures.names
        return Point(setting=setting, value=value, found=found, distance=self.distance(drawn))

    def distance(self, pixels: Pixels) -> float:
        return frechet_distance(self.space.vectors(pixels), self.reference)


def _axis(setting: str, value: float, codebook_size: int) -> float:
    """Where a value stands on its axis: top-k as a power of two, and no limit as many as there are codes."""
    if setting != TOP_K:
        return value
    return math.log2(min(value, codebook_size) if value else codebook_size)


def _worth(point: Point) -> tuple[float, float]:
    return (0.0 if point.found is None else -point.found.top10.share), point.distance


def sweeps_section(figures: Sweeps, codebook_size: int) -> Section:
    """Charts of names found and of distances over each setting, and all values in a table.

    Args:
        figures: What was measured.
        codebook_size: How many ids "all" are.
    """
    chosen = ", ".join(f"{_name(setting)} {_value(setting, value)}" for setting, value in figures.defaults.items())
    best = ", ".join(f"{_name(setting)} {_value(setting, value)}" for setting, value in figures.best.items())
    charts = [chart for setting in figures.defaults for chart in _charts(figures, setting, codebook_size)]
    return Section(
        title="Settings of drawing",
        text=f"{figures.count} held-out captions, drawn at each value of one setting while the others are the model's "
        f"own: {chosen} (large points). One picture is drawn at a time, but where the best of several is kept. So few "
        "tell large differences only. Best of those tried, by names found among ten and then by distance: "
        f"{best}.",
        blocks=(
            Curves(charts=tuple(charts)),
            Table(
                head=("Setting", "Drawings", "Name found", "Among ten", f"FD ({figures.features})"),
                rows=tuple(_row(figures, point) for point in figures.points),
            ),
            Text(
                text=f"Fréchet distances from {figures.count} drawings to {figures.others} real held-out pictures of "
                f"other captions; as many real pictures of these captions have {figures.real:.3g}. "
                + (
                    f"Names are looked for among {figures.names}, by other held-out pictures of them."
                    if figures.names
                    else ""
                )
            ),
        ),
    )


def _charts(figures: Sweeps, setting: str, codebook_size: int) -> list[Chart]:
    points = [point for point in figures.points if point.setting == setting]
    axis = "top-k, as a power of two" if setting == TOP_K else _name(setting)
    charts = [
        _chart(
            f"Fréchet distance by {_name(setting)}",
            axis,
            "lower is better",
            [(_axis(setting, point.value, codebook_size), point.distance) for point in points],
            [point.value == figures.defaults[setting] for point in points],
        )
    ]
    if figures.names:
        shares = [
            (_axis(setting, point.value, codebook_size), 100 * point.found.top10.share)
            for point in points
            if point.found is not None
        ]
        own = [point.value == figures.defaults[setting] for point in points]
        charts.insert(0, _chart(f"Names found among ten by {_name(setting)}", axis, "% of drawings", shares, own))
    return charts


def _chart(title: str, x: str, y: str, points: Sequence[tuple[float, float]], own: Sequence[bool]) -> Chart:
    chosen = tuple(point for point, is_own in zip(points, own, strict=True) if is_own)
    lines = (
        Line(name="tried", points=tuple(points)),
        Line(name="the model's own", points=chosen, dots=True),
    )
    return Chart(title=title, x=x, y=y, lines=lines)


def _row(figures: Sweeps, point: Point) -> tuple[str, ...]:
    own = " (the model's own)" if point.value == figures.defaults[point.setting] else ""
    hits = (point.found.top1, point.found.top10) if point.found else ()
    shares = [f"{hit.share:.0%} of {hit.asked}" for hit in hits] or ["–", "–"]
    name = f"{_name(point.setting)} {_value(point.setting, point.value)}{own}"
    return (name, str(figures.count), *shares, f"{point.distance:.3g}")


def _name(setting: str) -> str:
    return {GUIDANCE: "guidance scale", TEMPERATURE: "temperature", TOP_K: "top-k", BEST_OF: "best of"}[setting]


def _value(setting: str, value: float) -> str:
    return "all" if setting == TOP_K and not value else f"{value:g}"
