"""A vision tokenizer's config is typed and bounded before anything is built from it, in either layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.layouts.configs import vision_from_transformers_config
from emulus.tokenizer.vision.config import VisionTokenizerConfig
from emulus.tokenizer.vision.model import VisionTokenizer
from emulus.tokenizer.vision.weights import load_vision_tokenizer
from emulus.weights import on_meta

OWN = VisionTokenizerConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), codebook_size=64).to_dict()
THEIRS = {
    "ch": "base_channels",
    "ch_mult": "channel_multiplier",
    "z_channels": "latent_channels",
    "double_z": "double_latent",
}

HOSTILE: list[tuple[str, Any]] = [
    *((name, value) for name in ("num_res_blocks", "ch", "z_channels", "embed_dim", "codebook_size", "in_channels",
                                 "out_channels", "temporal_downsample_factor")
      for value in (10**8, 2**64, 10**400, 0, -1, 64.0, True, "64", [64], {}, float("nan"))),
    *((name, value) for name in ("ch_mult", "attn_resolutions")
      for value in ([1] * 3000, [10**9], [-1], [1.0], [True], ["1"], [[1]], [{}], [None], {}, {"0": 1}, 3, "12", True)),
    *(("dropout", value) for value in (2**64, -0.1, 1, 1.5, True, "0", [0.1], float("nan"), float("inf"))),
    *(("double_z", value) for value in (True, 1, "no", [0])),
    ("ch", 48), ("ch_mult", []), ("temporal_downsample_factor", 3), ("codebook_size", 1),
    ("model_type", ["Emu3VisionVQ"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), HOSTILE, ids=[f"{name}-{number}" for number, (name, _) in enumerate(HOSTILE)]
)
def test_hostile_values_are_refused_at_once(name: str, value: Any) -> None:
    with pytest.raises(EmulusError) as caught:
        VisionTokenizerConfig.from_dict(OWN | {name: value})
    assert len(str(caught.value)) < 400
    if name not in ("dropout", "model_type"):
        with pytest.raises(EmulusError):
            vision_from_transformers_config({"attn_resolutions": [], THEIRS.get(name, name): value})


def test_sizes_that_are_each_allowed_can_be_too_much_together() -> None:
    with pytest.raises(EmulusError, match=r"its sizes make .* parameters, and at most"):
        VisionTokenizerConfig.from_dict(OWN | {"ch": 4096, "ch_mult": [64] * 10, "num_res_blocks": 32})


@settings(deadline=None, max_examples=30)
@given(
    mults=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    blocks=st.integers(1, 3),
    attention=st.sets(st.integers(0, 5)),
    codes=st.integers(1, 9),
    latents=st.integers(1, 9),
    halvings=st.integers(0, 3),
)
def test_parameters_are_counted_right(
    mults: list[int], blocks: int, attention: set[int], codes: int, latents: int, halvings: int
) -> None:
    config = VisionTokenizerConfig(
        ch=32,
        ch_mult=tuple(mults),
        num_res_blocks=blocks,
        attn_resolutions=tuple(attention),
        embed_dim=codes,
        z_channels=latents,
        codebook_size=70,
        temporal_downsample_factor=2**halvings,
    )
    model = on_meta(lambda: VisionTokenizer(config))
    assert config.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert VisionTokenizerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_released_size() -> None:
    assert VisionTokenizerConfig().parameters == 270_740_287


def test_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OWN | {"ch": 64.0}))
    with pytest.raises(EmulusError, match=r"config\.json: vision tokenizer: ch must be a whole number"):
        load_vision_tokenizer(tmp_path)
