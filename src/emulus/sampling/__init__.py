"""logits -> id. Settings, guidance, filters, and noise that depends on the seed and the position alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulus.lazy import lazy
from emulus.sampling.params import SamplingParams

if TYPE_CHECKING:
    from emulus.sampling.draw import sample
    from emulus.sampling.filters import apply_temperature, top_k, top_p
    from emulus.sampling.guidance import apply_guidance
    from emulus.sampling.noise import gumbel

__all__ = ["SamplingParams", "apply_guidance", "apply_temperature", "gumbel", "sample", "top_k", "top_p"]
__getattr__ = lazy(
    __name__,
    {
        "apply_guidance": "guidance",
        "apply_temperature": "filters",
        "gumbel": "noise",
        "sample": "draw",
        "top_k": "filters",
        "top_p": "filters",
    },
)
