"""A folder -> what it holds, whichever published layout it is in. Small files and headers are read, no tensor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from emulus.codec import as_mapping, decode
from emulus.errors import EmulusError, shown
from emulus.files import MAX_TEXT_VOCABULARY_BYTES, read_bytes, read_config
from emulus.foreign import own_values
from emulus.layouts import configs
from emulus.layouts.names import from_transformers, vision_from_transformers
from emulus.layouts.vocabulary import check_roles, from_lines, from_map, known
from emulus.model.config import DecoderConfig
from emulus.model.quantize import Quantization
from emulus.model.weights import drop_redundant, expected_shapes, read_own_config
from emulus.tokenizer.text import EMU3_FILE, TIKTOKEN_FILE, TOKENIZERS_FILE, TextTokenizer, transformers_ids
from emulus.tokenizer.vision.config import MODEL_TYPE as RELEASED_VISION
from emulus.tokenizer.vision.config import VisionTokenizerConfig
from emulus.tokenizer.vision.model import VisionTokenizer
from emulus.tokenizer.vocabulary import Vocabulary
from emulus.weights import CONFIG, Shapes, Tensors, check_shapes, find_model, find_tensors, on_meta, rename

Layout = Literal["emulus", "released", "transformers"]
VISION_FOLDER = "vision"
VOCABULARY_FILE = "vocabulary.json"
GENERATION_FILE = "generation_config.json"
VISION_TOKENS_FILE = "emu3_vision_tokens.txt"
BASE_CONTEXT = 5120
"""The context of Emu3-Stage1, by which its folder is told from those of the models tuned from it."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a folder holds.

    Attributes:
        folder: Where.
        layout: Which files it is made of. A vision tokenizer by itself is the same in our and the released layout.
        decoder: The decoder's config, if there is a decoder.
        decoder_tensors: Under our names.
        quantized: How many bits the decoder's projections have in the files, if they are not whole.
        vision: The vision tokenizer's config, if there is one.
        vision_tensors: Under our names.
        vocabulary: Which id means what, if the folder says so or its size is a published model's.
        text_file: The text vocabulary.
        generation: ``generation_config.json`` as it is.
        image_area: Pixels of a picture, as a released config says.
        preset: Whose prompts and sequences the decoder knows: ``native``, ``emu3``, ``emu3-base`` or ``emu3.5``.
        special_ids: Role to id as the config says, for folders without a vocabulary.
    """

    folder: Path
    layout: Layout
    decoder: DecoderConfig | None = None
    decoder_tensors: Tensors = field(default_factory=dict)
    quantized: Quantization | None = None
    vision: VisionTokenizerConfig | None = None
    vision_tensors: Tensors = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    text_file: Path | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    image_area: int | None = None
    preset: str = "native"
    special_ids: Mapping[str, int] = field(default_factory=dict)


def inspect_folder(folder: Path) -> Contents:
    """Recognise a model's folder and check that its parts fit together.

    Args:
        folder: In our layout, the released one or that of transformers; or a training run's, whose newest model counts.
            One with nothing but the released text vocabulary is fine too.

    Raises:
        EmulusError: It is none of these, a file is missing or damaged, the tensors are not those of the config, or the
            parts are from different models.
    """
    if (folder / EMU3_FILE).is_file() and not (folder / CONFIG).exists():
        return _released_text(folder)
    folder = find_model(folder)
    values = read_config(folder / CONFIG)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise EmulusError(
            f"{folder / CONFIG} is of a model of type {shown(kind)}; Emulus reads the types {', '.join(_READERS)}"
        )
    contents = _READERS[kind](folder, values)
    if contents.decoder is not None:
        tensors = drop_redundant(contents.decoder, contents.decoder_tensors)
        contents = dataclasses.replace(contents, decoder_tensors=tensors)
    _check(contents)
    return dataclasses.replace(contents, preset=_preset(contents))


def read_text(contents: Contents) -> TextTokenizer | None:
    """The text tokenizer of a folder.

    That of a transformers folder is rebuilt from its vocabulary with the released splitting (Qwen's pattern, NFC, each
    digit by itself), since the model was trained with that; the GPT-2 splitting that the port's file asks for gives
    other ids.

    Args:
        contents: What :func:`inspect_folder` found.

    Raises:
        EmulusError: The file is damaged, or is not the vocabulary's.
    """
    if contents.text_file is None:
        return None
    vocabulary = contents.vocabulary
    if contents.layout == "transformers":
        text = TextTokenizer.from_transformers(contents.text_file)
    else:
        text = TextTokenizer.from_file(contents.text_file)
    if vocabulary is not None and text.size != vocabulary.text_size:
        raise EmulusError(
            f"{contents.text_file} has {text.size} text ids but the vocabulary {vocabulary.text_size}: "
            "they are from different models"
        )
    return text


@functools.lru_cache(maxsize=4)
def vision_shapes(config: VisionTokenizerConfig) -> Shapes:
    """The name and shape of every tensor of a vision tokenizer of this config (kept: not to be changed)."""
    model = on_meta(lambda: VisionTokenizer(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _native(folder: Path, values: Mapping[str, Any]) -> Contents:
    decoder, quantized = _config(folder, lambda: read_own_config(values))
    path = folder / VOCABULARY_FILE
    texts = (folder / name for name in (TOKENIZERS_FILE, TIKTOKEN_FILE))
    return _with_vision_folder(
        Contents(
            folder=folder,
            layout="emulus",
            decoder=decoder,
            decoder_tensors=find_tensors(folder),
            quantized=quantized,
            vocabulary=Vocabulary.load(path) if path.exists() else None,
            text_file=next((text for text in texts if text.is_file()), None),
            generation=_generation(folder),
        )
    )


def _released_decoder(folder: Path, values: Mapping[str, Any]) -> Contents:
    tensors = find_tensors(folder)
    qk_norm = any(name.endswith(".q_norm.weight") for name in tensors)
    decoder = _config(folder, lambda: configs.decoder_from_released(values, qk_norm=qk_norm))
    ids = configs.role_ids(values)
    vocabulary = _released_vocabulary(folder, decoder.vocab_size)
    if vocabulary is not None:
        _config(folder, lambda: check_roles(vocabulary, ids))
    return _with_vision_folder(
        Contents(
            folder=folder,
            layout="released",
            decoder=decoder,
            decoder_tensors=tensors,
            vocabulary=vocabulary,
            text_file=folder / EMU3_FILE if (folder / EMU3_FILE).exists() else None,
            generation=_generation(folder),
            image_area=_area(values),
            special_ids=ids,
        )
    )


def _released_text(folder: Path) -> Contents:
    """A folder with the text vocabulary alone; its preset is that of the vocabulary."""
    vocabulary = _released_vocabulary(folder, Vocabulary.emu3().size)
    preset = "emu3" if vocabulary is None or vocabulary.size == Vocabulary.emu3().size else "emu3.5"
    return Contents(
        folder=folder, layout="released", vocabulary=vocabulary, text_file=folder / EMU3_FILE, preset=preset
    )


def _released_vocabulary(folder: Path, size: int) -> Vocabulary | None:
    """The id table that the text files of a folder give, or that of the published model of this size."""
    text, lines = folder / EMU3_FILE, folder / VISION_TOKENS_FILE
    published = known(size)
    if not text.exists() and not lines.exists():
        return published
    text_size = sum(1 for line in _lines(text) if line.strip()) if text.exists() else 0
    if not lines.exists() and published is not None and published.text_size == text_size:
        return published
    for path, other in ((text, lines), (lines, text)):
        if not path.exists():
            raise EmulusError(f"{path} is missing; {other.name} beside it says nothing without it: fetch it too")
    try:
        return from_lines(text_size, [line.decode() for line in _lines(lines)])
    except UnicodeDecodeError:
        raise EmulusError(f"{lines} is not text; restore it from its source") from None
    except EmulusError as error:
        raise EmulusError(f"{lines}: {error}") from None


def _lines(path: Path) -> list[bytes]:
    return read_bytes(path, most=MAX_TEXT_VOCABULARY_BYTES).splitlines()


def _released_vision(folder: Path, values: Mapping[str, Any]) -> Contents:
    vision = _config(folder, lambda: VisionTokenizerConfig.from_dict(values))
    return Contents(folder=folder, layout="released", vision=vision, vision_tensors=find_tensors(folder))


def _whole_transformers(folder: Path, values: Mapping[str, Any]) -> Contents:
    whole = _config(folder, lambda: own_values(values, configs.WHOLE_KEYS, "its config"))
    parts = [whole.get(key) for key in ("text_config", "vq_config")]
    text, vq = ({} if part is None else part for part in parts)
    tied = _config(folder, lambda: _is_tied(whole, text))
    text = {**text, "tie_word_embeddings": tied}
    tensors = find_tensors(folder)
    vocabulary_map = whole.get("vocabulary_map")
    decoder = _config(folder, lambda: configs.decoder_from_transformers(text))
    return Contents(
        folder=folder,
        layout="transformers",
        decoder=decoder,
        decoder_tensors=rename(tensors, lambda name: _of_part("decoder", name)),
        vision=_config(folder, lambda: configs.vision_from_transformers_config(vq)),
        vision_tensors=rename(tensors, lambda name: _of_part("vision", name)),
        vocabulary=_mapped_vocabulary(folder / CONFIG, vocabulary_map) or known(decoder.vocab_size),
        text_file=_transformers_text(folder),
        generation=_generation(folder),
        image_area=_area(values),
        special_ids=configs.role_ids(text),
    )


def _is_tied(whole: Mapping[str, Any], text: Any) -> bool:
    """Whether any of the two places that may say so ties the head to the embedding."""
    said = [part.get("tie_word_embeddings") for part in (whole, as_mapping(text, "text_config"))]
    return any(decode(bool | None, value, "tie_word_embeddings") for value in said)


def _transformers_decoder(folder: Path, values: Mapping[str, Any]) -> Contents:
    decoder = _config(folder, lambda: configs.decoder_from_transformers(values))
    text_file = _transformers_text(folder)
    vocabulary = known(decoder.vocab_size)
    if text_file is not None:
        vocabulary = _mapped_vocabulary(text_file, transformers_ids(text_file))
    return Contents(
        folder=folder,
        layout="transformers",
        decoder=decoder,
        decoder_tensors=find_tensors(folder),
        vocabulary=vocabulary,
        text_file=text_file,
        generation=_generation(folder),
        image_area=_area(values),
        special_ids=configs.role_ids(values),
    )


def _transformers_vision(folder: Path, values: Mapping[str, Any]) -> Contents:
    vision = _config(folder, lambda: configs.vision_from_transformers_config(values))
    tensors = rename(find_tensors(folder), vision_from_transformers)
    return Contents(folder=folder, layout="transformers", vision=vision, vision_tensors=tensors)


_READERS: dict[str, Callable[[Path, Mapping[str, Any]], Contents]] = {
    "emulus": _native,
    configs.RELEASED_DECODER: _released_decoder,
    RELEASED_VISION: _released_vision,
    "emu3": _whole_transformers,
    "emu3_text_model": _transformers_decoder,
    "emu3_vqgan": _transformers_vision,
}


def _with_vision_folder(contents: Contents) -> Contents:
    """Add the vision tokenizer beside a decoder, as our own folders have it, if there is one."""
    folder = contents.folder / VISION_FOLDER
    if not (folder / CONFIG).exists():
        return contents
    vision = _released_vision(folder, read_config(folder / CONFIG))
    return dataclasses.replace(contents, vision=vision.vision, vision_tensors=vision.vision_tensors)


def _check(contents: Contents) -> None:
    folder, decoder, vision = contents.folder, contents.decoder, contents.vision
    if decoder is not None:
        check_shapes(folder, expected_shapes(decoder, contents.quantized), contents.decoder_tensors)
    if vision is not None:
        check_shapes(folder, vision_shapes(vision), contents.vision_tensors)
    check_together(contents)


def check_together(contents: Contents) -> None:
    """Refuse parts that count ids differently.

    Raises:
        EmulusError: They are from different models.
    """
    folder, decoder, vision, vocabulary = contents.folder, contents.decoder, contents.vision, contents.vocabulary
    if vocabulary is None:
        return
    if decoder is not None and decoder.vocab_size != vocabulary.size:
        raise EmulusError(
            f"{folder}: the decoder knows {decoder.vocab_size} ids but the vocabulary has {vocabulary.size}; "
            "they come from different models: use the vocabulary saved with this decoder"
        )
    if vision is not None and vision.codebook_size != vocabulary.visual_size:
        raise EmulusError(
            f"{folder}: the vision tokenizer has {vision.codebook_size} codes but the vocabulary "
            f"{vocabulary.visual_size}: they are from different models"
        )


def with_vision(contents: Contents, folder: Path) -> Contents:
    """A model with the vision tokenizer of another folder.

    Raises:
        EmulusError: That folder holds none, or one of another model.
    """
    other = inspect_folder(folder)
    if other.vision is None:
        raise EmulusError(f"{other.folder} holds no vision tokenizer; give the folder of one")
    together = dataclasses.replace(contents, vision=other.vision, vision_tensors=other.vision_tensors)
    check_together(together)
    return together


def _preset(contents: Contents) -> str:
    decoder, vision = contents.decoder, contents.vision
    if decoder is None:
        # By itself, the released vision tokenizer takes pictures as the models do that were trained with it.
        released = VisionTokenizerConfig()
        codes = (released.codebook_size, released.spatial_factor)
        return "emu3" if vision and (vision.codebook_size, vision.spatial_factor) == codes else "native"
    if contents.layout == "emulus":
        preset: str = decode(
            str, contents.generation.get("preset", "native"), f"{contents.folder / GENERATION_FILE}: preset"
        )
        return preset
    if decoder.qk_norm or decoder.vocab_size == Vocabulary.emu3_5().size:
        return "emu3.5"
    return "emu3-base" if decoder.max_position_embeddings == BASE_CONTEXT else "emu3"


def _area(values: Mapping[str, Any]) -> int | None:
    area = values.get("image_area")
    return area if isinstance(area, int) and not isinstance(area, bool) and 0 < area < 2**40 else None


def _of_part(part: str, name: str) -> str | None:
    found, ours = from_transformers(name)
    return ours if found == part else None


def _mapped_vocabulary(where: Path, ids: object) -> Vocabulary | None:
    if ids is None:
        return None
    try:
        if not isinstance(ids, Mapping):
            raise EmulusError("it is not a table of names and ids; restore the file")
        return from_map(ids)
    except EmulusError as error:
        raise EmulusError(f"{where}, the vocabulary: {error}") from None


def _transformers_text(folder: Path) -> Path | None:
    return folder / TOKENIZERS_FILE if (folder / TOKENIZERS_FILE).exists() else None


def _generation(folder: Path) -> Mapping[str, Any]:
    path = folder / GENERATION_FILE
    values = read_config(path) if path.exists() else {}
    for key, kind in _SAMPLING.items():
        decode(kind, values.get(key), f"{path}: {key}")
    return values


# What is read of the files of published models; null is not given.
_SAMPLING: Mapping[str, Any] = {
    "do_sample": bool | None,
    "temperature": float | None,
    "top_k": int | None,
    "top_p": float | None,
}


def _config(folder: Path, read: Callable[[], Any]) -> Any:
    """What ``read`` gives, its errors with the name of the config."""
    try:
        return read()
    except EmulusError as error:
        raise EmulusError(f"{folder / CONFIG}: {error}") from None
