"""Keys and values of tokens already seen, so that each is computed once."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emulus.errors import EmulusError
from emulus.model.config import DecoderConfig
from emulus.weights import Place, place


class KVCache:
    """Preallocated keys and values; a token's slot is its position.

    Rows are independent: each has its own length, kept by the caller as the positions it feeds. A query sees
    the slots at or before its own position, so what lies beyond (padding of a shorter row, a rejected draft)
    is never seen, and the next tokens of that row overwrite it. Going back is feeding a smaller position.

    Each layer's keys and values lie where that layer does.

    Attributes:
        keys: Of each layer, ``(batch, kv_heads, max_length, head_dim)``, after RoPE.
        values: Same shapes.
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: Place = "cpu",
    ) -> None:
        """Allocate.

        Args:
            config: The decoder's shape.
            batch: Rows.
            max_length: Slots per row.
            dtype: Of keys and values.
            device: Where they lie; a function gets the names of the layers (``model.layers.0``).

        Raises:
            EmulusError: There is not enough memory for it.
        """
        shape = (batch, config.num_key_value_heads, max_length, config.head_width)
        devices = [place(device, f"model.layers.{layer}") for layer in range(config.num_hidden_layers)]
        try:
            # Zeros, since a masked slot still enters the weighted sum as 0 * value and unset memory may hold
            # NaN.
            self.keys = [torch.zeros(shape, dtype=dtype, device=where) for where in devices]
            self.values = [torch.zeros(shape, dtype=dtype, device=where) for where in devices]
        except (RuntimeError, MemoryError) as error:
            size = 2 * len(devices) * dtype.itemsize * torch.Size(shape).numel() / 2**30
            raise EmulusError(
                f"no memory for the keys and values of {batch} rows of {max_length} tokens ({size:.1f} GiB); "
                "generate fewer or smaller items at once"
            ) from error
        self.max_length = max_length
        self._rows = {keys.device: torch.arange(batch, device=keys.device)[:, None] for keys in self.keys}

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
        rows = self._rows[self.keys[layer].device]
        # The row and position indices stand apart, so their shape (batch, tokens) leads the written block's.
        self.keys[layer][rows, :, position_ids] = keys.transpose(1, 2).to(self.keys[layer].dtype)
        self.values[layer][rows, :, position_ids] = values.transpose(1, 2).to(self.values[layer].dtype)

    def begin_with(self, prefix: KVCache) -> None:
        """Let every row begin with the tokens of another cache, of one row or of as many."""
        pairs = zip([*self.keys, *self.values], [*prefix.keys, *prefix.values], strict=True)
        for mine, other in pairs:
            mine[:, :, : prefix.max_length] = other.to(mine.device)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep only these rows, in this order."""
        where = {device: rows.to(device) for device in self._rows}
        # Layer by layer, so that only one layer is held twice.
        for kept in (self.keys, self.values):
            for layer, tensor in enumerate(kept):
                kept[layer] = tensor[where[tensor.device]]
        self._rows = {device: index[: len(rows)] for device, index in self._rows.items()}
