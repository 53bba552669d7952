"""Memory for keys and values, shared by everything that one engine runs at the same time."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

Sizes = Mapping[torch.device, int]
"""Bytes on each device."""


class Budget:
    """Counts what the schedulers of an engine have taken, so that two of them do not promise the same memory twice."""

    def __init__(self) -> None:
        self._used: dict[torch.device, int] = {}
        self._lock = threading.Lock()

    def used(self, device: torch.device) -> int:
        """Bytes taken on a device, by all."""
        return self._used.get(device, 0)

    def take(self, need: Sizes, limit: Sizes, *, anyway: bool = False) -> bool:
        """Take memory if there is room for it.

        Args:
            need: How much.
            limit: Most that all together may take; a device that is not named has none.
            anyway: Take it though there is none.

        Returns:
            Whether it was taken.
        """
        with self._lock:
            fits = all(self.used(device) + size <= limit.get(device, 0) for device, size in need.items())
            if fits or anyway:
                for device, size in need.items():
                    self._used[device] = self.used(device) + size
            return fits or anyway

    def give_back(self, need: Sizes) -> None:
        """Give back what was taken."""
        with self._lock:
            for device, size in need.items():
                self._used[device] = self.used(device) - size


def fits(need: Sizes, limit: Sizes) -> bool:
    """Whether there would be room if nothing else ran."""
    return all(size <= limit.get(device, 0) for device, size in need.items())
