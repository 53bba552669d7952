"""Writing a model in fewer bits from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from emulus.bundle import Bundle, pick_dtype, save_bundle
from emulus.commands.out import check_out
from emulus.data.mixture import Mixture
from emulus.data.tokens import Tokens, vision_digest
from emulus.errors import EmulusError, at_least
from emulus.files import COMPLETE, new_folder, read_config, write_json
from emulus.flags import parse_flags
from emulus.hub import fetch
from emulus.layouts import Contents, inspect_folder, read_text, with_vision
from emulus.layouts.conversion import check_free
from emulus.model import Decoder, DecoderConfig
from emulus.model.calibrate import calibrate_stored
from emulus.model.quantize import Quantization, check_kind
from emulus.model.weights import QUANTIZATION, load_decoder_from
from emulus.placement import plan
from emulus.presets import defaults_of
from emulus.sequence import Grammar, caption_first, caption_last
from emulus.tokenizer.vision.weights import load_vision_tokenizer, load_vision_tokenizer_from
from emulus.weights import CONFIG


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """Write a model whose decoder has fewer bits; it is loaded like any other.

    Attributes:
        model: A model's folder, in any layout, a training run's, or a name on the hub.
        out: The new folder.
        to: ``int8``, ``int4`` or ``fp8``.
        calibrate: A folder made by ``emulus tokenize`` of what the model was trained on: int4 then loses far less.
        documents: How many of its training items to look at.
        vision: The folder (or name) of the vision tokenizer, where the model has none.
        dtype: Of the decoder's weights that stay whole; what they are by default.
        vision_dtype: Of the vision tokenizer's weights that paint, on disk; its codes stay what they are.
        device: Where it is computed: ``cpu``, ``cuda`` ...
    """

    model: Annotated[str, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]
    to: Quantization
    calibrate: Path | None = None
    documents: int = 128
    vision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    vision_dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"


def quantize(arguments: Sequence[str]) -> None:
    """``emulus quantize MODEL OUT --to int8|int4|fp8 [--calibrate TOKENS]``."""
    options = parse_flags(QuantizeOptions, arguments, program="emulus quantize")
    check_out(options.out, "folder")
    quantize_folder(
        fetch(options.model),
        options.out,
        options.to,
        tokens=options.calibrate,
        documents=options.documents,
        vision=fetch(options.vision) if options.vision else None,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        vision_dtype=getattr(torch, options.vision_dtype),
        device=options.device,
    )
    size = sum(path.stat().st_size for path in options.out.glob("*.safetensors"))
    how = "calibrated" if options.calibrate else "rounded"
    print(f"{options.out}: decoder in {options.to}, {how}, {size / 1e6:,.1f} MB")


def quantize_folder(
    src: Path,
    out: Path,
    kind: Quantization,
    *,
    tokens: Path | None = None,
    documents: int = 128,
    vision: Path | None = None,
    dtype: torch.dtype | None = None,
    vision_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Contents:
    """Write a model in our layout, its decoder in fewer bits and everything else as it is.

    ``out`` appears when all of it is written; whatever stops the work before leaves nothing there.

    Args:
        src: A model's folder in any layout.
        out: The new folder; it must not exist or be empty.
        kind: How many bits.
        tokens: What to calibrate on: a folder made by :func:`emulus.data.tokenize.tokenize`. Without one, weights are
            rounded as they are.
        documents: How many of its training items to look at.
        vision: Where the vision tokenizer is, if not in ``src``.
        dtype: Of the decoder's weights that stay whole; what they are by default.
        vision_dtype: Of the vision tokenizer's weights that paint.
        device: Where this is computed.

    Returns:
        What the new folder holds.

    Raises:
        EmulusError: ``src`` holds no decoder, a quantised or a damaged one, ``out`` is not free, the tokens are of
            another model or damaged, or it does not fit into memory or on the disk.
    """
    check_kind(kind)
    at_least(1, documents=documents)
    out = out if out.name else out.resolve()
    source = inspect_folder(src)
    config = source.decoder
    if config is None:
        raise EmulusError(f"{source.folder} holds no decoder to be quantised; give a model's folder")
    if source.quantized is not None:
        raise EmulusError(f"{source.folder} is quantised already ({source.quantized}); take the original")
    if vision is not None:
        source = with_vision(source, vision)
    check_free(out, source.folder)
    # The small parts come first, so that nothing is found missing after hours.
    bundle = _without_decoder(source)
    ids = None
    if tokens is not None:
        ids = _documents(bundle, tokens, documents, config.max_position_embeddings)
    rest = dtype or pick_dtype(None, "cpu", source)
    decoder = _decoder(source, config, kind, ids, rest, device)
    with new_folder(out) as temporary:
        save_bundle(dataclasses.replace(bundle, decoder=decoder), temporary, dtype=rest, vision_dtype=vision_dtype)
        if ids is not None:
            _note(temporary / CONFIG, documents=len(ids), ids=sum(map(len, ids)))
        inspect_folder(temporary)
    # Models have no such marker; the folder was renamed into place whole.
    (out / COMPLETE).unlink()
    return inspect_folder(out)


def _decoder(
    source: Contents,
    config: DecoderConfig,
    kind: Quantization,
    documents: list[list[int]] | None,
    dtype: torch.dtype,
    device: str,
) -> Decoder:
    tensors, folder = source.decoder_tensors, source.folder
    if documents is not None:
        return calibrate_stored(config, tensors, documents, kind, device=device, folder=folder)
    where = plan(config, device=device, dtype=dtype, quantize=kind, kv_tokens=0)
    return load_decoder_from(config, tensors, dtype=dtype, device=where, quantize=kind, folder=folder)


def _without_decoder(source: Contents) -> Bundle:
    cpu = torch.device("cpu")
    return Bundle(
        vision=load_vision_tokenizer_from(source.vision, source.vision_tensors, cpu) if source.vision else None,
        text=read_text(source),
        vocabulary=source.vocabulary,
        defaults=defaults_of(source),
        preset=source.preset,
    )


def _documents(bundle: Bundle, folder: Path, count: int, context: int) -> list[list[int]]:
    """Ids of training items, evenly spread, with each of their captions in turn, half of them before the picture."""
    mixture = Mixture.open([f"{folder}:all=1"])
    _check_same_model(bundle, mixture.tokens)
    grammar = Grammar(mixture.vocabulary, mixture.text)
    documents = []
    for number, item in enumerate(mixture.items("train", count)):
        caption = item.captions[number // 2 % len(item.captions)] if item.captions else ""
        document = caption_last(item.media, caption) if number % 2 else caption_first(caption, item.media)
        documents.append(grammar.build(document))
    fitting = [ids for ids in documents if len(ids) <= context]
    if not fitting:
        raise EmulusError(f"{folder} has no training items of at most {context} ids, the decoder's context")
    return fitting


def _check_same_model(bundle: Bundle, tokens: Tokens) -> None:
    """Refuse ids that mean something else to the decoder: it would be fitted to noise."""
    pieces = None if bundle.text is None else list(bundle.text.pieces)
    if bundle.vocabulary != tokens.vocabulary or pieces != list(tokens.text.pieces):
        raise EmulusError(f"{tokens.folder} has another vocabulary than the model; give the tokens it was trained on")
    if bundle.vision is not None:
        theirs = load_vision_tokenizer(tokens.folder / "vision")
        if vision_digest(theirs) != vision_digest(bundle.vision):
            raise EmulusError(
                f"{tokens.folder} was made by another vision tokenizer than the model's; give the tokens that the "
                "model was trained on"
            )


def _note(path: Path, **calibrated: int) -> None:
    """Keep in the config what a decoder was calibrated on."""
    values: dict[str, Any] = read_config(path)
    values[QUANTIZATION] |= {"calibrated": calibrated}
    write_json(path, values)
