"""held-out captions -> pictures drawn for them, and how right, how real, how new and how various these are.

The entry point is :func:`drawing_figures`::

    figures, section = drawing_figures(model, examples, training, pictures, dual, DrawingConfig(), seed=0)

``examples`` are held-out (pictures are used, clips are not), ``training`` are the training items as codes, ``pictures``
the training pictures as items of a data set (``source.select(split="train", kind="image")``), and ``dual`` judges which
name a picture shows (``emulus.dual.DualEncoder.load(folder)``; without one nobody is asked, and it is left out).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from emulus.data.media_dataset import MediaDataset, to_pixels
from emulus.data.source import Item, even
from emulus.data.tokens import TokenizedItem
from emulus.dual import DualEncoder
from emulus.dual.names import Names, ranks
from emulus.errors import at_least
from emulus.evaluate.choice import Accuracy
from emulus.evaluate.doodles import doodles
from emulus.evaluate.drawing_section import Distances, Diversity, DrawingFigures, Found, Retrieval, drawing_section
from emulus.evaluate.features import (
    Distance,
    Pixels,
    Space,
    Vectors,
    dual_distance,
    dual_space,
    perceptual_distance,
    vgg_space,
)
from emulus.evaluate.frechet import frechet_distance
from emulus.evaluate.held_out import Example
from emulus.evaluate.neighbours import Closeness, Nearest, Neighbours, Pair, nearest_codes, nearest_vectors
from emulus.evaluate.report import Section
from emulus.log import logger, progress
from emulus.media import pixels_to_image
from emulus.pipeline import Drawn, Emulus
from emulus.sequence import Image
from emulus.tokenizer.vision import VisionTokenizer

SAMPLING = ("temperature", "top_k", "top_p", "guidance_scale")
"""Settings of one drawing."""
_AT_ONCE = 32
"""Pictures that are painted or looked at together."""


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """How much is drawn and compared.

    Attributes:
        pictures: Captions that are drawn, one picture each.
        various: Captions that are drawn several times, for the diversity; 0 leaves that out.
        tries: How often.
        frechet: Whether Fréchet distances are measured in VGG features as well, where their weights are there; those in
            the dual encoder's features cost nothing.
        shown: Pairs of a drawing and its nearest training picture that the report shows.
    """

    pictures: int = 128
    various: int = 8
    tries: int = 4
    frechet: bool = True
    shown: int = 8

    def __post_init__(self) -> None:
        at_least(1, pictures=self.pictures)
        at_least(0, various=self.various, shown=self.shown)
        at_least(2, tries=self.tries)


@dataclass(frozen=True, kw_only=True)
class Drawings:
    """Pictures drawn for captions.

    Attributes:
        captions: What each was to show.
        codes: What the decoder wrote.
        pixels: What the vision tokenizer painted, in [-1, 1].
    """

    captions: tuple[str, ...]
    codes: tuple[Image, ...]
    pixels: Pixels


def drawing_figures(
    model: Emulus,
    examples: Sequence[Example],
    training: Sequence[TokenizedItem],
    pictures: Sequence[Item],
    dual: DualEncoder | None = None,
    config: DrawingConfig | None = None,
    *,
    seed: int = 0,
) -> tuple[DrawingFigures, Section] | None:
    """Draw held-out captions and measure the pictures.

    Args:
        model: A whole model.
        examples: Held-out items; an even spread of their pictures is drawn, the others are what drawings are compared
            with.
        training: What the model was trained on, as codes.
        pictures: Its pictures, as items.
        dual: Judges what a picture shows.
        config: How much of everything.
        seed: Of everything drawn.

    Returns:
        The figures, and what a report says of them; None without held-out and training pictures to compare with.
    """
    config = config or DrawingConfig()
    held_out = [example for example in examples if isinstance(example.media, Image)]
    known = [item for item in training if isinstance(item.media, Image)]
    if len(held_out) < 4 or not known or not pictures:
        return None
    asked, others = _two_sets(held_out, config.pictures)
    logger.info(f"drawing {len(asked)} held-out captions")
    drawn = draw(model, [example.caption for example in asked], seed=seed)
    kinds = {
        "drawn": drawn.pixels,
        "real": pixels_of(asked),
        "reconstructed": paint(model.vision, codes_of(asked)),
        "bigram": paint(model.vision, doodles(known, len(asked), model.vision.config.codebook_size, seed=seed)),
        "training": _pictures(_some(pictures, len(asked), seed), drawn.pixels.shape[-1]),
    }
    if model.defaults.best_of > 1:
        kinds["single"] = draw(model, [example.caption for example in asked], seed=seed, best_of=1).pixels
    painted = paint(model.vision, codes_of(others))
    logger.info(f"comparing the drawings with {len(known)} training pictures")
    judged = [by_codes(model, drawn, held_out, known, config.shown)]
    if dual is not None:
        judged.append(by_features(dual, drawn, held_out, pictures, config.shown))
    distance = perceptual_distance() or (None if dual is None else dual_distance(dual))
    several = even(asked, config.various)
    figures = DrawingFigures(
        count=len(asked),
        sampling={name: getattr(model.defaults, name) for name in (*SAMPLING, "best_of")},
        retrieval=None if dual is None else retrieval(dual, held_out, asked, kinds),
        lookalikes=None if dual is None else lookalikes(dual, held_out, asked, kinds),
        frechet=tuple(distances(space, kinds, pixels_of(others), painted) for space in _spaces(model, dual, config)),
        neighbours=Neighbours(
            training=len(known), held_out=len(held_out), closeness=tuple(closeness for closeness, _ in judged)
        ),
        diversity=diversity(model, several, distance, tries=config.tries, seed=seed)
        if distance is not None and len(several) > 1
        else None,
    )
    return figures, drawing_section(figures, [pair for _, pairs in judged for pair in pairs])


# Drawing.


def draw(
    model: Emulus, captions: Sequence[str], *, seed: int = 0, best_of: int | None = None, **sampling: Any
) -> Drawings:
    """Draw one picture for each caption, as :meth:`Emulus.generate_images` does, and keep the codes.

    Args:
        model: A whole model.
        captions: What the pictures show, at least one.
        seed: The picture of caption ``i`` has seed ``seed + i``.
        best_of: How many are drawn of which the model keeps one; the model's own by default.
        sampling: ``temperature``, ``top_k``, ``top_p``, ``guidance_scale``; the model's own by default.
    """
    drawn = model.draw_codes(captions, [seed + place for place in range(len(captions))], best_of=best_of, **sampling)
    codes = tuple(codes_of(drawn))
    return Drawings(captions=tuple(captions), codes=codes, pixels=paint(model.vision, codes))


def paint(vision: VisionTokenizer, pictures: Sequence[Image]) -> Pixels:
    """Pixels of codes, in [-1, 1]."""
    grids = torch.stack([picture.codes for picture in pictures])
    parts = [
        vision.decode(part.to(vision.device)).float().cpu() for part in progress(grids.split(_AT_ONCE), what="painting")
    ]
    return torch.cat(parts).clamp(-1, 1)


def pixels_of(examples: Sequence[Example]) -> Pixels:
    """Pixels of held-out pictures, in [-1, 1]."""
    return to_pixels(torch.cat([example.frames[:1] for example in examples]))


def codes_of(items: Iterable[Example | TokenizedItem | Drawn]) -> list[Image]:
    """Codes of those that are pictures."""
    media = (item.codes if isinstance(item, Drawn) else item.media for item in items)
    return [medium for medium in media if isinstance(medium, Image)]


def _two_sets(pictures: Sequence[Example], count: int) -> tuple[list[Example], list[Example]]:
    """Two sets of held-out pictures, as large as one another and with nothing in common, both evenly spread."""
    count = min(count, len(pictures) // 2)
    asked = even(pictures, count)
    taken = {example.item.id for example in asked}
    return asked, even([example for example in pictures if example.item.id not in taken], count)


def _pictures(items: Sequence[Item], size: int) -> Pixels:
    """Pixels of a data set's pictures, in [-1, 1]."""
    data = MediaDataset(items, size=size)
    return to_pixels(torch.cat([data[place] for place in range(len(data))]))


