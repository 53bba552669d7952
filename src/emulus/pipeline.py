"""prompt -> media: the whole path, readable in one sitting.

Drawing: caption -> template -> ids -> engine -> ids -> grammar -> codes -> vision tokenizer -> pixels -> picture.
Captioning runs the same path from the other end. No function here knows more of a task than its template's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image as PILImage
from torch import Tensor

from emulus.bundle import Bundle, GenerationDefaults, load_bundle, save_bundle
from emulus.engine import Engine, Frame, Request, Result, Row, Token
from emulus.errors import EmulusError, at_least
from emulus.log import progress_bar
from emulus.media import (
    Clip,
    clip_to_pixels,
    fit,
    image_to_pixels,
    pixels_to_clip,
    pixels_to_image,
    read_image,
    read_media,
    resample,
)
from emulus.model import Decoder
from emulus.sampling import SamplingParams
from emulus.sequence import Grammar, Image, Prompt, Video, templates
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer

MediaSource = str | Path | bytes | PILImage.Image | Clip


def load(path: str | Path, *, device: str = "auto", dtype: torch.dtype | None = torch.float32) -> Emulus:
    """Load a model.

    Args:
        path: A model's folder, or a training run's (its newest model).
        device: ``auto``, ``cpu``, ``cuda`` ...
        dtype: Of the decoder; float32 is the fastest and most exact on most CPUs, bfloat16 is for GPUs.

    Returns:
        The model; a folder may hold only a part of one.

    Raises:
        EmulusError: There is no model, or it is damaged.
    """
    return Emulus(load_bundle(path, device=device, dtype=dtype))


class Emulus:
    """A model that draws, animates, continues clips, and describes and answers questions about what it is shown.

    Every random result depends on its seed alone: not on the batch, nor on what was asked before.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    # The parts. Each says what is missing when the folder had only some of them.

    @property
    def decoder(self) -> Decoder:
        """ids -> logits."""
        return _present(self.bundle.decoder, "decoder")

    @property
    def vision(self) -> VisionTokenizer:
        """pixels <-> codes."""
        return _present(self.bundle.vision, "vision tokenizer")

    @property
    def text(self) -> TextTokenizer:
        """text <-> ids."""
        return _present(self.bundle.text, "text tokenizer")

    @property
    def defaults(self) -> GenerationDefaults:
        """What calls get that do not say otherwise."""
        return self.bundle.defaults

    @cached_property
    def grammar(self) -> Grammar:
        """documents <-> ids."""
        return Grammar(_present(self.bundle.vocabulary, "vocabulary"), self.text)

    @cached_property
    def engine(self) -> Engine:
        """prompts -> ids."""
        return Engine(self.decoder, self.grammar)

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write every part to a folder that :func:`load` takes; ``dtype`` is the decoder's on disk."""
        save_bundle(self.bundle, Path(folder), dtype=dtype)

    # Drawing and animating.

    def generate_image(self, prompt: str, **options: Any) -> PILImage.Image:
        """Draw one picture; options as in :meth:`generate_images`."""
        return self.generate_images([prompt], **options)[0]

    def generate_images(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        num_images_per_prompt: int = 1,
        **sampling: Any,
    ) -> list[PILImage.Image]:
        """Draw pictures, all in one batch.

        Args:
            prompts: What each picture shows.
            negative_prompt: What guidance leads away from; empty is "nothing in particular".
            height: In pixels, a multiple of the vision tokenizer's factor; the model's own by default.
            width: Likewise.
            seed: Picture ``i`` of a prompt has seed ``seed + i``.
            num_images_per_prompt: How many pictures of each prompt, which follow one another in the result.
            sampling: ``temperature``, ``top_k``, ``top_p``, ``guidance_scale``.

        Returns:
            RGB pictures.

        Raises:
            EmulusError: An empty prompt, a size that does not fit the model, or a value out of range.
        """
        at_least(1, num_images_per_prompt=num_images_per_prompt)
        requests = []
        for prompt in prompts:
            drawn = self._drawing(prompt, negative_prompt, height, width)
            requests += [self._request(drawn, seed + i, **sampling) for i in range(num_images_per_prompt)]
        codes = torch.stack([self._medium(request).codes for request in self._finish(requests)])
        return [pixels_to_image(pixels) for pixels in self._paint(codes)]

    def stream_image(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> Iterator[PILImage.Image]:
        """Draw one picture and show it after every row of cells: the rows so far, the rest grey.

        Arguments as in :meth:`generate_images`. The last picture is the finished one. Closing the iterator stops.
        """
        request = self._request(self._drawing(prompt, negative_prompt, height, width), seed, **sampling)
        factor = self.vision.config.spatial_factor
        rows: list[Tensor] = []
        for event in self.engine.stream(request):
            if isinstance(event, Row):
                rows.append(torch.tensor(event.codes))
                # Rows that are not there yet repeat the last one: the painter looks at neighbours, and a repetition
                # disturbs it least.
                codes = torch.stack(rows + rows[-1:] * (event.size.h - len(rows)))
                pixels = self._paint(codes[None])[0]
                pixels[:, len(rows) * factor :] = 0.0
                yield pixels_to_image(pixels)

    def stream_video(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> Iterator[Clip]:
        """Animate one prompt and show the clip so far after every frame of codes (four frames of pixels).

        Arguments as in :meth:`generate_videos`. The last clip is the finished one. Closing the iterator stops.
        """
        animation = self._animation(prompt, negative_prompt, height, width, num_frames, fps)
        frames: list[Tensor] = []
        for event in self.engine.stream(self._request(animation, seed, **sampling)):
            if isinstance(event, Frame):
                frames.append(torch.tensor(event.codes).reshape(event.size.h, event.size.w))
                # The layers see backwards only, so frames that are there already do not change.
                yield self._clip(Video(torch.stack(frames), fps=event.size.fps or self.defaults.fps))

    def generate_video(self, prompt: str, **options: Any) -> Clip:
        """Animate one prompt; options as in :meth:`generate_videos`."""
        return self.generate_videos([prompt], **options)[0]

    def generate_videos(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> list[Clip]:
        """Animate prompts, all in one batch.

        Args:
            num_frames: Length in frames, a multiple of the temporal factor; the model's own by default.
            fps: Frame rate, which the model is told; the model's own by default.
            prompts: What each clip shows.
            negative_prompt: As for pictures.
            height: As for pictures.
            width: As for pictures.
            seed: Of every clip.
            sampling: As for pictures.

        Raises:
            EmulusError: As for pictures.
        """
        requests = []
        for prompt in prompts:
            animation = self._animation(prompt, negative_prompt, height, width, num_frames, fps)
            requests.append(self._request(animation, seed, **sampling))
        return [self._clip(self._medium(request)) for request in self._finish(requests)]

    def continue_video(
        self, clip: MediaSource, *, prompt: str = "", num_frames: int | None = None, seed: int = 0, **sampling: Any
    ) -> Clip:
        """Go on with a clip, for as long as wanted.

        A pass sees at most as many frames as the model's clips have (``defaults.num_frames``). A longer result is made
        in several: each starts from the last half of such a window.

        Args:
            clip: A clip (a file, its bytes, or a :class:`Clip`), brought to the model's size and frame rate; what is
                beyond the last whole code in time is cut.
            prompt: What the clip shows, if known.
            num_frames: Length of the result, the given frames included; twice the given ones by default.
            seed: Of the result.
            sampling: As for pictures; guidance leads away from "no prompt", so it has no effect without one.

        Returns:
            The given frames and the new ones.

        Raises:
            EmulusError: The clip cannot be read or leaves nothing to add.
        """
        start = self._fitted(clip)
        if not isinstance(start, Clip):
            raise EmulusError("a picture cannot be continued: give a clip")
        frames = list(start.frames)
        factor = self.vision.config.temporal_factor
        total = factor * self._code_frames(2 * len(frames) if num_frames is None else num_frames)
        if total <= len(frames):
            raise EmulusError(f"the clip has {len(frames)} frames; num_frames must be more, got {total}")
        if not prompt:
            sampling["guidance_scale"] = 1.0
        window = max(self._code_frames(self.defaults.num_frames), 2)
        while len(frames) < total:
            seen = frames if len(frames) < window * factor else frames[-(window // 2) * factor :]
            video = self._encode_clip(Clip(tuple(seen), start.fps))
            end = min(window, len(video.codes) + (total - len(frames)) // factor)
            asked = templates.continue_video(self.grammar, prompt, video, end)
            (ids,) = self._finish([self._request(asked, seed, **sampling)])
            frames += self._clip(self._medium(ids)).frames[len(seen) :]
            # The next window's positions are the same again; the same noise would repeat what they drew.
            seed += 1
        return Clip(tuple(frames), start.fps)

    # Describing and answering.

    def describe(self, media: MediaSource, **options: Any) -> str:
        """Write a caption for a picture or clip; options as in :meth:`describe_all`."""
        return self.describe_all([media], **options)[0]

    def describe_all(self, media: Sequence[MediaSource], *, seed: int = 0, **sampling: Any) -> list[str]:
        """Write a caption for each picture or clip, all in one batch.

        Args:
            media: Files, bytes, pictures or clips, brought to the model's size.
            seed: Of every caption; it matters at a temperature above 0.
            sampling: ``temperature``, ``top_k``, ``top_p``, ``guidance_scale`` (1 by default), ``max_new_tokens``.
        """
        prompts = [templates.caption(self.grammar, self.encode(medium)) for medium in media]
        return self._write(prompts, seed, sampling)

    def answer(self, media: MediaSource, question: str, *, seed: int = 0, **sampling: Any) -> str:
        """Answer a question about a picture or clip; sampling as in :meth:`describe_all`."""
        _check_prompt(question)
        return self._write([templates.answer(self.grammar, self.encode(media), question)], seed, sampling)[0]

    def _write(self, prompts: Sequence[Prompt], seed: int, sampling: dict[str, Any]) -> list[str]:
        own = {
            "temperature": self.defaults.text_temperature,
            "max_new_tokens": self.defaults.max_text_tokens,
            "guidance_scale": 1.0,
            **sampling,
        }
        requests = [self._request(prompt, seed, **own) for prompt in prompts]
        return [self._text(list(result.ids)) for result in self._generate(requests)]

    def _text(self, ids: list[int]) -> str:
        start, stop = self.grammar.vocabulary.text_range
        return self.text.decode([i for i in ids if start <= i < stop]).strip()

    # pixels <-> codes, for media of any size.

    def encode(self, media: MediaSource) -> Image | Video:
        """A picture or clip as codes, after bringing it to the model's own size and frame rate.

        Of a clip, at most as many frames as the model's own clips have are taken, from the start.

        Raises:
            EmulusError: It cannot be read, or the clip is shorter than one code in time.
        """
        fitted = self._fitted(media, self.defaults.num_frames)
        if isinstance(fitted, Clip):
            return self._encode_clip(fitted)
        pixels = image_to_pixels(fitted)
        return Image(self.vision.encode(pixels[None].to(self.vision.device))[0].cpu())

    def _fitted(self, media: MediaSource, max_frames: int | None = None) -> PILImage.Image | Clip:
        """A picture, or a clip cut to whole codes in time, at the model's size and frame rate."""
        height, width, fps = self.defaults.height, self.defaults.width, self.defaults.fps
        if isinstance(media, Clip):
            media = resample(media, fps)
        elif isinstance(media, PILImage.Image):
            media = read_image(media)
        else:
            media = read_media(media, fps=fps, max_frames=max_frames)
        if not isinstance(media, Clip):
            return fit(media, height, width)
        factor = self.vision.config.temporal_factor
        frames = media.frames[:max_frames]
        whole = frames[: len(frames) // factor * factor]
        if not whole:
            raise EmulusError(f"the clip has {len(frames)} frames at {fps:g} fps, but {factor} make one code")
        return Clip(tuple(fit(frame, height, width) for frame in whole), fps)

    def _encode_clip(self, clip: Clip) -> Video:
        pixels = clip_to_pixels(clip)[None].to(self.vision.device)
        return Video(self.vision.encode(pixels)[0].cpu(), fps=clip.fps)

    def decode(self, media: Image | Video) -> PILImage.Image | Clip:
        """The picture or clip of codes."""
        if isinstance(media, Video):
            return self._clip(media)
        return pixels_to_image(self._paint(media.codes[None])[0])

    def _clip(self, media: Image | Video) -> Clip:
        assert isinstance(media, Video), "the template opened a clip"
        return pixels_to_clip(self._paint(media.codes[None])[0], media.fps)

    def _paint(self, codes: Int[Tensor, "b *grid"]) -> Tensor:
        # Clones leave inference mode, so that callers may do with pixels what they like.
        return self.vision.decode(codes.to(self.vision.device)).float().cpu().clone()

    # Requests.

    def _drawing(self, prompt: str, negative: str, height: int | None, width: int | None) -> Prompt:
        _check_prompt(prompt)
        h, w = self._cells(height, width)
        asked, away = (templates.draw(self.grammar, text, h, w) for text in (prompt, negative))
        return dataclasses.replace(asked, null_ids=away.ids)

    def _animation(
        self, prompt: str, negative: str, height: int | None, width: int | None, frames: int | None, fps: float | None
    ) -> Prompt:
        _check_prompt(prompt)
        h, w = self._cells(height, width)
        t = self._code_frames(self.defaults.num_frames if frames is None else frames)
        rate = self.defaults.fps if fps is None else fps
        asked, away = (templates.animate(self.grammar, text, t, h, w, rate) for text in (prompt, negative))
        return dataclasses.replace(asked, null_ids=away.ids)

    def _request(self, prompt: Prompt, seed: int, **sampling: Any) -> Request:
        defaults = {name: getattr(self.defaults, name) for name in ("temperature", "top_k", "top_p", "guidance_scale")}
        values = {**defaults, "seed": seed, **{name: value for name, value in sampling.items() if value is not None}}
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        for name in values.keys() - known:
            raise EmulusError(f"unknown option {name!r}; choose from {', '.join(sorted(known))}")
        return Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids, may=prompt.may, params=SamplingParams(**values))

    def _generate(self, requests: Sequence[Request]) -> list[Result]:
        """Run the engine, with a progress bar on a terminal."""
        with progress_bar(self.engine.most_new_tokens(requests), what="generating", unit="id") as bar:
            return self.engine.generate(
                requests, on_event=lambda event: bar.update() if isinstance(event, Token) else None
            )

    def _finish(self, requests: Sequence[Request]) -> list[list[int]]:
        """Prompt and generated ids of each request."""
        results = self._generate(requests)
        return [[*request.prompt_ids, *result.ids] for request, result in zip(requests, results, strict=True)]

    def _medium(self, ids: Sequence[int]) -> Image | Video:
        """The last picture or clip of a sequence."""
        segments = self.grammar.parse(ids).document.segments
        return next(segment for segment in reversed(segments) if isinstance(segment, Image | Video))

    def _cells(self, height: int | None, width: int | None) -> tuple[int, int]:
        factor = self.vision.config.spatial_factor
        sides = {
            "height": self.defaults.height if height is None else height,
            "width": self.defaults.width if width is None else width,
        }
        for name, side in sides.items():
            if side < factor or side % factor:
                near = max(round(side / factor), 1) * factor
                raise EmulusError(f"{name} must be a multiple of {factor}, got {side}; the nearest is {near}")
        return sides["height"] // factor, sides["width"] // factor

    def _code_frames(self, num_frames: int) -> int:
        factor = self.vision.config.temporal_factor
        if num_frames < factor or num_frames % factor:
            near = max(round(num_frames / factor), 1) * factor
            raise EmulusError(f"num_frames must be a multiple of {factor}, got {num_frames}; the nearest is {near}")
        return num_frames // factor


def _present(part: Any, name: str) -> Any:
    if part is None:
        raise EmulusError(f"this model has no {name}: its folder does not hold one")
    return part


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise EmulusError("the prompt is empty: say what to draw, animate or answer")
