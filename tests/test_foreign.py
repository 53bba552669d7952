"""What other programs write into configs: passed over where it changes nothing, refused where it could."""

from __future__ import annotations

from typing import Any

import pytest

from emulus.errors import EmulusError
from emulus.foreign import NEUTRAL, SILENT, own_values, rope_theta
from emulus.layouts.configs import (
    decoder_from_released,
    decoder_from_transformers,
    decoder_to_transformers,
    vision_from_transformers_config,
    vision_to_transformers_config,
)
from emulus.model import DecoderConfig, sized
from emulus.tokenizer.vision.config import VisionTokenizerConfig

SHAPE = sized("tiny", vocab_size=300, pad_token_id=7)
VISION = VisionTokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(1,), codebook_size=64)

# What the base class of transformers 4.2 to 4.57 wrote, beside what it writes now.
OLDER: dict[str, Any] = {
    "_attn_implementation_autoset": True, "_commit_hash": "abc", "add_cross_attention": False,
    "bad_words_ids": None, "begin_suppress_tokens": None, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "exponential_decay_length_penalty": None,
    "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "gradient_checkpointing": False,
    "is_decoder": False, "is_encoder_decoder": False, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1, "output_scores": False,
    "prefix": None, "problem_type": None, "pruned_heads": {}, "quantization_config": None,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "suppress_tokens": None, "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False,
    "tie_encoder_decoder": False, "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torchscript": False,
    "typical_p": 1.0, "use_bfloat16": False, "layer_types": ["full_attention"] * 4, "sliding_window": None,
    "max_window_layers": 28, "use_sliding_window": False, "partial_rotary_factor": 1.0, "mlp_bias": None,
}  # fmt: skip


@pytest.mark.parametrize("key", OLDER)
def test_a_key_that_older_releases_wrote_passes(key: str) -> None:
    extra = {key: OLDER[key]}
    assert DecoderConfig.from_dict(SHAPE.to_dict() | extra) == SHAPE
    text = decoder_to_transformers(SHAPE, {"pad": 7, "bos": 8, "eos": 9})
    assert decoder_from_transformers(text | extra) == SHAPE
    assert VisionTokenizerConfig.from_dict(VISION.to_dict() | extra) == VISION
    assert vision_from_transformers_config(vision_to_transformers_config(VISION) | extra) == VISION


def test_every_key_of_the_installed_transformers_passes() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Emu3TextConfig(
        **{key: value for key, value in SHAPE.to_dict().items() if key not in ("qk_norm", "head_dim", "rope_theta")},
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.rope_theta},
    )
    for written in (config.to_dict(), config.to_diff_dict(), vars(transformers.PretrainedConfig())):
        assert decoder_from_transformers({**config.to_dict(), **written}) == SHAPE
        assert decoder_from_released({**config.to_dict(), **written}, qk_norm=False) == SHAPE
    vq = transformers.Emu3VQVAEConfig(
        codebook_size=64, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, attn_resolutions=[1]
    )
    for written in (vq.to_dict(), vq.to_diff_dict(), vars(transformers.PretrainedConfig())):
        assert vision_from_transformers_config({**vq.to_dict(), **written}) == VISION


@pytest.mark.parametrize("key", sorted(NEUTRAL))
def test_a_key_that_could_change_the_maths_passes_only_if_it_does_not(key: str) -> None:
    for value in NEUTRAL[key]:
        assert own_values({key: value, "mine": 1}, {"mine"}, "it") == {"mine": 1}
    for value in ("x", 7, -1, 0.5, [3], {"a": 1}, True):
        if value not in NEUTRAL[key]:
            with pytest.raises(EmulusError, match=f"it: {key} is .*nothing else is supported"):
                own_values({key: value}, {"mine"}, "it")


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 4096},
        {"sliding_window": 4096, "use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": "sliding_attention"},
        {"layer_types": 5},
        {"is_encoder_decoder": True},
        {"partial_rotary_factor": 0.5},
        {"attention_bias": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"hidden_act": "gelu"},
        {"num_experts": 8},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0}},
        {"rope_scaling": {"mrope_section": [1, 2, 3], "type": "default"}},
        {"rope_scaling": "linear"},
        {"rope_parameters": {"type": "yarn", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": ["default"], "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "big"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": True}},
        {"an_unknown_key": None},
    ],
)
def test_other_maths_are_refused_in_both_layouts(change: dict[str, Any]) -> None:
    for read in (DecoderConfig.from_dict, decoder_from_transformers):
        with pytest.raises(EmulusError, match=next(iter(change))) as caught:
            read({**SHAPE.to_dict(), **change})
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": 500.0},
        {"rope_theta": 500, "rope_scaling": None},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
        {"rope_parameters": None, "rope_scaling": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 500.0},
    ],
)
def test_plain_rope_in_whatever_way_it_is_said(values: dict[str, Any]) -> None:
    assert rope_theta(values, "it") == 500.0
    shape = {key: value for key, value in SHAPE.to_dict().items() if key != "rope_theta"}
    assert DecoderConfig.from_dict(shape | values).rope_theta == 500.0


def test_nothing_said_is_the_default() -> None:
    assert rope_theta({"rope_parameters": {"rope_type": "default"}}, "it") is None
    shape = {key: value for key, value in SHAPE.to_dict().items() if key != "rope_theta"}
    nothing = {"attention_dropout": None, "head_dim": None, "tie_word_embeddings": None, "rms_norm_eps": None}
    assert DecoderConfig.from_dict(shape | nothing).rope_theta == 1e6
    assert DecoderConfig.from_dict(SHAPE.to_dict() | {"num_key_value_heads": None}).num_key_value_heads == 4


def test_a_window_that_is_switched_off_passes() -> None:
    off = {"sliding_window": 4096, "use_sliding_window": False}
    assert DecoderConfig.from_dict(SHAPE.to_dict() | off) == SHAPE


def test_no_key_is_of_two_kinds() -> None:
    assert not SILENT & NEUTRAL.keys()
    assert not SILENT - {"pad_token_id"} & SHAPE.to_dict().keys()
