"""Who tells painted frames from real ones, so that the vision tokenizer learns to paint what looks real.

A pixel's error is least when everything uncertain is painted as its mean, that is blurred. A second network, trained
at the same time to tell the two apart patch by patch, calls blur painted. The tokenizer gets a small term for being
told apart.

Sources: patches: Isola et al. (arXiv:1611.07004); the non-saturating loss: Goodfellow et al. (arXiv:1406.2661);
LeCAM: Tseng et al. (arXiv:2104.03310).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from emulus.errors import EmulusError, at_least

_GROUPS = 8
_AVERAGE_DECAY = 0.99


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """The adversarial part of a vision tokenizer's training.

    Attributes:
        weight: Of the term; 0 trains without a discriminator. Beside ``l2`` of 1 the gradient is of the same size at
            about 0.01, once the discriminator is ahead.
        start_share: Share of the steps after which the discriminator begins: what it says of blobs helps nobody.
        rise_share: Share of the steps over which the weight rises from zero then, while the discriminator learns.
        learning_rate: Peak of the discriminator's; it falls as the tokenizer's does.
        lecam: Weight of the pull of its verdicts on real frames towards its usual ones on painted frames and the other
            way round. It keeps the discriminator from learning few pictures by heart.
        width: Channels of its first layer.
        layers: How many of its layers halve the picture.
        frames: How many of a batch's pictures, and as many of its clips' frames, it sees at most.
    """

    weight: float = 0.0
    start_share: float = 0.3
    rise_share: float = 0.05
    learning_rate: float = 3e-4
    lecam: float = 0.01
    width: int = 32
    layers: int = 2
    frames: int = 16

    def __post_init__(self) -> None:
        at_least(0, weight=self.weight, start_share=self.start_share, rise_share=self.rise_share, lecam=self.lecam)
        at_least(1, layers=self.layers, frames=self.frames)
        if not 0 < self.learning_rate < float("inf"):
            raise EmulusError(f"the discriminator's learning_rate must be positive, got {self.learning_rate}")
        if self.width < 1 or self.width % _GROUPS:
            raise EmulusError(f"the discriminator's width must be a multiple of {_GROUPS}, got {self.width}")

    def weight_at(self, step: int, steps: int) -> float:
        """Weight of the term in a step: zero, then rising, then ``weight``."""
        begun = step - self.start_share * steps
        return self.weight * min(max((begun + 1) / max(self.rise_share * steps, 1.0), 0.0), 1.0)


class Discriminator(nn.Module):
    """A verdict for each patch of a frame: positive for real, negative for painted.

    It sees a frame and how it differs from the one before (nothing for pictures and first frames), so flicker shows.
    """

    def __init__(self, channels: int, config: AdversarialConfig) -> None:
        super().__init__()
        widths = [config.width * 2 ** min(level, 2) for level in range(config.layers)]
        layers: list[nn.Module] = [nn.Conv2d(2 * channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, width in pairwise(widths):
            layers += _normed(nn.Conv2d(before, width, 4, stride=2, padding=1, bias=False))
        layers += _normed(nn.Conv2d(widths[-1], 2 * widths[-1], 3, padding=1, bias=False))
        self.layers = nn.Sequential(*layers, nn.Conv2d(2 * widths[-1], 1, 3, padding=1))

    def forward(self, views: Float[Tensor, "n c h w"]) -> Float[Tensor, "n i j"]:
        """Verdicts on what :func:`views_of` made."""
        return cast(Tensor, self.layers(views))[:, 0].float()


def _normed(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.GroupNorm(_GROUPS, convolution.out_channels), nn.LeakyReLU(0.2)]


def views_of(pixels: Float[Tensor, "*frames c h w"]) -> Float[Tensor, "n 2c h w"]:
    """Each frame and its change since the frame before; pictures, and first frames of clips, have none."""
    change = torch.zeros_like(pixels)
    if pixels.ndim == 5:
        change = torch.cat([change[:, :1], pixels[:, 1:] - pixels[:, :-1]], dim=1)
    return torch.cat([pixels, change], dim=-3).flatten(0, -4)


class Verdicts:
    """The losses made of verdicts, and their running means, which LeCAM needs."""

    def __init__(self, lecam: float, device: torch.device | str = "cpu") -> None:
        """Start both means at zero.

        Args:
            lecam: Weight of the regulariser.
            device: Where verdicts will lie.
        """
        self.lecam = lecam
        self.real, self.painted = (torch.zeros((), device=device) for _ in range(2))

    def tokenizer_loss(self, painted: Float[Tensor, "n i j"]) -> Float[Tensor, ""]:
        """Small where painted patches pass for real."""
        return F.softplus(-painted).mean()

    def discriminator_loss(self, real: Float[Tensor, "n i j"], painted: Float[Tensor, "n i j"]) -> Float[Tensor, ""]:
        """Small where both are told apart, with LeCAM's pull towards each other; moves the running means."""
        for mean, verdicts in ((self.real, real), (self.painted, painted)):
            mean.lerp_(verdicts.detach().mean(), 1 - _AVERAGE_DECAY)
        loss = F.softplus(-real).mean() + F.softplus(painted).mean()
        pull = F.relu(real - self.painted).square().mean() + F.relu(self.real - painted).square().mean()
        return loss + self.lecam * pull

    def state(self) -> dict[str, Tensor]:
        """The running means; loaded in place."""
        return {"real": self.real, "painted": self.painted}
