"""Shape of a decoder: Hugging Face's field names, checked, and a ladder of named sizes. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from emulus.codec import decode_fields
from emulus.errors import EmulusError, did_you_mean, shown
from emulus.foreign import own_values, rope_theta

# A size beyond these is a damaged or hostile file, refused before anything is built from it.
_MAX_SIZE = 2**24
_MAX_LAYERS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that fixes a decoder's parameters and maths.

    Attributes:
        vocab_size: Ids in the one id space (text, specials, visual, action).
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Query heads.
        num_key_value_heads: Key/value heads; divides ``num_attention_heads``.
        head_dim: Width of one head; ``None`` means ``hidden_size // num_attention_heads`` (see
            ``head_width``).
        max_position_embeddings: Longest sequence the model was made for.
        rope_theta: Base of the rotary wave lengths.
        rms_norm_eps: Added to the mean square in every norm.
        attention_dropout: One rate for the three released places: input embeddings, attention weights, and
            the residual branches; active in train mode only.
        initializer_range: Standard deviation of every new weight.
        tie_word_embeddings: Whether the output head is the embedding table.
        qk_norm: Whether queries and keys are normalised per head before RoPE (Emu3.5).
        pad_token_id: The id whose embedding starts as zero, if any.

    Raises:
        EmulusError: A value is out of range or two values do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    max_position_embeddings: int = 9216
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (*_INTEGERS, *(("head_dim",) if self.head_dim is not None else ())):
            _check(_is_int(getattr(self, name), 1, _MAX_SIZE), name, getattr(self, name), "a positive integer")
        _check(
            self.num_hidden_layers <= _MAX_LAYERS,
            "num_hidden_layers",
            self.num_hidden_layers,
            f"<= {_MAX_LAYERS}",
        )
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            _check(_is_number(value) and 0 < value < float("inf"), name, value, "a positive number")
        rate = self.attention_dropout
        _check(_is_number(rate) and 0 <= rate < 1, "attention_dropout", rate, "in [0, 1)")
        for name in ("tie_word_embeddings", "qk_norm"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _check(
            heads % kv_heads == 0,
            "num_key_value_heads",
            kv_heads,
            f"a divisor of num_attention_heads {heads}",
        )
        fits = self.head_dim is not None or self.hidden_size % heads == 0
        _check(
            fits,
            "hidden_size",
            self.hidden_size,
            f"a multiple of num_attention_heads {heads}, or give head_dim",
        )
        _check(self.head_width % 2 == 0, "head_dim", self.head_width, "even (RoPE turns pairs)")
        _check(
            heads * self.head_width <= _MAX_SIZE,
            "head_dim",
            self.head_width,
            f"<= {_MAX_SIZE} over all heads",
        )
        pad = self.pad_token_id
        fits = pad is None or _is_int(pad, 0, self.vocab_size - 1)
        _check(fits, "pad_token_id", pad, f"below vocab_size {self.vocab_size}")

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim if self.head_dim is not None else self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Read a config.json, ours or a released one.

        Args:
            values: The parsed file.

        Raises:
            EmulusError: A key is unknown or missing, or a value asks for maths this decoder does not do.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        known = own_values(values, {*fields, "rope_parameters", "rope_scaling"}, _WHERE)
        theta = rope_theta(known, _WHERE)
        given = {name: value for name, value in known.items() if name in fields and name != "rope_theta"}
        # As in transformers, null is the default, which here is as many as there are query heads.
        if "num_key_value_heads" in given and given["num_key_value_heads"] is None:
            given["num_key_value_heads"] = given.get("num_attention_heads")
        given = {name: value for name, value in given.items() if value is not None or name in _REQUIRED}
        missing = [name for name in _REQUIRED if name not in given]
        if missing:
            raise EmulusError(f"{_WHERE} lacks {', '.join(missing)}; is it another model's config.json?")
        if theta is not None:
            given["rope_theta"] = theta
        return decode_fields(cls, given, _WHERE)

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON values; :meth:`from_dict` reads them back."""
        return dataclasses.asdict(self)


_WHERE = "decoder config"
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_INTEGERS = (*_REQUIRED, "max_position_embeddings")


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(fine: bool, name: str, value: object, wanted: str) -> None:
    if not fine:
        raise EmulusError(f"{name} is {shown(value)} but must be {wanted}")


# The emoji ladder: sequences are short, so rotary waves are too (a base of 1e6 would leave most pairs
# unturned).
_SHORT: Mapping[str, Any] = MappingProxyType({"max_position_embeddings": 4096, "rope_theta": 1e4})


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **rest: Any) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            **rest,
        }
    )


SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "tiny": _shape(128, 352, 4, 4, 2, **_SHORT),
        "emoji-3m": _shape(192, 512, 4, 3, 1, **_SHORT),
        "emoji-6m": _shape(256, 704, 6, 4, 2, **_SHORT),
        "emoji-9m": _shape(256, 704, 8, 4, 2, **_SHORT),
        "emoji-10m": _shape(320, 864, 7, 5, 1, **_SHORT),
        "emoji-25m": _shape(512, 1376, 8, 8, 2, **_SHORT),
        "emoji-60m": _shape(640, 1728, 12, 10, 2, **_SHORT),
        "emu3-8b": _shape(
            4096, 14336, 32, 32, 8, vocab_size=184_622, max_position_embeddings=9216, pad_token_id=151_643
        ),
        # Grown from Qwen3, whose norm epsilon and rotary base are taken here: the report gives neither.
        "emu3.5-34b": _shape(
            5120,
            25600,
            64,
            64,
            8,
            vocab_size=282_926,
            head_dim=128,
            max_position_embeddings=32_768,
            rms_norm_eps=1e-6,
            qk_norm=True,
            pad_token_id=151_643,
        ),
    }
)


def sized(name: str, *, vocab_size: int | None = None, **overrides: Any) -> DecoderConfig:
    """Give a named size as a config.

    Args:
        name: One of ``SIZES``.
        vocab_size: Ids in the vocabulary; may be left out for the released sizes.
        overrides: Other fields of :class:`DecoderConfig` to change.

    Raises:
        EmulusError: The name or a field is unknown, a value is out of range, or the vocabulary size is
            missing.

    Source: Emu3 arXiv:2409.18869 table 3; Emu3.5 arXiv:2510.26583. The emoji sizes are this project's.
    """
    if name not in SIZES:
        raise EmulusError(f"unknown decoder size {name!r}{did_you_mean(name, SIZES)}")
    values = {**SIZES[name], **overrides}
    if vocab_size is not None:
        values["vocab_size"] = vocab_size
    if "vocab_size" not in values:
        raise EmulusError(f"decoder size {name!r} needs a vocab_size")
    return DecoderConfig.from_dict(values)
