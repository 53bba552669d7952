"""What a published model was trained with, beside its weights: wording, sequence layout, settings, tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emulus.checks import number, text, whole
from emulus.config import merge
from emulus.errors import EmulusError, did_you_mean
from emulus.foreign import SILENT_IN_GENERATION
from emulus.media import generation_size
from emulus.sampling.params import SamplingParams
from emulus.sequence import EMU3, EMU3_5, EMU3_BASE, NATIVE, SequenceLayout, Wording

if TYPE_CHECKING:
    from emulus.layouts.contents import Contents

RELEASED_NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
"""What the released drawing script leads away from. Source: baaivision/Emu3, image_generation.py."""

# Which default each option of sampling has, where images are drawn and where words are written.
DRAWING = {name: name for name in ("temperature", "top_k", "top_p", "guidance_scale")}
WRITING = {
    "temperature": "text_temperature",
    "top_k": "text_top_k",
    "top_p": "text_top_p",
    "max_new_tokens": "max_text_tokens",
}
MOST_TRIES = 1024
"""Most images drawn for each that is asked for."""
MOST_PIXELS = MOST_FRAMES = 2**20
"""Longest side of an image or clip, and longest clip; contexts end long before."""

_BASE_AREA = 512 * 512  # of Emu3-Stage1's pictures, for its transformers form, whose config does not say


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a call that does not say otherwise gets.

    Attributes:
        height: Of pictures and clips, in pixels.
        width: Likewise.
        num_frames: Of clips.
        fps: Of clips.
        negative_prompt: What guidance leads away from; empty is "nothing in particular".
        guidance_scale: Strength of guidance when drawing and animating.
        best_of: Pictures drawn for each that is asked for, of which the model keeps the one that it would most likely
            give the prompt as a caption.
        temperature: Of visual ids.
        top_k: Of visual ids.
        top_p: Of visual ids.
        text_temperature: Of captions and answers; 0 takes the likeliest id.
        text_top_k: Of captions and answers, at a temperature above 0.
        text_top_p: Likewise.
        max_text_tokens: Longest caption or answer.
        min_pixels: Least area of a picture that is shown to the model, which is scaled up to it; 0 for models of one
            size, to which pictures are scaled and cropped.
        max_pixels: Greatest area, to which larger ones are scaled down; 0 likewise.
    """

    height: int = 720
    width: int = 720
    num_frames: int = 16
    fps: float = 8.0
    negative_prompt: str = ""
    guidance_scale: float = 3.0
    best_of: int = 1
    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 1.0
    text_temperature: float = 0.0
    text_top_k: int = 2048
    text_top_p: float = 1.0
    max_text_tokens: int = 64
    min_pixels: int = 0
    max_pixels: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            whole(name, getattr(self, name), least=1, most=MOST_PIXELS)
        least = whole("min_pixels", self.min_pixels, most=MOST_PIXELS**2)
        whole("max_pixels", self.max_pixels, least=least, most=MOST_PIXELS**2)
        whole("num_frames", self.num_frames, least=1, most=MOST_FRAMES)
        number("fps", self.fps, above=0)
        text("negative_prompt", self.negative_prompt)
        whole("best_of", self.best_of, least=1, most=MOST_TRIES)
        whole("max_text_tokens", self.max_text_tokens, least=1)
        for names in (DRAWING, WRITING):
            SamplingParams(**{option: getattr(self, name) for option, name in names.items()})


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a decoder was trained with, beside its weights.

    Attributes:
        wording: How prompts are put.
        layout: How pictures and clips are written.
        defaults: Of generation.
        spatial_factor: Pixels per code along a side, of the vision tokenizer that belongs to it.
    """

    wording: Wording = NATIVE
    layout: SequenceLayout = dataclasses.field(default_factory=SequenceLayout)
    defaults: GenerationDefaults = dataclasses.field(default_factory=GenerationDefaults)
    spatial_factor: int | None = None


_RELEASED = GenerationDefaults(
    negative_prompt=RELEASED_NEGATIVE_PROMPT, max_text_tokens=1024, min_pixels=512 * 512, max_pixels=1024 * 1024
)
PRESETS: Mapping[str, Preset] = {
    "native": Preset(),
    "emu3": Preset(wording=EMU3, defaults=_RELEASED, spatial_factor=8),
    "emu3-base": Preset(
        # Pictures of the area it was trained with: the larger ones that are shown to Emu3-Chat exceed its context.
        wording=EMU3_BASE,
        defaults=dataclasses.replace(_RELEASED, max_pixels=512 * 512),
        spatial_factor=8,
    ),
    "emu3.5": Preset(
        wording=EMU3_5,
        layout=SequenceLayout.emu3_5(),
        defaults=GenerationDefaults(
            height=1024,
            width=1024,
            guidance_scale=2.0,
            top_k=5120,
            text_temperature=1.0,
            text_top_k=1024,
            text_top_p=0.9,
            max_text_tokens=5120,
        ),
        spatial_factor=16,
    ),
}
"""Settings by preset. Sources: facts of the released scripts (baaivision/Emu3, baaivision/Emu3.5)."""


def preset_called(name: str) -> Preset:
    """The preset of a name.

    Raises:
        EmulusError: There is none.
    """
    if name not in PRESETS:
        raise EmulusError(f"there is no preset {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def defaults_of(contents: Contents) -> GenerationDefaults:
    """Generation settings: the folder's own where it has some, else its preset's.

    Raises:
        EmulusError: The folder's ``generation_config.json`` has a wrong key or value.
    """
    where = str(contents.folder / "generation_config.json")
    try:
        return _merged(contents, where)
    except EmulusError as error:
        raise EmulusError(str(error) if where in str(error) else f"{where}: {error}") from error


def _merged(contents: Contents, where: str) -> GenerationDefaults:
    preset = preset_called(contents.preset).defaults
    if contents.layout == "emulus":
        own = {key: it for key, it in contents.generation.items() if key not in {"preset", *SILENT_IN_GENERATION}}
        return merge(preset, own, where)
    changes: dict[str, Any] = {}
    area = contents.image_area or (_BASE_AREA if contents.preset == "emu3-base" else None)
    if area is not None:
        factor = contents.vision.spatial_factor if contents.vision else PRESETS[contents.preset].spatial_factor or 8
        rows, columns = generation_size("1:1", area, factor=factor)
        changes |= {"height": rows * factor, "width": columns * factor}
    if contents.generation.get("do_sample"):
        # Those of a file that samples: without that the published files leave greedy text settings here.
        names = ("top_k", "top_p", "temperature")
        changes |= {name: contents.generation[name] for name in names if _is_positive(contents.generation.get(name))}
    return dataclasses.replace(preset, **changes)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


_DRAWING, _UNDERSTANDING = ("draw",), ("caption", "answer", "chat")
# Released models differ in nothing but their context: 9,216 ids are a drawing one's, 131,072 an understanding one's.
_TASKS_BY_CONTEXT = {9216: _DRAWING, 131_072: _UNDERSTANDING}


def tasks_of(contents: Contents) -> tuple[str, ...]:
    """What a model was trained to do, as far as its files say; nothing if a part is missing."""
    if contents.decoder is None or contents.text_file is None or contents.vocabulary is None:
        return ()
    if contents.preset == "native":
        return ("draw", "animate", "continue", "caption", "answer") if contents.vision is not None else ()
    if contents.preset == "emu3-base":
        return ("draw", "caption")
    both = _DRAWING + _UNDERSTANDING
    if contents.layout != "released":
        return both
    return _TASKS_BY_CONTEXT.get(contents.decoder.max_position_embeddings, both)
