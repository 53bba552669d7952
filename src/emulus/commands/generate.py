"""The playground: drawing, animating, continuing, describing and asking from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

import emulus
from emulus.checks import whole
from emulus.commands.out import check_format, check_out
from emulus.commands.shipped import MODEL, shipped
from emulus.errors import EmulusError
from emulus.flags import parse_flags
from emulus.log import logger
from emulus.media import write_image, write_video
from emulus.media.source import opened
from emulus.model.quantize import Quantization
from emulus.options import ScheduleName, schedule_called
from emulus.outline import Outline
from emulus.pipeline import MOST_IMAGES

Options = TypeVar("Options")


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

    def outline(self) -> Outline:
        """The model without its weights, to check on it what it will be asked.

        Raises:
            EmulusError: There is no such file, or its metadata is damaged.
        """
        return Outline.of(self._path(), vision=self.vision, preset=self.preset, compat=self.compat)

    def load(self) -> emulus.Emulus:
        """The model.

        Raises:
            EmulusError: There is none, or it is damaged.
        """
        return emulus.load(
            self._path(),
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

    def _path(self) -> Path | str:
        return shipped(MODEL, "--model") if self.model == str(MODEL) else self.model


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(ModelOptions):
    """What pictures and clips from words have in common.

    Attributes:
        prompt: What it shows.
        negative_prompt: What to lead away from; the model's own by default.
        height: In pixels; the model's own size by default.
        width: In pixels.
        seed: The same seed gives the same result.
        guidance_scale: How strongly to follow the prompt; 1 is unguided.
        temperature: 0 takes the likeliest id each time.
        top_k: Choose among this many likeliest ids.
        top_p: Choose among the likeliest ids of this total probability.
    """

    prompt: Annotated[str, tyro.conf.Positional]
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def drawing(self) -> dict[str, Any]:
        """These options as a model takes them."""
        names = ("negative_prompt", "height", "width", "seed", "guidance_scale", "temperature", "top_k", "top_p")
        return _values(self, names)

    def judge_size(self, model: emulus.Emulus) -> None:
        """Say so if a model of one size was asked for another one: it draws, but what comes out is no measure of it."""
        own = model.defaults
        height, width = self.height or own.height, self.width or own.width
        if model.bundle.preset == "native" and (height, width) != (own.height, own.width):
            logger.warning(f"the model learnt {own.width}x{own.height} pixels and does worse at {width}x{height}")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(DrawingOptions):
    """Draw pictures from words.

    Attributes:
        out: The file to write; its ending chooses the format (.png .jpg .webp).
        ratio: Instead of height and width, width:height such as 16:9, of as many pixels as the model draws or
            ``image_area``.
        image_area: In pixels.
        num_images: How many pictures, numbered from the second on.
        best_of: How many are drawn for each of these; the model keeps the one that it would most likely caption so. The
            model's own number by default.
    """

    out: Path = Path("generated.png")
    ratio: str | None = None
    image_area: int | None = None
    num_images: int = 1
    best_of: int | None = None


@dataclass(frozen=True, kw_only=True)
class AnimateOptions(DrawingOptions):
    """Make a clip from words.

    Attributes:
        out: The file to write; its ending chooses the format (.webp .mp4 .gif .webm).
        num_frames: Length; the model's own by default.
        fps: Frame rate; the model's own by default.
    """

    out: Path = Path("animated.webp")
    num_frames: int | None = None
    fps: float | None = None


@dataclass(frozen=True, kw_only=True)
class WritingOptions(ModelOptions):
    """What captions and answers have in common.

    Attributes:
        max_new_tokens: Longest caption or answer.
        max_pixels: Larger pictures are shown at this area.
        seed: Matters at a temperature above 0.
        temperature: 0 takes the likeliest id each time.
    """

    max_new_tokens: int | None = None
    max_pixels: int | None = None
    seed: int = 0
    temperature: float | None = None

    def writing(self) -> dict[str, Any]:
        """These options as a model takes them."""
        return _values(self, ("seed", "temperature", "max_new_tokens", "max_pixels"))


@dataclass(frozen=True, kw_only=True)
class DescribeOptions(WritingOptions):
    """Write captions.

    Attributes:
        file: Pictures or clips; each gets a line.
    """

    file: Annotated[tuple[Path, ...], tyro.conf.Positional]


@dataclass(frozen=True, kw_only=True)
class AskOptions(WritingOptions):
    """Answer a question about pictures or clips.

    Attributes:
        words: Pictures or clips, and last the question, in quotes; it is about all of them.
    """

    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE [FILE ...] QUESTION")]


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
    whole("--num-images", options.num_images, least=1, most=MOST_IMAGES)
    paths = [options.out if number == 0 else _numbered(options.out, number + 1) for number in range(options.num_images)]
    for path in {paths[0], paths[-1]}:
        check_out(path, "image")
    shape = _values(options, ("ratio", "image_area", "best_of"))
    drawing = options.drawing()
    check_format(options.out, options.outline().drawing(options.prompt, **shape, **drawing), clip=False)
    model = options.load()
    pictures = model.generate_images([options.prompt], num_images_per_prompt=options.num_images, **shape, **drawing)
    options.judge_size(model)
    for picture, path in zip(pictures, paths, strict=True):
        write_image(picture, path)
        print(path)


def animate(arguments: Sequence[str]) -> None:
    """``emulus animate "a rocket" [--out rocket.webp]``."""
    options = _parse(AnimateOptions, arguments, "emulus animate")
    check_out(options.out, "clip")
    asked = _values(options, ("num_frames", "fps")) | options.drawing()
    check_format(options.out, options.outline().animation(options.prompt, **asked), clip=True)
    model = options.load()
    clip = model.generate_video(options.prompt, **asked)
    options.judge_size(model)
    write_video(clip, options.out)
    print(options.out)


def continue_(arguments: Sequence[str]) -> None:
    """``emulus continue clip.webp [--out longer.webp]``."""
    options = _parse(ContinueOptions, arguments, "emulus continue")
    check_out(options.out, "clip")
    _check_files([options.file])
    names = ("prompt", "num_frames", "seed", "guidance_scale", "temperature", "top_k")
    asked = _values(options, names)
    check_format(options.out, options.outline().continuation(options.file, **asked), clip=True)
    model = options.load()
    write_video(model.continue_video(options.file, **asked), options.out)
    print(options.out)


def describe(arguments: Sequence[str]) -> None:
    """``emulus describe picture.png [more.png ...]``."""
    options = _parse(DescribeOptions, arguments, "emulus describe")
    _check_files(options.file)
    outline = options.outline()
    for file in options.file:
        outline.showing([file], **options.writing())
    model = options.load()
    if len(options.file) == 1:
        _print_pieces(model.stream_description(options.file[0], **options.writing()))
    else:
        print("\n".join(model.describe_all(options.file, **options.writing())))


def ask(arguments: Sequence[str]) -> None:
    """``emulus ask picture.png [more.png ...] "what is it?"``."""
    options = _parse(AskOptions, arguments, "emulus ask")
    files, question = _files_and_question(options.words)
    options.outline().showing(files, question, **options.writing())
    model = options.load()
    _print_pieces(model.stream_answer(files, question, **options.writing()))


def _numbered(path: Path, number: int) -> Path:
    return path.with_stem(f"{path.stem}-{number}")


def _print_pieces(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _files_and_question(words: Sequence[str]) -> tuple[list[Path], str]:
    """What is shown, and what is asked about it."""
    files, question = [Path(word) for word in words[:-1]], words[-1]
    usage = 'first the files, then the question in quotes: emulus ask picture.png "what is it?"'
    if not question.strip():
        raise EmulusError(f"the question is empty; {usage}")
    if _exists(question):
        raise EmulusError(f"the question is missing after {question}; {usage}")
    if not files:
        raise EmulusError(f"there is no file {question}, or no file is named to ask about; {usage}")
    missing = [file for file in files if not _exists(file)]
    if missing:
        raise EmulusError(f"there is no file {missing[0]}; {usage}")
    _check_files(files)
    return files, question


def _exists(path: str | Path) -> bool:
    """Whether there is something at a path; a question may be too long for one."""
    try:
        return Path(path).exists()
    except OSError:
        return False


def _check_files(files: Iterable[Path]) -> None:
    """What cannot be opened is better found before the model is read than after it."""
    for file in files:
        with opened(file):
            pass


def _values(options: object, names: Sequence[str]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _parse(kind: type[Options], arguments: Sequence[str], program: str) -> Options:
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    positional = next(field.name for field in fields if "Positional" in str(field.type))
    options = parse_flags(kind, arguments, program=program) if arguments else None
    # Several words may also be none for the parser.
    if options is None or getattr(options, positional) == ():
        needed = {"words": "file and a question"}.get(positional, positional)
        raise EmulusError(f"{program} needs a {needed}; see {program} --help")
    return options
