"""Are drawings copies? Their nearest training pictures, beside those of real pictures that are certainly none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from jaxtyping import Float, Int
from torch import Tensor

from emulus.log import progress
from emulus.sequence import Image

Closenesses = Float[Tensor, " n"]
Places = Int[Tensor, " n"]

_AT_ONCE = 8
"""Pictures that are compared with all training pictures at once, 100 MB at a time for ten thousand of 256 codes."""


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """The nearest training picture of each of some pictures.

    Attributes:
        closeness: 1 is the same picture.
        places: Which training picture.
    """

    closeness: Closenesses
    places: Places


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """How close drawings come to training pictures, beside how close real held-out pictures come.

    Attributes:
        measure: Of closeness; 1 is the same picture.
        drawn: Median over the drawings.
        drawn_most: Of the drawing that is closest to a training picture.
        real: Median over the real pictures.
        real_high: All but a hundredth of the real pictures are less close than this. The closest of all says little:
            data sets have the same picture under two names (flags, for one).
        beyond: Drawings that are closer than that. A hundredth of them is to be expected; what is more are copies.
    """

    measure: str
    drawn: float
    drawn_most: float
    real: float
    real_high: float
    beyond: int

    @classmethod
    def of(cls, measure: str, drawn: Closenesses, real: Closenesses) -> Closeness:
        """Sum up."""
        # The larger neighbour, so that of fewer than a hundred pictures it is the closest.
        high = real.double().quantile(0.99, interpolation="higher")
        return cls(
            measure=measure,
            drawn=float(drawn.double().quantile(0.5)),
            drawn_most=float(drawn.max()),
            real=float(real.double().quantile(0.5)),
            real_high=float(high),
            beyond=int((drawn.double() > high).sum()),
        )


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Closeness to the nearest training picture.

    Attributes:
        training: Training pictures that were compared, as codes.
        held_out: Real held-out pictures.
        closeness: In one or two measures.
    """

    training: int
    held_out: int
    closeness: tuple[Closeness, ...]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A drawing and its nearest training picture.

    Attributes:
        drawn: The drawing.
        caption: What it was to show.
        nearest: The training picture.
        nearest_caption: Its caption.
        measure: Of closeness.
        closeness: 1 is the same picture.
    """

    drawn: PIL.Image.Image
    caption: str
    nearest: PIL.Image.Image
    nearest_caption: str
    measure: str
    closeness: float


def nearest_codes(pictures: Sequence[Image], training: Sequence[Image]) -> Nearest:
    """By the share of places that have the same code; all pictures have as many places.

    Blind to a copy that is moved by a pixel, but not to one that was changed anywhere else.
    """
    known = torch.stack([picture.codes for picture in training]).flatten(1).int()
    asked = torch.stack([picture.codes for picture in pictures]).flatten(1).int()
    best = []
    for part in progress(asked.split(_AT_ONCE), what="comparing codes with training pictures"):
        best.append((part[:, None] == known[None]).sum(-1, dtype=torch.int32).max(1))
    shares = torch.cat([part.values for part in best]).double() / known.shape[1]
    return Nearest(closeness=shares, places=torch.cat([part.indices for part in best]))


def nearest_vectors(pictures: Float[Tensor, "n d"], training: Float[Tensor, "m d"]) -> Nearest:
    """By the cosine of unit vectors, which sees through small changes of place and colour."""
    best = (pictures @ training.T).max(1)
    return Nearest(closeness=best.values, places=best.indices)
