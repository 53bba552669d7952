"""prompt -> media: the whole path, readable in one sitting.

Drawing: caption -> template -> ids -> engine -> ids -> grammar -> codes -> vision tokenizer -> pixels -> picture.
Captioning runs the same path from the other end. No function here knows more of a task than its template's name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from PIL import Image as PILImage
from torch import Tensor

from emulus import __version__
from emulus.bundle import Bundle, load_bundle, load_default_vision, save_bundle
from emulus.engine import Engine, Frame, Request, Result, Row, Token
from emulus.errors import EmulusError, at_least
from emulus.log import logger, progress_bar
from emulus.media import (
    Clip,
    clip_to_pixels,
    fit,
    generation_size,
    image_to_pixels,
    pixels_to_clip,
    pixels_to_image,
    read_image,
    read_media,
    resample,
    resize,
    smart_resize,
)
from emulus.model import Decoder
from emulus.model.quantize import Quantization
from emulus.presets import GenerationDefaults, Preset, preset_called
from emulus.sampling import SamplingParams
from emulus.sequence import Grammar, Image, Prompt, Turn, Video, templates
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer

# What decides a picture; the rest of the sampling settings are of words.
_OF_PICTURES = ("seed", "temperature", "top_k", "top_p", "guidance_scale")

MediaSource = str | Path | bytes | PILImage.Image | Clip


def load(
    path: str | Path,
    *,
    vision: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype | str | None = "auto",
    quantize: Quantization | None = None,
    max_memory: Mapping[str, int] | None = None,
    revision: str | None = None,
    preset: str | None = None,
    compat: Literal["released"] | None = None,
) -> Emulus:
    """Load a model: ours, a released Emu3 checkpoint or one of transformers, from a folder or from the hub.

    Args:
        path: A model's folder, a training run's (its newest model), or a name on the hub (``BAAI/Emu3-Gen``,
            ``BAAI/Emu3-Gen@REVISION``).
        vision: Where the vision tokenizer is, if not there. For a released decoder that has none beside it, the
            released one is fetched when it is needed.
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` spreads a decoder over all GPUs, and over the CPU what they
            cannot hold.
        dtype: Of the decoder: ``float32``, ``bfloat16``, ``float16``; ``auto`` is float32, on a GPU bfloat16 for large
            models; ``None`` keeps the file's.
        quantize: ``int8`` or ``int4`` for the decoder's projections.
        max_memory: Bytes that the decoder may take on each device (``{"cuda:0": 20 * 2**30, "cpu": ...}``).
        revision: Branch, tag or commit of a model on the hub.
        preset: Whose prompts, sequences and defaults: ``native``, ``emu3``, ``emu3-base`` (Stage1's) or ``emu3.5``; by
            default what the model looks like.
        compat: ``released`` repeats what the released code does where Emulus knows better: specials in a user's text
            become specials, narrow and several pictures follow its rule, a batch may be padded.

    Returns:
        The model; a folder may hold only a part of one.

    Raises:
        EmulusError: There is no model, it is damaged, or it does not fit into memory.
    """
    _check_compat(compat)
    bundle = load_bundle(
        path,
        vision=vision,
        device=device,
        dtype=dtype,
        quantize=quantize,
        max_memory=max_memory,
        revision=revision,
        preset=preset,
    )
    return Emulus(bundle, compat=compat, device=device)


class Emulus:
    """A model that draws, animates, continues clips, and describes and answers questions about what it is shown.

    Every random result depends on its seed alone: not on the batch, nor on what was asked before.
    """

    def __init__(self, bundle: Bundle, *, compat: Literal["released"] | None = None, device: str = "auto") -> None:
        """Put the parts together.

        Args:
            bundle: The parts.
            compat: As for :func:`load`.
            device: Where a vision tokenizer that is fetched later shall lie.
        """
        _check_compat(compat)
        self.bundle = bundle
        self.compat = compat
        self._said: set[str] = set()
        self._device = device

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

    @cached_property
    def engine(self) -> Engine:
        """prompts -> ids."""
        return Engine(self.decoder, self.grammar)

    def save(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write every part to a folder that :func:`load` takes; ``dtype`` is the decoder's on disk."""
        save_bundle(self.bundle, Path(folder), dtype=dtype)

    # Prompts.

    def drawing_prompt(
        self, text: str, *, ratio: str = "1:1", image_area: int | None = None
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
        h, w = self._cells(None, None, ratio, image_area)
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
        media = self.encode_all(images, min_pixels=min_pixels, max_pixels=max_pixels)
        turn = Turn(text=text, media=tuple(media))
        return templates.converse(self.grammar, [turn], wording=self.preset.wording).ids

    # Drawing and animating.

    def generate_image(self, prompt: str, **options: Any) -> PILImage.Image:
        """Draw one picture; options as in :meth:`generate_images`."""
        return self.generate_images([prompt], **options)[0]

    def generate_images(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        ratio: str | Sequence[str] | None = None,
        image_area: int | None = None,
        seed: int = 0,
        num_images_per_prompt: int = 1,
        **sampling: Any,
    ) -> list[PILImage.Image]:
        """Draw pictures, all in one batch; each is what it would be by itself.

        Args:
            prompts: What each picture shows.
            negative_prompt: What guidance leads away from, "" for nothing in particular; the model's own by default.
            height: In pixels, a multiple of the vision tokenizer's factor; the model's own by default.
            width: Likewise.
            ratio: ``"width:height"`` instead of height and width, one for all or one for each prompt.
            image_area: Pixels of a picture of this ratio; the model's own by default.
            seed: Picture ``i`` of a prompt has seed ``seed + i``.
            num_images_per_prompt: How many pictures of each prompt, which follow one another in the result.
            sampling: ``temperature``, ``top_k``, ``top_p``, ``guidance_scale``.

        Returns:
            RGB pictures. How each was made is in its ``info["emulus"]``, as JSON, which
            :func:`emulus.media.write_image` keeps in PNG files.

        Raises:
            EmulusError: An empty prompt, a size that does not fit the model, or a value out of range.
        """
        self._expect("draw", prompts)
        at_least(1, num_images_per_prompt=num_images_per_prompt)
        _ = self.vision  # where it is missing, before hours of drawing
        ratios = [ratio] * len(prompts) if ratio is None or isinstance(ratio, str) else list(ratio)
        if len(ratios) != len(prompts):
            raise EmulusError(f"{len(ratios)} ratios are given for {len(prompts)} prompts; give one, or one for each")
        requests, notes = [], []
        for prompt, shape in zip(prompts, ratios, strict=True):
            drawn = self._drawing(prompt, negative_prompt, height, width, shape, image_area)
            for number in range(num_images_per_prompt):
                requests.append(self._request(drawn, seed + number, **sampling))
                notes.append({"prompt": prompt, "negative_prompt": self._negative(negative_prompt)})
        media = [self._medium(ids) for ids in self._finish(requests)]
        pictures = [pixels_to_image(self._paint(medium.codes[None])[0]) for medium in media]
        for picture, request, note in zip(pictures, requests, notes, strict=True):
            picture.info["emulus"] = self._record(picture, request, note)
        return pictures

    def stream_image(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        ratio: str | None = None,
        image_area: int | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> Iterator[PILImage.Image]:
        """Draw one picture and show it after every row of cells: the rows so far, the rest grey.

        Arguments as in :meth:`generate_images`. The last picture is the finished one. Closing the iterator stops.
        """
        drawing = self._drawing(prompt, negative_prompt, height, width, ratio, image_area)
        request = self._request(drawing, seed, **sampling)
        self._expect("draw")
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
        negative_prompt: str | None = None,
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
        self._expect("animate")
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
        negative_prompt: str | None = None,
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
        self._expect("animate", prompts)
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
        self._expect("continue")
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
            asked = templates.continue_video(self.grammar, prompt, video, end, wording=self.preset.wording)
            (ids,) = self._finish([self._request(asked, seed, **sampling)])
            frames += self._clip(self._medium(ids)).frames[len(seen) :]
            # The next window's positions are the same again; the same noise would repeat what they drew.
            seed += 1
        return Clip(tuple(frames), start.fps)

    # Describing and answering.

    def describe(self, media: MediaSource, **options: Any) -> str:
        """Write a caption for a picture or clip; options as in :meth:`describe_all`."""
        return self.describe_all([media], **options)[0]

    def describe_all(
        self,
        media: Sequence[MediaSource],
        *,
        seed: int = 0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **sampling: Any,
    ) -> list[str]:
        """Write a caption for each picture or clip, all in one batch; each is what it would be by itself.

        Args:
            media: Files, bytes, pictures or clips, brought to a size that the model takes.
            seed: Of every caption; it matters at a temperature above 0.
            min_pixels: Smaller pictures are scaled up to this area; the model's own by default.
            max_pixels: Larger ones are scaled down to this one; likewise.
            sampling: ``temperature``, ``top_k``, ``top_p``, ``guidance_scale`` (1 by default), ``max_new_tokens``.

        Raises:
            EmulusError: A file cannot be read, a picture is too large for the model's context, or an option is wrong.
        """
        self._expect("caption", media)
        params = self._text_params(seed, sampling)
        shown = [codes for medium in media for codes in self._shown([medium], min_pixels, max_pixels)]
        prompts = [templates.caption(self.grammar, codes, wording=self.preset.wording) for codes in shown]
        return self._write(prompts, params)

    def answer(
        self,
        media: MediaSource | Sequence[MediaSource],
        question: str,
        *,
        seed: int = 0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **sampling: Any,
    ) -> str:
        """Answer a question about a picture or clip, or about several; options as in :meth:`describe_all`."""
        self._expect("answer")
        _check_prompt(question)
        params = self._text_params(seed, sampling)
        sources = [media] if isinstance(media, MediaSource) else list(media)
        turn = Turn(text=question, media=tuple(self._shown(sources, min_pixels, max_pixels)))
        return self._write([templates.converse(self.grammar, [turn], wording=self.preset.wording)], params)[0]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        seed: int = 0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **sampling: Any,
    ) -> str:
        """Give the next answer of a conversation.

        Args:
            messages: In order, each ``{"role": "user", "content": ...}`` with role ``system`` (first, if at all),
                ``user`` or ``assistant``. The content is text, or a list of ``{"type": "text", "text": ...}``,
                ``{"type": "image", "image": ...}`` and ``{"type": "video", "video": ...}``, where pictures and clips
                are files, bytes, pictures or clips. A message's media stand where the model's prompts have them, which
                in Emu3's is before its words.
            seed: Matters at a temperature above 0.
            min_pixels: As in :meth:`describe_all`.
            max_pixels: Likewise.
            sampling: Likewise.

        Raises:
            EmulusError: The messages do not alternate, the last is not the user's, or a content is of no known kind.
        """
        self._expect("chat", messages)
        params = self._text_params(seed, sampling)
        system, turns = self._turns(messages, min_pixels, max_pixels)
        prompt = templates.converse(self.grammar, turns, system=system, wording=self.preset.wording)
        return self._write([prompt], params)[0]

    def _turns(
        self, messages: Sequence[Mapping[str, Any]], min_pixels: int | None, max_pixels: int | None
    ) -> tuple[str | None, list[Turn]]:
        system: str | None = None
        turns: list[Turn] = []
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping):
                raise EmulusError(f"message {index + 1} of the conversation is not {{'role': ..., 'content': ...}}")
            role = message.get("role")
            text, shown = _content(message.get("content"))
            open_turn = bool(turns) and turns[-1].answer is None
            if role == "system" and index == 0 and not shown:
                system = text
            elif role == "user" and not open_turn:
                turns.append(Turn(text=text, media=tuple(self._shown(shown, min_pixels, max_pixels))))
            elif role == "assistant" and open_turn and not shown:
                turns[-1] = dataclasses.replace(turns[-1], answer=text)
            else:
                raise EmulusError(
                    f"message {index + 1} of the conversation has role {role!r}: after a system message in words, if "
                    "any, 'user' and 'assistant' (in words) alternate, and the last is the user's"
                )
        return system, turns

    def _write(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[str]:
        requests = [_as_request(prompt, params) for prompt in prompts]
        return [self._text(list(result.ids)) for result in self._generate(requests)]

    def _text_params(self, seed: int, sampling: Mapping[str, Any]) -> SamplingParams:
        """How words are chosen; wrong options are found here, before a picture is read for them."""
        own = {
            "temperature": self.defaults.text_temperature,
            "max_new_tokens": self.defaults.max_text_tokens,
            "guidance_scale": 1.0,
        }
        return self._params(seed, **{**own, **sampling})

    def _text(self, ids: list[int]) -> str:
        start, stop = self.grammar.vocabulary.text_range
        return self.text.decode([i for i in ids if start <= i < stop]).strip()

    # pixels <-> codes, for media of any size.

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
        if padding_image and self.compat != "released":
            raise EmulusError("padding_image moves codes; load the model with compat='released' if you want that")
        _check_list(media)
        fitted = self._fit_all(media, min_pixels, max_pixels)
        pictures = [picture for picture in fitted if not isinstance(picture, Clip)]
        if padding_image and len(pictures) == len(fitted) > 1:
            return list(self._encode_padded(pictures))
        return [self._encode_fitted(each) for each in fitted]

    def _shown(
        self, media: Sequence[MediaSource], min_pixels: int | None = None, max_pixels: int | None = None
    ) -> list[Image | Video]:
        """Codes of what stands in one prompt; that the model's context has room for them is found before they are."""
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
        return [self._encode_fitted(each) for each in fitted]

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
        if isinstance(media, Clip):
            media = resample(media, fps)
        elif isinstance(media, PILImage.Image):
            media = read_image(media)
        else:
            media = read_media(media, fps=fps, max_frames=max_frames)
        if not isinstance(media, Clip):
            least = self.defaults.min_pixels if min_pixels is None else min_pixels
            most = self.defaults.max_pixels if max_pixels is None else max_pixels
            if least > most:
                raise EmulusError(f"min_pixels ({least}) must be at most max_pixels ({most})")
            if not most:
                return fit(media, height, width)
            factor = self.vision.config.spatial_factor
            sides = smart_resize(media.height, media.width, factor=factor, min_pixels=least, max_pixels=most)
            return resize(media, *sides)
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

    def _drawing(
        self,
        prompt: str,
        negative: str | None,
        height: int | None,
        width: int | None,
        ratio: str | None = None,
        image_area: int | None = None,
    ) -> Prompt:
        _check_prompt(prompt)
        h, w = self._cells(height, width, ratio, image_area)
        wording = self.preset.wording
        return templates.draw(self.grammar, prompt, h, w, negative=self._negative(negative), wording=wording)

    def _animation(
        self,
        prompt: str,
        negative: str | None,
        height: int | None,
        width: int | None,
        frames: int | None,
        fps: float | None,
    ) -> Prompt:
        _check_prompt(prompt)
        h, w = self._cells(height, width)
        t = self._code_frames(self.defaults.num_frames if frames is None else frames)
        rate = self.defaults.fps if fps is None else fps
        away, wording = self._negative(negative), self.preset.wording
        return templates.animate(self.grammar, prompt, t, h, w, rate, negative=away, wording=wording)

    def _expect(self, task: str, items: Any = ()) -> None:
        """Say once if the model was not trained for what is asked of it; refuse a single item where a list is meant."""
        _check_list(items)
        if self.bundle.tasks and task not in self.bundle.tasks and task not in self._said:
            self._said.add(task)
            logger.warning("%s was trained to %s, not to %s", self.bundle.source, _and(self.bundle.tasks), task)

    def _negative(self, given: str | None) -> str:
        return self.defaults.negative_prompt if given is None else given

    def _record(self, picture: PILImage.Image, request: Request, note: Mapping[str, Any]) -> str:
        """How a picture was made, as JSON."""
        size = {"height": picture.height, "width": picture.width}
        sampling = {name: value for name, value in dataclasses.asdict(request.params).items() if name in _OF_PICTURES}
        made_by = {"model": self.bundle.source, **self.bundle.loading, "compat": self.compat, "emulus": __version__}
        return json.dumps({**note, **size, **sampling, **made_by}, ensure_ascii=False)

    def _request(self, prompt: Prompt, seed: int, **sampling: Any) -> Request:
        return _as_request(prompt, self._params(seed, **sampling))

    def _params(self, seed: int, **sampling: Any) -> SamplingParams:
        """The model's own settings, but for what is given."""
        defaults = {name: getattr(self.defaults, name) for name in ("temperature", "top_k", "top_p", "guidance_scale")}
        values = {**defaults, "seed": seed, **{name: value for name, value in sampling.items() if value is not None}}
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        for name in values.keys() - known:
            raise EmulusError(f"unknown option {name!r}; choose from {', '.join(sorted(known))}")
        return SamplingParams(**values)

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
        # What stands before it was given, and is not looked at: with compat a text may hold any special.
        start = max(place for place, id in enumerate(ids) if id == self.grammar.vocabulary.boi)
        try:
            (medium,) = self.grammar.parse(ids[start:]).document.segments
        except (EmulusError, ValueError):
            if self.compat is None:
                raise
            raise EmulusError(
                "by the released rule this picture is not whole: it is narrow or not the first; leave compat away"
            ) from None
        assert isinstance(medium, Image | Video), "BOI begins a medium"
        return medium

    def _cells(
        self, height: int | None, width: int | None, ratio: str | None = None, image_area: int | None = None
    ) -> tuple[int, int]:
        """Rows and columns of codes."""
        factor = self._spatial_factor()
        if ratio is not None or image_area is not None:
            if height is not None or width is not None:
                raise EmulusError("give height and width, or ratio and image_area, not both")
            area = self.defaults.height * self.defaults.width if image_area is None else image_area
            return generation_size(ratio or "1:1", area, factor=factor)
        sides = {
            "height": self.defaults.height if height is None else height,
            "width": self.defaults.width if width is None else width,
        }
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
        if num_frames < factor or num_frames % factor:
            near = max(round(num_frames / factor), 1) * factor
            raise EmulusError(f"num_frames must be a multiple of {factor}, got {num_frames}; the nearest is {near}")
        return num_frames // factor


def _present(part: Any, name: str) -> Any:
    if part is None:
        raise EmulusError(f"this model has no {name}: its folder does not hold one")
    return part


def _check_compat(compat: str | None) -> None:
    if compat not in (None, "released"):
        raise EmulusError(f"unknown compat {compat!r}; it is 'released' or None")


def _check_list(items: Any) -> None:
    """A single text or picture where several are meant would be taken apart."""
    if isinstance(items, str | bytes | Path | PILImage.Image | Clip | Mapping) or not isinstance(items, Sequence):
        raise EmulusError(f"several items are expected here, not one {type(items).__name__}: put it into a list")


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _as_request(prompt: Prompt, params: SamplingParams) -> Request:
    return Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids, may=prompt.may, params=params)


def _content(content: Any) -> tuple[str, list[MediaSource]]:
    """Text and media of a message."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
        raise EmulusError("a message's content is text, or a list of {'type': 'text', 'text': ...} and the like")
    texts: list[str] = []
    media: list[MediaSource] = []
    for part in parts:
        kind = part.get("type")
        value = part.get(kind) if isinstance(kind, str) else None
        if kind == "text" and isinstance(value, str):
            texts.append(value)
        elif kind in ("image", "video") and isinstance(value, MediaSource):
            media.append(value)
        else:
            raise EmulusError(
                f"a part of a message is of type {kind!r} with {type(value).__name__} in it; give 'text' with words, "
                "or 'image' or 'video' with a file, bytes, a picture or a clip"
            )
    return " ".join(texts), media


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise EmulusError("the prompt is empty: say what to draw, animate or answer")
