"""What a small model of emoji should reach on held-out code points, and what this one does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from emulus.evaluate.answers import STYLE_QUESTION, Answers
from emulus.evaluate.choice import Choice
from emulus.evaluate.clips import ClipFigures
from emulus.evaluate.continuation import LOOP, REPEAT, Continuation
from emulus.evaluate.drawing_section import DrawingFigures
from emulus.evaluate.reconstruction import Reconstruction

Reached = Literal["aim", "least", "no", "not measured"]

_LARGE = 128
"""Pictures of at least this side in pixels have the higher bar."""
_WAY = "sampled"
"""How the model continues clips by default."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One figure that should be high enough.

    Attributes:
        name: What was measured.
        value: The model's; ``None`` where it was not measured.
        least: What it must reach; ``None`` where there is only an aim.
        aim: What it should reach.
        form: How the figures are written, by :func:`format`.
        reached: The higher of the two that the value is not below; "no" where there is none.
        meaning: How it was measured.
    """

    name: str
    value: float | None
    least: float | None
    aim: float
    form: str
    meaning: str = ""
    reached: Reached = "not measured"

    @classmethod
    def of(cls, name: str, value: float | None, least: float | None, aim: float, form: str, meaning: str = "") -> Bar:
        """Compare."""
        reached: Reached = "not measured"
        if value is not None:
            reached = "aim" if value >= aim else "least" if least is not None and value >= least else "no"
        return cls(name=name, value=value, least=least, aim=aim, form=form, meaning=meaning, reached=reached)

    def written(self, value: float | None) -> str:
        """One of its figures in words."""
        return "–" if value is None else self.form.format(value)


def bars(
    *,
    size: int,
    reconstruction: Reconstruction | None = None,
    same_style: Choice | None = None,
    answers: Answers | None = None,
    clips: ClipFigures | None = None,
    drawing: DrawingFigures | None = None,
) -> tuple[Bar, ...]:
    """Every bar; what was not measured has no value.

    Args:
        size: Side of the model's pictures in pixels.
        reconstruction: Of the vision tokenizer.
        same_style: Choice among 16 pictures of one style.
        answers: Of questions.
        clips: Continued.
        drawing: Of held-out captions.
    """
    pictures = reconstruction.pictures if reconstruction else None
    moving = reconstruction.clips if reconstruction else None
    usage = reconstruction.codebook["usage"] if reconstruction else None
    to_picture = same_style.picture_pmi.top1.share if same_style and same_style.picture_pmi else None
    by_words = same_style.picture_by_words.top1.share if same_style else None
    to_caption = same_style.caption_pmi.top1.share if same_style else None
    continued = clips.continuation if clips else None
    among = f"one of {same_style.candidates if same_style else 16} of the same style"
    return (
        Bar.of(
            f"Pictures, reconstructed ({size} pixels)",
            pictures.psnr if pictures else None,
            26.0 if size >= _LARGE else 24.0,
            30.0,
            "{:.1f} dB",
            "mean PSNR",
        ),
        Bar.of("Codes in use", usage, 0.5, 0.8, "{:.0%}", "by the held-out pictures and clips"),
        Bar.of("Clips, reconstructed", moving.psnr if moving else None, 25.0, 29.0, "{:.1f} dB", "mean PSNR"),
        Bar.of("A picture's caption found", to_caption, 0.3, 0.6, "{:.0%}", f"{among}, by what the picture adds to it"),
        Bar.of("A caption's picture found", to_picture, 0.3, 0.6, "{:.0%}", f"{among}, by what the caption adds to it"),
        Bar.of("The same by the caption's likelihood", by_words, 0.3, 0.6, "{:.0%}", "given each of the pictures"),
        Bar.of('"Which style?" answered right', _style(answers), 0.95, 0.99, "{:.1%}", "in the words of the data set"),
        Bar.of(
            "Frames ahead nearer than the last frame held",
            _nearer(continued, REPEAT),
            1.0,
            1.0,
            "{:.0%}",
            "share of the future frames at which the clips' mean ST-LPIPS is lower",
        ),
        Bar.of(
            "Frames ahead nearer than the given frames again",
            _nearer(continued, LOOP),
            None,
            1.0,
            "{:.0%}",
            "likewise",
        ),
        Bar.of(
            "Drawings whose name is found among ten",
            _times(drawing),
            3.0,
            8.0,
            "{:.1f}×",
            "by the dual encoder; times what guessing or a bigram sampler reaches, whichever is more",
        ),
        Bar.of(
            "Beside models of one task each",
            None,
            0.97,
            1.0,
            "{:.2f}×",
            "takes models trained for it: see scripts/single_task.py",
        ),
    )


def _style(answers: Answers | None) -> float | None:
    questions = answers.questions if answers else ()
    return next((each.exact.share for each in questions if each.question == STYLE_QUESTION), None)


def _nearer(continued: Continuation | None, baseline: str) -> float | None:
    versus = continued.true.versus.get(_WAY) if continued else None
    return versus[baseline].frames / continued.ahead if continued and versus else None


def _times(drawing: DrawingFigures | None) -> float | None:
    if drawing is None or drawing.retrieval is None:
        return None
    figures = drawing.retrieval
    return figures.found["drawn"].top10.share / max(figures.chance10, figures.found["bigram"].top10.share)
