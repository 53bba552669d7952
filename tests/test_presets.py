"""Defaults of published models, and what a generation_config.json may say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import emulus
from emulus.errors import EmulusError
from emulus.pipeline import Emulus
from emulus.presets import PRESETS, GenerationDefaults


def test_emu3_5_samples_words_as_released(tiny: Emulus) -> None:
    """Text: top-k 1,024, top-p 0.9, temperature 1; images: top-k 5,120. Source: its released configs."""
    model = Emulus(dataclasses.replace(tiny.bundle, defaults=PRESETS["emu3.5"].defaults))
    words, image = model._text_params(None, {}), model._params(None, {})
    assert (words.temperature, words.top_k, words.top_p, words.guidance_scale) == (1.0, 1024, 0.9, 1.0)
    assert (image.temperature, image.top_k, image.top_p, image.guidance_scale) == (1.0, 5120, 1.0, 2.0)
    given = model._text_params(3, {"top_k": 7, "temperature": None})
    assert (given.temperature, given.top_k, given.top_p, given.seed) == (1.0, 7, 0.9, 3)


def test_words_do_not_take_the_options_of_images(tiny: Emulus) -> None:
    defaults = dataclasses.replace(tiny.defaults, top_k=1, top_p=0.01, text_temperature=1.0)
    params = Emulus(dataclasses.replace(tiny.bundle, defaults=defaults))._text_params(None, {})
    assert (params.top_k, params.top_p) == (2048, 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"best_of": 10**9},
        {"best_of": 0},
        {"height": 0},
        {"width": 10**12},
        {"num_frames": 0},
        {"fps": float("nan")},
        {"fps": 0},
        {"top_k": -1},
        {"top_p": 0},
        {"text_top_p": 2},
        {"text_top_k": 1.5},
        {"temperature": float("inf")},
        {"text_temperature": -1},
        {"max_text_tokens": 0},
        {"min_pixels": 10, "max_pixels": 5},
        {"negative_prompt": 3},
    ],
)
def test_defaults_are_bounded(changes: dict[str, Any], tiny: Emulus, tmp_path: Path) -> None:
    with pytest.raises(EmulusError):
        GenerationDefaults(**changes)
    tiny.save(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(EmulusError, match="generation_config") as raised:
        emulus.load(tmp_path)
    assert "\n" not in str(raised.value)
