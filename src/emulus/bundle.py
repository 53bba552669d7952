"""A model on disk: decoder, vision tokenizer, text vocabulary and defaults in one folder, or whichever are there.

Our own layout, which :func:`save_bundle` writes; :mod:`emulus.layouts` reads the published ones as well::

    config.json  model.safetensors     the decoder (Hugging Face layout)
    vocabulary.json  tokenizer.json    which id means what; text <-> ids
    vision/                            the vision tokenizer (released layout)
    generation_config.json             sizes and sampling settings the model is used with by default
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emulus.config import merge
from emulus.device import pick_device
from emulus.errors import EmulusError, at_least, did_you_mean
from emulus.files import write_json
from emulus.hub import EMU3_VISION, fetch
from emulus.layouts import Contents, inspect_folder, read_text
from emulus.layouts.contents import check_together
from emulus.log import logger
from emulus.media import generation_size
from emulus.model import Decoder, save_decoder
from emulus.model.quantize import Quantization
from emulus.model.weights import load_decoder_from
from emulus.placement import plan
from emulus.sequence import EMU3, EMU3_5, EMU3_BASE, NATIVE, SequenceLayout, Wording
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.weights import load_vision_tokenizer_from, save_vision_tokenizer
from emulus.tokenizer.vocabulary import Vocabulary

GENERATION_CONFIG = "generation_config.json"
RELEASED_NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
"""What the released drawing script leads away from. Source: baaivision/Emu3, image_generation.py."""

RELEASED_QUALITY_SUFFIX = " masterpiece, film grained, best quality."
"""What the released drawing script adds to every prompt; Emulus adds nothing unasked. Source: as above."""

_BASE_AREA = 512 * 512  # of Emu3-Stage1's pictures, for its transformers form, whose config does not say
_LARGE = 10**9  # parameters from which a GPU computes in bfloat16 unless told otherwise


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
        temperature: Of visual ids.
        top_k: Of visual ids.
        top_p: Of visual ids.
        text_temperature: Of captions and answers; 0 takes the likeliest id.
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
    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 1.0
    text_temperature: float = 0.0
    max_text_tokens: int = 64
    min_pixels: int = 0
    max_pixels: int = 0

    def __post_init__(self) -> None:
        at_least(1, height=self.height, width=self.width, num_frames=self.num_frames)
        at_least(1, max_text_tokens=self.max_text_tokens)
        at_least(0, min_pixels=self.min_pixels)
        at_least(self.min_pixels, max_pixels=self.max_pixels)


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
    "emu3-base": Preset(wording=EMU3_BASE, defaults=_RELEASED, spatial_factor=8),
    "emu3.5": Preset(
        wording=EMU3_5,
        layout=SequenceLayout.emu3_5(),
        defaults=GenerationDefaults(
            height=1024, width=1024, guidance_scale=2.0, top_k=5120, text_temperature=1.0, max_text_tokens=5120
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


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The parts of a model; a part that its folder does not have is ``None``.

    Attributes:
        decoder: ids -> logits.
        vision: pixels <-> codes.
        text: text <-> ids.
        vocabulary: Which id means what.
        defaults: Of generation.
        preset: Name of what the decoder was trained with (see :data:`PRESETS`).
        source: Where it was loaded from, for the record that goes with results.
        default_vision: Where the vision tokenizer is to be had that the decoder was trained with and that its folder
            does not hold.
    """

    decoder: Decoder | None = None
    vision: VisionTokenizer | None = None
    text: TextTokenizer | None = None
    vocabulary: Vocabulary | None = None
    defaults: GenerationDefaults = dataclasses.field(default_factory=GenerationDefaults)
    preset: str = "native"
    source: str = ""
    default_vision: str | None = None


