"""What a vision tokenizer is made of (imports no torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emulus.errors import EmulusError, did_you_mean

MODEL_TYPE = "Emu3VisionVQ"
NORM_GROUPS = 32


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
        if self.ch <= 0 or any(mult <= 0 for mult in self.ch_mult) or not self.ch_mult:
            raise EmulusError(f"vision tokenizer: ch {self.ch} and ch_mult {self.ch_mult} must be positive")
        if self.ch % NORM_GROUPS:
            raise EmulusError(f"vision tokenizer: ch must be a multiple of {NORM_GROUPS}, got {self.ch}")
        factor = self.temporal_downsample_factor
        if factor < 1 or factor & (factor - 1):
            raise EmulusError(f"vision tokenizer: temporal_downsample_factor must be a power of two, got {factor}")
        if not 2 <= self.codebook_size <= 2**24:
            raise EmulusError(f"vision tokenizer: codebook_size must be in 2..2^24, got {self.codebook_size}")
        if min(self.embed_dim, self.z_channels, self.num_res_blocks) < 1:
            raise EmulusError("vision tokenizer: embed_dim, z_channels and num_res_blocks must be at least 1")

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
        if values.get("model_type") != MODEL_TYPE:
            raise EmulusError(
                f"not a vision tokenizer: config.json says model_type {values.get('model_type')!r}, not {MODEL_TYPE!r}"
            )
        if values.get("double_z"):
            raise EmulusError("vision tokenizers with double_z (a mean and a variance per latent) are not supported")
        known = {field.name for field in dataclasses.fields(cls)}
        bookkeeping = {
            "model_type",
            "double_z",
            "architectures",
            "auto_map",
            "torch_dtype",
            "dtype",
            "transformers_version",
        }
        for key in values.keys() - known - bookkeeping:
            raise EmulusError(f"unknown key {key!r} in the vision tokenizer's config.json{did_you_mean(key, known)}")
        chosen: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in known
        }
        try:
            return cls(**chosen)
        except TypeError as error:
            raise EmulusError(f"the vision tokenizer's config.json has a value of the wrong kind: {error}") from None
