"""Keys and values of tokens already seen, so that each is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emulus.device import numbers
from emulus.errors import EmulusError
from emulus.model.config import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class CacheLayout:
    """How the keys and values of one token lie, and where.

    Attributes:
        kv_heads: Heads of keys and values.
        head_dim: Width of a head.
        dtype: Of keys and values.
        devices: Where each layer's lie: where that layer does.
    """

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]

    @classmethod
    def of(cls, config: DecoderConfig, devices: Sequence[torch.device], dtype: torch.dtype) -> CacheLayout:
        """The layout of a decoder whose layers lie on ``devices``."""
        return cls(kv_heads=config.num_key_value_heads, head_dim=config.head_width, dtype=dtype, devices=tuple(devices))

    def bytes(self, capacity: int) -> dict[torch.device, int]:
        """Memory of one lane of ``capacity`` tokens, on each device."""
        layer = 2 * self.kv_heads * capacity * self.head_dim * self.dtype.itemsize
        return {device: layer * self.devices.count(device) for device in dict.fromkeys(self.devices)}


class Lane:
    """Keys and values of one sequence, allocated once; a token's slot is its position.

    What lies at :attr:`length` and beyond is not seen and may be overwritten, so taking tokens back is making the
    length smaller.

    Attributes:
        capacity: Slots.
        length: Tokens that are there for good.
        memory: On each device ``(layers there, 2, kv_heads, capacity, head_dim)``: keys after RoPE, and values.
        ready: On each device, which slots may be seen, where that is not simply all up to the one who looks; else None.
    """

    def __init__(self, layout: CacheLayout, capacity: int) -> None:
        """Allocate.

        Raises:
            EmulusError: There is not enough memory for it.
        """
        self.capacity = capacity
        self.length = 0
        self.ready: Mapping[torch.device, Tensor] | None = None
        self._layout = layout
        shape = (2, layout.kv_heads, capacity, layout.head_dim)
        try:
            # Zeros, since a slot that plain PyTorch masks still enters the sum as 0 * value, and unset memory may
            # hold NaN.
            self.memory = {
                device: torch.zeros((layout.devices.count(device), *shape), dtype=layout.dtype, device=device)
                for device in dict.fromkeys(layout.devices)
            }
        except (RuntimeError, MemoryError) as error:
            size = sum(layout.bytes(capacity).values()) / 2**30
            raise EmulusError(
                f"no memory for the keys and values of {capacity} tokens ({size:.1f} GiB); "
                "generate fewer or smaller items at once"
            ) from error

    def layer(self, device: torch.device, index: int) -> Float[Tensor, "2 kv_heads capacity head_dim"]:
        """Keys and values of the ``index``-th layer on a device."""
        return self.memory[device][index]

    def free(self) -> None:
        """Give the memory back, though the lane itself may still be held somewhere, as by a traceback."""
        self.memory = {}
        self.ready = None

    def begin_like(self, other: Lane, length: int) -> None:
        """Take over the first ``length`` tokens of another lane of the same decoder."""
        for device, memory in self.memory.items():
            memory[:, :, :, :length] = other.memory[device][:, :, :, :length]
        self.length = length

    def watch(self) -> None:
        """Begin to keep which slots may be seen: those that are there now, and those marked with :meth:`mark`."""
        ready = torch.zeros(self.capacity, dtype=torch.uint8)
        ready[: self.length] = 1
        self.ready = {device: ready.to(device) for device in self.memory}

    def mark(self, positions: Sequence[int]) -> None:
        """Let slots be seen from now on."""
        assert self.ready is not None, "watch() comes first"
        for ready in self.ready.values():
            ready.index_fill_(0, numbers(positions, ready.device), 1)
