"""a folder or a name -> a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from emulus.bundle import load_bundle
from emulus.checks import shown, text, whole
from emulus.engine import Schedule
from emulus.engine.runner import Runner
from emulus.errors import EmulusError
from emulus.model.quantize import Quantization
from emulus.options import EngineOptions, ScheduleName
from emulus.pipeline import Emulus
from emulus.prompts import check_compat


def load(
    path: str | Path,
    *,
    vision: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype | str | None = "auto",
    quantize: Quantization | None = None,
    max_memory: Mapping[str, int] | None = None,
    revision: str | None = None,
    preset: str | None = None,
    vision_dtype: torch.dtype | str = "float32",
    compat: Literal["released"] | None = None,
    schedule: ScheduleName | Schedule = "auto",
    kv_budget: int | None = None,
    kv_dtype: torch.dtype | None = None,
    batch_size: int = 8,
) -> Emulus:
    """Load a model: ours, a released Emu3 checkpoint or one of transformers, from a folder or from the hub.

    Args:
        path: A model's folder, a training run's (its newest model), or a name on the hub (``BAAI/Emu3-Gen``,
            ``BAAI/Emu3-Gen@REVISION``).
        vision: Where the vision tokenizer is, if not there. For a released decoder that has none beside it, the
            released one is fetched when it is needed.
        device: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` spreads a decoder over all GPUs, and over the CPU what they
            cannot hold.
        dtype: Of the decoder: ``float32``, ``bfloat16``, ``float16``; ``auto`` is float32, on a GPU bfloat16 for large
            models; ``None`` keeps the file's.
        quantize: ``int8``, ``int4`` or ``fp8`` for the decoder's projections and head.
        max_memory: Bytes that the decoder may take on each device (``{"cuda:0": 20 * 2**30, "cpu": ...}``).
        revision: Branch, tag or commit of a model on the hub.
        vision_dtype: ``bfloat16`` paints with half the memory and faster on CPUs, a hair off; pictures are read in
            float32 always, since rounding there would move codes.
        preset: Whose prompts, sequences and defaults: ``native``, ``emu3``, ``emu3-base`` (Stage1's) or ``emu3.5``; by
            default what the model looks like.
        compat: ``released`` repeats what the released code does where Emulus knows better: specials in a user's text
            become specials, narrow and several pictures follow its rule, a batch may be padded.
        schedule: In which order ids are computed, by name or as a value of :mod:`emulus.engine`. ``sequential``: one
            after another. ``jacobi``: guessed ahead and checked, the same ids in fewer steps. ``zipar``: several rows
            at a time, fewer steps still but another picture, so never chosen by itself. ``auto`` is ``jacobi`` where it
            is the same to the bit (on a CPU with the native kernels), else ``sequential``.
        kv_budget: Bytes for keys and values on each device; by default nine tenths of what is free.
        kv_dtype: Of keys and values; by default what is fast and loses nothing. ``torch.float8_e4m3fn`` halves them for
            long videos, on GPUs with Triton.
        batch_size: Most pictures, clips or answers that are computed together. Others wait for their turn.

    Returns:
        The model; a folder may hold only a part of one.

    Raises:
        EmulusError: There is no model, it is damaged, it does not fit into memory, or an option is wrong.

    Options that are None are what they are by default, but for ``dtype``.
    """
    # Wrong options are better found before gigabytes are read than after.
    check_compat(compat)
    _check_path("path", path)
    if vision is not None:
        _check_path("vision", vision)
    for name, value in {"revision": revision, "preset": preset, "quantize": quantize}.items():
        if value is not None:
            text(name, value)
    device = "auto" if device is None else text("device", str(device) if isinstance(device, torch.device) else device)
    vision_dtype = "float32" if vision_dtype is None else vision_dtype
    for name, kind in {"dtype": dtype, "vision_dtype": vision_dtype}.items():
        if kind is not None and not isinstance(kind, torch.dtype):
            text(name, kind)
    if max_memory is not None:
        max_memory = _memory(max_memory)
    options = EngineOptions(schedule=schedule, kv_budget=kv_budget, kv_dtype=kv_dtype, batch_size=batch_size)
    bundle = load_bundle(
        path,
        vision=vision,
        device=device,
        dtype=dtype,
        quantize=quantize,
        max_memory=max_memory,
        revision=revision,
        preset=preset,
        vision_dtype=vision_dtype,
    )
    if bundle.decoder is not None and kv_dtype is not None:
        Runner(bundle.decoder, kv_dtype=kv_dtype)  # whether such keys and values are possible, before they are needed
    return Emulus(bundle, compat=compat, device=device, options=options)


def _check_path(name: str, path: str | Path) -> None:
    if not isinstance(path, str | Path) or not str(path).strip():
        raise EmulusError(f"{name} is {shown(path)} but must be a folder or a name on the hub such as BAAI/Emu3-Gen")
    try:
        Path(path).exists()
    except (OSError, ValueError) as error:  # too long, or of characters that no name can have
        raise EmulusError(f"{name} is {shown(str(path))}, which cannot be a folder's name; check it") from error


def _memory(given: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(given, Mapping):
        raise EmulusError(f"max_memory is {shown(given)} but must be bytes by device, such as {{'cpu': 2**34}}")
    return {text("a device of max_memory", name): whole(f"max_memory of {name}", size) for name, size in given.items()}
