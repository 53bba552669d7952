"""what a user gives -> requests: words, sizes, pictures, clips, conversations and options, as the engine takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from PIL import Image as PILImage

from emulus.bundle import Bundle, load_default_vision, save_bundle
from emulus.checks import flag, number, several, shown, text, whole
from emulus.engine import Request
from emulus.errors import EmulusError, did_you_mean
from emulus.log import logger
from emulus.media import (
    Clip,
    MediaSource,
    clip_to_pixels,
    fit,
    generation_size,
    image_to_pixels,
    read_image,
    read_media,
    resample,
    resize,
    smart_resize,
)
from emulus.messages import MEDIA, read_messages
from emulus.model import Decoder
from emulus.presets import DRAWING, MOST_FRAMES, MOST_PIXELS, WRITING, GenerationDefaults, Preset, preset_called
from emulus.sampling import SamplingParams
from emulus.sequence import Grammar, Image, Prompt, Turn, Video, templates
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer

Value = TypeVar("Value")


class Prompter:
    """A model's parts, and all that is done before its decoder runs: media are encoded, prompts are written.

    Attributes:
        bundle: The parts, of which some may be missing.
        compat: ``released`` where the released code's ways are repeated.
    """

    def __init__(self, bundle: Bundle, *, compat: Literal["released"] | None = None, device: str = "auto") -> None:
        """Put the parts together.

        Args:
            bundle: The parts.
            compat: ``released`` repeats what the released code does where Emulus knows better.
            device: Where a vision tokenizer that is fetched later shall lie.
        """
        check_compat(compat)
        self.bundle = bundle
        self.compat = compat
        self._device = device
        self._said: set[str] = set()

    # The parts. Each says what is missing when the folder had only some of them.

    @property
    def decoder(self) -> Decoder:
        """ids -> logits."""
        return _present(self.bundle.decoder, "decoder")

    @property
    def vision(self) -> VisionTokenizer:
        """pixels <-> codes; fetched now if the decoder's folder lacks the one it was trained with."""
        if self.bundle.vision is None and self.bundle.default_vision is not None:
            self.bundle = dataclasses.replace(self.bundle, vision=load_default_vision(self.bundle, self._device))
        return _present(self.bundle.vision, "vision tokenizer")

    @property
    def text(self) -> TextTokenizer:
        """text <-> ids."""
        return _present(self.bundle.text, "text tokenizer")

    @property
    def defaults(self) -> GenerationDefaults:
        """What calls get that do not say otherwise."""
        return self.bundle.defaults

    @property
    def preset(self) -> Preset:
        """The prompts and sequences that the decoder was trained with."""
        return preset_called(self.bundle.preset)

    @cached_property
    def grammar(self) -> Grammar:
        """documents <-> ids."""
        vocabulary = _present(self.bundle.vocabulary, "vocabulary")
        return Grammar(vocabulary, self.text, self.preset.layout, compat=self.compat)

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write every part to a folder that :func:`emulus.load` takes; ``dtype`` is the decoder's on disk."""
        if not isinstance(folder, str | Path):
            raise EmulusError(f"folder is {shown(folder)} but must be a path")
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise EmulusError(f"dtype is {shown(dtype)} but must be a type of torch such as torch.bfloat16")
        save_bundle(self.bundle, Path(folder), dtype=dtype)

    # Prompts.

    def drawing_prompt(
        self, text: str, *, ratio: str | None = "1:1", image_area: int | None = None
    ) -> tuple[list[int], tuple[int, int]]:
        """The ids that ask for a picture, up to where its codes begin.

        Args:
            text: What it shows; also what guidance leads away from.
            ratio: ``"width:height"``.
            image_area: Pixels; the model's own by default.

        Returns:
            The ids, and the picture's rows and columns of codes.

        Raises:
            EmulusError: The ratio or area is none.
        """
        self._check_text("text", text)
        h, w = self._cells(None, None, "1:1" if ratio is None else ratio, image_area)
        return templates.draw(self.grammar, text, h, w, wording=self.preset.wording).ids, (h, w)

    def understanding_prompt(
        self,
        text: str,
        images: Sequence[MediaSource] = (),
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> list[int]:
        """The ids that ask a question about pictures, up to where the answer begins.

        Args:
            text: The question.
            images: Any number of pictures or clips.
            min_pixels: Smaller pictures are scaled up to this area; the model's own by default.
            max_pixels: Larger ones are scaled down to this one.

        Raises:
            EmulusError: A picture cannot be read or has an impossible shape.
        """
        self._check_text("text", text)
        media = self.encode_all(images, min_pixels=min_pixels, max_pixels=max_pixels)
        turn = Turn(text=text, media=tuple(media))
        return templates.converse(self.grammar, [turn], wording=self.preset.wording).ids

    def _drawing(
        self,
        prompt: str,
        negative: str | None,
        height: int | None,
        width: int | None,
        ratio: str | None = None,
        image_area: int | None = None,
    ) -> Prompt:
        self._check_prompt(prompt)
        h, w = self._cells(height, width, ratio, image_area)
        away, wording = self._negative(negative), self.preset.wording
        return templates.draw(self.grammar, prompt, h, w, negative=away, wording=wording)

    def _animation(
        self,
        prompt: str,
        negative: str | None,
        height: int | None,
        width: int | None,
        frames: int | None,
        fps: float | None,
    ) -> Prompt:
        self._check_prompt(prompt)
        h, w = self._cells(height, width)
        t = self._code_frames(self._own("num_frames", frames))
        rate = number("fps", self._own("fps", fps), above=0)
        away, wording = self._negative(negative), self.preset.wording
        return templates.animate(self.grammar, prompt, t, h, w, rate, negative=away, wording=wording)

    def _negative(self, given: str | None) -> str:
        negative = self._own("negative_prompt", given)
        self._check_text("negative_prompt", negative)
        return negative

    def _own(self, name: str, given: Value | None) -> Value:
        """What was given, or the model's own where that is None: the one place that knows what "not given" means."""
        return getattr(self.defaults, name) if given is None else given

    def _check_prompt(self, prompt: str, name: str = "prompt") -> None:
        self._check_text(name, prompt)
        if not prompt.strip():
            raise EmulusError(f"the {name} is empty: say what to draw, animate or answer")

    def _check_text(self, name: str, value: str) -> None:
        """That it is text, and no more of it than can be read: found before any work is done on it."""
        text(name, value)
        if self.bundle.decoder is None:
            return
        most = self.bundle.decoder.config.max_position_embeddings * self.text.longest
        if len(value) > most:
            raise EmulusError(
                f"{name} has {len(value):,} characters, more than the model's longest sequence can hold ({most:,}); "
                "shorten it"
            )

    # Requests: prompts, and how ids are drawn for them.

    def _captioning(
        self,
        media: Sequence[MediaSource],
        *,
        seed: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **sampling: Any,
    ) -> list[Request]:
        self._expect("caption", media=media)
        params = self._text_params(seed, sampling)
        shown = [codes for medium in media for codes in self._shown([medium], min_pixels, max_pixels)]
        prompts = [templates.caption(self.grammar, codes, wording=self.preset.wording) for codes in shown]
        return [as_request(prompt, params) for prompt in prompts]

    def _answering(
        self,
        media: MediaSource | Sequence[MediaSource],
        question: str,
        *,
        seed: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **sampling: Any,
    ) -> Request:
        self._expect("answer")
        self._check_prompt(question, "question")
        params = self._text_params(seed, sampling)
        sources = [media] if isinstance(media, MediaSource) else several("media", media, MediaSource)
        turn = Turn(text=question, media=tuple(self._shown(sources, min_pixels, max_pixels)))
        return as_request(templates.converse(self.grammar, [turn], wording=self.preset.wording), params)

    def _chatting(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        seed: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **sampling: Any,
    ) -> Request:
        self._expect("chat", messages=messages)
        params = self._text_params(seed, sampling)
        system, said = read_messages(messages)
        for place, each in enumerate(said, 1):
            self._check_text(f"question {place}", each.text)
            self._check_text(f"answer {place}", each.answer or "")
        self._check_text("the system message", system or "")
        turns = [
            Turn(text=each.text, media=tuple(self._shown(each.media, min_pixels, max_pixels)), answer=each.answer)
            for each in said
        ]
        prompt = templates.converse(self.grammar, turns, system=system, wording=self.preset.wording)
        return as_request(prompt, params)

    def _request(self, prompt: Prompt, seed: int | None, **sampling: Any) -> Request:
        return as_request(prompt, self._params(seed, sampling))

    def _params(self, seed: int | None, sampling: Mapping[str, Any]) -> SamplingParams:
        """How visual ids are chosen."""
        return self._merged(DRAWING, seed, sampling)

    def _text_params(self, seed: int | None, sampling: Mapping[str, Any]) -> SamplingParams:
        """How words are chosen; wrong options are found here, before an image is read for them."""
        unguided = sampling.get("guidance_scale") is None
        return self._merged(WRITING, seed, {**sampling, "guidance_scale": 1.0} if unguided else sampling)

    def _merged(self, own: Mapping[str, str], seed: int | None, sampling: Mapping[str, Any]) -> SamplingParams:
        """What was given, and for what is None the default that has the name beside it."""
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        for name in sampling.keys() - known:
            raise EmulusError(f"unknown option {shown(name)}{did_you_mean(name[:60], known)}")
        defaults = {option: self._own(default, sampling.get(option)) for option, default in own.items()}
        return SamplingParams(**{**sampling, **defaults, "seed": seed})

    def _expect(self, task: str, **items: Any) -> None:
        """Say once if the model was not trained for what is asked of it; refuse a single item where a list is meant."""
        for name, value in items.items():
            several(name, value, MediaSource)
        if self.bundle.tasks and task not in self.bundle.tasks and task not in self._said:
            self._said.add(task)
            logger.warning("%s was trained to %s, not to %s", self.bundle.source, _and(self.bundle.tasks), task)

    # pixels -> codes, for media of any size.

    def encode(self, media: MediaSource) -> Image | Video:
        """A picture or clip as codes; see :meth:`encode_all`."""
        return self.encode_all([media])[0]

    def encode_all(
        self,
        media: Sequence[MediaSource],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        padding_image: bool = False,
    ) -> list[Image | Video]:
        """Pictures and clips as codes, each by itself: what is beside it changes nothing.

        A model of one size gets pictures of that size, scaled and cropped; others get them at their own aspect, scaled
        into the allowed areas. Clips are brought to the model's own size and frame rate, and at most as many frames as
        the model's own clips have are taken, from the start.

        Args:
            media: Files, bytes, pictures or clips.
            min_pixels: Smaller pictures are scaled up to this area; the model's own by default.
            max_pixels: Larger ones are scaled down to this one; likewise.
            padding_image: With ``compat="released"``: encode pictures of unlike sizes in one batch, padded with grey at
                the right and below, as the released option of this name does. Their codes depend on one another then.

        Raises:
            EmulusError: One cannot be read, or a clip is shorter than one code in time.
        """
        padding_image = padding_image is not None and flag("padding_image", padding_image)
        if padding_image and self.compat != "released":
            raise EmulusError("padding_image moves codes; load the model with compat='released' if you want that")
        several("media", media, MediaSource)
        fitted = self._fit_all(media, min_pixels, max_pixels)
        pictures = [picture for picture in fitted if not isinstance(picture, Clip)]
        if padding_image and len(pictures) == len(fitted) > 1:
            return list(self._encode_padded(pictures))
        return [self._encode_fitted(each) for each in fitted]

    def _shown(
        self, media: Sequence[MediaSource], min_pixels: int | None = None, max_pixels: int | None = None
    ) -> list[Image | Video]:
        """Codes of what stands in one prompt; that the model's context has room for them is found before they are."""
        return [self._encode_fitted(each) for each in self.fitting(media, min_pixels, max_pixels)]

    def fitting(
        self, media: Sequence[MediaSource], min_pixels: int | None = None, max_pixels: int | None = None
    ) -> list[PILImage.Image | Clip]:
        """Read what is to be shown in one prompt, at the size and rate that the model takes; nothing is computed.

        Args:
            media: Files, bytes, images or clips.
            min_pixels: As for :meth:`encode_all`.
            max_pixels: Likewise.

        Raises:
            EmulusError: One cannot be read, or the model's context has no room for all of them.
        """
        fitted = self._fit_all(media, min_pixels, max_pixels)
        factor = self.vision.config.spatial_factor
        cells = 0
        for each in fitted:
            first = each.frames[0] if isinstance(each, Clip) else each
            frames = len(each.frames) // self.vision.config.temporal_factor if isinstance(each, Clip) else 1
            cells += frames * (first.height // factor) * (first.width // factor)
        context = self.decoder.config.max_position_embeddings
        if cells >= context:
            raise EmulusError(
                f"what is shown has {cells} codes, but the model's longest sequence is {context} ids; "
                "show less, or smaller: max_pixels"
            )
        return fitted

    def _fit_all(
        self, media: Sequence[MediaSource], min_pixels: int | None, max_pixels: int | None
    ) -> list[PILImage.Image | Clip]:
        return [self._fitted(medium, self.defaults.num_frames, min_pixels, max_pixels) for medium in media]

    def _encode_fitted(self, fitted: PILImage.Image | Clip) -> Image | Video:
        return self._encode_clip(fitted) if isinstance(fitted, Clip) else self._encode_picture(fitted)

    def _encode_picture(self, picture: PILImage.Image) -> Image:
        pixels = image_to_pixels(picture)
        return Image(self.vision.encode(pixels[None].to(self.vision.device))[0].cpu())

    def _encode_padded(self, pictures: Sequence[PILImage.Image]) -> Iterable[Image]:
        factor = self.vision.config.spatial_factor
        height, width = (max(getattr(picture, side) for picture in pictures) for side in ("height", "width"))
        batch = torch.zeros(len(pictures), 3, height, width)
        for row, picture in zip(batch, pictures, strict=True):
            row[:, : picture.height, : picture.width] = image_to_pixels(picture)
        codes = self.vision.encode(batch.to(self.vision.device)).cpu()
        for grid, picture in zip(codes, pictures, strict=True):
            yield Image(grid[: picture.height // factor, : picture.width // factor])

    def _fitted(
        self,
        media: MediaSource,
        max_frames: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> PILImage.Image | Clip:
        """A picture, or a clip cut to whole codes in time, at a size that the model takes."""
        height, width, fps = self.defaults.height, self.defaults.width, self.defaults.fps
        least = whole("min_pixels", self._own("min_pixels", min_pixels), most=MOST_PIXELS**2)
        most = whole("max_pixels", self._own("max_pixels", max_pixels), most=MOST_PIXELS**2)
        if not isinstance(media, MediaSource):
            raise EmulusError(f"{shown(media)} is no image or clip: give {MEDIA}")
        if isinstance(media, Clip):
            media = resample(media, fps)
        elif isinstance(media, PILImage.Image):
            media = read_image(media)
        else:
            media = read_media(media, fps=fps, max_frames=max_frames)
        if not isinstance(media, Clip):
            if least > most:
                raise EmulusError(f"min_pixels ({least}) must be at most max_pixels ({most})")
            if not most:
                return fit(media, height, width)
            factor = self.vision.config.spatial_factor
            if most < factor**2:
                raise EmulusError(f"max_pixels is {most} but must be at least {factor**2}, one code")
            sides = smart_resize(media.height, media.width, factor=factor, min_pixels=least, max_pixels=most)
            return resize(media, *sides)
        factor = self.vision.config.temporal_factor
        frames = media.frames[:max_frames]
        kept = frames[: len(frames) // factor * factor]
        if not kept:
            raise EmulusError(f"the clip has {len(frames)} frames at {fps:g} fps, but {factor} make one code")
        return Clip(tuple(fit(frame, height, width) for frame in kept), fps)

    def _start_and_total(self, clip: MediaSource, num_frames: int | None) -> tuple[Clip, int]:
        """A clip to go on with, as the model takes it, and how many frames the result has."""
        factor = self.vision.config.temporal_factor
        if num_frames is not None:
            self._code_frames(num_frames)  # before the clip is read
        start = self._fitted(clip)
        if not isinstance(start, Clip):
            raise EmulusError("a picture cannot be continued: give a clip")
        frames = len(start.frames)
        total = factor * self._code_frames(2 * frames if num_frames is None else num_frames)
        if total <= frames:
            raise EmulusError(f"the clip has {frames} frames; num_frames must be more, got {total}")
        return start, total

    def _encode_clip(self, clip: Clip) -> Video:
        pixels = clip_to_pixels(clip)[None].to(self.vision.device)
        return Video(self.vision.encode(pixels)[0].cpu(), fps=clip.fps)

    # Sizes in codes.

    def _cells(
        self, height: int | None, width: int | None, ratio: str | None = None, image_area: int | None = None
    ) -> tuple[int, int]:
        """Rows and columns of codes."""
        factor = self._spatial_factor()
        if ratio is not None or image_area is not None:
            if height is not None or width is not None:
                raise EmulusError("give height and width, or ratio and image_area, not both")
            area = self.defaults.height * self.defaults.width if image_area is None else image_area
            area = whole("image_area", area, most=MOST_PIXELS**2)
            return generation_size("1:1" if ratio is None else text("ratio", ratio), area, factor=factor)
        given = {"height": self._own("height", height), "width": self._own("width", width)}
        sides = {name: whole(name, side, least=1, most=MOST_PIXELS) for name, side in given.items()}
        for name, side in sides.items():
            if side < factor or side % factor:
                near = max(round(side / factor), 1) * factor
                raise EmulusError(f"{name} must be a multiple of {factor}, got {side}; the nearest is {near}")
        return sides["height"] // factor, sides["width"] // factor

    def _spatial_factor(self) -> int:
        """Pixels per code along a side; a released decoder's is known without its vision tokenizer."""
        if self.bundle.vision is None and self.preset.spatial_factor is not None:
            return self.preset.spatial_factor
        return self.vision.config.spatial_factor

    def _code_frames(self, num_frames: int) -> int:
        factor = self.vision.config.temporal_factor
        num_frames = whole("num_frames", num_frames, least=1, most=MOST_FRAMES)
        if num_frames < factor or num_frames % factor:
            near = max(round(num_frames / factor), 1) * factor
            raise EmulusError(f"num_frames must be a multiple of {factor}, got {num_frames}; the nearest is {near}")
        return num_frames // factor


def _present(part: Any, name: str) -> Any:
    if part is None:
        raise EmulusError(f"this model has no {name}: its folder does not hold one")
    return part


def as_request(prompt: Prompt, params: SamplingParams) -> Request:
    """A prompt and how its ids are drawn, as the engine takes them."""
    return Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids, may=prompt.may, params=params)


def check_compat(compat: str | None) -> None:
    """Refuse what is no way to be compatible.

    Raises:
        EmulusError: It is neither ``"released"`` nor None.
    """
    if compat is not None and not (isinstance(compat, str) and compat == "released"):
        raise EmulusError(f"unknown compat {shown(compat)}; it is 'released' or None")


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]