def _some(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """Random ones."""
    chosen = np.random.default_rng([seed, 1]).choice(len(items), count, replace=count > len(items))
    return [items[int(place)] for place in chosen]


# Do they show what they should?


def retrieval(
    dual: DualEncoder, held_out: Sequence[Example], asked: Sequence[Example], kinds: Mapping[str, Pixels]
) -> Retrieval:
    """Look every picture's name up among the names of all held-out pictures.

    Args:
        dual: Judges; it has seen none of the names.
        held_out: Pictures whose names are the candidates.
        asked: Some of these.
        kinds: By kind, as many pictures as there are ``asked``, in their order.
    """
    names = Names.of([example.item for example in held_out])
    place_of = {example.item.id: int(place) for example, place in zip(held_out, names.places, strict=True)}
    places = torch.tensor([place_of[example.item.id] for example in asked])
    vectors = names.vectors(dual)
    return Retrieval(
        names=len(names.names),
        chance1=names.chance(1),
        chance10=names.chance(10),
        found={kind: found(dual.images(pixels), vectors, places) for kind, pixels in kinds.items()},
    )


def lookalikes(
    dual: DualEncoder, held_out: Sequence[Example], asked: Sequence[Example], kinds: Mapping[str, Pixels]
) -> Retrieval | None:
    """As :func:`retrieval`, but a name is stood for by its held-out pictures instead of its words.

    Words that were never seen are hard to place, pictures are not: this is the sharper of the two, and asks less. The
    very picture whose caption was drawn never stands for its name, so that real pictures are not looked up by
    themselves; captions whose name has no other picture are left out.

    Returns:
        The figures, or None where no name has a second picture.
    """
    names = Names.of([example.item for example in held_out])
    vectors = dual.images(pixels_of(held_out))
    sums = torch.zeros(len(names.names), vectors.shape[1]).index_add_(0, names.places, vectors)
    row_of = {example.item.id: row for row, example in enumerate(held_out)}
    shared = names.places.bincount()[names.places] > 1
    kept = torch.tensor([bool(shared[row_of[example.item.id]]) for example in asked])
    rows = torch.tensor([row_of[example.item.id] for example in asked])[kept]
    if not len(rows):
        return None
    places = names.places[rows]
    candidates, own = F.normalize(sums, dim=-1), F.normalize(sums[places] - vectors[rows], dim=-1)
    return Retrieval(
        names=len(names.names),
        chance1=names.chance(1),
        chance10=names.chance(10),
        found={kind: found(dual.images(pixels[kept]), candidates, places, own) for kind, pixels in kinds.items()},
    )


def found(pictures: Vectors, names: Vectors, places: Int[Tensor, " n"], own: Vectors | None = None) -> Found:
    """How often the right name is found.

    Args:
        pictures: Their unit vectors.
        names: Unit vectors of the candidates.
        places: Which of these is right.
        own: What the right name's vector is for each picture, where that differs.
    """
    above = ranks(pictures, names, places, own)
    return Found(
        top1=Accuracy.of(int((above < 1).sum()), len(above)),
        top10=Accuracy.of(int((above < 10).sum()), len(above)),
        median_rank=float(above.double().quantile(0.5)) + 1,
    )


# Are they like real pictures?


def distances(space: Space, kinds: Mapping[str, Pixels], others: Pixels, painted: Pixels) -> Distances:
    """Fréchet distances of all kinds of pictures.

    Args:
        space: What they are measured in.
        kinds: By kind, equally many pictures.
        others: As many real pictures, none of which is among the kinds.
        painted: Their reconstructions.
    """
    vectors = {kind: space.vectors(pixels) for kind, pixels in kinds.items()}
    real, reconstructed = space.vectors(others), space.vectors(painted)
    return Distances(
        features=space.name,
        count=len(others),
        dimensions=real.shape[1],
        to_real={kind: frechet_distance(each, real) for kind, each in vectors.items()},
        to_reconstructed={kind: frechet_distance(each, reconstructed) for kind, each in vectors.items()},
    )


def _spaces(model: Emulus, dual: DualEncoder | None, config: DrawingConfig) -> list[Space]:
    vgg = vgg_space(model.vision.device) if config.frechet else None
    return [space for space in (vgg, None if dual is None else dual_space(dual)) if space is not None]


# Are they copies?


def by_codes(
    model: Emulus, drawn: Drawings, held_out: Sequence[Example], training: Sequence[TokenizedItem], shown: int
) -> tuple[Closeness, list[Pair]]:
    """How close drawings come to training pictures code by code, and the closest of them.

    Args:
        model: What drew.
        drawn: Its drawings.
        held_out: Real pictures, which are no copies.
        training: Training pictures.
        shown: How many pairs.
    """
    measure, known = "share of equal codes", codes_of(training)
    found, real = nearest_codes(drawn.codes, known), nearest_codes(codes_of(held_out), known)
    pairs = []
    for place, nearest, closeness in _closest(found, shown):
        picture = pixels_to_image(paint(model.vision, [known[nearest]])[0])
        pairs.append(_pair(drawn, place, picture, next(iter(training[nearest].captions), ""), measure, closeness))
    return Closeness.of(measure, found.closeness, real.closeness), pairs


def by_features(
    dual: DualEncoder, drawn: Drawings, held_out: Sequence[Example], training: Sequence[Item], shown: int
) -> tuple[Closeness, list[Pair]]:
    """As :func:`by_codes`, in the dual encoder's space."""
    measure, size = "cosine of dual-encoder features", drawn.pixels.shape[-1]
    parts = [training[start : start + _AT_ONCE] for start in range(0, len(training), _AT_ONCE)]
    known = torch.cat([dual.images(_pictures(part, size)) for part in progress(parts, what="training pictures")])
    found, real = (nearest_vectors(dual.images(pixels), known) for pixels in (drawn.pixels, pixels_of(held_out)))
    pairs = []
    for place, nearest, closeness in _closest(found, shown):
        picture = pixels_to_image(_pictures([training[nearest]], size)[0])
        pairs.append(_pair(drawn, place, picture, training[nearest].caption, measure, closeness))
    return Closeness.of(measure, found.closeness, real.closeness), pairs


def _closest(found: Nearest, count: int) -> list[tuple[int, int, float]]:
    """Drawing, training picture and closeness of the closest pairs, the closest first."""
    order = found.closeness.argsort(descending=True, stable=True)[:count]
    return [(int(place), int(found.places[place]), float(found.closeness[place])) for place in order]


def _pair(drawn: Drawings, place: int, nearest: PIL.Image.Image, caption: str, measure: str, closeness: float) -> Pair:
    return Pair(
        drawn=pixels_to_image(drawn.pixels[place]),
        caption=drawn.captions[place],
        nearest=nearest,
        nearest_caption=caption,
        measure=measure,
        closeness=closeness,
    )


# Do they differ?


def diversity(
    model: Emulus, examples: Sequence[Example], distance: Distance, *, tries: int, seed: int = 0
) -> Diversity:
    """Draw some captions several times, and compare the drawings of one and of different captions.

    Args:
        model: A whole model.
        examples: Held-out pictures, at least two.
        distance: Of pairs of pictures.
        tries: Drawings of each caption, at least two.
        seed: Of the first drawing; no two have the same.
    """
    logger.info(f"drawing {len(examples)} captions {tries} times")
    captions = [example.caption for example in examples for _ in range(tries)]
    drawn = draw(model, captions, seed=seed).pixels.unflatten(0, (len(examples), tries))
    same = [(caption, *pair) for caption in range(len(examples)) for pair in itertools.combinations(range(tries), 2)]
    other = list(itertools.combinations(range(len(examples)), 2))
    real = pixels_of(examples)

    def mean(first: list[Tensor], second: list[Tensor]) -> float:
        return float(distance.between(torch.stack(first), torch.stack(second)).double().mean())

    return Diversity(
        distance=distance.name,
        captions=len(examples),
        tries=tries,
        same=mean([drawn[i, a] for i, a, _ in same], [drawn[i, b] for i, _, b in same]),
        other=mean([drawn[a, 0] for a, _ in other], [drawn[b, 0] for _, b in other]),
        real=mean([real[a] for a, _ in other], [real[b] for _, b in other]),
    )
