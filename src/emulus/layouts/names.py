"""Parameter names: ours <-> those of the transformers library. The released checkpoints' names are ours."""

from __future__ import annotations

import re
from typing import Literal

Part = Literal["decoder", "vision"]

# How transformers renames the vision tokenizer's parameters: (ours, theirs as a replacement) and back.
_PROJECTION = r"(\.attn(?:_1|\.\d+))"
_VISION_RULES: tuple[tuple[str, str, str, str], ...] = (
    (r"\.mid\.attn_1\.norm\.", ".middle_block.attn_norm.", r"\.middle_block\.attn_norm\.", ".mid.attn_1.norm."),
    (r"\.mid\.", ".middle_block.", r"\.middle_block\.", ".mid."),
    (r"\.attn\.(\d+)\.norm\.", r".attn_norms.\1.", r"\.attn_norms\.(\d+)\.", r".attn.\1.norm."),
    (r"^encoder\.down\.", "encoder.down_block.down.", r"^encoder\.down_block\.down\.", "encoder.down."),
    (r"^decoder\.up\.", "decoder.up_block.up.", r"^decoder\.up_block\.up\.", "decoder.up."),
    (_PROJECTION + r"\.([qkv])\.", r"\1.\2_proj.", _PROJECTION + r"\.([qkv])_proj\.", r"\1.\2."),
    (_PROJECTION + r"\.proj_out\.", r"\1.out_proj.", _PROJECTION + r"\.out_proj\.", r"\1.proj_out."),
)
_SQUEEZED = re.compile(_PROJECTION + r"\.(q|k|v|proj_out)\.weight$")

# Where a whole transformers model keeps each part: (part, their prefix, ours). The first of a part is the older
# generation's, which every release reads and which save_pretrained itself still writes.
_PREFIXES: tuple[tuple[Part, str, str], ...] = (
    ("decoder", "text_model.model.", "model."),
    ("decoder", "text_model.lm_head.", "lm_head."),
    ("vision", "vqmodel.", ""),
    ("decoder", "model.text_model.", "model."),
    ("decoder", "lm_head.", "lm_head."),
    ("vision", "model.vqmodel.", ""),
)


def vision_to_transformers(name: str) -> str:
    """A vision tokenizer's parameter in an ``Emu3VQVAE``."""
    for ours, theirs, _, _ in _VISION_RULES:
        name = re.sub(ours, theirs, name)
    return name


def vision_from_transformers(name: str) -> str:
    """The inverse of :func:`vision_to_transformers`; a name it never gives is left as it is."""
    for _, _, theirs, ours in _VISION_RULES:
        name = re.sub(theirs, ours, name)
    return name


def shape_in_transformers(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that an ``Emu3VQVAE`` gives our vision parameter: its projections are matrices, not 1x1 kernels."""
    return shape[:2] if _SQUEEZED.search(name) else shape


def to_transformers(part: Part, name: str, *, newer: bool = False) -> str:
    """Our parameter in an ``Emu3ForConditionalGeneration``.

    Args:
        part: Which of our models has it.
        name: Its name there.
        newer: The names of the modules themselves (transformers 4.52 and later) rather than those that checkpoints
            have had from the start and that later releases map on loading.
    """
    rules = [rule for rule in (_PREFIXES[3:] if newer else _PREFIXES[:3]) if rule[0] == part]
    inner = vision_to_transformers(name) if part == "vision" else name
    _, theirs, ours = next(rule for rule in rules if inner.startswith(rule[2]))
    return theirs + inner.removeprefix(ours)


def from_transformers(name: str) -> tuple[Part, str]:
    """The inverse of :func:`to_transformers`, of either generation.

    Returns:
        The part and our name. An unknown name stays what it is, a decoder's, so that it is listed as unexpected there.
    """
    for part, theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            inner = ours + name.removeprefix(theirs)
            return part, vision_from_transformers(inner) if part == "vision" else inner
    return "decoder", name
