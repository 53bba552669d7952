"""Continuations see nothing of what comes, baselines are what they say, and motion is measured as defined."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.data.media_dataset import to_pixels
from emulus.data.source import open_source
from emulus.engine import Request
from emulus.errors import EmulusError
from emulus.evaluate import perceptual
from emulus.evaluate.clips import ClipConfig, clip_figures, clips_to_draw, draw_clips
from emulus.evaluate.continuation import (
    BASELINES,
    BOUND,
    LOOP,
    REPEAT,
    REPEAT_PAINTED,
    ContinuationConfig,
    continuation,
)
from emulus.evaluate.held_out import Example, encode_examples
from emulus.evaluate.motion import motion
from emulus.evaluate.perceptual import perceptual_metric
from emulus.evaluate.reconstruction import painted
from emulus.evaluate.report import Curves, Gallery, Report, Table, write_report
from emulus.media import Clip, clip_to_pixels, keep_still
from emulus.pipeline import Emulus
from emulus.sampling import SamplingParams
from emulus.sequence import Image, Video, templates
from emulus.tokenizer.vision.metrics import psnr

needs_weights = pytest.mark.skipif(perceptual_metric() is None, reason="needs emulus[perceptual]")
HALF = ContinuationConfig(given=4, show=2)


@pytest.fixture(scope="module")
def clips(model: Emulus, data: Path) -> list[Example]:
    return encode_examples(model, [item for item in open_source(data) if item.kind == "video"])


def test_baselines_and_the_bound(model: Emulus, clips: list[Example]) -> None:
    found = continuation(model, clips, HALF)
    assert found is not None
    figures, strips = found
    assert (figures.count, figures.too_short, figures.given, figures.ahead) == (4, 0, 4, 4)
    assert set(figures.true.courses) == {"greedy", "sampled", *BASELINES, BOUND}
    pixels = torch.stack([to_pixels(clip.frames) for clip in clips])
    true, held = pixels[:, 4:], pixels[:, 3:4].expand(-1, 4, -1, -1, -1)
    shown = torch.stack([painted(model.vision, clip.media.codes) for clip in clips]).clamp(-1, 1)
    for name, frames in {REPEAT: held, LOOP: pixels[:, :4], BOUND: shown[:, 4:]}.items():
        # All clips in one picture: the error is averaged before decibels are taken.
        whole = [
            float(psnr(frames[:, ahead].flatten(1, 2)[None], true[:, ahead].flatten(1, 2)[None])) for ahead in range(4)
        ]
        assert figures.true.courses[name].psnr == pytest.approx(whole, abs=1e-3)
    assert torch.equal(strips[0].rows[REPEAT], held[0])
    assert torch.equal(strips[0].rows["true"], true[0])
    # Against themselves the reconstructed true frames would be perfect, so they are not among those compared.
    assert BOUND not in figures.shown.courses
    assert figures.shown.courses[REPEAT_PAINTED].mean_psnr > 0


@needs_weights
def test_against_baselines(model: Emulus, clips: list[Example]) -> None:
    found = continuation(model, clips, dataclasses.replace(HALF, ways=("greedy",)))
    assert found is not None
    figures, _ = found
    courses, versus = figures.true.courses, figures.true.versus["greedy"]
    assert set(versus) == set(BASELINES)
    for name, each in versus.items():
        ours, theirs = courses["greedy"].stlpips, courses[name].stlpips
        assert ours is not None
        assert theirs is not None
        assert each.frames == sum(a < b for a, b in zip(ours, theirs, strict=True))
        assert each.margin == pytest.approx(sum(theirs) / 4 - sum(ours) / 4, abs=1e-5)
        assert 0 <= each.clips <= 1
        assert each.error >= 0


def test_nothing_leaks_from_what_comes(model: Emulus, clips: list[Example]) -> None:
    changed = [
        dataclasses.replace(
            clip,
            frames=torch.cat([clip.frames[:4], 255 - clip.frames[4:]]),
            media=dataclasses.replace(
                clip.media, codes=torch.cat([clip.media.codes[:1], clip.media.codes[1:].flip(1)])
            ),
        )
        for clip in clips
    ]
    ours, theirs = (continuation(model, each, HALF, seed=3) for each in (clips, changed))
    assert ours is not None
    assert theirs is not None
    for one, other in zip(ours[1], theirs[1], strict=True):
        assert torch.equal(one.rows["greedy"], other.rows["greedy"])
        assert torch.equal(one.rows["sampled"], other.rows["sampled"])
        assert torch.equal(one.rows[LOOP], other.rows[LOOP])
        assert not torch.equal(one.rows["true"], other.rows["true"])


def test_continuations_are_the_pipeline_s(model: Emulus, clips: list[Example]) -> None:
    found = continuation(model, clips, HALF, seed=5)
    assert found is not None
    clip = clips[0]
    original = clip.original
    assert isinstance(original, Clip)
    start = Clip(original.frames[:4], original.fps)
    for way, temperature in {"greedy": 0.0, "sampled": model.defaults.temperature}.items():
        options = {"temperature": temperature, "guidance_scale": 1.0, "seed": 5}
        theirs = clip_to_pixels(model.continue_video(start, prompt=clip.caption, num_frames=8, **options))[4:]
        torch.testing.assert_close(found[1][0].rows[way].clamp(-1, 1), theirs, atol=1.01 / 127.5, rtol=0)


@pytest.mark.parametrize(("captioned", "guidance"), [(True, 1.0), (True, 6.0), (False, 6.0)])
def test_the_models_own_sampling_is_used(model: Emulus, clips: list[Example], captioned: bool, guidance: float) -> None:
    """Temperature, top-k and top-p of the model's defaults, guidance and caption as configured."""
    for change in ({"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.2}):
        own = dataclasses.replace(model.defaults, **change)
        choosy = Emulus(dataclasses.replace(model.bundle, defaults=own))
        config = dataclasses.replace(
            HALF, ways=("sampled",), captioned=captioned, guidance_scale=guidance, clips=1, show=1
        )
        found = continuation(choosy, clips, config, seed=2)
        assert found is not None
        assert found[0].guidance_scale == (guidance if captioned else 1.0)
        original = clips[0].original
        assert isinstance(original, Clip)
        start = Clip(original.frames[:4], original.fps)
        theirs = choosy.continue_video(
            start,
            prompt=clips[0].caption if captioned else "",
            num_frames=8,
            seed=2,
            guidance_scale=guidance,
            temperature=own.temperature,
            top_k=own.top_k,
            top_p=own.top_p,
        )
        ours = found[1][0].rows["sampled"].clamp(-1, 1)
        torch.testing.assert_close(ours, clip_to_pixels(theirs)[4:], atol=1.01 / 127.5, rtol=0)


@needs_weights
def test_figures_are_those_of_the_frames_that_are_shown(model: Emulus, clips: list[Example]) -> None:
    """Recomputed clip by clip from the frames of the report."""
    found = continuation(model, clips, dataclasses.replace(HALF, show=4), seed=1)
    assert found is not None
    figures, strips = found
    metric = perceptual_metric()
    assert metric is not None
    assert len(strips) == figures.count == 4

    def per_clip(name: str) -> torch.Tensor:
        return torch.stack([metric(strip.rows[name].clamp(-1, 1), strip.rows["true"]) for strip in strips])

    for name in ("greedy", "sampled", REPEAT, LOOP):
        course, near = figures.true.courses[name], per_clip(name)
        assert course.stlpips == pytest.approx(near.mean(0).tolist(), abs=1e-5)
        assert course.mean_stlpips == pytest.approx(float(near.mean()), abs=1e-5)
        errors = torch.cat([(strip.rows[name].clamp(-1, 1) - strip.rows["true"]).square() for strip in strips])
        assert course.mean_psnr == pytest.approx(float(10 * torch.log10(4 / errors.mean())), abs=1e-3)
    shares = set()
    for way, base in itertools.product(("greedy", "sampled"), (REPEAT, LOOP)):
        versus = figures.true.versus[way][base]
        margins = (per_clip(base) - per_clip(way)).mean(1)
        assert versus.margin == pytest.approx(float(margins.mean()), abs=1e-5)
        assert versus.error == pytest.approx(float(margins.std()) / len(margins) ** 0.5, abs=1e-5)
        assert versus.clips == float((margins > 0).float().mean())
        shares.add(versus.clips)
    assert shares != {0.5}, "shares of lost clips would be the same"


def test_what_is_shown_is_painted_from_codes_alone(model: Emulus, clips: list[Example]) -> None:
    """The second comparison: with nothing kept of the given pixels, against the true frames painted likewise."""
    found = continuation(model, clips, dataclasses.replace(HALF, ways=("sampled",)), seed=1)
    assert found is not None
    made, kept, true = [], [], []
    for clip in clips:
        start = model.vision.encode(to_pixels(clip.frames[:4])[None])[0]
        assert isinstance(clip.media, Video)
        prompt = templates.continue_video(model.grammar, clip.caption, Video(start, fps=clip.media.fps), 2)
        params = SamplingParams(top_k=model.defaults.top_k, seed=1, guidance_scale=1.0)
        (result,) = model.engine.generate([Request(prompt_ids=prompt.ids, may=prompt.may, params=params)])
        whole = model.grammar.parse([*prompt.ids, *result.ids]).document.segments[-1]
        assert isinstance(whole, Video)
        frames = painted(model.vision, whole.codes)
        made.append(frames[4:].clamp(-1, 1))
        kept.append(keep_still(frames, to_pixels(clip.frames[:4]), cell=model.vision.config.spatial_factor))
        true.append(painted(model.vision, clip.media.codes)[4:].clamp(-1, 1))
    errors = (torch.stack(made) - torch.stack(true)).square().flatten(2).mean((0, 2))
    expected = (10 * torch.log10(4 / errors)).tolist()
    assert found[0].shown.courses["sampled"].psnr == pytest.approx(expected, abs=1e-3)
    assert (torch.stack(made) - torch.stack(kept).clamp(-1, 1)).abs().max() > 0.1, "some pixels are kept elsewhere"


def test_motion_is_of_the_clips_it_is_named_after(model: Emulus, clips: list[Example]) -> None:
    drawn = draw_clips(model, clips[:2], seed=1)
    config = ClipConfig(continuation=dataclasses.replace(HALF, clips=0), drawn=2)
    found = clip_figures(model, clips, config, drawn=drawn)
    assert found is not None
    chosen = clips_to_draw(clips, config)
    expected = {
        "drawn": motion([to_pixels(clip) for clip in drawn], 4),
        "real": motion([to_pixels(clip.frames) for clip in chosen], 4),
        "reconstructed": motion([painted(model.vision, clip.media.codes) for clip in chosen], 4),
    }
    assert found[0].motion == expected
    assert len({each.difference for each in expected.values()}) == 3


def test_drawn_clips_are_those_of_the_pipeline(model: Emulus, clips: list[Example]) -> None:
    drawn = draw_clips(model, clips[:2], seed=9)
    theirs = model.generate_videos([clip.caption for clip in clips[:2]], seed=9)
    for clip, expected in zip(drawn, theirs, strict=True):
        torch.testing.assert_close(to_pixels(clip), clip_to_pixels(expected))
    assert not torch.equal(drawn[0], draw_clips(model, clips[:1], seed=8)[0])


def test_only_whole_clips_and_whole_codes(model: Emulus, clips: list[Example]) -> None:
    short = dataclasses.replace(
        clips[0],
        frames=clips[0].frames[:4],
        media=dataclasses.replace(clips[0].media, codes=clips[0].media.codes[:1]),
    )
    found = continuation(model, [short, *clips[1:]], HALF)
    assert found is not None
    assert (found[0].count, found[0].too_short) == (3, 1)
    assert continuation(model, [short], HALF) is None
    assert continuation(model, clips, dataclasses.replace(HALF, clips=0)) is None
    with pytest.raises(EmulusError, match="multiple of 4"):
        continuation(model, clips, ContinuationConfig(given=6))
    with pytest.raises(EmulusError, match="greedy and sampled"):
        ContinuationConfig(ways=("lucky",))  # type: ignore[arg-type]


def test_the_section(model: Emulus, data: Path, tmp_path: Path, check_page, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    examples = encode_examples(model, [item for item in open_source(data) if item.split != "train"])
    config = ClipConfig(continuation=HALF, drawn=2)
    chosen = clips_to_draw(examples, config)
    drawn = draw_clips(model, chosen, seed=1)
    assert [tuple(clip.shape) for clip in drawn] == [(8, 3, 16, 16)] * 2
    found = clip_figures(model, examples, config, seed=1, drawn=drawn)
    assert found is not None
    figures, section = found
    assert clip_figures(model, examples, config, seed=1) is not None
    assert set(figures.motion) == {"drawn", "real", "reconstructed"}
    assert {type(block) for block in section.blocks} >= {Curves, Gallery, Table}
    write_report(Report(title="clips", sections=(section,)), tmp_path / "report.html")
    page = check_page(tmp_path / "report.html")
    # A strip: four frames ahead in each of the five rows true, greedy, sampled, held and again.
    assert (4 * 16, 5 * 16) in [image.size for image in page.images]
    monkeypatch.setattr(perceptual, "available", lambda: False)
    without = clip_figures(model, examples, config, seed=1, drawn=drawn)
    assert without is not None
    assert without[0].continuation is not None
    assert without[0].continuation.true.courses["greedy"].stlpips is None
    assert without[0].continuation.true.versus == {}
    assert without[0].motion["real"].consistency is None
    write_report(Report(title="clips", sections=(without[1],)), tmp_path / "without.html")
    assert "emulus[perceptual]" in " ".join(check_page(tmp_path / "without.html").words)


def test_without_clips(model: Emulus, data: Path) -> None:
    pictures = encode_examples(model, [item for item in open_source(data) if item.kind == "image"][:2])
    assert all(isinstance(example.media, Image) for example in pictures)
    assert clip_figures(model, pictures) is None


def test_motion_of_known_clips() -> None:
    first, second = torch.full((1, 3, 32, 32), -1.0), torch.full((1, 3, 32, 32), 1.0)
    still = motion([first.expand(8, -1, -1, -1)], 4)
    assert (still.difference, still.moving, still.still, still.flicker, still.jumps) == (0, 0, 1, 0, None)
    blinking = motion([torch.cat([first, second] * 4)], 4)
    assert (blinking.difference, blinking.moving, blinking.still) == (1, 1, 0)
    assert blinking.flicker == pytest.approx(1)
    assert blinking.jumps == pytest.approx(1)
    fading = motion([torch.cat([first + step / 4 for step in range(8)])], 4)
    assert fading.difference == pytest.approx(1 / 8)
    assert fading.flicker == pytest.approx(0, abs=1e-6)
    # 0, 1, 2, 3 | 5, 6, 7, 8: twice as far from one code to the next.
    stepping = motion([torch.cat([first + step / 8 for step in (0, 1, 2, 3, 5, 6, 7, 8)])], 4)
    assert stepping.jumps == pytest.approx(2)
    # Clips of any length, and half of them still.
    both = motion([first.expand(4, -1, -1, -1), torch.cat([first, second] * 4)], 4)
    assert (both.count, both.difference, both.still) == (2, 0.5, 0.5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), frames=st.integers(3, 9))
def test_motion_is_the_same_backwards_and_mirrored(seed: int, frames: int) -> None:
    clip = torch.rand(frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    one, backwards, mirrored = (motion([each], 16) for each in (clip, clip.flip(0), clip.flip(-1)))
    for name in ("difference", "moving", "still", "flicker"):
        assert getattr(backwards, name) == pytest.approx(getattr(one, name), abs=1e-6)
        assert getattr(mirrored, name) == pytest.approx(getattr(one, name), abs=1e-6)
    if one.consistency is not None:
        assert backwards.consistency == pytest.approx(one.consistency, abs=1e-5)
        assert backwards.seam == pytest.approx(one.seam, abs=1e-5)


@needs_weights
def test_stlpips() -> None:
    pixels = torch.rand(3, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(perceptual.stlpips(pixels, pixels), torch.zeros(3))
    # Both are clipped; many are compared in pieces.
    torch.testing.assert_close(
        perceptual.stlpips(pixels * 3, pixels), perceptual.stlpips((pixels * 3).clamp(-1, 1), pixels)
    )
    many = pixels[:1].expand(perceptual.AT_ONCE + 1, -1, -1, -1)
    found = perceptual.stlpips(many, many.flip(-1))
    assert found.shape == (perceptual.AT_ONCE + 1,)
    torch.testing.assert_close(found, found[:1].expand_as(found))
