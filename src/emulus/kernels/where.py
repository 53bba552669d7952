"""Where each token of a step stands: which lane's memory its keys and values lie in, and at which slot."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Where:
    """Addresses and positions of the tokens of one step, shared by every layer's kernels.

    A lane's memory is one contiguous tensor ``(layers, 2, kv_heads, capacity, head_dim)``: 0 keys, 1 values; the slot
    of a token is its position. Whoever makes this keeps the lanes (and maps) alive while it is used.

    Attributes:
        base: Address of each token's lane memory.
        capacity: Slots of each token's lane.
        position: Each token's position, at least 0 and below its capacity.
        dtype: Of the lanes, float32 or bfloat16.
        kv_heads: Key/value heads of a layer.
        head_dim: Width of a head.
        ready: Address of each token's uint8 map ``(capacity,)``: a token sees only slots whose entry is not 0, and
            its own. A token whose address is 0 sees every slot up to its position; ``None`` where all tokens do.
    """

    base: Int[Tensor, " tokens"]
    capacity: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]
    dtype: torch.dtype
    kv_heads: int
    head_dim: int
    ready: Int[Tensor, " tokens"] | None = None

    @functools.cached_property
    def finished(self) -> Int[Tensor, "tokens kv_heads"]:
        """Zeros in int32, for attention on GPUs to count its finished programs in; each launch leaves zeros behind.

        Made once for all layers of a step, and part of its CUDA graph; never shared by steps that may run at once.
        """
        return torch.zeros(len(self.base), self.kv_heads, dtype=torch.int32, device=self.base.device)
