"""Keys that transformers and programs around it write into a model's JSON files, and what each may say here.

Every release writes others: the base class of all configs alone has had some seventy. Those that say nothing about what
a model computes are passed over with any value. Those that could change it are passed over if their value changes
nothing. Any other key is refused, since what it asks for would silently not be done.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from emulus.codec import as_mapping, decode
from emulus.errors import EmulusError, did_you_mean, shown

_GENERATION = frozenset(
    {
        "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
        "bad_words_ids", "begin_suppress_tokens", "cache_config", "cache_implementation", "compile_config",
        "constraints", "continuous_batching_config", "custom_generate", "disable_compile", "diversity_penalty",
        "do_sample", "dola_layers", "early_stopping", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty",
        "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id",
        "forced_decoder_ids", "forced_eos_token_id", "generation_kwargs", "is_assistant", "length_penalty",
        "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size", "max_new_tokens", "max_time",
        "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "num_beam_groups", "num_beams", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_logits", "output_scores", "penalty_alpha", "prefill_chunk_size",
        "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits", "repetition_penalty",
        "return_dict_in_generate", "return_legacy_cache", "sequence_bias", "speculation_type", "stop_strings",
        "suppress_tokens", "target_lookbehind", "token_healing", "top_h", "trust_remote_code", "typical_p", "use_cache",
        "use_mtp", "watermarking_config",
    }
)  # fmt: skip
_IDS = frozenset(
    {
        "audio_token_id", "boi_token_id", "bos_token_id", "cls_token_id", "decoder_start_token_id", "eof_token_id",
        "eoi_token_id", "eol_token_id", "eos_token_id", "image_token_id", "image_token_index", "img_token_id",
        "mask_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "video_token_id",
    }
)  # fmt: skip
# Of files: who wrote them, and how they are to be loaded by others.
_FILE = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash",
        "_diffusers_version", "_experts_implementation", "_experts_implementation_internal", "_flash_attn_2_enabled",
        "_from_model_config", "_name_or_path", "_num_labels", "_output_attentions", "_post_init_done", "architectures",
        "attn_implementation", "auto_map", "base_model_name_or_path", "custom_pipelines", "dtype",
        "experts_implementation", "license", "model_max_length", "model_name", "model_type", "name_or_path",
        "processor_class", "tags", "tokenizer_class", "torch_dtype", "transformers.js_config", "transformers_version",
        "unsloth_fixed", "unsloth_version",
    }
)  # fmt: skip
# Of transformers' classes: what they return, how they are split over devices, heads for classifying, training.
_CLASS = frozenset(
    {
        "base_model_ep_plan", "base_model_pp_plan", "base_model_tp_plan", "chunk_size_feed_forward",
        "distributed_config",
        "embd_dropout", "embd_pdrop", "finetuning_task", "gradient_checkpointing", "hidden_dropout", "id2label",
        "initializer_factor", "is_decoder", "keys_to_ignore_at_inference", "label2id", "loss_type",
        "max_window_layers",
        "num_labels", "prefix", "problem_type", "resid_pdrop", "return_dict", "sub_configs", "task_specific_params",
        "tf_legacy_loss", "tie_encoder_decoder", "torchscript", "tp_plan", "use_bfloat16", "use_return_dict",
        "xla_device",
    }
)  # fmt: skip
SILENT = _FILE | _CLASS | _IDS | _GENERATION | {"temperature", "top_k", "top_p", "image_area", "guidance_scale"}
"""Keys of a ``config.json`` that say nothing about what a model computes."""
SILENT_IN_GENERATION = _FILE | _IDS | _GENERATION
"""Keys of a ``generation_config.json`` that are of no use here. Those that are used have the same names as ours."""

NEUTRAL: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "add_cross_attention": (False, None),
        "attention_bias": (False, None),
        "attention_chunk_size": (None,),
        "attn_logit_softcapping": (None,),
        "attn_logits_soft_cap": (None,),
        "compression_config": (None,),
        "cross_attention_hidden_size": (None,),
        "final_logit_softcapping": (None,),
        "hidden_act": ("silu", "swish", None),
        "hidden_activation": ("silu", "swish", None),
        "is_encoder_decoder": (False, None),
        "logit_scale": (1, None),
        "mlp_bias": (False, None),
        "no_rope_layers": (None, []),
        "num_experts": (None, 0),
        "num_local_experts": (None, 0),
        "partial_rotary_factor": (1, None),
        "pretraining_tp": (1, None),
        "pruned_heads": (None, {}),
        "qkv_bias": (False, None),
        "quantization_config": (None,),
        "rope_interleaved": (False, None),
        "sparsity_config": (None, {}),
        "use_bias": (False, None),
        "use_qk_norm": (False, None),
        "use_sliding_window": (False, None),
    }
)
"""Keys that could change what a decoder computes, with the values that do not."""

_FULL_ATTENTION = "full_attention"
# Of "rope_parameters" and the older "rope_scaling": what leaves plain RoPE what it is.
_ROPE_KINDS = ("default", None)
_ROPE: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {"factor": (1, None), "attention_factor": (1, None), "partial_rotary_factor": (1, None), "mscale": (1, None)}
)
_ROPE_SILENT = frozenset({"rope_type", "type", "rope_theta", "original_max_position_embeddings", "finetuned"})


def own_values(values: object, fields: Collection[str], where: str) -> dict[str, Any]:
    """The keys of a ``config.json`` that are ours, once all others are known to change nothing.

    Args:
        values: The parsed file, or a part of it.
        fields: What is ours.
        where: Names it in errors.

    Raises:
        EmulusError: It is not a mapping, or a key is unknown or asks for something that is not computed here.
    """
    mapping = as_mapping(values, where)
    for key, value in mapping.items():
        if key not in fields and key not in SILENT:
            _check_neutral(key, value, mapping, fields, where)
    return {key: value for key, value in mapping.items() if key in fields}


def _check_neutral(key: str, value: object, values: Mapping[str, Any], fields: Collection[str], where: str) -> None:
    if key in NEUTRAL:
        if not _is_one_of(value, NEUTRAL[key]):
            wanted = shown(NEUTRAL[key][0])
            raise EmulusError(f"{where}: {key} is {shown(value)} but must be {wanted} (nothing else is supported)")
    elif key == "layer_types":
        kinds = value if isinstance(value, list) else [] if value is None else [value]
        if any(kind != _FULL_ATTENTION for kind in kinds):
            raise EmulusError(f"{where}: layer_types are not all {_FULL_ATTENTION} (nothing else is supported)")
    elif key == "sliding_window":
        # Some configs give a width and switch it off beside.
        if value is not None and values.get("use_sliding_window") is not False:
            raise EmulusError(f"{where}: sliding_window is {shown(value)} but must be null (nothing else is supported)")
    else:
        raise EmulusError(f"{where}: unknown key {shown(key)}{did_you_mean(key, fields)}")


def rope_theta(values: Mapping[str, Any], where: str) -> float | None:
    """The base of a decoder's rotary wave lengths, from the three keys that have said it.

    transformers 5 writes ``rope_parameters``, older releases ``rope_theta`` and ``rope_scaling``.

    Args:
        values: A ``config.json``.
        where: Names it in errors.

    Returns:
        The base, or ``None`` if none is given.

    Raises:
        EmulusError: The waves are scaled or cover a part of each head only, or two bases contradict each other.
    """
    found: dict[str, float] = {}
    if values.get("rope_theta") is not None:
        found["rope_theta"] = decode(float, values["rope_theta"], f"{where}: rope_theta")
    for name in ("rope_parameters", "rope_scaling"):
        if values.get(name) is None:
            continue
        parameters = as_mapping(values[name], f"{where}: {name}")
        _check_plain(name, parameters, where)
        if parameters.get("rope_theta") is not None:
            found[name] = decode(float, parameters["rope_theta"], f"{where}: {name}, rope_theta")
    if len(set(found.values())) > 1:
        raise EmulusError(f"{where}: {' and '.join(found)} give different bases; remove the wrong one")
    return next(iter(found.values()), None)


def _check_plain(name: str, parameters: Mapping[str, Any], where: str) -> None:
    kinds = [parameters[key] for key in ("rope_type", "type") if key in parameters]
    # A linear scaling by 1 scales nothing.
    allowed = (*_ROPE_KINDS, "linear") if parameters.get("factor") == 1 else _ROPE_KINDS
    wrong = [key for key, value in parameters.items() if not _is_one_of(value, _ROPE.get(key, (value,)))]
    wrong += [key for key in parameters if key not in _ROPE and key not in _ROPE_SILENT]
    if not all(_is_one_of(kind, allowed) for kind in kinds) or wrong:
        raise EmulusError(f"{where}: {name} {shown(parameters)} is not plain RoPE; scaling is not supported")


def _is_one_of(value: object, options: tuple[object, ...]) -> bool:
    # False == 0 and True == 1, but "mlp_bias": 0 is not what anyone writes, and "factor": true is a damaged file.
    return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in options)
