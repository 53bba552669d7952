"""How the next id is chosen, as one checked value. Imports no torch."""

from __future__ import annotations

import dataclasses
import math

from emulus.errors import EmulusError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's ids are drawn. The defaults are the released sampler's for pictures.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest id.
        top_k: Only this many likeliest ids may be drawn; 0 keeps all.
        top_p: Only the likeliest ids that together reach this probability may be drawn; 1 keeps all.
        guidance_scale: Strength of classifier-free guidance where a request has a null prompt; 1 is none.
        seed: Fixes the noise, and with it the result, whatever else is drawn in the same batch.
        max_new_tokens: Ids that may be generated besides the medium that the prompt left open.

    Raises:
        EmulusError: A value is out of range.
    """

    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 1.0
    guidance_scale: float = 3.0
    seed: int = 0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        _check(
            "temperature",
            self.temperature,
            _is_number(self.temperature) and self.temperature >= 0,
            "at least 0",
        )
        _check("top_k", self.top_k, _is_integer(self.top_k) and self.top_k >= 0, "a whole number, 0 for no limit")
        _check("top_p", self.top_p, _is_number(self.top_p) and 0 < self.top_p <= 1, "in (0, 1]")
        fine = _is_number(self.guidance_scale) and self.guidance_scale >= 0
        _check("guidance_scale", self.guidance_scale, fine, "at least 0; 1 for none")
        _check(
            "seed",
            self.seed,
            _is_integer(self.seed) and 0 <= self.seed < 2**63,
            "a whole number in [0, 2**63)",
        )
        fine = _is_integer(self.max_new_tokens) and self.max_new_tokens >= 1
        _check("max_new_tokens", self.max_new_tokens, fine, "a whole number of at least 1")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(name: str, value: object, fine: bool, wanted: str) -> None:
    if not fine:
        raise EmulusError(f"{name} is {value!r} but must be {wanted}")