def save_bundle(bundle: Bundle, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write every part the bundle has.

    Args:
        bundle: What to write.
        folder: Where; created if need be.
        dtype: Of the decoder's weights on disk; the vision tokenizer keeps its own, since rounding would move codes.

    Raises:
        EmulusError: The disk is full or the folder may not be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if bundle.decoder is not None:
        save_decoder(bundle.decoder, folder, dtype=dtype)
        preset = {} if bundle.preset == "native" else {"preset": bundle.preset}
        write_json(folder / GENERATION_CONFIG, preset | dataclasses.asdict(bundle.defaults))
    if bundle.text is not None:
        bundle.text.save(folder)
    if bundle.vocabulary is not None:
        bundle.vocabulary.save(folder / "vocabulary.json")
    if bundle.vision is not None:
        save_vision_tokenizer(bundle.vision, folder / "vision")


def load_bundle(
    path: Path | str,
    *,
    vision: Path | str | None = None,
    device: str = "auto",
    dtype: torch.dtype | str | None = "auto",
    quantize: Quantization | None = None,
    max_memory: Mapping[str, int] | None = None,
    revision: str | None = None,
) -> Bundle:
    """Read a model, in whichever published layout it is.

    Args:
        path: A folder with a decoder, a vision tokenizer, a text vocabulary or several of them; a training run's
            folder (its newest model); or a model's name on the hub, ``owner/name`` or ``owner/name@revision``.
        vision: Where the vision tokenizer is, if not there: a folder or a name on the hub.
        device: Where to put the weights; ``auto`` spreads a decoder over all GPUs, and over the CPU what they cannot
            hold.
        dtype: Of the decoder's weights: ``float32``, ``bfloat16``, ``float16``; ``auto`` is float32, on a GPU bfloat16
            for large models; ``None`` keeps the file's. The vision tokenizer stays in float32.
        quantize: ``int8`` or ``int4`` for the decoder's projections.
        max_memory: Bytes that the decoder may take on each device; by default what is free.
        revision: Of a model on the hub.

    Raises:
        EmulusError: There is no model, a part is damaged, the parts do not belong together, or it does not fit.
    """
    contents = inspect_folder(fetch(path, revision=revision))
    if vision is not None:
        contents = _with_vision(contents, inspect_folder(fetch(vision)))
    preset = preset_called(contents.preset)
    # First, so that the decoder is planned into what is left.
    painter = _load_vision(contents, device)
    text = read_text(contents)
    return Bundle(
        decoder=_load_decoder(contents, device, dtype, quantize, max_memory),
        vision=painter,
        text=text,
        vocabulary=contents.vocabulary,
        defaults=defaults_of(contents, preset.defaults),
        preset=contents.preset,
        source=str(path) if revision is None else f"{path}@{revision}",
        default_vision=_default_vision(contents),
    )


def load_default_vision(bundle: Bundle, device: str = "auto") -> VisionTokenizer:
    """Fetch and read the vision tokenizer that the bundle's decoder was trained with.

    Raises:
        EmulusError: It cannot be had, or the bundle needs none.
    """
    if bundle.default_vision is None:
        raise EmulusError("this model has no vision tokenizer; say where it is with vision=")
    logger.info("%s holds no vision tokenizer: taking %s", bundle.source, bundle.default_vision)
    try:
        contents = inspect_folder(fetch(bundle.default_vision))
    except EmulusError as error:
        raise EmulusError(f"{bundle.source} needs the vision tokenizer it was trained with: {error}") from None
    vision = _load_vision(contents, device)
    if vision is None:
        raise EmulusError(f"{bundle.default_vision} holds no vision tokenizer; say where one is with vision=")
    return vision


def defaults_of(contents: Contents, preset: GenerationDefaults) -> GenerationDefaults:
    """Generation settings: the folder's own where it has some, else its preset's.

    Raises:
        EmulusError: Our own ``generation_config.json`` has a wrong key or value.
    """
    if contents.layout == "emulus":
        own = {key: value for key, value in contents.generation.items() if key != "preset"}
        return merge(preset, own, str(contents.folder / GENERATION_CONFIG))
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


def _with_vision(contents: Contents, other: Contents) -> Contents:
    if other.vision is None:
        raise EmulusError(f"{other.folder} holds no vision tokenizer; give vision= the folder of one")
    together = dataclasses.replace(contents, vision=other.vision, vision_tensors=other.vision_tensors)
    check_together(together)
    return together


def _default_vision(contents: Contents) -> str | None:
    """The released vision tokenizer, for a decoder that draws with its codes."""
    released = VisionTokenizerConfig().codebook_size
    fits = contents.vocabulary is not None and contents.vocabulary.visual_size == released
    wants = contents.vision is None and contents.preset in ("emu3", "emu3-base")
    return EMU3_VISION if wants and fits else None


def _load_vision(contents: Contents, device: str) -> VisionTokenizer | None:
    if contents.vision is None:
        return None
    return load_vision_tokenizer_from(contents.vision, contents.vision_tensors, pick_device(device))


def _load_decoder(
    contents: Contents,
    device: str,
    dtype: torch.dtype | str | None,
    quantize: Quantization | None,
    max_memory: Mapping[str, int] | None,
) -> Decoder | None:
    config = contents.decoder
    if config is None:
        return None
    tokens = min(2 * config.max_position_embeddings, 2 * 9216)
    kind = pick_dtype(dtype, device, contents)
    where = plan(
        config,
        device=device,
        dtype=kind or torch.float32,
        quantize=quantize,
        max_memory=max_memory,
        kv_tokens=tokens,
    )
    if len(where.devices) > 1:
        logger.info("%s: %s", contents.folder, where)
    return load_decoder_from(
        config, contents.decoder_tensors, dtype=kind, device=where, quantize=quantize, folder=contents.folder
    )


def pick_dtype(dtype: torch.dtype | str | None, device: str, contents: Contents) -> torch.dtype | None:
    """The type that a decoder's weights shall have; ``None`` keeps the file's.

    Raises:
        EmulusError: It is none that can be computed in.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        elements = sum(math.prod(stored.shape) for stored in contents.decoder_tensors.values())
        on_gpu = pick_device(device).type == "cuda"
        return torch.bfloat16 if on_gpu and elements >= _LARGE else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise EmulusError(f"unknown dtype {dtype!r}{did_you_mean(dtype, ['auto', *known])}")
    return known[dtype]
