"""Clips that a model makes: how well it goes on with given frames, and how what it animates from words moves.

The entry point is :func:`clip_figures`::

    found = clip_figures(model, examples, ClipConfig(), seed=0)
    if found is not None:
        figures, section = found

``examples`` are held-out items of which the clips are used. Clips drawn from captions, for other figures of their
frames, come from :func:`draw_clips`, and can be handed to :func:`clip_figures` so that they are drawn once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import UInt8
from torch import Tensor

from emulus.data.media_dataset import to_pixels
from emulus.data.source import even
from emulus.errors import at_least
from emulus.evaluate.charts import Chart, Line
from emulus.evaluate.continuation import (
    BOUND,
    LOOP,
    LOOP_PAINTED,
    REPEAT,
    REPEAT_PAINTED,
    Comparison,
    Continuation,
    ContinuationConfig,
    Strip,
    continuation,
)
from emulus.evaluate.held_out import Example
from emulus.evaluate.motion import MOVING, Motion, motion
from emulus.evaluate.perceptual import NAME
from emulus.evaluate.reconstruction import painted
from emulus.evaluate.report import Block, Curves, Gallery, Section, Shot, Table, Text, Tile
from emulus.log import logger
from emulus.media import clip_to_pixels, pixels_to_image
from emulus.media.image import pixels_to_bytes
from emulus.pipeline import Emulus
from emulus.sequence import Video


@dataclass(frozen=True, kw_only=True)
class ClipFigures:
    """All figures of clips.

    Attributes:
        continuation: ``None`` where no clip is long enough.
        motion: Of ``drawn`` clips, of the ``real`` ones whose captions they were drawn from, and of these
            ``reconstructed``; empty where none were drawn.
    """

    continuation: Continuation | None
    motion: dict[str, Motion] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How many clips are made, and how.

    Attributes:
        continuation: Of held-out clips, from their first frames.
        drawn: Most clips drawn from captions; 0 for none.
    """

    continuation: ContinuationConfig = field(default_factory=ContinuationConfig)
    drawn: int = 12

    def __post_init__(self) -> None:
        at_least(0, drawn=self.drawn)


def clip_figures(
    model: Emulus,
    examples: Sequence[Example],
    config: ClipConfig | None = None,
    *,
    seed: int = 0,
    drawn: Sequence[UInt8[Tensor, "t 3 h w"]] | None = None,
) -> tuple[ClipFigures, Section] | None:
    """Continue held-out clips, draw clips from captions, and measure both.

    Args:
        model: A whole model.
        examples: Held-out items; an even spread of the clips is taken.
        config: How many, and how.
        seed: Of everything drawn.
        drawn: What :func:`draw_clips` made of ``clips_to_draw(examples, config)`` with this seed, if it is there.

    Returns:
        The figures and their part of the report; ``None`` without clips.

    Raises:
        EmulusError: The frames given for a continuation are no multiple of those of a code.
    """
    config = config or ClipConfig()
    clips = [example for example in examples if isinstance(example.media, Video)]
    if not clips:
        return None
    continued = continuation(model, clips, config.continuation, seed=seed)
    chosen = clips_to_draw(examples, config)
    made = draw_clips(model, chosen, seed=seed) if drawn is None else drawn
    figures = ClipFigures(continuation=continued[0] if continued else None, motion=_motions(model, chosen, made))
    return figures, clips_section(figures, continued[1] if continued else ())


def clips_to_draw(examples: Sequence[Example], config: ClipConfig) -> list[Example]:
    """The held-out clips whose captions are drawn."""
    return even([example for example in examples if isinstance(example.media, Video)], config.drawn)


def draw_clips(model: Emulus, examples: Sequence[Example], *, seed: int = 0) -> list[UInt8[Tensor, "t 3 h w"]]:
    """Clips of the model's own length, drawn from the captions of held-out ones, all in one batch."""
    if not examples:
        return []
    logger.info(f"animating {len(examples)} captions")
    clips = model.generate_videos([example.caption for example in examples], seed=seed)
    return [pixels_to_bytes(clip_to_pixels(clip)).movedim(-1, -3).contiguous() for clip in clips]


def _motions(model: Emulus, examples: Sequence[Example], drawn: Sequence[Tensor]) -> dict[str, Motion]:
    """Of drawn clips, of the real ones, and of these as the vision tokenizer shows them."""
    if not examples:
        return {}
    kinds = {
        "drawn": [to_pixels(clip) for clip in drawn],
        "real": [to_pixels(example.frames) for example in examples],
        "reconstructed": [painted(model.vision, example.media.codes) for example in examples],
    }
    factor = model.vision.config.temporal_factor
    return {kind: motion(clips, factor) for kind, clips in kinds.items()}


def clips_section(figures: ClipFigures, strips: Sequence[Strip] = ()) -> Section:
    """The figures of clips as a part of the report, with charts and continuations frame by frame."""
    blocks: list[Block] = []
    found = figures.continuation
    if found is not None:
        blocks += [Text(text=_about(found)), _charts(found), *_tables(found)]
        blocks += [Gallery(tiles=tuple(_tile(strip) for strip in strips))] if strips else []
    if figures.motion:
        blocks += [Text(text=_ABOUT_MOTION), _motion_table(figures.motion)]
    return Section(
        title="Clips", text="Clips continued from their first frames, and drawn from words.", blocks=tuple(blocks)
    )


