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

import torch

from emulus.device import pick_device
from emulus.errors import EmulusError, did_you_mean, shown
from emulus.files import write_json
from emulus.hub import EMU3_VISION, fetch
from emulus.layouts import Contents, inspect_folder, read_text, with_vision
from emulus.log import logger
from emulus.model import Decoder, save_decoder
from emulus.model.quantize import Quantization
from emulus.model.weights import check_stored, expected_shapes, load_decoder_from
from emulus.placement import free_memory, plan
from emulus.presets import GenerationDefaults, defaults_of, preset_called, tasks_of
from emulus.shards import dtypes_of
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.weights import load_vision_tokenizer_from, save_vision_tokenizer
from emulus.tokenizer.vocabulary import Vocabulary

GENERATION_CONFIG = "generation_config.json"
_LARGE = 10**9  # parameters from which a GPU computes in bfloat16 unless told otherwise
_RELEASED_VISION_BYTES = 4 * 270_740_287


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The parts of a model; a part that its folder does not have is ``None``.

    Attributes:
        decoder: ids -> logits.
        vision: pixels <-> codes.
        text: text <-> ids.
        vocabulary: Which id means what.
        defaults: Of generation.
        preset: Name of what the decoder was trained with (see :data:`emulus.presets.PRESETS`).
        tasks: What it was trained to do, if that is known.
        source: Where it was loaded from (of a model on the hub with its commit), for the record of a result.
        loading: How it was loaded, likewise.
        default_vision: Where the vision tokenizer is to be had that the decoder was trained with and that its folder
            does not hold.
        vision_dtype: Of the vision tokenizer's large convolutions that paint, also if it is read later.
    """

    decoder: Decoder | None = None
    vision: VisionTokenizer | None = None
    text: TextTokenizer | None = None
    vocabulary: Vocabulary | None = None
    defaults: GenerationDefaults = dataclasses.field(default_factory=GenerationDefaults)
    preset: str = "native"
    tasks: tuple[str, ...] = ()
    source: str = ""
    loading: Mapping[str, str] = dataclasses.field(default_factory=dict)
    default_vision: str | None = None
    vision_dtype: torch.dtype = torch.float32


def save_bundle(
    bundle: Bundle,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    vision_dtype: torch.dtype = torch.float32,
) -> None:
    """Write every part the bundle has.

    Args:
        bundle: What to write.
        folder: Where; created if need be.
        dtype: Of the decoder's weights on disk.
        vision_dtype: Of the vision tokenizer's weights that paint; the others keep theirs, since rounding moves codes.

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
        save_vision_tokenizer(bundle.vision, folder / "vision", dtype=vision_dtype)


def load_bundle(
    path: Path | str,
    *,
    vision: Path | str | None = None,
    device: str = "auto",
    dtype: torch.dtype | str | None = "auto",
    quantize: Quantization | None = None,
    max_memory: Mapping[str, int] | None = None,
    revision: str | None = None,
    preset: str | None = None,
    vision_dtype: torch.dtype | str = "float32",
) -> Bundle:
    """Read a model, in whichever published layout it is.

    Args:
        path: A folder with a decoder, a vision tokenizer, a text vocabulary or several of them; a training run's
            folder (its newest model); or a model's name on the hub, ``owner/name`` or ``owner/name@revision``.
        vision: Where the vision tokenizer is, if not there: a folder or a name on the hub.
        device: Where to put the weights; ``auto`` spreads a decoder over all GPUs, and over the CPU what they cannot
            hold.
        dtype: Of the decoder's weights: ``float32``, ``bfloat16``, ``float16``; ``auto`` is float32, on a GPU bfloat16
            for large models; ``None`` keeps the file's.
        quantize: ``int8``, ``int4`` or ``fp8`` for the decoder's projections and head. A folder that is quantised
            already stays what it is.
        max_memory: Bytes that the decoder may take on each device; by default what is free.
        revision: Of a model on the hub.
        preset: Whose prompts, sequences and defaults; by default what the folder looks like.
        vision_dtype: ``bfloat16`` paints pictures with half the memory and faster on CPUs, a hair off; they are read in
            float32 always, since rounding there would move codes.

    Raises:
        EmulusError: There is no model, a part is damaged, the parts do not belong together, or it does not fit.
    """
    folder = fetch(path, revision=revision)
    contents = inspect_folder(folder)
    if preset is not None:
        preset_called(preset)
        contents = dataclasses.replace(contents, preset=preset)
    if vision is not None:
        contents = with_vision(contents, fetch(vision))
    # Small files before large ones: what is wrong with them is said before gigabytes are read.
    defaults, tasks = defaults_of(contents), tasks_of(contents)
    text = read_text(contents)
    kind = pick_dtype(dtype, device, contents)
    bits = check_stored(contents.folder, contents.quantized, quantize)
    # First, so that the decoder is planned into what is left.
    paints_in = _vision_dtype(vision_dtype)
    painter = _load_vision(contents, device, paints_in)
    return Bundle(
        decoder=_load_decoder(contents, device, kind, bits, max_memory),
        vision=painter,
        text=text,
        vocabulary=contents.vocabulary,
        defaults=defaults,
        preset=contents.preset,
        tasks=tasks,
        source=str(path) if folder == Path(path) else f"{str(path).partition('@')[0]}@{folder.name}",
        loading={
            "dtype": str(kind).removeprefix("torch."),
            "quantize": str(bits or "no"),
            "vision_dtype": str(paints_in).removeprefix("torch."),
        },
        default_vision=_default_vision(contents),
        vision_dtype=paints_in,
    )


