"""Figures of drawings, as plain numbers and as tables of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emulus.evaluate.choice import Accuracy
from emulus.evaluate.neighbours import Neighbours, Pair
from emulus.evaluate.report import Block, Gallery, Section, Shot, Table, Text, Tile


@dataclass(frozen=True, kw_only=True)
class Found:
    """How often the right name was found by looking at the pictures.

    Attributes:
        top1: The right name was the nearest of all.
        top10: It was among the nearest ten.
        median_rank: 1 is the best.
    """

    top1: Accuracy
    top10: Accuracy
    median_rank: float


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """The names of pictures as the dual encoder sees them, looked up by words or by other pictures.

    Attributes:
        names: How many there are to choose from: those of all held-out pictures.
        chance1: What guessing scores.
        chance10: What guessing scores in ten tries.
        found: By kind of pictures: ``drawn`` (as the model draws by default), ``single`` (the first try of each, where
            it chooses the best of several), ``real`` (held-out ones of the same names: the ceiling),
            ``reconstructed`` (from their codes), ``bigram`` and ``training`` (random training pictures in their place:
            the floor, which no model has to draw for).
    """

    names: int
    chance1: float
    chance10: float
    found: Mapping[str, Found]


@dataclass(frozen=True, kw_only=True)
class Distances:
    """Fréchet distances to real held-out pictures, none of which the captions are of; smaller is better.

    Attributes:
        features: What they are measured in.
        count: Pictures on each side. It decides how large the distance of real pictures is, so other counts cannot be
            compared.
        dimensions: Of the features; with fewer pictures than that the covariances are guessed.
        to_real: By kind of pictures: ``real`` (others: the floor), ``reconstructed``, ``drawn``, ``training``,
            ``bigram``.
        to_reconstructed: Likewise, to the same real pictures after the vision tokenizer: what it cannot paint is held
            against nobody, and ``reconstructed`` is the floor.
    """

    features: str
    count: int
    dimensions: int
    to_real: Mapping[str, float]
    to_reconstructed: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """Mean distance between two pictures.

    Attributes:
        distance: What it is measured in.
        captions: How many captions.
        tries: Drawings of each.
        same: Of two drawings of one caption.
        other: Of drawings of two captions.
        real: Of the true pictures of two captions.
    """

    distance: str
    captions: int
    tries: int
    same: float
    other: float
    real: float


@dataclass(frozen=True, kw_only=True)
class DrawingFigures:
    """What is known of the drawings.

    Attributes:
        count: Captions drawn, one picture each.
        sampling: Temperature, top-k, top-p and guidance.
        retrieval: Whether they show what they should, by the words of the names; None without a dual encoder.
        lookalikes: The same by other pictures of the names; None without a dual encoder or such pictures.
        frechet: Whether they are like real ones as a set, in one or two kinds of features.
        neighbours: Whether they are copies of training pictures.
        diversity: Whether they differ; None where that was not asked for or cannot be measured.
    """

    count: int
    sampling: Mapping[str, float]
    retrieval: Retrieval | None
    lookalikes: Retrieval | None
    frechet: tuple[Distances, ...]
    neighbours: Neighbours
    diversity: Diversity | None


KINDS = {
    "real": "real held-out pictures",
    "reconstructed": "the same from their codes",
    "drawn": "drawn by the model",
    "single": "the same, each the first try",
    "training": "random training pictures",
    "bigram": "drawn by counts of code pairs",
}


def _kinds(found: Mapping[str, object]) -> list[tuple[str, str]]:
    """Those that were measured, in order: a model that draws once has no first tries."""
    return [(kind, name) for kind, name in KINDS.items() if kind in found]


def drawing_section(figures: DrawingFigures, pairs: Sequence[Pair] = ()) -> Section:
    """The figures as tables, and the drawings that are most like training pictures.

    Args:
        figures: What was measured.
        pairs: What to show of the nearest training pictures.
    """
    settings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in figures.sampling.items())
    blocks: list[Block] = []
    if figures.retrieval is not None:
        blocks += _of_retrieval(figures.retrieval, f"Is it what was asked for? {_BY_WORDS}")
    if figures.lookalikes is not None:
        blocks += _of_retrieval(figures.lookalikes, f"Is it like other pictures of that name? {_BY_PICTURES}")
    if figures.frechet:
        blocks += _of_distances(figures.frechet)
    if figures.diversity is not None:
        blocks.append(_of_diversity(figures.diversity))
    blocks += _of_neighbours(figures.neighbours)
    if pairs:
        blocks.append(Gallery(tiles=tuple(map(_tile, pairs))))
    return Section(
        title="How right, how real and how new drawings are",
        text=f"{figures.count} pictures, one for each held-out caption ({settings}).",
        blocks=tuple(blocks),
    )


_BY_WORDS = (
    "A dual encoder that never saw these names looks every picture's up among all held-out names, by their words. How "
    "far it can be trusted shows in what it makes of real pictures: it is small and does not know every word. The ends "
    "of 95 % intervals stand in brackets."
)
_BY_PICTURES = (
    "The same with each name stood for by its held-out pictures, other styles of the same thing among them, but never "
    "by the one whose caption was drawn. It needs no words, so it is sharper."
)


def _of_retrieval(figures: Retrieval, about: str) -> list[Block]:
    rows = []
    for kind, name in _kinds(figures.found):
        hit = figures.found[kind]
        times = f"{hit.top10.share / figures.chance10:.1f}"
        rows.append((name, _share(hit.top1), _share(hit.top10), times, f"{hit.median_rank:g}"))
    guessing = ("guessing", f"{figures.chance1:.1%}", f"{figures.chance10:.1%}", "1.0", f"{(figures.names + 1) / 2:g}")
    head = (f"Found among {figures.names} names", "Nearest", "Among ten", "Times chance", "Median rank")
    return [Text(text=about), Table(head=head, rows=(*rows, guessing))]


def _share(accuracy: Accuracy) -> str:
    return f"{accuracy.share:.1%} ({accuracy.low:.0%} to {accuracy.high:.0%})"


def _of_distances(figures: Sequence[Distances]) -> list[Block]:
    head = [f"{each.features}, {to}" for each in figures for to in ("to real", "to reconstructed")]
    columns = [column for each in figures for column in (each.to_real, each.to_reconstructed)]
    return [
        Text(
            text=f"Does it look real? Fréchet distances (FD) of {figures[0].count} pictures of each kind to as many "
            "other real held-out ones, and to what the vision tokenizer makes of these, which leaves out what it "
            "cannot paint. So few pictures make every distance too large: the floor is that of real (or of "
            "reconstructed) pictures, not 0, and figures of other counts or features cannot be compared with these."
        ),
        Table(
            head=("FD of pictures", *head),
            rows=tuple((name, *(_number(column[kind]) for column in columns)) for kind, name in _kinds(columns[0])),
        ),
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _of_diversity(figures: Diversity) -> Block:
    return Table(
        head=(f"Do they differ? Mean {figures.distance}, {figures.captions} captions", "Distance"),
        rows=(
            (f"two of {figures.tries} drawings of one caption", f"{figures.same:.3f}"),
            ("drawings of two captions", f"{figures.other:.3f}"),
            ("real pictures of two captions", f"{figures.real:.3f}"),
        ),
    )


def _of_neighbours(figures: Neighbours) -> list[Block]:
    about = (
        f"Is it a copy? How close the nearest of {figures.training:,} training pictures is, beside the same for "
        f"{figures.held_out} real held-out pictures, which are no copies. Drawings that are closer than all but a "
        "hundredth of these are counted; more than a hundredth would be copies. The closest drawings are shown below."
    )
    rows = tuple(
        (
            each.measure,
            *(f"{value:.2f}" for value in (each.drawn, each.drawn_most, each.real, each.real_high)),
            str(each.beyond),
        )
        for each in figures.closeness
    )
    head = ("Closeness to training", "Drawn: median", "Closest", "Real: median", "All but 1 %", "Drawn beyond")
    return [Text(text=about), Table(head=head, rows=rows)]


def _tile(pair: Pair) -> Tile:
    return Tile(
        shots=(Shot(media=pair.drawn, label="drawn"), Shot(media=pair.nearest, label="nearest in training")),
        text=pair.caption,
        note=f"{pair.measure} {pair.closeness:.2f}; nearest: {pair.nearest_caption}",
    )