_ABOUT_MOTION = (
    "How clips move that were drawn from the captions of held-out clips, beside those clips and their reconstructions. "
    f"Pixels move that change by more than {MOVING:.0%} of their range from one frame to the next. Flicker is 0 where "
    "pixels change evenly and 1 where every frame is undone by the next. Jumps compare changes from one code to the "
    "next with those within a code. None of it tells whether a clip shows the right motion."
)


def _about(found: Continuation) -> str:
    """What was done, and how it compares."""
    told = "and their captions" if found.captioned else "and no words"
    guided = "" if found.guidance_scale == 1 or not found.captioned else f", guidance {found.guidance_scale:g}"
    words = [
        f"The model was given the first {found.given} frames of {found.count} held-out clips {told}{guided}, and made "
        f"the next {found.ahead}, which are compared with the true ones. Beside it is what needs no model: the last "
        "given frame held, and the given frames played again. These copy original pixels, while what the model makes "
        "comes from its vision tokenizer, but where nothing moves. So all are measured once more as painted from codes "
        "alone; the true frames painted so are the most that can be hoped for. In the second comparison they stand "
        "for the truth, so that what the tokenizer loses counts for nobody.",
    ]
    if not found.true.versus:
        words.append(f"{NAME} was not measured: pip install 'emulus[perceptual]'.")
    for comparison, truth, baselines in (
        (found.true, "the true frames", (REPEAT, LOOP)),
        (found.shown, "the reconstructed ones", (REPEAT_PAINTED, LOOP_PAINTED)),
    ):
        for way, others in comparison.versus.items():
            first, second = (others[name] for name in baselines)
            words.append(
                f"By {NAME}, {way} continuations are nearer to {truth} than the last frame held at {first.frames} of "
                f"{found.ahead} frames (in {first.clips:.0%} of the clips), than the given frames again at "
                f"{second.frames} ({second.clips:.0%})."
            )
    if found.too_short:
        words.append(f"{found.too_short} clips were too short.")
    return " ".join(words)


def _charts(found: Continuation) -> Curves:
    """Distances by how far ahead frames lie: to the true frames, and to those as the tokenizer shows them."""
    true, shown = found.true.courses, found.shown.courses
    names, shown_names = (*found.ways, REPEAT, LOOP, BOUND), (*found.ways, REPEAT_PAINTED, LOOP_PAINTED)
    charts = [_chart("PSNR", "dB", {name: true[name].psnr for name in names})]
    if true[BOUND].stlpips is not None:
        near = {name: true[name].stlpips or () for name in names}
        near_shown = {name: shown[name].stlpips or () for name in shown_names}
        charts = [
            _chart(f"{NAME} to the true frames", "lower is better", near),
            _chart(f"{NAME} to the true frames, reconstructed", "lower is better", near_shown),
            *charts,
        ]
    return Curves(charts=tuple(charts))


def _chart(title: str, y: str, courses: Mapping[str, Sequence[float]]) -> Chart:
    colours = {"greedy": 0, "sampled": 3, REPEAT: 1, REPEAT_PAINTED: 1, LOOP: 2, LOOP_PAINTED: 2}
    lines = tuple(
        Line(
            name=name,
            points=tuple(enumerate(values, start=1)),
            colour=colours.get(name, 0),
            # Where the model could be at best, in the model's colour.
            dots=name == BOUND,
        )
        for name, values in courses.items()
    )
    return Chart(title=title, x="frames ahead", y=y, lines=lines)


def _tables(found: Continuation) -> list[Table]:
    return [_courses("to the true frames", found.true), _courses("to these, reconstructed", found.shown)]


def _courses(title: str, comparison: Comparison) -> Table:
    """Every course at some frames ahead, and on average."""
    courses = comparison.courses
    ahead = len(next(iter(courses.values())).psnr)
    places = sorted({*range(0, ahead, max(ahead // 4, 1)), ahead - 1})
    head, rows = [title, "PSNR"], []
    if comparison.versus:
        head += [NAME, *(f"frame {place + 1} ahead" for place in places)]
    for name, course in courses.items():
        cells = [f"{course.mean_psnr:.1f} dB"]
        if course.stlpips is not None:
            cells += [f"{course.mean_stlpips:.3f}", *(f"{course.stlpips[place]:.3f}" for place in places)]
        rows.append((name, *cells))
    return Table(head=tuple(head), rows=tuple(rows))


def _motion_table(motions: Mapping[str, Motion]) -> Table:
    def cell(value: float | None, form: str = ".3f") -> str:
        return "–" if value is None else format(value, form)

    head = (
        "clips",
        "change a frame",
        "pixels that move",
        "still clips",
        f"{NAME} of neighbours",
        "flicker",
        "jumps",
        "last to first",
    )
    rows = tuple(
        (
            kind,
            f"{each.difference:.2%}",
            f"{each.moving:.1%}",
            f"{each.still:.0%}",
            cell(each.consistency),
            cell(each.flicker, ".2f"),
            cell(each.jumps, ".2f"),
            cell(each.seam),
        )
        for kind, each in motions.items()
    )
    return Table(head=head, rows=rows)


def _tile(strip: Strip) -> Tile:
    """Rows of frames ahead, one for each source."""
    sheet = torch.cat([torch.cat(list(frames.clamp(-1, 1)), dim=2) for frames in strip.rows.values()], dim=1)
    rows = ", ".join(strip.rows)
    return Tile(shots=(Shot(media=pixels_to_image(sheet), wide=True),), text=strip.caption, note=f"rows: {rows}")
