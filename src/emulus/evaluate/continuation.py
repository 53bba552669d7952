"""Held-out clips of which the model sees the first frames: how near to the true ones it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from emulus.data.media_dataset import to_pixels
from emulus.data.source import even
from emulus.engine import Event, Frame, Request
from emulus.errors import EmulusError, at_least
from emulus.evaluate.held_out import Example
from emulus.evaluate.perceptual import Metric, perceptual_metric
from emulus.evaluate.reconstruction import painted
from emulus.log import logger
from emulus.media import keep_still
from emulus.pipeline import Emulus
from emulus.sampling import SamplingParams
from emulus.sequence import Video, templates

Way = Literal["greedy", "sampled"]
"""How the next codes are chosen: the likeliest, or drawn as the model draws by default."""

# What needs no model: the last given frame held, or the given frames played again, from their own pixels and from those
# that the vision tokenizer makes of them.
REPEAT, LOOP = "last frame held", "given frames again"
REPEAT_PAINTED, LOOP_PAINTED = f"{REPEAT}, reconstructed", f"{LOOP}, reconstructed"
BASELINES = (REPEAT, LOOP, REPEAT_PAINTED, LOOP_PAINTED)
BOUND = "true frames, reconstructed"
"""No continuation can be expected to beat this."""

Pixels = Float[Tensor, "t 3 h w"]


@dataclass(frozen=True, kw_only=True)
class ContinuationConfig:
    """How many clips are continued, and how.

    Attributes:
        clips: Most clips; 0 for none. Clips shorter than the model's own are left out, so that all figures along the
            clip are of the same clips.
        given: Frames that the model sees first, whole codes.
        captioned: Whether it is told the clip's caption, too.
        ways: How it chooses codes.
        guidance_scale: Away from "no caption"; 1 is none, and takes half the time.
        show: Continuations kept to be looked at.
    """

    clips: int = 24
    given: int = 8
    captioned: bool = True
    ways: tuple[Way, ...] = get_args(Way)
    guidance_scale: float = 1.0
    show: int = 6

    def __post_init__(self) -> None:
        at_least(0, clips=self.clips, show=self.show)
        at_least(1, given=self.given)
        if not self.ways or not set(self.ways) <= set(get_args(Way)):
            raise EmulusError(f"ways to continue a clip are {' and '.join(get_args(Way))}, not {', '.join(self.ways)}")


@dataclass(frozen=True, kw_only=True)
class Course:
    """How far frames are from the true ones, by how far ahead they lie.

    Attributes:
        psnr: Of the squared error averaged over the clips, in dB; the mean of the clips' own would be infinite where a
            frame that is held is the true one.
        stlpips: Mean over the clips; ``None`` without the extra ``emulus[perceptual]``.
        mean_psnr: Of the squared error averaged over clips and frames, in dB.
        mean_stlpips: Mean over clips and frames.
    """

    psnr: tuple[float, ...]
    stlpips: tuple[float, ...] | None
    mean_psnr: float
    mean_stlpips: float | None


@dataclass(frozen=True, kw_only=True)
class Versus:
    """Continuations against a baseline, by ST-LPIPS.

    Attributes:
        frames: At how many of the frames ahead the mean over the clips is below the baseline's.
        clips: Share of the clips whose mean over the frames ahead is below the baseline's.
        margin: Mean of the clips' differences, baseline less model.
        error: Standard error of the margin.
    """

    frames: int
    clips: float
    margin: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Continuations and baselines, as near as they come to the same frames.

    Attributes:
        courses: By name: the ways of the model, and the baselines.
        versus: By way of the model and by baseline; empty without the extra ``emulus[perceptual]``.
    """

    courses: dict[str, Course]
    versus: dict[str, dict[str, Versus]]


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Clips that the model went on with.

    What needs no model copies original pixels, while what the model makes comes from its vision tokenizer, but for the
    given pixels that are kept where nothing moves. So there are two comparisons: of what
    :meth:`Emulus.continue_video` shows with the true frames, which nothing flatters, and of what is painted from codes
    alone with the true frames painted likewise, which leaves what the vision tokenizer loses out of all of them.

    Attributes:
        count: How many clips.
        too_short: Clips that were left out.
        given: Frames seen.
        ahead: Frames made.
        captioned: Whether the model was told the caption.
        guidance_scale: Of the model.
        ways: How codes were chosen.
        true: Against the true frames, beside all ``BASELINES`` and ``BOUND``.
        shown: Against the true frames as the vision tokenizer shows them, beside the reconstructed baselines.
    """

    count: int
    too_short: int
    given: int
    ahead: int
    captioned: bool
    guidance_scale: float
    ways: tuple[Way, ...]
    true: Comparison
    shown: Comparison


@dataclass(frozen=True, kw_only=True)
class Strip:
    """A continuation to look at.

    Attributes:
        caption: Of the clip.
        rows: The frames ahead, by where they come from; the true ones first.
    """

    caption: str
    rows: dict[str, Pixels]


def continuation(
    model: Emulus, clips: Sequence[Example], config: ContinuationConfig | None = None, *, seed: int = 0
) -> tuple[Continuation, tuple[Strip, ...]] | None:
    """Go on with clips and compare the new frames with the true ones.

    Args:
        model: A whole model. It sees the first frames, encoded by themselves, and no pixel of the others.
        clips: Held-out clips, of which those of the model's own length are taken, evenly spread.
        config: How many, and how.
        seed: Of what is drawn.

    Returns:
        Figures, and some continuations to look at; ``None`` where no clip is long enough.

    Raises:
        EmulusError: ``given`` is no multiple of the frames of a code.
    """
    config = config or ContinuationConfig()
    given, factor = config.given, model.vision.config.temporal_factor
    if given % factor:
        raise EmulusError(f"{given} frames cannot be given: {factor} make one code, so give a multiple of {factor}")
    length = model.defaults.num_frames // factor * factor
    whole = [clip for clip in clips if len(clip.frames) == length > given]
    chosen = even(whole, config.clips)
    if not chosen:
        return None
    truth = [to_pixels(clip.frames)[given:] for clip in chosen]
    made: dict[str, list[Pixels]] = {}
    from_codes: dict[str, list[Pixels]] = {}
    for way in config.ways:
        logger.info(f"continuing {len(chosen)} clips, {way}")
        wholes = _continued(model, chosen, config, way, seed)
        from_codes[way] = [frames[given:] for frames in wholes]
        made[way] = [
            keep_still(frames, to_pixels(clip.frames[:given]), cell=model.vision.config.spatial_factor)
            for frames, clip in zip(wholes, chosen, strict=True)
        ]
    beside = _without_model(model, chosen, given)
    figures = Continuation(
        count=len(chosen),
        too_short=len(clips) - len(whole),
        given=given,
        ahead=length - given,
        captioned=config.captioned,
        guidance_scale=config.guidance_scale if config.captioned else 1.0,
        ways=config.ways,
        true=_compare(made, beside, truth),
        shown=_compare(from_codes, {name: beside[name] for name in (REPEAT_PAINTED, LOOP_PAINTED)}, beside[BOUND]),
    )
    rows = {"true": truth, **made, REPEAT: beside[REPEAT], LOOP: beside[LOOP]}
    strips = tuple(
        Strip(
            caption=chosen[place].caption,
            rows={name: frames[place] for name, frames in rows.items()},
        )
        for place in even(range(len(chosen)), config.show)
    )
    return figures, strips


def _continued(
    model: Emulus, clips: Sequence[Example], config: ContinuationConfig, way: Way, seed: int
) -> list[Pixels]:
    """Each clip from its first frame on, as painted from codes, all clips in one batch."""
    defaults = model.defaults
    params = SamplingParams(
        temperature=defaults.temperature if way == "sampled" else 0.0,
        top_k=defaults.top_k,
        top_p=defaults.top_p,
        guidance_scale=config.guidance_scale if config.captioned else 1.0,
        seed=seed,
    )
    requests: list[Request] = []
    codes: list[list[Tensor]] = []
    for clip in clips:
        assert isinstance(clip.media, Video), "pictures are not continued"
        start = _encoded(model, clip.frames[: config.given])
        prompt = templates.continue_video(
            model.grammar,
            clip.caption if config.captioned else "",
            Video(start, fps=clip.media.fps),
            len(clip.media.codes),
            wording=model.preset.wording,
        )
        codes.append([start])
        requests.append(Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids, may=prompt.may, params=params))

    def collect(event: Event) -> None:
        if isinstance(event, Frame):
            codes[event.request].append(torch.tensor(event.codes).reshape(1, event.size.h, event.size.w))

    model.engine.generate(requests, batch_size=model.options.batch_size, on_event=collect)
    return [painted(model.vision, torch.cat(each)) for each in codes]


def _encoded(model: Emulus, frames: UInt8[Tensor, "t 3 h w"]) -> Int[Tensor, "k h w"]:
    """Codes of frames that are all there is: what comes after them cannot leak in."""
    return model.vision.encode(to_pixels(frames)[None].to(model.vision.device))[0].cpu()


def _without_model(model: Emulus, clips: Sequence[Example], given: int) -> dict[str, list[Pixels]]:
    """The frames ahead as they come for nothing, and as well as the vision tokenizer can show them."""
    found: dict[str, list[Pixels]] = {name: [] for name in (*BASELINES, BOUND)}
    for clip in clips:
        ahead = len(clip.frames) - given
        own = to_pixels(clip.frames[:given])
        again = painted(model.vision, _encoded(model, clip.frames[:given]))
        for pixels, repeat, loop in ((own, REPEAT, LOOP), (again, REPEAT_PAINTED, LOOP_PAINTED)):
            found[repeat].append(pixels[-1:].expand(ahead, -1, -1, -1))
            found[loop].append(pixels[torch.arange(ahead) % given])
        found[BOUND].append(painted(model.vision, clip.media.codes)[given:])
    return found


def _compare(
    made: Mapping[str, Sequence[Pixels]], beside: Mapping[str, Sequence[Pixels]], truth: Sequence[Pixels]
) -> Comparison:
    metric = perceptual_metric()
    scores = {name: _Scores.of(frames, truth, metric) for name, frames in {**made, **beside}.items()}
    bases = [name for name in beside if name != BOUND]
    return Comparison(
        courses={name: each.course for name, each in scores.items()},
        versus={way: {name: scores[way].versus(scores[name]) for name in bases} for way in made} if metric else {},
    )


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """By clip, and by how far ahead a frame lies."""

    errors: Float[Tensor, "clips ahead"]
    stlpips: Float[Tensor, "clips ahead"] | None

    @classmethod
    def of(cls, frames: Sequence[Pixels], truth: Sequence[Pixels], metric: Metric | None) -> _Scores:
        made, true = (torch.cat(list(each)).clamp(-1, 1) for each in (frames, truth))
        shape = (len(frames), -1)
        return cls(
            errors=(made - true).square().flatten(1).mean(1).reshape(shape),
            stlpips=metric(made, true).reshape(shape) if metric else None,
        )

    @property
    def course(self) -> Course:
        return Course(
            psnr=tuple(_decibels(self.errors.mean(0)).tolist()),
            stlpips=None if self.stlpips is None else tuple(self.stlpips.mean(0).tolist()),
            mean_psnr=float(_decibels(self.errors.mean())),
            mean_stlpips=None if self.stlpips is None else float(self.stlpips.mean()),
        )

    def versus(self, other: _Scores) -> Versus:
        assert self.stlpips is not None, "without distances there is nothing to compare"
        assert other.stlpips is not None, "without distances there is nothing to compare"
        margins = (other.stlpips - self.stlpips).mean(1)
        return Versus(
            frames=int((self.stlpips.mean(0) < other.stlpips.mean(0)).sum()),
            clips=float((margins > 0).float().mean()),
            margin=float(margins.mean()),
            error=float(margins.std(correction=0) / max(len(margins) - 1, 1) ** 0.5),
        )


def _decibels(errors: Tensor) -> Tensor:
    # The range of pixels is 2 wide, so the squared peak is 4.
    return 10 * torch.log10(4 / errors.clamp_min(1e-10))
