"""ids -> logits. The decoder: its shape, its maths, its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulus.lazy import lazy
from emulus.model.config import SIZES, DecoderConfig, sized

if TYPE_CHECKING:
    from emulus.model.transformer import Decoder
    from emulus.model.weights import load_config, load_decoder, save_decoder

__all__ = [
    "SIZES",
    "Decoder",
    "DecoderConfig",
    "load_config",
    "load_decoder",
    "save_decoder",
    "sized",
]
__getattr__ = lazy(
    __name__,
    {
        "Decoder": "transformer",
        "load_config": "weights",
        "load_decoder": "weights",
        "save_decoder": "weights",
    },
)
