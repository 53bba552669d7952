"""Keys and values of tokens already seen, so that each is computed once."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emulus.errors import EmulusError
from emulus.model.config import DecoderConfig


class KVCache:
    """Preallocated keys and values; a token's slot is its position.

    Rows are independent: each has its own length, kept by the caller as the positions it feeds. A query sees
    the slots at or before its own position, so what lies beyond (padding of a shorter row, a rejected draft)
    is never seen, and the next tokens of that row overwrite it. Going back is feeding a smaller position.

    Attributes:
        keys: ``(layers, batch, kv_heads, max_length, head_dim)``, after RoPE.
        values: Same shape.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate.

        Args:
            config: The decoder's shape.
            batch: Rows.
            max_length: Slots per row.
            dtype: Of keys and values.
            device: Where they lie.

        Raises:
            EmulusError: There is not enough memory for it.
        """
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, max_length, config.head_width)
        try:
            # Zeros, since a masked slot still enters the weighted sum as 0 * value and unset memory may hold
            # NaN.
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
        except (RuntimeError, MemoryError) as error:
            size = 2 * dtype.itemsize * torch.Size(shape).numel() / 2**30
            raise EmulusError(
                f"no memory for the keys and values of {batch} rows of {max_length} tokens ({size:.1f} GiB); "
                "generate fewer or smaller items at once"
            ) from error
        self.max_length = max_length
        self._rows = torch.arange(batch, device=device)[:, None]

    def visible(self, position_ids: Int[Tensor, "batch tokens"]) -> int:
        """Say how many slots any of these queries can see.

        Raises:
            EmulusError: A position lies beyond the cache.
        """
        reach = int(position_ids.max()) + 1
        if reach > self.max_length:
            raise EmulusError(f"a sequence of {reach} tokens does not fit a key/value cache of {self.max_length}")
        return reach

    def write(
        self,
        layer: int,
        position_ids: Int[Tensor, "batch tokens"],
        keys: Float[Tensor, "batch kv_heads tokens head_dim"],
        values: Float[Tensor, "batch kv_heads tokens head_dim"],
    ) -> None:
        """Put one layer's new keys and values at their positions."""
        # The row and position indices stand apart, so their shape (batch, tokens) leads the written block's.
        self.keys[layer, self._rows, :, position_ids] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[layer, self._rows, :, position_ids] = values.transpose(1, 2).to(self.values.dtype)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep only these rows, in this order."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]
        self._rows = self._rows[: len(rows)]
