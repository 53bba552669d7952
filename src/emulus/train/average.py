"""The running mean of the weights: what is evaluated and shipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Average:
    """A second copy of a model's tensors that follows the first. Of a spread model each process has its part."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, decay: float) -> None:
        """Start at the model's values.

        Args:
            model: What is followed.
            decay: How much of the mean stays at each step, once there were many.
        """
        self.model, self.decay = model, decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the mean towards the model; whole numbers are copied. The first steps count more."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = self._pairs()
        means, news = ([pair[side] for pair in pairs if pair[0].is_floating_point()] for side in (0, 1))
        torch._foreach_lerp_(means, news, 1 - decay)
        for mean, new in pairs:
            if not mean.is_floating_point():
                mean.copy_(new)

    @contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """The model with the mean's values, for the time of the block."""
        self._swap()
        try:
            yield self.model
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for mean, new in self._pairs():
            kept = new.clone()
            new.copy_(mean)
            mean.copy_(kept)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        news = self.model.state_dict().values()
        return [(local(mean), local(new)) for mean, new in zip(self.tensors.values(), news, strict=True)]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
