"""How the next id is chosen, as one checked value. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from emulus.checks import number, whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request's ids are drawn. The defaults are the released sampler's for images; None is the default, too.

    Attributes:
        temperature: Divides the logits; 0 takes the likeliest id.
        top_k: Only this many likeliest ids may be drawn; 0 keeps all.
        top_p: Only the likeliest ids that together reach this probability may be drawn; 1 keeps all.
        guidance_scale: Strength of classifier-free guidance where a request has a null prompt; 1 is none.
        seed: Fixes the noise, and with it the result, whatever else is drawn in the same batch.
        max_new_tokens: Ids that may be generated besides the medium that the prompt left open.

    Raises:
        EmulusError: A value is not a number or out of range: a temperature above 0 is at least 1e-6, and no scale is
            above 1e6.
    """

    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 1.0
    guidance_scale: float = 3.0
    seed: int = 0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            checked = field.default if given is None else _CHECKS[field.name](field.name, given)
            object.__setattr__(self, field.name, checked)


# Beyond these bounds logits overflow, and what is drawn means nothing any more.
_MOST_SCALE, _LEAST_TEMPERATURE = 1e6, 1e-6


def _temperature(name: str, value: Any) -> float:
    found = number(name, value, least=0, most=_MOST_SCALE)
    return number(name, value, least=_LEAST_TEMPERATURE) if found else found


_CHECKS: Mapping[str, Callable[[str, Any], int | float]] = {
    "temperature": _temperature,
    "top_k": partial(whole, most=2**31 - 1),
    "top_p": partial(number, above=0, most=1),
    "guidance_scale": partial(number, least=0, most=_MOST_SCALE),
    "seed": partial(whole, most=2**63 - 1),
    "max_new_tokens": partial(whole, least=1, most=2**31 - 1),
}
