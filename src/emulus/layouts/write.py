"""What a folder holds -> the files of another layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from emulus.errors import EmulusError
from emulus.files import write_json, write_text
from emulus.layouts import configs
from emulus.layouts.contents import (
    GENERATION_FILE,
    VISION_FOLDER,
    VISION_TOKENS_FILE,
    VOCABULARY_FILE,
    Contents,
    Layout,
    read_text,
    vision_shapes,
)
from emulus.layouts.names import Part, shape_in_transformers, to_transformers, vision_to_transformers
from emulus.layouts.text import spelling, write_tokenizer
from emulus.layouts.vocabulary import FIRST_NAMES, ROLE_NAMES, names_after_text, whole_map
from emulus.model.weights import expected_shapes
from emulus.presets import defaults_of
from emulus.shards import Planned, dtypes_of, save_sharded
from emulus.tokenizer.text import EMU3_FILE
from emulus.tokenizer.vision.config import VisionTokenizerConfig
from emulus.weights import CONFIG, Shapes, Tensors

SHARD_BYTES = 5 * 10**9
_PIXELS = {"min_pixels": 512 * 512, "max_pixels": 1024 * 1024}

Files = dict[str, Any]
"""What small files hold: a string is text, anything else JSON."""


def write_folder(
    contents: Contents,
    folder: Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    moved: Callable[[int], object] | None = None,
) -> None:
    """Write a model in a layout.

    * ``emulus``: our own, with the vision tokenizer in ``vision/``.
    * ``released``: that of the decoders on the hub. A released decoder's vision tokenizer is a repository of its own;
      here it is put into ``vision/``, a folder of the same kind.
    * ``transformers``: one ``Emu3ForConditionalGeneration`` with its processor; an ``Emu3ForCausalLM`` if there is
      only a decoder, an ``Emu3VQVAE`` if there is only a vision tokenizer. The names are those that every release
      with Emu3 reads, and its tokenizer splits text as released.

    Tensors go through memory piece by piece. ``config.json`` is written last: a folder without it is no model.

    Args:
        contents: The model: what :func:`inspect_folder` found.
        folder: An existing, empty folder.
        layout: Which.
        dtype: Of the decoder's weights; by default what they are. The vision tokenizer's stay: rounding would move
            codes. (transformers itself loads both parts in the decoder's type unless it is told another.)
        max_shard_bytes: Of one weights file.
        moved: Told how many bytes of tensors were written, again and again.

    Raises:
        EmulusError: The layout cannot express this model, a source is damaged, or the disk is full.
    """
    try:
        folders = _FILES[layout](contents, dtype)
    except EmulusError as error:
        raise EmulusError(f"{contents.folder} cannot be written in the layout {layout!r}: {error}") from None
    for place, tensors in plan(contents, layout, dtype).items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        save_sharded(tensors, folder / place, most_bytes=max_shard_bytes, moved=moved)
    _write_text_files(contents, folder, layout)
    for place, files in folders.items():
        for name in sorted(files, key=lambda name: name == CONFIG):
            write = write_text if isinstance(files[name], str) else write_json
            write(folder / place / name, files[name])


def plan(contents: Contents, layout: Layout, dtype: torch.dtype | None) -> dict[str, dict[str, Planned]]:
    """Every tensor to be written, by folder and by its name there."""
    decoder = _planned(contents.decoder_tensors, expected_shapes(contents.decoder) if contents.decoder else {}, dtype)
    vision = _planned(contents.vision_tensors, vision_shapes(contents.vision) if contents.vision else {}, None)
    if layout != "transformers":
        places = {"": decoder, VISION_FOLDER: vision} if decoder else {"": vision}
        return {place: tensors for place, tensors in places.items() if tensors}
    vision = {
        name: Planned(stored=it.stored, shape=shape_in_transformers(name, it.shape), dtype=it.dtype)
        for name, it in vision.items()
    }
    if not decoder:
        return {"": {vision_to_transformers(name): planned for name, planned in vision.items()}}
    if not vision:
        return {"": decoder}
    parts: dict[Part, dict[str, Planned]] = {"decoder": decoder, "vision": vision}
    return {"": {to_transformers(part, name): it for part, tensors in parts.items() for name, it in tensors.items()}}


def _planned(tensors: Tensors, shapes: Shapes, dtype: torch.dtype | None) -> dict[str, Planned]:
    kinds = {name: dtype if dtype and kind.is_floating_point else kind for name, kind in dtypes_of(tensors).items()}
    return {name: Planned(stored=tensors[name], shape=shape, dtype=kinds[name]) for name, shape in shapes.items()}


def _dtype(tensors: Tensors, dtype: torch.dtype | None = None) -> str:
    """What a config says of the weights' type: what they shall be, or what the first of them is."""
    kinds = (kind for kind in dtypes_of(tensors).values() if kind.is_floating_point)
    return str(dtype or next(kinds)).removeprefix("torch.")


def _emulus(contents: Contents, dtype: torch.dtype | None) -> dict[str, Files]:
    vision = {CONFIG: contents.vision.to_dict()} if contents.vision else None
    if contents.decoder is None:
        return {"": vision or {}}
    files: Files = {CONFIG: {"model_type": "emulus", **contents.decoder.to_dict()}}
    if contents.vocabulary is not None:
        files[VOCABULARY_FILE] = contents.vocabulary.to_dict()
    if contents.layout != "emulus":
        files[GENERATION_FILE] = {"preset": contents.preset, **dataclasses.asdict(defaults_of(contents))}
    elif contents.generation:
        files[GENERATION_FILE] = dict(contents.generation)
    return {"": files, **({VISION_FOLDER: vision} if vision else {})}


def _released(contents: Contents, dtype: torch.dtype | None) -> dict[str, Files]:
    if contents.decoder is None:
        return {"": _released_vision(contents)}
    ids = _special_ids(contents, configs.ROLE_KEYS)
    config = configs.decoder_to_released(
        contents.decoder, ids, image_area=_image_area(contents), dtype=_dtype(contents.decoder_tensors, dtype)
    )
    files: Files = {CONFIG: config, GENERATION_FILE: {"_from_model_config": True, **_end_ids(ids)}}
    if contents.vocabulary is not None and contents.text_file is not None:
        names = names_after_text(contents.vocabulary)
        files[VISION_TOKENS_FILE] = "".join(f"{name}\n" for name in names[len(FIRST_NAMES) :])
        files["special_tokens_map.json"] = {f"{role}_token": ROLE_NAMES[role] for role in ("bos", "eos", "pad")}
        files["tokenizer_config.json"] = {
            "added_tokens_decoder": {},
            "auto_map": {"AutoTokenizer": ["BAAI/Emu3-Gen--tokenization_emu3.Emu3Tokenizer", None]},
            "clean_up_tokenization_spaces": True,
            "model_max_length": int(1e30),
            "tokenizer_class": "Emu3Tokenizer",
            **files["special_tokens_map.json"],
        }
    return {"": files, **({VISION_FOLDER: _released_vision(contents)} if contents.vision else {})}


def _released_vision(contents: Contents) -> Files:
    vision = contents.vision
    assert vision is not None  # a folder without a decoder holds one
    classes = {
        "AutoConfig": "configuration_emu3visionvq.Emu3VisionVQConfig",
        "AutoModel": "modeling_emu3visionvq.Emu3VisionVQModel",
    }
    processor = "image_processing_emu3visionvq.Emu3VisionVQImageProcessor"
    hub = "BAAI/Emu3-VisionTokenizer--"
    return {
        CONFIG: {
            "architectures": ["Emu3VisionVQModel"],
            "auto_map": {auto: hub + name for auto, name in classes.items()},
            **vision.to_dict(),
            "torch_dtype": _dtype(contents.vision_tensors),
        },
        "preprocessor_config.json": {
            "auto_map": {"AutoImageProcessor": hub + processor},
            "image_processor_type": "Emu3VisionVQImageProcessor",
            **_preprocessing(vision),
        },
    }


def _transformers(contents: Contents, dtype: torch.dtype | None) -> dict[str, Files]:
    vision = configs.vision_to_transformers_config(contents.vision) if contents.vision else None
    if contents.decoder is None:
        assert vision is not None  # a folder without a decoder holds one
        return {"": {CONFIG: {"architectures": ["Emu3VQVAE"], **vision, "dtype": _dtype(contents.vision_tensors)}}}
    kind = _dtype(contents.decoder_tensors, dtype)
    ids = _special_ids(contents, ("pad", "bos", "eos"))
    text = configs.decoder_to_transformers(contents.decoder, ids)
    sampling = {"do_sample": True, "top_k": 2048, "max_new_tokens": 50_000}
    files: Files = {GENERATION_FILE: {**_end_ids(ids), **sampling}}
    # Not of transformers, which keeps it: of what size the model draws is nowhere else in this layout.
    area = {"image_area": _image_area(contents)}
    if vision is None or contents.vision is None:
        files[CONFIG] = {"architectures": ["Emu3ForCausalLM"], **text, **area, "dtype": kind}
        return {"": files}
    if contents.vocabulary is None or contents.text_file is None:
        raise EmulusError("it has no text vocabulary, which a whole Emu3 of transformers needs; add its files")
    tokenizer = read_text(contents)
    assert tokenizer is not None  # there is a file
    files[CONFIG] = {
        "architectures": ["Emu3ForConditionalGeneration"],
        "model_type": "emu3",
        "dtype": kind,
        **area,
        "text_config": text,
        "tie_word_embeddings": contents.decoder.tie_word_embeddings,
        "vq_config": vision,
        "vocabulary_map": whole_map(spelling(tokenizer.pieces), names_after_text(contents.vocabulary)),
    }
    files["preprocessor_config.json"] = {
        "image_processor_type": "Emu3ImageProcessor",
        "processor_class": "Emu3Processor",
        "do_pad": True,
        **_preprocessing(contents.vision),
    }
    files["processor_config.json"] = {"processor_class": "Emu3Processor"}
    files["chat_template.jinja"] = _CHAT_TEMPLATE
    return {"": files}


_FILES: Mapping[Layout, Callable[[Contents, torch.dtype | None], dict[str, Files]]] = {
    "emulus": _emulus,
    "released": _released,
    "transformers": _transformers,
}

# As the released processor writes a question: pictures before the text, and a full stop after it.
_CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}{{ 'You are a helpful assistant. ' }}{% endif -%}
{%- for message in messages -%}
{%- set parts = message['content'] -%}
{%- if parts is string %}{% set parts = [{'type': 'text', 'text': parts}] %}{% endif -%}
{%- if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif -%}
{%- for part in parts if part['type'] == 'image' %}{{ '<image>' }}{% endfor -%}
{%- for part in parts if part['type'] == 'text' %}{{ part['text'] }}{% endfor -%}
{{ '. ' if message['role'] == 'user' else ' ' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif -%}
"""


def _write_text_files(contents: Contents, folder: Path, layout: Layout) -> None:
    text = read_text(contents)
    if text is None or contents.decoder is None:
        return
    if layout == "emulus":
        text.save(folder)
    elif layout == "released":
        text.save_tiktoken(folder / EMU3_FILE)
    elif contents.vocabulary is not None:
        write_tokenizer(text.pieces, names_after_text(contents.vocabulary), folder)


def _special_ids(contents: Contents, roles: Any) -> Mapping[str, int]:
    """Role to id, of a vocabulary that published layouts can express."""
    if contents.vocabulary is not None:
        names_after_text(contents.vocabulary)
        return contents.vocabulary.specials
    missing = [role for role in roles if role not in contents.special_ids]
    if missing:
        raise EmulusError(f"nothing says which id is {missing[0]}, since it has no vocabulary; add its files")
    return contents.special_ids


def _end_ids(ids: Mapping[str, int]) -> dict[str, int]:
    return {configs.ROLE_KEYS[role]: ids[role] for role in ("bos", "eos", "pad")}


def _image_area(contents: Contents) -> int:
    defaults = defaults_of(contents)
    return contents.image_area or defaults.height * defaults.width


def _preprocessing(vision: VisionTokenizerConfig) -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        **_PIXELS,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": dict(_PIXELS),
        "spatial_factor": vision.spatial_factor,
    }
