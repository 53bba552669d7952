"""Drawing, describing and continuing from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

import emulus
from emulus.errors import EmulusError
from emulus.media import check_writable, write_image, write_video
from emulus.model.quantize import Quantization
from emulus.options import ScheduleName, schedule_called

Options = TypeVar("Options")
MODEL = Path("checkpoints/emoji")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded.

    Attributes:
        model: A model's folder, a training run's, or a name on the hub such as BAAI/Emu3-Gen.
        vision: Folder or name of the vision tokenizer, if the model has none.
        device: ``auto``, ``cpu``, ``cuda`` ...
        dtype: Of the decoder's weights; ``auto`` is float32, on a GPU bfloat16 for large models.
        vision_dtype: Of the vision tokenizer's layers that paint; bfloat16 is faster and smaller, a hair off.
        quantize: Fewer bits for most of the decoder's weights.
        preset: Whose prompts and defaults, if the model's folder does not look like it.
        compat: ``released`` repeats the released code where Emulus does better.
        schedule: How ids are computed. sequential: one after another. jacobi: guessed ahead and checked; the same
            result in fewer steps. zipar: several rows at a time; fewer steps, another picture. auto: jacobi where it is
            the same to the bit (on a CPU), else sequential.
        window: Of jacobi, how many ids are guessed at once; by default whatever is fastest. Of zipar, how many columns
            a row is behind the one above it, half a row by default; fewer is faster and worse.
        batch_size: Most pictures or captions that are computed together; more take more memory.
    """

    model: str = str(MODEL)
    vision: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    vision_dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Quantization | None = None
    preset: Literal["native", "emu3", "emu3-base", "emu3.5"] | None = None
    compat: Literal["released"] | None = None
    schedule: ScheduleName = "auto"
    window: int | None = None
    batch_size: int = 8

    def load(self) -> emulus.Emulus:
        """The model.

        Raises:
            EmulusError: There is none, or it is damaged.
        """
        if self.model == str(MODEL) and not MODEL.exists():
            raise EmulusError(f"the model that comes with Emulus lies in its repository, at {MODEL}: give --model here")
        return emulus.load(
            self.model,
            vision=self.vision,
            device=self.device,
            dtype=self.dtype,
            vision_dtype=self.vision_dtype,
            quantize=self.quantize,
            preset=self.preset,
            compat=self.compat,
            schedule=schedule_called(self.schedule, self.window),
            batch_size=self.batch_size,
        )


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """Draw a picture, or a clip.

    Attributes:
        prompt: What it shows.
        out: The file to write; its ending chooses the format (.png .jpg .webp, for clips .webp .mp4 .gif .webm).
        video: A clip instead of a picture.
        negative_prompt: What to lead away from; the model's own by default.
        height: In pixels; the model's own size by default.
        width: In pixels.
        ratio: Instead of both, width:height such as 16:9, of as many pixels as the model draws or ``image_area``.
        image_area: In pixels.
        num_frames: Length of a clip.
        fps: Frame rate of a clip.
        seed: The same seed gives the same picture.
        num_images: How many pictures, numbered from the second on.
        guidance_scale: How strongly to follow the prompt; 1 is unguided.
        temperature: 0 takes the likeliest id each time.
        top_k: Choose among this many likeliest ids.
        top_p: Choose among the likeliest ids of this total probability.
    """

    prompt: Annotated[str, tyro.conf.Positional]
    out: Path | None = None
    video: bool = False
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    ratio: str | None = None
    image_area: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    seed: int = 0
    num_images: int = 1
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True, kw_only=True)
class DescribeOptions(ModelOptions):
    """Write captions, or answer a question.

    Attributes:
        file: Pictures or clips. Each gets a caption; a question is about all of them.
        question: Answer this instead of writing captions.
        max_new_tokens: Longest caption or answer.
        max_pixels: Larger pictures are shown at this area.
        seed: Matters at a temperature above 0.
        temperature: 0 takes the likeliest id each time.
    """

    file: Annotated[tuple[Path, ...], tyro.conf.Positional]
    question: str | None = None
    max_new_tokens: int | None = None
    max_pixels: int | None = None
    seed: int = 0
    temperature: float | None = None


@dataclass(frozen=True, kw_only=True)
class ContinueOptions(ModelOptions):
    """Go on with a clip.

    Attributes:
        file: The clip.
        out: The file to write; its ending chooses the format (.webp .mp4 .gif .webm).
        prompt: What the clip shows, if known.
        num_frames: Length of the result, the given frames included; twice the given ones by default.
        seed: The same seed gives the same clip.
        guidance_scale: How strongly to follow the prompt; 1 is unguided.
        temperature: 0 takes the likeliest id each time.
        top_k: Choose among this many likeliest ids.
    """

    file: Annotated[Path, tyro.conf.Positional]
    out: Path = Path("continued.webp")
    prompt: str = ""
    num_frames: int | None = None
    seed: int = 0
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None


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
    if options.video and (options.ratio is not None or options.image_area is not None):
        raise EmulusError("--ratio and --image-area are for pictures; give a clip's --height and --width")
    model = options.load()
    common = _values(options, ("negative_prompt", "height", "width", "seed", *SAMPLING))
    if options.video:
        clip = model.generate_video(options.prompt, **common, **_values(options, ("num_frames", "fps")))
        write_video(clip, out)
        print(out)
        return
    shape = _values(options, ("ratio", "image_area"))
    pictures = model.generate_images([options.prompt], num_images_per_prompt=options.num_images, **shape, **common)
    for number, picture in enumerate(pictures):
        path = out if number == 0 else out.with_stem(f"{out.stem}-{number + 1}")
        write_image(picture, path)
        print(path)


def describe(arguments: Sequence[str]) -> None:
    """``emulus describe picture.png [more.png ...] [--question "what is it?"]``."""
    options = _parse(DescribeOptions, arguments, "emulus describe")
    model = options.load()
    sampling = _values(options, ("seed", "temperature", "max_new_tokens", "max_pixels"))
    if options.question is None and len(options.file) > 1:
        print("\n".join(model.describe_all(options.file, **sampling)))
        return
    if options.question is None:
        pieces = model.stream_description(options.file[0], **sampling)
    else:
        pieces = model.stream_answer(options.file, options.question, **sampling)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def continue_(arguments: Sequence[str]) -> None:
    """``emulus continue clip.webp [--out longer.webp]``."""
    options = _parse(ContinueOptions, arguments, "emulus continue")
    check_writable(options.out, clip=True)
    model = options.load()
    names = ("prompt", "num_frames", "seed", "guidance_scale", "temperature", "top_k")
    write_video(model.continue_video(options.file, **_values(options, names)), options.out)
    print(options.out)


SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")


def _values(options: object, names: Sequence[str]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _parse(kind: type[Options], arguments: Sequence[str], program: str) -> Options:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    positional = next(field.name for field in fields if "Positional" in str(field.type))
    if not arguments:
        raise EmulusError(f"{program} needs a {positional}; see {program} --help")
    return tyro.cli(kind, args=list(arguments), prog=program)
