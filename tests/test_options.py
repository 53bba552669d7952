"""Names and values that say how an engine runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import emulus
from emulus.engine import Jacobi, Schedule, Sequential, Zipar
from emulus.errors import EmulusError
from emulus.kernels import native
from emulus.model import Decoder, sized
from emulus.model.quantize import Quantization, quantize_decoder
from emulus.options import EngineOptions, best_schedule, schedule_called
from emulus.pipeline import Emulus

AHEAD = Jacobi() if native.available() else Sequential()


def small(**changes: Any) -> Decoder:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, **changes}
    return Decoder(sized("tiny", vocab_size=80, **shape)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_guesses_ahead_on_a_cpu(dtype: torch.dtype) -> None:
    assert best_schedule(small().to(dtype)) == AHEAD


@pytest.mark.parametrize(("kind", "expected"), [("int8", AHEAD), ("int4", AHEAD), ("fp8", Sequential())])
def test_auto_knows_which_weights_the_kernels_take(kind: Quantization, expected: Schedule) -> None:
    assert best_schedule(quantize_decoder(small(), kind)) == expected


def test_auto_goes_one_after_another_where_rounding_depends_on_the_step() -> None:
    assert best_schedule(small().half()) == Sequential()
    assert best_schedule(small(hidden_size=576, num_attention_heads=2, num_key_value_heads=1)) == Sequential()
    split = small(num_hidden_layers=2)
    split.model.blocks[1].to("meta")
    assert best_schedule(split) == Sequential()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "jacoby"}, "no schedule 'jacoby'; did you mean 'jacobi'"),
        ({"schedule": 3}, "schedule is 3 but must be a value of emulus.engine"),
        ({"kv_budget": "1GB"}, "kv_budget is '1GB' but must be"),
        ({"kv_dtype": "bfloat16"}, "kv_dtype is 'bfloat16' but must be a type of torch"),
        ({"schedule": "quick"}, "choose from auto, jacobi, sequential, zipar"),
        ({"batch_size": 0}, "batch_size is 0 but must be"),
        ({"kv_budget": 0}, "kv_budget is 0 but must be"),
    ],
)
def test_wrong_options_are_found_before_a_model_is_looked_for(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(EmulusError, match=message):
        emulus.load("nowhere", **wrong)


def test_a_name_with_a_window() -> None:
    assert schedule_called("zipar", 4) == Zipar(window=4)
    assert schedule_called("jacobi", 4) == Jacobi(window=4)
    assert schedule_called("jacobi") == "jacobi"
    with pytest.raises(EmulusError, match="of jacobi or zipar"):
        schedule_called("auto", 4)


def test_what_is_lossy_says_so_once(tiny: Emulus, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="emulus"):
        for schedule in ("sequential", "jacobi", Zipar(window=2)):
            model = Emulus(tiny.bundle, options=EngineOptions(schedule=schedule))
            model.generate_image("a cat", height=8, width=8)
            model.generate_image("a cat", height=8, width=8)
    (line,) = caplog.messages
    assert line.startswith("Zipar(window=2) is lossy")


def test_so_many_at_once(tiny: Emulus) -> None:
    """Twelve pictures in one go take the steps of one; five at once those of three."""
    steps = {}
    for size in (12, 5):
        model = Emulus(tiny.bundle, options=EngineOptions(schedule="sequential", batch_size=size))
        pictures = model.generate_images(["a cat"], num_images_per_prompt=12)
        steps[size] = (model.engine.counts.forwards, [picture.tobytes() for picture in pictures])
    assert steps[5][0] == 3 * steps[12][0]
    assert steps[5][1] == steps[12][1]
    short = Emulus(tiny.bundle, options=EngineOptions(kv_budget=1000))
    with pytest.raises(EmulusError, match="kv_budget"):
        short.generate_image("a cat")
