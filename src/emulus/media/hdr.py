"""Frames of HDR videos -> the range and gamut of an ordinary screen."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import Float32, UInt8, UInt16

PQ = 16
HLG = 18
"""What ITU-T H.273 and FFmpeg call the two curves of HDR."""

_WHITE = 203.0
"""Candelas per square metre of a white sheet of paper, which a screen shows as its white (ITU-R BT.2408)."""
_PEAK = 1000.0
"""Of the brightest lights that are told apart."""
_KNEE = 0.7
"""Share of a screen's white up to which light is shown as it is; what is brighter is compressed."""

# ITU-R BT.2087: light in the primaries of BT.2020 to those of BT.709, which sRGB shares.
_TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)
_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
_STEPS = 2**14


def to_screen(values: UInt16[np.ndarray, "height width 3"], curve: int) -> UInt8[np.ndarray, "height width 3"]:
    """Show HDR values as sRGB: white becomes white, and brighter lights are compressed so that they differ still.

    Args:
        values: RGB of a PQ or HLG video in the primaries of BT.2020.
        curve: :data:`PQ` or :data:`HLG`.

    Returns:
        sRGB.

    Source: ITU-R BT.2100 (curves), BT.2408 (white).
    """
    light = _light(curve)[values]
    if curve == HLG:
        # The brightness that an HLG screen of 1,000 candelas adds to what the camera saw.
        light *= np.maximum(light @ _LUMINANCE, 1e-6)[..., None] ** np.float32(0.2) * np.float32(_PEAK / _WHITE)
    light = np.maximum(light @ _TO_709.T, 0)
    brightest = light.max(-1, keepdims=True)
    light *= _compressed(brightest) / np.maximum(brightest, 1e-6)
    return _srgb()[np.minimum(light * _STEPS, _STEPS).astype(np.int32)]


def _compressed(light: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    over = np.maximum(light - _KNEE, 0) / (1 - _KNEE)
    most = (_PEAK / _WHITE - _KNEE) / (1 - _KNEE)
    shown = np.minimum(over * (1 + over / most**2) / (1 + over), 1)
    return np.where(light > _KNEE, _KNEE + (1 - _KNEE) * shown, light).astype(np.float32)


@lru_cache(maxsize=2)
def _light(curve: int) -> Float32[np.ndarray, "65536"]:
    """For each value its light; of PQ as a multiple of white, of HLG as the camera saw it, up to 1."""
    value = np.linspace(0, 1, 2**16)
    if curve == PQ:
        root = value ** (1 / 78.84375)
        light = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
        light = light ** (1 / 0.1593017578125) * (10_000 / _WHITE)
    else:
        light = np.where(value <= 0.5, value**2 / 3, (np.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return light.astype(np.float32)


@lru_cache(maxsize=1)
def _srgb() -> UInt8[np.ndarray, "steps"]:
    light = np.linspace(0, 1, _STEPS + 1)
    value = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(value * 255).astype(np.uint8)
