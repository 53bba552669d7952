"""prompt -> media: the whole path, readable in one sitting.

Drawing: caption -> template -> ids -> engine -> ids -> grammar -> codes -> vision tokenizer -> pixels -> picture.
Captioning runs the same path from the other end. No function here knows more of a task than its template's name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Generator, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image as PILImage
from torch import Tensor

from emulus import __version__
from emulus.bundle import Bundle
from emulus.checks import several, shown, whole
from emulus.engine import Engine, Frame, Request, Result, Row, TextPiece, Token
from emulus.engine.scores import score
from emulus.errors import EmulusError
from emulus.log import progress_bar
from emulus.media import Clip, MediaSource, clip_to_pixels, keep_still, pixels_to_clip, pixels_to_image
from emulus.options import EngineOptions
from emulus.presets import MOST_TRIES
from emulus.prompts import Prompter, as_request
from emulus.sequence import Image, Video, templates

# What decides a picture; the rest of the sampling settings are of words.
_OF_PICTURES = ("seed", "temperature", "top_k", "top_p", "guidance_scale")


MOST_IMAGES = 2**16
"""Most images of one prompt in a call."""


class Drawn(NamedTuple):
    """A picture as codes, what was asked of the engine for it, and what the user had asked."""

    codes: Image | Video
    request: Request
    note: Mapping[str, Any]


class Emulus(Prompter):
    """A model that draws, animates, continues clips, and describes and answers questions about what it is shown.

    Every random result depends on its seed alone: not on the batch, nor on what was asked before.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        compat: Literal["released"] | None = None,
        device: str = "auto",
        options: EngineOptions | None = None,
    ) -> None:
        """Put the parts together.

        Args:
            bundle: The parts.
            compat: As for :func:`load`.
            device: Where a vision tokenizer that is fetched later shall lie.
            options: How the engine runs.
        """
        super().__init__(bundle, compat=compat, device=device)
        self.options = options or EngineOptions()

    @cached_property
    def engine(self) -> Engine:
        """prompts -> ids."""
        return self.options.engine(self.decoder, self.grammar)

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
        seed: int | None = None,
        num_images_per_prompt: int | None = None,
        best_of: int | None = None,
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
            best_of: How many are drawn for each of these, of which the one is kept whose caption the model itself would
                most likely find the prompt to be; the model's own by default, 1 draws no others. At temperature 0 there
                are no others.
            sampling: ``temperature``, ``top_k``, ``top_p``, ``guidance_scale``.

        Returns:
            RGB pictures. How each was made is in its ``info["emulus"]``, as JSON, which
            :func:`emulus.media.write_image` keeps in PNG files.

        Raises:
            EmulusError: An empty prompt, a size that does not fit the model, or a value out of range.
        """
        self._expect("draw", prompts=prompts)
        each = 1 if num_images_per_prompt is None else num_images_per_prompt
        numbers = range(whole("num_images_per_prompt", each, least=1, most=MOST_IMAGES))
        first = self._params(seed, sampling).seed
        ratios = [ratio] * len(prompts) if ratio is None or isinstance(ratio, str) else several("ratio", ratio, str)
        if len(ratios) != len(prompts):
            raise EmulusError(f"{len(ratios)} ratios are given for {len(prompts)} prompts; give one, or one for each")
        drawn = self.draw_codes(
            [prompt for prompt in prompts for _ in numbers],
            [(first + number) % 2**63 for _ in prompts for number in numbers],
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            ratios=[shape for shape in ratios for _ in numbers],
            image_area=image_area,
            best_of=best_of,
            **sampling,
        )
        return [
            self._recorded(pixels_to_image(self._paint(codes.codes[None])[0]), request, note)
            for codes, request, note in drawn
        ]

    def draw_codes(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        ratios: Sequence[str | None] | None = None,
        image_area: int | None = None,
        best_of: int | None = None,
        **sampling: Any,
    ) -> list[Drawn]:
        """Draw one picture for each prompt, as codes.

        Args:
            prompts: What each picture shows.
            seeds: Of each picture, as many as prompts.
            negative_prompt: As in :meth:`generate_images`, like all that follow.
            height: Of all pictures.
            width: Of all pictures.
            ratios: Of each picture.
            image_area: Of all pictures.
            best_of: Drawn for each picture.
            sampling: Of all pictures.
        """
        self._expect("draw", prompts=prompts, seeds=seeds)
        shapes = [None] * len(prompts) if ratios is None else several("ratios", ratios, str)
        if not len(prompts) == len(seeds) == len(shapes):
            raise EmulusError(f"{len(prompts)} prompts, {len(seeds)} seeds and {len(shapes)} ratios; give one of each")
        tries = whole("best_of", self._own("best_of", best_of), least=1, most=MOST_TRIES)
        # Without noise all tries would be the same.
        tries = tries if self._params(None, sampling).temperature else 1
        if tries > 1:
            self._expect("caption")
        _ = self.vision  # where it is missing, before hours of drawing
        requests: list[Request] = []
        for prompt, seed, ratio in zip(prompts, seeds, shapes, strict=True):
            drawing = self._drawing(prompt, negative_prompt, height, width, ratio, image_area)
            first = self._request(drawing, seed, **sampling)
            requests += [_with_seed(first, each) for each in _apart(first.params.seed, tries)]
        media = [self._medium(ids) for ids in self._finish(requests)]
        found = []
        for prompt, start in zip(prompts, range(0, len(media), tries), strict=True):
            kept = start + self.likeliest(prompt, media[start : start + tries])
            found.append(Drawn(media[kept], requests[kept], self._note(prompt, negative_prompt)))
        return found

    def likeliest(self, prompt: str, media: Sequence[Image | Video]) -> int:
        """Which of some pictures or clips, as codes, the model would most likely give the prompt as a caption."""
        for medium in several("media", media, MediaSource):
            _check_codes(medium, self.grammar.vocabulary.visual_size)
        self._check_text("prompt", prompt)
        if len(media) == 1:
            return 0
        if not media:
            raise EmulusError("media is empty: give at least one image or clip, as codes")
        wording = self.preset.wording
        documents = [templates.captioned(self.grammar, medium, prompt, wording=wording) for medium in media]
        longest, context = max(len(ids) for ids, _ in documents), self.decoder.config.max_position_embeddings
        if longest > context:
            raise EmulusError(
                f"an image or clip and its caption take {longest} ids, but the model's longest sequence is {context}; "
                "give smaller ones, or fewer words"
            )
        words = [np.arange(len(ids)) >= start for ids, start in documents]
        scores = score(self.decoder, [np.array(ids) for ids, _ in documents], words, what="looking at them")
        return int(np.argmax([each.sum() for each in scores]))

    def stream_image(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        ratio: str | None = None,
        image_area: int | None = None,
        seed: int | None = None,
        **sampling: Any,
    ) -> Generator[PILImage.Image]:
        """Draw one picture and show it after every row of cells: the rows so far, the rest grey.

        Arguments as in :meth:`generate_images`, but one picture is drawn and shown, whatever the model's ``best_of``.
        The last picture is the finished one. Closing the iterator stops the drawing and frees its memory.
        """
        self._expect("draw")
        drawing = self._drawing(prompt, negative_prompt, height, width, ratio, image_area)
        return self._growing(self._request(drawing, seed, **sampling), self._note(prompt, negative_prompt))

    def _growing(self, request: Request, note: Mapping[str, Any]) -> Generator[PILImage.Image]:
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
                yield self._recorded(pixels_to_image(pixels), request, note)

    def stream_video(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        seed: int | None = None,
        **sampling: Any,
    ) -> Generator[Clip]:
        """Animate one prompt and show the clip so far after every frame of codes (four frames of pixels).

        Arguments as in :meth:`generate_videos`. The last clip is the finished one. Closing the iterator stops.
        """
        self._expect("animate")
        animation = self._animation(prompt, negative_prompt, height, width, num_frames, fps)
        return self._lengthening(self._request(animation, seed, **sampling))

    def _lengthening(self, request: Request) -> Generator[Clip]:
        frames: list[Tensor] = []
        for event in self.engine.stream(request):
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
        seed: int | None = None,
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
        self._expect("animate", prompts=prompts)
        requests = []
        for prompt in prompts:
            animation = self._animation(prompt, negative_prompt, height, width, num_frames, fps)
            requests.append(self._request(animation, seed, **sampling))
        return [self._clip(self._medium(request)) for request in self._finish(requests)]

    def continue_video(
        self,
        clip: MediaSource,
        *,
        prompt: str | None = None,
        num_frames: int | None = None,
        seed: int | None = None,
        **sampling: Any,
    ) -> Clip:
        """Go on with a clip, for as long as wanted.

        What does not move keeps the pixels of the last given frame (see :func:`emulus.media.still.keep_still`).

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
        prompt = "" if prompt is None else prompt
        self._check_text("prompt", prompt)
        # Guidance has nothing to lead away from then.
        sampling = sampling if prompt else {**sampling, "guidance_scale": 1.0}
        params = self._params(seed, sampling)
        start, total = self._start_and_total(clip, num_frames)
        frames = list(start.frames)
        factor = self.vision.config.temporal_factor
        window = max(self._code_frames(self.defaults.num_frames), 2)
        while len(frames) < total:
            seen = frames if len(frames) < window * factor else frames[-(window // 2) * factor :]
            video = self._encode_clip(Clip(tuple(seen), start.fps))
            end = min(window, len(video.codes) + (total - len(frames)) // factor)
            asked = templates.continue_video(self.grammar, prompt, video, end, wording=self.preset.wording)
            (ids,) = self._finish([as_request(asked, params)])
            painted, given = self._paint(self._medium(ids).codes[None])[0], clip_to_pixels(Clip(tuple(seen), start.fps))
            further = keep_still(painted, given, cell=self.vision.config.spatial_factor)
            frames += pixels_to_clip(further, start.fps).frames
            # The next window's positions are the same again; the same noise would repeat what they drew.
            params = dataclasses.replace(params, seed=(params.seed + 1) % 2**63)
        return Clip(tuple(frames), start.fps)

    # Describing and answering.

    def describe(self, media: MediaSource, **options: Any) -> str:
        """Write a caption for a picture or clip; options as in :meth:`describe_all`."""
        return self.describe_all([media], **options)[0]

    def describe_all(
        self,
        media: Sequence[MediaSource],
        *,
        seed: int | None = None,
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
        options = {"seed": seed, "min_pixels": min_pixels, "max_pixels": max_pixels, **sampling}
        return self._write(self._captioning(media, **options))

    def answer(self, media: MediaSource | Sequence[MediaSource], question: str, **options: Any) -> str:
        """Answer a question about a picture or clip, or about several; options as in :meth:`describe_all`."""
        return self._write([self._answering(media, question, **options)])[0]

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Give the next answer of a conversation.

        Args:
            messages: In order, each ``{"role": "user", "content": ...}`` with role ``system`` (first, if at all),
                ``user`` or ``assistant``. The content is text, or a list of ``{"type": "text", "text": ...}``,
                ``{"type": "image", "image": ...}`` and ``{"type": "video", "video": ...}``, where pictures and clips
                are files, bytes, pictures or clips. A message's media stand where the model's prompts have them, which
                in Emu3's is before its words.
            options: As in :meth:`describe_all`.

        Raises:
            EmulusError: The messages do not alternate, the last is not the user's, or a content is of no known kind.
        """
        return self._write([self._chatting(messages, **options)])[0]

    def stream_description(self, media: MediaSource, **options: Any) -> Generator[str]:
        """As :meth:`describe`, but give the words as they come; closing the iterator stops."""
        return self._pieces(*self._captioning([media], **options))

    def stream_answer(
        self, media: MediaSource | Sequence[MediaSource], question: str, **options: Any
    ) -> Generator[str]:
        """As :meth:`answer`, but give the words as they come; closing the iterator stops."""
        return self._pieces(self._answering(media, question, **options))

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Generator[str]:
        """As :meth:`chat`, but give the words as they come; closing the iterator stops."""
        return self._pieces(self._chatting(messages, **options))

    def _pieces(self, request: Request) -> Generator[str]:
        """What :meth:`_write` gives, piece by piece."""
        return _stripped(event.text for event in self.engine.stream(request) if isinstance(event, TextPiece))

    def _write(self, requests: Sequence[Request]) -> list[str]:
        return [self._text(list(result.ids)) for result in self._generate(requests)]

    def _text(self, ids: list[int]) -> str:
        start, stop = self.grammar.vocabulary.text_range
        return self.text.decode([i for i in ids if start <= i < stop]).strip()

    # codes -> pixels.

    def decode(self, media: Image | Video) -> PILImage.Image | Clip:
        """The picture or clip of codes."""
        _check_codes(media, self.vision.config.codebook_size)
        if isinstance(media, Video):
            return self._clip(media)
        return pixels_to_image(self._paint(media.codes[None])[0])

    def _clip(self, media: Image | Video) -> Clip:
        assert isinstance(media, Video), "the template opened a clip"
        return pixels_to_clip(self._paint(media.codes[None])[0], media.fps)

    def _paint(self, codes: Int[Tensor, "b *grid"]) -> Tensor:
        # Clones leave inference mode, so that callers may do with pixels what they like.
        return self.vision.decode(codes).float().cpu().clone()

    # Running the engine.

    def _note(self, prompt: str, negative_prompt: str | None) -> dict[str, Any]:
        return {"prompt": prompt, "negative_prompt": self._negative(negative_prompt)}

    def _recorded(self, picture: PILImage.Image, request: Request, note: Mapping[str, Any]) -> PILImage.Image:
        """A picture that says how it was made, as JSON."""
        size = {"height": picture.height, "width": picture.width}
        sampling = {name: value for name, value in dataclasses.asdict(request.params).items() if name in _OF_PICTURES}
        sampling["best_of"] = 1  # with its own seed it comes by itself
        made_by = {"model": self.bundle.source, **self.bundle.loading, "compat": self.compat, "emulus": __version__}
        schedule = {"schedule": repr(self.engine.schedule)}
        picture.info["emulus"] = json.dumps({**note, **size, **sampling, **schedule, **made_by}, ensure_ascii=False)
        return picture

    def _generate(self, requests: Sequence[Request]) -> list[Result]:
        """Run the engine, with a progress bar on a terminal."""
        with progress_bar(self.engine.most_new_tokens(requests), what="generating", unit=" ids") as bar:
            return self.engine.generate(
                requests,
                batch_size=self.options.batch_size,
                on_event=lambda event: bar.update() if isinstance(event, Token) else None,
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


def _with_seed(request: Request, seed: int) -> Request:
    return dataclasses.replace(request, params=dataclasses.replace(request.params, seed=seed))


def _check_codes(media: Image | Video, size: int) -> None:
    if not isinstance(media, Image | Video):
        raise EmulusError(f"an image or clip as codes is expected (Emulus.encode gives them), got {shown(media)}")
    low, high = int(media.codes.min()), int(media.codes.max())
    if not 0 <= low <= high < size:
        raise EmulusError(f"codes are 0 to {size - 1}, but {low} to {high} were given; are they another tokenizer's?")


def _apart(seed: int, tries: int) -> list[int]:
    """Seeds of so many pictures of which one is kept.

    They are far from those of other pictures, which would otherwise choose among the same ones.
    """
    return [(seed + 2**32 * number) % 2**63 if number else seed for number in range(tries)]


def _stripped(pieces: Iterable[str]) -> Generator[str]:
    """Text without blanks around it, though its end is not known before it is there."""
    begun, blanks = False, ""
    for piece in pieces:
        text = blanks + piece if begun else piece.lstrip()
        words = text.rstrip()
        begun, blanks = begun or bool(words), text[len(words) :]
        if words:
            yield words
