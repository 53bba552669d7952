"""Decoder configs: sizes, released files, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.model import SIZES, Decoder, DecoderConfig, sized


def parameters(config: DecoderConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(config).parameters())


def test_released_sizes_count_as_published() -> None:
    assert parameters(sized("emu3-8b")) == 8_492_011_520
    assert parameters(sized("emu3.5-34b")) == 34_103_460_864  # counted by hand in test_emu3_5.py


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("emoji")])
def test_ladder_sizes_are_what_they_say(name: str) -> None:
    millions = int(name.removeprefix("emoji-").removesuffix("m"))
    assert parameters(sized(name, vocab_size=5000)) / 1e6 == pytest.approx(millions, rel=0.2)


def test_config_imports_no_torch() -> None:
    code = "import sys, emulus.model.config, emulus.sampling.params; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_reads_released_config(official: Path) -> None:
    config = DecoderConfig.from_dict(json.loads((official / "language_model" / "config.json").read_text()))
    assert (config.vocab_size, config.head_width, config.pad_token_id) == (300, 16, 90)


@given(
    heads=st.integers(1, 8),
    groups=st.integers(1, 4),
    width=st.integers(1, 32),
    dropout=st.floats(0, 0.9),
    qk_norm=st.booleans(),
)
def test_dict_round_trip(heads: int, groups: int, width: int, dropout: float, qk_norm: bool) -> None:
    config = DecoderConfig(
        vocab_size=10,
        hidden_size=2 * width * heads * groups,
        intermediate_size=3,
        num_hidden_layers=1,
        num_attention_heads=heads * groups,
        num_key_value_heads=heads,
        attention_dropout=dropout,
        qk_norm=qk_norm,
    )
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_sise": 3}, "did you mean 'hidden_size'"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 129}, "num_attention_heads"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"pad_token_id": 100}, "pad_token_id"),
        ({"qk_norm": "yes"}, "qk_norm"),
    ],
)
def test_refuses_bad_values(change: dict[str, object], named: str) -> None:
    values = {**sized("tiny", vocab_size=100).to_dict(), **change}
    with pytest.raises(EmulusError, match=named) as caught:
        DecoderConfig.from_dict(values)
    assert "\n" not in str(caught.value)


def test_refuses_unknown_size_and_missing_vocabulary() -> None:
    with pytest.raises(EmulusError, match="did you mean 'emoji-6m'"):
        sized("emoji-6", vocab_size=10)
    with pytest.raises(EmulusError, match="vocab_size"):
        sized("tiny")
    with pytest.raises(EmulusError, match="lacks hidden_size"):
        DecoderConfig.from_dict({"vocab_size": 3, "model_type": "bert"})
    with pytest.raises(EmulusError, match="holds a list, not fields"):
        DecoderConfig.from_dict([1])  # type: ignore[arg-type]
