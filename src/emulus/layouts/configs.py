"""Configs: ours <-> the ``config.json`` of each published layout."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from emulus.codec import as_mapping, decode
from emulus.errors import EmulusError, shown
from emulus.foreign import own_values
from emulus.model.config import SIZES, DecoderConfig
from emulus.tokenizer.vision.config import VisionTokenizerConfig

RELEASED_DECODER = "Emu3"
# What config.json calls the special ids, by role.
ROLE_KEYS = {role: f"{role}_token_id" for role in ("pad", "bos", "eos", "img", "boi", "eoi", "eol", "eof")}

# A vision tokenizer's fields under transformers' names.
_VISION_KEYS = {
    "codebook_size": "codebook_size",
    "embed_dim": "embed_dim",
    "latent_channels": "z_channels",
    "double_latent": "double_z",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "temporal_downsample_factor": "temporal_downsample_factor",
    "base_channels": "ch",
    "channel_multiplier": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "attn_resolutions": "attn_resolutions",
}
# Of their class; the width is that of the last level, and dropout matters in training alone.
_VISION_SILENT = ("hidden_size", "attention_dropout", "initializer_range")
WHOLE_KEYS = ("text_config", "vq_config", "vocabulary_map", "tie_word_embeddings")
"""What is read of the config of a whole model of transformers."""


def role_ids(values: Mapping[str, Any]) -> dict[str, int]:
    """The special ids that a released ``config.json`` names, by role."""
    ids = ((role, values.get(key)) for role, key in ROLE_KEYS.items())
    return {role: id for role, id in ids if isinstance(id, int) and not isinstance(id, bool) and 0 <= id < 2**31}


def decoder_from_released(values: Mapping[str, Any], *, qk_norm: bool) -> DecoderConfig:
    """Read a released decoder's ``config.json``.

    Args:
        values: The parsed file.
        qk_norm: Whether the checkpoint has such norms: the code released with Emu3.5 has them always, and its config
            does not say so.

    Raises:
        EmulusError: A key is unknown or missing, or a value asks for other maths than this decoder's.
    """
    return dataclasses.replace(DecoderConfig.from_dict(values), qk_norm=qk_norm)


def decoder_to_released(
    config: DecoderConfig, ids: Mapping[str, int], *, image_area: int, dtype: str
) -> dict[str, Any]:
    """Write a decoder's ``config.json`` as released. The code it points at is that of the hub's ``BAAI/Emu3-Gen``.

    Args:
        config: The decoder's.
        ids: The special ids by role.
        image_area: Of the pictures it draws, in pixels.
        dtype: Of the stored weights.

    Raises:
        EmulusError: The released code cannot build such a decoder.
    """
    if not config.qk_norm and config.head_width * config.num_attention_heads != config.hidden_size:
        raise EmulusError(
            f"Emu3's released code cannot have heads of width {config.head_width}: "
            f"{config.num_attention_heads} of them must make hidden_size {config.hidden_size}"
        )
    fields = config.to_dict()
    del fields["qk_norm"]
    if config.head_dim is None:
        del fields["head_dim"]
    classes = {"AutoConfig": "configuration_emu3.Emu3Config", "AutoModelForCausalLM": "modeling_emu3.Emu3ForCausalLM"}
    return {
        "architectures": ["Emu3ForCausalLM"],
        "auto_map": {auto: f"BAAI/Emu3-Gen--{name}" for auto, name in classes.items()},
        "model_type": RELEASED_DECODER,
        **fields,
        **{ROLE_KEYS[role]: ids[role] for role in ROLE_KEYS},
        "hidden_act": "silu",
        "image_area": image_area,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def decoder_from_transformers(values: Mapping[str, Any]) -> DecoderConfig:
    """Read an ``Emu3TextConfig``; what it leaves out is the class's default, an 8B Emu3's.

    Raises:
        EmulusError: A value asks for other maths than this decoder's.
    """
    return DecoderConfig.from_dict({**SIZES["emu3-8b"], **as_mapping(values, "decoder config")})


def decoder_to_transformers(config: DecoderConfig, ids: Mapping[str, int]) -> dict[str, Any]:
    """Write an ``Emu3TextConfig``.

    Args:
        config: The decoder's.
        ids: The special ids by role.

    Raises:
        EmulusError: transformers' Emu3 cannot compute such a decoder.
    """
    if config.qk_norm:
        raise EmulusError("transformers' Emu3 has no norms of queries and keys (qk_norm), which this decoder has")
    fields = config.to_dict()
    del fields["qk_norm"], fields["rope_theta"]
    if config.head_dim is None:
        del fields["head_dim"]
    return {
        "model_type": "emu3_text_model",
        **fields,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        **{key: ids[role] for role, key in ROLE_KEYS.items() if role in ("pad", "bos", "eos")},
    }


def vision_from_transformers_config(values: Mapping[str, Any]) -> VisionTokenizerConfig:
    """Read an ``Emu3VQVAEConfig``; what it leaves out is the class's default, the released tokenizer's.

    Raises:
        EmulusError: A value asks for another network than this vision tokenizer.
    """
    known = own_values(values, {*_VISION_KEYS, *_VISION_SILENT, "num_attention_heads"}, "vision tokenizer")
    if known.get("num_attention_heads") not in (1, None):
        raise EmulusError(
            f"vision tokenizer: num_attention_heads is {shown(known['num_attention_heads'])} but must be 1 "
            "(nothing else is supported)"
        )
    # Typed here, so that errors have the names of this layout.
    kinds = typing.get_type_hints(VisionTokenizerConfig)
    chosen = {
        ours: decode(kinds.get(ours, bool | None), known[theirs], f"vision tokenizer: {theirs}")
        for theirs, ours in _VISION_KEYS.items()
        if known.get(theirs) is not None
    }
    if "attn_resolutions" in known:
        chosen.setdefault("attn_resolutions", ())
    return VisionTokenizerConfig.from_dict({"model_type": "Emu3VisionVQ", **chosen})


def vision_to_transformers_config(config: VisionTokenizerConfig) -> dict[str, Any]:
    """Write an ``Emu3VQVAEConfig``. It has no place for ``dropout``, which matters in training alone.

    Raises:
        EmulusError: transformers' network cannot have attention where this tokenizer has it.
    """
    width = config.ch * config.ch_mult[-1]
    levels = [level for level in config.attn_resolutions if level < len(config.ch_mult)]
    if any(config.ch * config.ch_mult[level] != width for level in levels):
        raise EmulusError(
            f"transformers' Emu3 has attention only at levels as wide as the last, {width}; "
            f"this vision tokenizer has it at levels {levels}"
        )
    values = config.to_dict()
    return {
        "model_type": "emu3_vqgan",
        **{theirs: values[ours] for theirs, ours in _VISION_KEYS.items()},
        "hidden_size": width,
        "num_attention_heads": 1,
    }