def load_default_vision(bundle: Bundle, device: str = "auto") -> VisionTokenizer:
    """Fetch and read the vision tokenizer that the bundle's decoder was trained with.

    Raises:
        EmulusError: It cannot be had, or the bundle needs none.
    """
    if bundle.default_vision is None:
        raise EmulusError("this model has no vision tokenizer; say where it is with vision= (--vision)")
    logger.info("%s holds no vision tokenizer: taking %s", bundle.source, bundle.default_vision)
    try:
        contents = inspect_folder(fetch(bundle.default_vision))
    except EmulusError as error:
        raise EmulusError(f"{bundle.source} needs the vision tokenizer it was trained with: {error}") from None
    vision = _load_vision(contents, device, bundle.vision_dtype)
    if vision is None:
        raise EmulusError(f"{bundle.default_vision} holds no vision tokenizer; name another with vision= (--vision)")
    return vision


def _default_vision(contents: Contents) -> str | None:
    """The released vision tokenizer, for a decoder that draws with its codes."""
    released = VisionTokenizerConfig().codebook_size
    fits = contents.vocabulary is not None and contents.vocabulary.visual_size == released
    wants = contents.vision is None and contents.preset in ("emu3", "emu3-base")
    return EMU3_VISION if wants and fits else None


def _load_vision(contents: Contents, device: str, dtype: torch.dtype) -> VisionTokenizer | None:
    if contents.vision is None:
        return None
    return load_vision_tokenizer_from(contents.vision, contents.vision_tensors, pick_device(device), dtype=dtype)


def _vision_dtype(wanted: torch.dtype | str) -> torch.dtype:
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    name = str(wanted).removeprefix("torch.")
    if name not in kinds:
        raise EmulusError(f"vision_dtype is {name!r}{did_you_mean(name, kinds)}")
    return kinds[name]


def _load_decoder(
    contents: Contents,
    device: str,
    dtype: torch.dtype,
    quantize: Quantization | None,
    max_memory: Mapping[str, int] | None,
) -> Decoder | None:
    config = contents.decoder
    if config is None:
        return None
    tokens = min(2 * config.max_position_embeddings, 2 * 9216)
    if max_memory is None and _default_vision(contents) is not None:
        max_memory = _room_beside_vision(device)
    where = plan(config, device=device, dtype=dtype, quantize=quantize, max_memory=max_memory, kv_tokens=tokens)
    if len(where.devices) > 1:
        logger.info("%s: %s", contents.folder, where)
    return load_decoder_from(
        config,
        contents.decoder_tensors,
        dtype=dtype,
        device=where,
        quantize=quantize,
        stored=contents.quantized,
        folder=contents.folder,
    )


def _room_beside_vision(device: str) -> Mapping[str, int]:
    """What is free for a decoder, whose vision tokenizer is to come later and to lie where work begins."""
    room = {str(place): size for place, size in free_memory().items()}
    first = "cpu" if device == "cpu" else next(iter(room)) if device in ("auto", "cuda") else device
    if first in room:
        room[first] = max(room[first] - _RELEASED_VISION_BYTES, 0)
    return room


def pick_dtype(dtype: torch.dtype | str | None, device: str, contents: Contents) -> torch.dtype:
    """The type that a decoder's weights shall have; ``None`` is the file's.

    Raises:
        EmulusError: It is none that can be computed in.
    """
    if dtype is None:
        # What is quantised has types of its own, whatever is computed in.
        whole = {name: it for name, it in contents.decoder_tensors.items() if name.endswith(".weight")}
        return next((kind for kind in dtypes_of(whole).values() if kind.is_floating_point), torch.float32)
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        shapes = expected_shapes(contents.decoder) if contents.decoder else {}
        elements = sum(math.prod(shape) for shape in shapes.values())
        on_gpu = pick_device(device).type == "cuda"
        return torch.bfloat16 if on_gpu and elements >= _LARGE else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if not isinstance(dtype, str) or dtype not in known:
        raise EmulusError(f"unknown dtype {shown(dtype)}{did_you_mean(str(dtype), ['auto', *known])}")
    return known[dtype]
