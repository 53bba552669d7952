"""What pictures are called, and where the right name stands among all when a dual encoder is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from emulus.data.item import Item
from emulus.dual.model import DualEncoder

NAME_QUESTION = "what is it?"
"""The question of a data set whose answer is a picture's name."""


def name_of(item: Item) -> str:
    """What a picture is called: its answer to :data:`NAME_QUESTION`, else its first caption."""
    answers = (question.answer for question in item.questions if question.question == NAME_QUESTION)
    return next(answers, item.caption)


def texts_of(item: Item) -> tuple[str, ...]:
    """All that is said of a picture: its name and its captions."""
    return tuple(dict.fromkeys((name_of(item), *item.captions)))


@dataclass(frozen=True, kw_only=True)
class Names:
    """The names of some pictures, each once.

    Attributes:
        names: In order of first use.
        texts: Of each name, all that is said of the pictures that have it.
        places: Of each picture, the place of its name.
    """

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    places: Int[Tensor, " n"]

    @classmethod
    def of(cls, items: Sequence[Item]) -> Names:
        """Collect the names of items, which have at least one caption each."""
        texts: dict[str, dict[str, None]] = {}
        for item in items:
            texts.setdefault(name_of(item), {}).update(dict.fromkeys(texts_of(item)))
        place = {name: number for number, name in enumerate(texts)}
        return cls(
            names=tuple(texts),
            texts=tuple(map(tuple, texts.values())),
            places=torch.tensor([place[name_of(item)] for item in items], dtype=torch.long),
        )

    def vectors(self, model: DualEncoder) -> Float[Tensor, "k d"]:
        """A unit vector for each name: the mean of its texts' vectors, since each text says a little of the thing."""
        vectors = model.texts([text for texts in self.texts for text in texts])
        means = [part.mean(0) for part in vectors.split([len(texts) for texts in self.texts])]
        return F.normalize(torch.stack(means), dim=-1)

    def chance(self, first: int) -> float:
        """How often guessing puts the right name among the ``first``."""
        return min(first / len(self.names), 1.0)


def ranks(
    pictures: Float[Tensor, "n d"],
    names: Float[Tensor, "k d"],
    places: Int[Tensor, " n"],
    own: Float[Tensor, "n d"] | None = None,
) -> Int[Tensor, " n"]:
    """How many names are nearer to each picture than its own; ties count as nearer.

    Args:
        pictures: Unit vectors.
        names: Unit vectors of the candidates.
        places: Which of these is right.
        own: Unit vectors of the right names, where each picture has its own for them.
    """
    scores = pictures @ names.T
    if own is not None:
        scores.scatter_(1, places[:, None], (pictures * own).sum(1, keepdim=True))
    return (scores >= scores.gather(1, places[:, None])).sum(1) - 1
