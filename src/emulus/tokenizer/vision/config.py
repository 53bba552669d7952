"""What a vision tokenizer is made of (imports no torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emulus.codec import as_mapping, decode_fields
from emulus.errors import EmulusError, shown
from emulus.foreign import own_values

MODEL_TYPE = "Emu3VisionVQ"
NORM_GROUPS = 32
_WHERE = "vision tokenizer"
# A size beyond these is a damaged or hostile file, refused before anything is built from it. The released tokenizer has
# 4 levels of 2 blocks and 0.27e9 parameters.
_MAX_LEVELS = 10
_MAX_PARAMETERS = 2**33
_BOUNDS = {
    "codebook_size": (2, 2**24),
    "embed_dim": (1, 4096),
    "z_channels": (1, 4096),
    # Those of an RGB image.
    "in_channels": (3, 3),
    "out_channels": (3, 3),
    "temporal_downsample_factor": (1, 256),
    "ch": (NORM_GROUPS, 4096),
    "num_res_blocks": (1, 32),
}


@dataclass(frozen=True, kw_only=True)
class VisionTokenizerConfig:
    """Shape of a vision tokenizer. The defaults are the released Emu3-VisionTokenizer's (270.7 M parameters).

    The spatial factor is ``2 ** (len(ch_mult) - 1)``. Widths (``ch`` times every ``ch_mult``) are multiples of 32, the
    number of groups of every group norm.

    Source: the released ``configuration_emu3visionvq.py``; the field names are its keys.
    """

    codebook_size: int = 32768
    embed_dim: int = 4
    z_channels: int = 4
    in_channels: int = 3
    out_channels: int = 3
    temporal_downsample_factor: int = 4
    ch: int = 256
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    # Level indices, not pixel sizes.
    attn_resolutions: tuple[int, ...] = (3,)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            _check_whole(name, getattr(self, name), least, most)
        for name, least, most, longest in (("ch_mult", 1, 64, _MAX_LEVELS), ("attn_resolutions", 0, 31, 32)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) > longest:
                raise EmulusError(f"{name} must be at most {longest} whole numbers, got {shown(values)}")
            for value in values:
                _check_whole(name, value, least, most)
        if not self.ch_mult:
            raise EmulusError("ch_mult is empty; give a factor for each level")
        if self.ch % NORM_GROUPS:
            raise EmulusError(f"ch must be a multiple of {NORM_GROUPS}, got {self.ch}")
        factor = self.temporal_downsample_factor
        if factor & (factor - 1):
            raise EmulusError(f"temporal_downsample_factor must be a power of two, got {factor}")
        rate = self.dropout
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise EmulusError(f"dropout must be at least 0 and below 1, got {shown(rate)}")
        if self.parameters > _MAX_PARAMETERS:
            raise EmulusError(
                f"its sizes make {self.parameters:.1e} parameters, and at most {_MAX_PARAMETERS:.1e} are read"
            )

    @property
    def parameters(self) -> int:
        """Number of learned parameters, by arithmetic: nothing is built."""
        widths, last = [self.ch * mult for mult in self.ch_mult], len(self.ch_mult) - 1
        blocks, codes, z = self.num_res_blocks, self.embed_dim, self.z_channels
        count = self.codebook_size * codes + 2 * 3 * z * codes + z + codes
        for code_channels, extra in ((0, 0), (codes, 1)):  # of the encoder and the decoder
            for level, width in enumerate(widths):
                before = (self.ch, *widths)[level] if not extra else widths[min(level + 1, last)]
                count += _block(before, width, code_channels) + (blocks + extra - 1) * _block(
                    width, width, code_channels
                )
                if level in self.attn_resolutions:
                    count += (blocks + extra) * _attention(width, code_channels)
                # A level is resized after it but for the last: the coarsest, or the finest of the decoder.
                count += _convolution(width, width, 9) if level != (0 if extra else last) else 0
            count += 2 * _block(widths[-1], widths[-1], code_channels) + _attention(widths[-1], code_channels)
            count += blocks * 2 * (2 * z + _convolution(z, z, 27))
        count += _convolution(self.in_channels, self.ch, 9) + 2 * widths[-1] + _convolution(widths[-1], z, 9)
        count += (
            _convolution(z, widths[-1], 9) + _norm(widths[0], codes) + _convolution(widths[0], self.out_channels, 9)
        )
        halvings = self.temporal_factor.bit_length() - 1
        return count + halvings * (_convolution(z, z, 36) + _convolution(z, z, 27))

    @property
    def spatial_factor(self) -> int:
        """Pixels per code along each side."""
        return int(2 ** (len(self.ch_mult) - 1))

    @property
    def temporal_factor(self) -> int:
        """Frames per code along time."""
        return self.temporal_downsample_factor

    def to_dict(self) -> dict[str, Any]:
        """The content of ``config.json``, in the released layout."""
        fields = dataclasses.asdict(self)
        lists = {key: list(value) for key, value in fields.items() if isinstance(value, tuple)}
        return {"model_type": MODEL_TYPE, **fields, **lists, "double_z": False}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VisionTokenizerConfig:
        """Read the content of a released (or own) ``config.json``.

        Raises:
            EmulusError: Another model type, an unknown key, or a value of the wrong kind.
        """
        kind = as_mapping(values, _WHERE).get("model_type")
        if kind != MODEL_TYPE:
            raise EmulusError(f"not a {_WHERE}: config.json says model_type {shown(kind)}, not {MODEL_TYPE!r}")
        fields = {field.name for field in dataclasses.fields(cls)}
        known = own_values(values, {*fields, "double_z"}, _WHERE)
        if known.pop("double_z", None) not in (False, None):
            raise EmulusError(f"{_WHERE}s with double_z (a mean and a variance per latent) are not supported")
        return decode_fields(cls, known, _WHERE)


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        wanted = f"{least}" if least == most else f"a whole number from {least} to {most}"
        raise EmulusError(f"{name} must be {wanted}, got {shown(value)}")


def _convolution(inputs: int, outputs: int, kernel: int) -> int:
    """Parameters of a convolution whose kernel has so many places."""
    return inputs * outputs * kernel + outputs


def _norm(width: int, code_channels: int) -> int:
    """Parameters of a group norm, steered by codebook vectors if they have channels."""
    return 2 * width + (2 * _convolution(code_channels, width, 1) if code_channels else 0)


def _block(inputs: int, outputs: int, code_channels: int) -> int:
    skip = _convolution(inputs, outputs, 1) if inputs != outputs else 0
    norms = _norm(inputs, code_channels) + _norm(outputs, code_channels)
    return norms + _convolution(inputs, outputs, 9) + _convolution(outputs, outputs, 9) + skip


def _attention(width: int, code_channels: int) -> int:
    return _norm(width, code_channels) + 4 * _convolution(width, width, 1)
