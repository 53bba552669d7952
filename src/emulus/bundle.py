"""A model on disk: decoder, vision tokenizer, text vocabulary and defaults in one folder, or whichever are there.

::

    config.json  model.safetensors     the decoder (Hugging Face layout)
    vocabulary.json  tokenizer.json    which id means what; text <-> ids
    vision/                            the vision tokenizer (released layout)
    generation_config.json             sizes and sampling settings the model is used with by default
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from emulus.config import merge
from emulus.device import pick_device
from emulus.errors import EmulusError, at_least
from emulus.files import read_json, write_json
from emulus.model import Decoder, load_decoder, save_decoder
from emulus.tokenizer.text import TIKTOKEN_FILE, TOKENIZERS_FILE, TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer
from emulus.tokenizer.vision.config import MODEL_TYPE as VISION_MODEL_TYPE
from emulus.tokenizer.vision.weights import load_vision_tokenizer, save_vision_tokenizer
from emulus.tokenizer.vocabulary import Vocabulary
from emulus.weights import find_model

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What a call that does not say otherwise gets.

    Attributes:
        height: Of pictures and clips, in pixels.
        width: Likewise.
        num_frames: Of clips.
        fps: Of clips.
        guidance_scale: Strength of guidance when drawing and animating.
        temperature: Of visual ids.
        top_k: Of visual ids.
        top_p: Of visual ids.
        text_temperature: Of captions and answers; 0 takes the likeliest id.
        max_text_tokens: Longest caption or answer.
    """

    height: int = 720
    width: int = 720
    num_frames: int = 16
    fps: float = 8.0
    guidance_scale: float = 3.0
    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 1.0
    text_temperature: float = 0.0
    max_text_tokens: int = 64

    def __post_init__(self) -> None:
        at_least(1, height=self.height, width=self.width, num_frames=self.num_frames)
        at_least(1, max_text_tokens=self.max_text_tokens)


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The parts of a model; a part that its folder does not have is ``None``."""

    decoder: Decoder | None = None
    vision: VisionTokenizer | None = None
    text: TextTokenizer | None = None
    vocabulary: Vocabulary | None = None
    defaults: GenerationDefaults = dataclasses.field(default_factory=GenerationDefaults)


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
        write_json(folder / GENERATION_CONFIG, dataclasses.asdict(bundle.defaults))
    if bundle.text is not None:
        bundle.text.save(folder)
    if bundle.vocabulary is not None:
        bundle.vocabulary.save(folder / "vocabulary.json")
    if bundle.vision is not None:
        save_vision_tokenizer(bundle.vision, folder / "vision")


def load_bundle(path: Path | str, *, device: str = "auto", dtype: torch.dtype | None = torch.float32) -> Bundle:
    """Read a model's folder, or the newest model of a training run's folder.

    Args:
        path: A folder with a decoder, a vision tokenizer or both.
        device: Where to put the weights.
        dtype: Of the decoder's weights; ``None`` keeps the file's. The vision tokenizer stays in float32.

    Raises:
        EmulusError: There is no model, a part is damaged, or the parts do not belong together.
    """
    folder = find_model(Path(path))
    target = pick_device(device)
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and config.get("model_type") == VISION_MODEL_TYPE:
        return Bundle(vision=load_vision_tokenizer(folder, target))
    vocabulary = Vocabulary.load(folder / "vocabulary.json") if (folder / "vocabulary.json").exists() else None
    has_text = any((folder / name).is_file() for name in (TOKENIZERS_FILE, TIKTOKEN_FILE))
    text = TextTokenizer.from_file(folder) if has_text else None
    vision = load_vision_tokenizer(folder / "vision", target) if (folder / "vision").is_dir() else None
    size = vocabulary.size if vocabulary else None
    decoder = load_decoder(folder, dtype=dtype, device=target, vocab_size=size)
    bundle = Bundle(decoder=decoder, vision=vision, text=text, vocabulary=vocabulary, defaults=_read_defaults(folder))
    _check_together(bundle, folder)
    return bundle


def _read_defaults(folder: Path) -> GenerationDefaults:
    if not (folder / GENERATION_CONFIG).exists():
        return GenerationDefaults()
    return merge(GenerationDefaults(), read_json(folder / GENERATION_CONFIG), str(folder / GENERATION_CONFIG))


def _check_together(bundle: Bundle, folder: Path) -> None:
    vocabulary = bundle.vocabulary
    if vocabulary is None:
        return
    if bundle.text is not None and bundle.text.size != vocabulary.text_size:
        raise EmulusError(
            f"{folder}: tokenizer.json has {bundle.text.size} ids but vocabulary.json {vocabulary.text_size}: "
            "they are from different models"
        )
    if bundle.vision is not None and bundle.vision.config.codebook_size != vocabulary.visual_size:
        raise EmulusError(
            f"{folder}: the vision tokenizer has {bundle.vision.config.codebook_size} codes but vocabulary.json "
            f"{vocabulary.visual_size}: they are from different models"
        )
