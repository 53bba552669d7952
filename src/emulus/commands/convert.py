"""Bringing a model into another layout from the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from emulus.commands.out import check_out
from emulus.errors import EmulusError, shown
from emulus.flags import parse_flags
from emulus.hub import fetch
from emulus.layouts.conversion import convert as convert_folder

_LONGEST = 40
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Write a model in another layout, and check that it is the same.

    Attributes:
        src: A model's folder, in any layout, or its name on the hub.
        dst: The new folder.
        to: ``released`` (the files on the hub), ``transformers`` (loads with Emu3ForConditionalGeneration) or
            ``emulus``.
        vision: The folder (or name) of the vision tokenizer, where ``src`` has none.
        dtype: Of the decoder's weights; what they are by default.
        shard_size: Largest weights file, e.g. 5GB or 500MB.
        check: Read everything back and compare it.
    """

    src: Annotated[str, tyro.conf.Positional]
    dst: Annotated[Path, tyro.conf.Positional]
    to: Literal["released", "transformers", "emulus"]
    vision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    shard_size: str = "5GB"
    check: bool = True


def convert(arguments: Sequence[str]) -> None:
    """``emulus convert SRC DST --to released|transformers|emulus``."""
    options = parse_flags(ConvertOptions, arguments, program="emulus convert")
    check_out(options.dst, "folder")
    done = convert_folder(
        fetch(options.src),
        options.dst,
        to=options.to,
        vision=fetch(options.vision) if options.vision else None,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        max_shard_bytes=parse_bytes(options.shard_size),
        check=options.check,
    )
    checked = "every one equal to its source" if done.checked else "not checked"
    print(f"{done.folder}: {options.to}, {done.tensors} tensors, {done.bytes / 1e9:.2f} GB, {checked}")


def parse_bytes(text: str) -> int:
    """A size like ``5GB``, ``500 MB`` or ``2GiB`` in bytes.

    Raises:
        EmulusError: It is not one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?)B?\s*", text.upper())
    if not match or match[2] not in _UNITS or len(text) > _LONGEST:
        raise EmulusError(f"{shown(text)} is not a size; write it like 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])
