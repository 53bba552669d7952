"""What the painted pixels of a vision tokenizer are trained to minimise, term by term.

Each pixel's error (``l2``, ``l1``), that of its changes (``motion``), and how different the pictures look
(``perceptual``). The adversarial term belongs to the discriminator (``discriminator.py``), the commitment term to the
codebook (``codebook.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from emulus.errors import at_least
from emulus.tokenizer.vision.perceptual import Backbone, PerceptualDistance


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Weight of each term; one of weight 0 is not computed.

    Attributes:
        l2: Of the mean squared error, pixels in [-1, 1].
        l1: Of the mean absolute error.
        motion: Of the mean squared error of the changes from frame to frame. A clip's frames hardly differ, so to
            paint a still for each code is a poor optimum that the other terms are slow to leave.
        perceptual: Of the perceptual distance, which needs ``emulus[perceptual]``. On the reconstructions of a trained
            tokenizer its gradient was 20 times that of ``l2`` and 9 times that of ``l1`` (``alex``, 64 pixels), so 0.1
            beside ``l2`` makes it the larger part.
        backbone: Network that measures it; at 64 pixels a frame costs a CPU core about 10 ms with ``alex``, 40 with
            ``vgg``.
        perceptual_frames: How many of a batch's pictures, and as many of its clips' frames, are measured at most,
            chosen anew for each batch.
    """

    l2: float = 1.0
    l1: float = 0.0
    motion: float = 0.0
    perceptual: float = 0.0
    backbone: Backbone = "alex"
    perceptual_frames: int = 16

    def __post_init__(self) -> None:
        at_least(0, l2=self.l2, l1=self.l1, motion=self.motion, perceptual=self.perceptual)
        at_least(1, perceptual_frames=self.perceptual_frames)


class ReconstructionLoss:
    """The weighted sum of the terms."""

    def __init__(self, config: ReconstructionConfig, device: torch.device | str = "cpu") -> None:
        """Load what the terms need.

        Args:
            config: Weights.
            device: Where pixels will lie.

        Raises:
            EmulusError: The perceptual distance is wanted and its weights are not installed.
        """
        self.config = config
        self.perceptual = PerceptualDistance.load(config.backbone, device) if config.perceptual else None

    def __call__(
        self, painted: Float[Tensor, "*frames c h w"], pixels: Float[Tensor, "*frames c h w"]
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Compare pictures or clips.

        Args:
            painted: Reconstruction.
            pixels: What it should be, in [-1, 1].

        Returns:
            The sum, and each term unweighted by name.
        """
        config, painted = self.config, painted.float()
        terms: dict[str, Tensor] = {}
        if config.l2:
            terms["l2"] = F.mse_loss(painted, pixels)
        if config.l1:
            terms["l1"] = F.l1_loss(painted, pixels)
        if config.motion and pixels.ndim == 5:
            terms["motion"] = F.mse_loss(painted.diff(dim=1), pixels.diff(dim=1))
        if self.perceptual is not None:
            some = chosen_frames(painted, config.perceptual_frames)
            terms["perceptual"] = self.perceptual(frames_of(painted)[some], frames_of(pixels)[some]).mean()
        total = sum((getattr(config, name) * term for name, term in terms.items()), start=painted.new_zeros(()))
        return total, {name: term.detach() for name, term in terms.items()}


def frames_of(pixels: Float[Tensor, "*frames c h w"]) -> Float[Tensor, "n c h w"]:
    """Pictures, or all frames of clips, as pictures."""
    return pixels.flatten(0, -4)


def chosen_frames(pixels: Float[Tensor, "*frames c h w"], most: int) -> Tensor | slice:
    """Index into :func:`frames_of`: all, or ``most`` of them at random."""
    count = pixels[..., 0, 0, 0].numel()
    return slice(None) if count <= most else torch.randperm(count, device=pixels.device)[:most]
