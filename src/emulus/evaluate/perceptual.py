"""How different pictures look to a network: ST-LPIPS as a figure of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from emulus.tokenizer.vision.perceptual import PerceptualDistance, available

NAME = "ST-LPIPS (alex)"
"""What the figure is called: not LPIPS, whose weights are others."""

AT_ONCE = 64
"""Pictures compared together; more are no faster and take more memory."""

Metric = Callable[[Float[Tensor, "n 3 h w"], Float[Tensor, "n 3 h w"]], Float[Tensor, " n"]]


def perceptual_metric() -> Metric | None:
    """The distance of pairs of pictures in [-1, 1], on the CPU, lower is better.

    Returns:
        A function that clips both to [-1, 1]; ``None`` without the extra ``emulus[perceptual]``.
    """
    return stlpips if available() else None


@torch.inference_mode()
def stlpips(first: Float[Tensor, "n 3 h w"], second: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
    """ST-LPIPS (alex) of each pair, both clipped to [-1, 1]; 0 for equal pictures.

    Raises:
        EmulusError: The extra ``emulus[perceptual]`` is not installed.

    Source: Ghildyal & Liu 2022, "Shift-tolerant Perceptual Similarity Metric".
    """
    network = _network()
    pairs = zip(first.clamp(-1, 1).split(AT_ONCE), second.clamp(-1, 1).split(AT_ONCE), strict=True)
    return torch.cat([network(one, other).float() for one, other in pairs])


@lru_cache(maxsize=1)
def _network() -> PerceptualDistance:
    return PerceptualDistance.load("alex", device="cpu").eval()
