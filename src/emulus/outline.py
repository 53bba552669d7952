"""a folder or a name -> a model without its weights: everything that can be checked of a request is checked on it.

Small files and headers are read, so a wrong size, prompt, option or file is found in a second, not after gigabytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from emulus.bundle import Bundle
from emulus.checks import number, whole
from emulus.engine import Request
from emulus.engine.walk import Walk
from emulus.hub import fetch
from emulus.layouts import inspect_folder, read_text, with_vision
from emulus.media import MediaSource
from emulus.model import Decoder
from emulus.presets import MOST_TRIES, defaults_of, preset_called
from emulus.prompts import Prompter
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.weights import on_meta


class Shape(NamedTuple):
    """What will come out, in pixels; an image is one frame."""

    height: int
    width: int
    frames: int = 1
    fps: float = 1.0


class Outline(Prompter):
    """Checks what would be asked of a model."""

    @classmethod
    def of(
        cls,
        path: str | Path,
        *,
        vision: str | Path | None = None,
        preset: str | None = None,
        compat: Literal["released"] | None = None,
    ) -> Outline:
        """Read what a folder or a model on the hub says of itself; arguments as for :func:`emulus.load`.

        Raises:
            EmulusError: There is no model, or its small files or headers are damaged.
        """
        contents = inspect_folder(fetch(path))
        if preset is not None:
            preset_called(preset)
            contents = dataclasses.replace(contents, preset=preset)
        if vision is not None:
            contents = with_vision(contents, fetch(vision))
        decoder, seer = contents.decoder, contents.vision
        if seer is None and contents.preset in ("emu3", "emu3-base"):
            seer = VisionTokenizerConfig()  # the released one, which is fetched when it is needed
        bundle = Bundle(
            decoder=None if decoder is None else on_meta(lambda: Decoder(decoder)),
            vision=None if seer is None else on_meta(lambda: VisionTokenizer(seer)),
            text=read_text(contents),
            vocabulary=contents.vocabulary,
            defaults=defaults_of(contents),
            preset=contents.preset,
            source=str(path),
        )
        return cls(bundle, compat=compat)

    def drawing(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        ratio: str | None = None,
        image_area: int | None = None,
        best_of: int | None = None,
        seed: int | None = None,
        **sampling: Any,
    ) -> Shape:
        """Check what :meth:`emulus.pipeline.Emulus.generate_image` would be given.

        Raises:
            EmulusError: As there.
        """
        whole("best_of", self._own("best_of", best_of), least=1, most=MOST_TRIES)
        asked = self._drawing(prompt, negative_prompt, height, width, ratio, image_area)
        self._fits(self._request(asked, seed, **sampling))
        h, w = self._cells(height, width, ratio, image_area)
        factor = self._spatial_factor()
        return Shape(h * factor, w * factor)

    def animation(
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
    ) -> Shape:
        """Check what :meth:`emulus.pipeline.Emulus.generate_video` would be given.

        Raises:
            EmulusError: As there.
        """
        asked = self._animation(prompt, negative_prompt, height, width, num_frames, fps)
        self._fits(self._request(asked, seed, **sampling))
        h, w = (cells * self._spatial_factor() for cells in self._cells(height, width))
        return Shape(
            h, w, whole("num_frames", self._own("num_frames", num_frames)), number("fps", self._own("fps", fps))
        )

    def continuation(
        self,
        clip: MediaSource,
        *,
        prompt: str | None = None,
        num_frames: int | None = None,
        seed: int | None = None,
        **sampling: Any,
    ) -> Shape:
        """Check what :meth:`emulus.pipeline.Emulus.continue_video` would be given.

        Raises:
            EmulusError: As there.
        """
        self._check_text("prompt", prompt or "")
        self._params(seed, sampling)
        start, total = self._start_and_total(clip, num_frames)
        first = start.frames[0]
        return Shape(first.height, first.width, total, start.fps)

    def showing(
        self,
        media: Sequence[MediaSource],
        question: str | None = None,
        *,
        max_pixels: int | None = None,
        seed: int | None = None,
        **sampling: Any,
    ) -> None:
        """Check what would be shown in one prompt, and what is asked about it.

        Raises:
            EmulusError: A file cannot be read, or there is no room for it, or an option is wrong.
        """
        if question is not None:
            self._check_prompt(question, "question")
        self._text_params(seed, sampling)
        self.fitting(media, None, max_pixels)

    def _fits(self, request: Request) -> None:
        Walk(0, request, self.grammar, self.decoder.config.max_position_embeddings)
