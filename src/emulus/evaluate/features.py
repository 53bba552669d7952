"""pictures -> vectors in which alike pictures are near: where Fréchet distances and nearest neighbours are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emulus.dual import DualEncoder
from emulus.log import progress
from emulus.tokenizer.vision.perceptual import PerceptualDistance, available

Pixels = Float[Tensor, "n 3 h w"]
Vectors = Float[Tensor, "n d"]

_AT_ONCE = 16
"""Pictures that go through a network together: VGG's first stages are wide."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """A way to turn pictures into vectors.

    Attributes:
        name: As it is reported: a distance without the name of its features says nothing.
        vectors: Pictures in [-1, 1] to vectors on the CPU.
    """

    name: str
    vectors: Callable[[Pixels], Vectors]


def vgg_space(device: torch.device | str = "cpu") -> Space | None:
    """The last stage of ST-LPIPS's VGG16, averaged over the picture: 512 numbers. None where its weights are missing.

    About 15 milliseconds for a picture of 64 pixels on a CPU core.
    """
    if not available():
        return None
    network = PerceptualDistance.load("vgg", device)

    @torch.no_grad()
    def vectors(pixels: Pixels) -> Vectors:
        parts = progress(pixels.split(_AT_ONCE), what="VGG features")
        return torch.cat([network.features(part.to(device)).cpu() for part in parts])

    return Space(name="ST-LPIPS-VGG features", vectors=vectors)


def dual_space(dual: DualEncoder) -> Space:
    """The dual encoder's pictures: what they show, rather than how they look."""
    return Space(name="dual-encoder features", vectors=dual.images)


@dataclass(frozen=True, kw_only=True)
class Distance:
    """A way to compare two pictures.

    Attributes:
        name: As it is reported.
        between: Pairs of pictures to distances.
    """

    name: str
    between: Callable[[Pixels, Pixels], Float[Tensor, " n"]]


def perceptual_distance(device: torch.device | str = "cpu") -> Distance | None:
    """ST-LPIPS, or None where its weights are missing."""
    if not available():
        return None
    network = PerceptualDistance.load("alex", device)

    @torch.no_grad()
    def between(first: Pixels, second: Pixels) -> Tensor:
        parts = zip(first.split(_AT_ONCE), second.split(_AT_ONCE), strict=True)
        return torch.cat([network(a.to(device), b.to(device)).cpu() for a, b in parts])

    return Distance(name="ST-LPIPS (alex)", between=between)


def dual_distance(dual: DualEncoder) -> Distance:
    """One minus the cosine of the dual encoder's vectors."""
    return Distance(
        name="1 - cosine of dual-encoder features",
        between=lambda first, second: 1 - (dual.images(first) * dual.images(second)).sum(-1),
    )
