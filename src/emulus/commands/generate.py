"""Drawing, describing and continuing from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

import emulus
from emulus.errors import EmulusError
from emulus.media import check_writable, write_image, write_video

Options = TypeVar("Options")
MODEL = Path("checkpoints/emoji")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Draw a picture, or a clip.

    Attributes:
        prompt: What it shows.
        model: A model's folder or a training run's.
        out: The file to write; its ending chooses the format (.png .jpg .webp, for clips .webp .mp4 .gif .webm).
        video: A clip instead of a picture.
        negative_prompt: What to lead away from.
        height: In pixels; the model's own size by default.
        width: In pixels.
        num_frames: Length of a clip.
        fps: Frame rate of a clip.
        seed: The same seed gives the same picture.
        num_images: How many pictures, numbered from the second on.
        guidance_scale: How strongly to follow the prompt; 1 is unguided.
        temperature: 0 takes the likeliest id each time.
        top_k: Choose among this many likeliest ids.
        top_p: Choose among the likeliest ids of this total probability.
        device: ``auto``, ``cpu``, ``cuda`` ...
    """

    prompt: Annotated[str, tyro.conf.Positional]
    model: Path = MODEL
    out: Path | None = None
    video: bool = False
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    seed: int = 0
    num_images: int = 1
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class DescribeOptions:
    """Write a caption, or answer a question.

    Attributes:
        file: A picture or clip.
        question: Answer this instead of writing a caption.
        model: A model's folder or a training run's.
        seed: Matters at a temperature above 0.
        temperature: 0 takes the likeliest id each time.
        device: ``auto``, ``cpu``, ``cuda`` ...
    """

    file: Annotated[Path, tyro.conf.Positional]
    question: str | None = None
    model: Path = MODEL
    seed: int = 0
    temperature: float | None = None
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class ContinueOptions:
    """Go on with a clip.

    Attributes:
        file: The clip.
        model: A model's folder or a training run's.
        out: The file to write; its ending chooses the format (.webp .mp4 .gif .webm).
        prompt: What the clip shows, if known.
        num_frames: Length of the result, the given frames included; twice the given ones by default.
        seed: The same seed gives the same clip.
        guidance_scale: How strongly to follow the prompt; 1 is unguided.
        temperature: 0 takes the likeliest id each time.
        top_k: Choose among this many likeliest ids.
        device: ``auto``, ``cpu``, ``cuda`` ...
    """

    file: Annotated[Path, tyro.conf.Positional]
    model: Path = MODEL
    out: Path = Path("continued.webp")
    prompt: str = ""
    num_frames: int | None = None
    seed: int = 0
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    device: str = "auto"


def generate(arguments: Sequence[str]) -> None:
    """``emulus generate "a red apple" [--out apple.png]``."""
    options = _parse(GenerateOptions, arguments, "emulus generate")
    out = options.out or Path("generated.webp" if options.video else "generated.png")
    # A name that cannot be written is better found before the drawing than after it.
    check_writable(out, clip=options.video)
    if options.video and options.num_images != 1:
        raise EmulusError("--num-images is for pictures; run the command again with another --seed for another clip")
    if not options.video and (options.num_frames is not None or options.fps is not None):
        raise EmulusError("--num-frames and --fps are for clips: add --video")
    model = emulus.load(options.model, device=options.device)
    common = _values(options, ("negative_prompt", "height", "width", "seed", *SAMPLING))
    if options.video:
        clip = model.generate_video(options.prompt, **common, **_values(options, ("num_frames", "fps")))
        write_video(clip, out)
        print(out)
        return
    pictures = model.generate_images([options.prompt], num_images_per_prompt=options.num_images, **common)
    for number, picture in enumerate(pictures):
        path = out if number == 0 else out.with_stem(f"{out.stem}-{number + 1}")
        write_image(picture, path)
        print(path)


def describe(arguments: Sequence[str]) -> None:
    """``emulus describe picture.png [--question "what is it?"]``."""
    options = _parse(DescribeOptions, arguments, "emulus describe")
    model = emulus.load(options.model, device=options.device)
    sampling = _values(options, ("seed", "temperature"))
    if options.question is None:
        print(model.describe(options.file, **sampling))
    else:
        print(model.answer(options.file, options.question, **sampling))


def continue_(arguments: Sequence[str]) -> None:
    """``emulus continue clip.webp [--out longer.webp]``."""
    options = _parse(ContinueOptions, arguments, "emulus continue")
    check_writable(options.out, clip=True)
    model = emulus.load(options.model, device=options.device)
    names = ("prompt", "num_frames", "seed", "guidance_scale", "temperature", "top_k")
    write_video(model.continue_video(options.file, **_values(options, names)), options.out)
    print(options.out)


SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")


def _values(options: object, names: Sequence[str]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _parse(kind: type[Options], arguments: Sequence[str], program: str) -> Options:
    positional = next(iter(dataclasses.fields(kind))).name  # type: ignore[arg-type]
    if not arguments:
        raise EmulusError(f"{program} needs a {positional}; see {program} --help")
    return tyro.cli(kind, args=list(arguments), prog=program)
