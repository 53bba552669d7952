"""Drawings: counted ones stay in the codebook, copies are found, what is measured adds up."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from emulus.data.item import Question
from emulus.data.source import open_source
from emulus.data.tokens import TokenizedItem
from emulus.dual import DualConfig, DualEncoder
from emulus.errors import EmulusError
from emulus.evaluate.doodles import doodles
from emulus.evaluate.drawing import (
    DrawingConfig,
    Drawings,
    by_codes,
    by_features,
    codes_of,
    draw,
    drawing_figures,
    found,
    lookalikes,
    paint,
    pixels_of,
)
from emulus.evaluate.held_out import Example, encode_examples
from emulus.evaluate.neighbours import Closeness, nearest_codes, nearest_vectors
from emulus.evaluate.report import Report, Table, write_report
from emulus.media import image_to_pixels
from emulus.pipeline import Emulus
from emulus.sequence import Image, Video


@pytest.fixture(scope="module")
def training(model: Emulus, data: Path) -> list[Example]:
    return encode_examples(model, open_source(data).select(split="train", kind="image"))


@pytest.fixture(scope="module")
def held_out(model: Emulus, data: Path) -> list[Example]:
    return encode_examples(model, [item for item in open_source(data) if item.split != "train"])


@pytest.fixture(scope="module")
def dual() -> DualEncoder:
    torch.manual_seed(0)
    return DualEncoder(DualConfig(size=16, widths=(8,), dimensions=8, buckets=64, piece_width=8, hidden=8)).eval()


def grid(*codes: int) -> TokenizedItem:
    return TokenizedItem(id="", captions=("",), media=Image(torch.tensor(codes).reshape(2, -1)))


def test_counted_pictures_have_only_pairs_that_were_seen() -> None:
    draws = np.random.default_rng(0)
    known = [grid(*draws.integers(0, 8, size=12).tolist()) for _ in range(5)]
    made = doodles(known, 20, 64, seed=1)
    rows = [item.media.codes.flatten().tolist() for item in known]
    followers: dict[int, set[int]] = {}
    for first, second in (pair for row in rows for pair in itertools.pairwise(row)):
        followers.setdefault(first, set()).add(second)
    for picture in made:
        row = picture.codes.flatten().tolist()
        assert picture.codes.shape == (2, 6)
        # A code that was only ever the last of a picture may be followed by any.
        assert all(second in followers.get(first, range(8)) for first, second in itertools.pairwise(row))
        assert row[0] in {known_row[0] for known_row in rows}
    again = doodles(known, 20, 64, seed=1)
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(made, again, strict=True))
    assert len({tuple(picture.codes.flatten().tolist()) for picture in made}) > 10


def test_counted_pictures_follow_the_counts() -> None:
    # After 0 comes 1 three times of four, else 2; both are followed by 0.
    known = [grid(0, 1, 0, 1, 0, 1, 0, 2)]
    codes = torch.stack([picture.codes for picture in doodles(known, 400, 3)]).flatten(1)
    assert (codes[:, 0] == 0).all()
    assert float((codes[:, 1] == 1).float().mean()) == pytest.approx(0.75, abs=0.08)
    assert (codes[codes[:, 1] == 1][:, 2] == 0).all()


def test_counting_needs_pictures_of_one_size() -> None:
    clip = TokenizedItem(id="", captions=("",), media=Video(torch.zeros(2, 2, 2, dtype=torch.long), fps=8.0))
    for known in ([clip], [grid(0, 1), grid(0, 1, 2, 3)]):
        with pytest.raises(EmulusError, match="one size"):
            doodles(known, 1, 8)


def test_drawings_are_those_of_generate_images(model: Emulus) -> None:
    captions = ["a flat red disc", "a round blue disc", "a flat orange disc"]
    drawn = draw(model, captions, seed=3, top_k=5)
    for place, caption in enumerate(captions):
        picture = model.generate_image(caption, seed=3 + place, top_k=5)
        assert torch.allclose(image_to_pixels(picture), drawn.pixels[place], atol=1 / 127)
    assert torch.equal(paint(model.vision, drawn.codes), drawn.pixels)
    assert drawn.pixels.abs().max() <= 1


def test_the_best_of_several_is_the_one_that_generate_images_keeps(model: Emulus) -> None:
    captions = ["a flat red disc", "a round blue disc"]
    drawn = draw(model, captions, seed=3, best_of=3)
    for place, caption in enumerate(captions):
        picture = model.generate_image(caption, seed=3 + place, best_of=3)
        assert torch.allclose(image_to_pixels(picture), drawn.pixels[place], atol=1 / 127)


def test_copies_are_found(model: Emulus, training: list[Example], held_out: list[Example], dual: DualEncoder) -> None:
    real = [example for example in held_out if isinstance(example.media, Image)]
    # Discs of one colour have the same codes; pictures that are no copies have others.
    real = [dataclasses.replace(example, media=Image(torch.randint(64, example.media.codes.shape))) for example in real]
    known = [example.tokenized for example in training]
    copied = training[1:4]
    drawn = Drawings(
        captions=tuple("a drawing" for _ in copied), codes=tuple(codes_of(copied)), pixels=pixels_of(copied)
    )
    closeness, pairs = by_codes(model, drawn, real, known, 2)
    assert (closeness.drawn, closeness.drawn_most, len(pairs)) == (1.0, 1.0, 2)
    assert closeness.beyond == 3
    assert pairs[0].closeness == 1.0
    assert pairs[0].nearest_caption == copied[0].caption
    seen, alike = by_features(dual, drawn, real, [example.item for example in training], 1)
    assert seen.drawn == pytest.approx(1, abs=1e-5)
    assert torch.equal(image_to_pixels(alike[0].nearest), image_to_pixels(alike[0].drawn))


def test_nearest_by_codes_and_by_vectors() -> None:
    known = [Image(torch.tensor([[0, 1], [2, 3]])), Image(torch.tensor([[9, 9], [9, 9]]))]
    asked = [Image(torch.tensor([[0, 1], [2, 9]])), Image(torch.tensor([[9, 9], [9, 9]]))]
    nearest = nearest_codes(asked, known)
    assert nearest.closeness.tolist() == [0.75, 1.0]
    assert nearest.places.tolist() == [0, 1]
    vectors = nearest_vectors(torch.tensor([[0.6, 0.8]]), torch.eye(2))
    assert vectors.places.tolist() == [1]
    summed = Closeness.of("m", torch.tensor([0.2, 0.9, 0.95]), torch.tensor([0.1, 0.9]))
    assert (summed.drawn, summed.beyond) == (pytest.approx(0.9), 1)
    assert (summed.drawn_most, summed.real, summed.real_high) == pytest.approx((0.95, 0.5, 0.9))
    # One picture under two names does not hide the copies.
    twins = Closeness.of("m", torch.tensor([0.5, 0.9, 1.0]), torch.cat([torch.rand(199) * 0.6, torch.ones(1)]))
    assert twins.beyond == 2


def test_names_are_found_as_often_as_they_are() -> None:
    names = torch.eye(20)
    pictures = torch.cat([names[:4], names[4:5] * 0.5 + names[7:8], -names[:1]])
    hits = found(pictures, names, torch.tensor([0, 1, 2, 3, 4, 0]))
    assert (hits.top1.right, hits.top10.right, hits.top1.asked) == (4, 5, 6)
    assert hits.median_rank == 1


def test_a_name_is_stood_for_by_its_other_pictures(model: Emulus, held_out: list[Example], dual: DualEncoder) -> None:
    discs = [example for example in held_out if isinstance(example.media, Image)]

    def named(example: Example, name: str) -> Example:
        question = Question("what is it?", name)
        return dataclasses.replace(example, item=dataclasses.replace(example.item, questions=(question,)))

    # Two pictures of each name look the same, but for one name that has a single picture.
    places = (0, 0, 1, 1, 2)
    twins = [
        named(
            dataclasses.replace(discs[place], item=dataclasses.replace(discs[place].item, id=f"twin {number}")),
            str(place),
        )
        for number, place in enumerate(places)
    ]
    pixels = pixels_of(twins)
    figures = lookalikes(dual, twins, twins, {"real": pixels, "wrong": pixels[[2, 3, 0, 1, 4]]})
    assert figures is not None
    assert (figures.names, figures.chance1) == (3, 1 / 3)
    assert (figures.found["real"].top1.right, figures.found["real"].top1.asked) == (4, 4)
    assert figures.found["wrong"].top1.right == 0
    assert lookalikes(dual, twins[4:], twins[4:], {"real": pixels[4:]}) is None


def test_no_picture_stands_for_its_own_name(held_out: list[Example], dual: DualEncoder) -> None:
    """Looked up one by one: the right name is stood for by its other pictures, any other by all of its own."""
    discs = [example for example in held_out if isinstance(example.media, Image)][:9]
    names = [number % 3 for number in range(9)]
    examples = [
        dataclasses.replace(
            disc,
            item=dataclasses.replace(disc.item, id=f"disc {number}", questions=(Question("what is it?", str(name)),)),
        )
        for number, (disc, name) in enumerate(zip(discs, names, strict=True))
    ]
    vectors = dual.images(pixels_of(examples))
    ranks, flattered = [], []
    for place, name in enumerate(names):
        nearness: dict[int, float] = {}
        for other in range(3):
            rows = [row for row in range(9) if names[row] == other]
            mean = vectors[[row for row in rows if row != place]].sum(0)
            nearness[other] = float(vectors[place] @ (mean / mean.norm()))
        ranks.append(sum(near >= nearness[name] for near in nearness.values()))
        own = vectors[[row for row in range(9) if names[row] == name]].sum(0)
        nearness[name] = float(vectors[place] @ (own / own.norm()))
        flattered.append(sum(near >= nearness[name] for near in nearness.values()))
    figures = lookalikes(dual, examples, examples, {"real": pixels_of(examples)})
    assert figures is not None
    real = figures.found["real"]
    assert real.top1.right == sum(rank == 1 for rank in ranks)
    assert real.median_rank == sorted(ranks)[4]
    assert sum(rank == 1 for rank in flattered) > real.top1.right


def test_everything_is_measured_and_told(
    model: Emulus,
    training: list[Example],
    held_out: list[Example],
    dual: DualEncoder,
    data: Path,
    tmp_path: Path,
    check_page: Callable[[Path], object],
) -> None:
    items = open_source(data).select(split="train", kind="image")
    counts = DrawingConfig(pictures=4, various=2, tries=2, shown=3)
    known = [example.tokenized for example in training]
    made = drawing_figures(model, held_out, known, items, dual, counts, seed=1)
    assert made is not None
    figures, section = made
    assert figures.count == 4
    assert figures.retrieval is not None
    assert set(figures.retrieval.found) == {"drawn", "real", "reconstructed", "bigram", "training"}
    for each in figures.frechet:
        assert each.count == 4
        assert each.to_reconstructed["reconstructed"] < each.to_reconstructed["real"]
        assert each.to_real["real"] > 1e-6, "the pictures that are drawn are not those compared with"
    assert len(figures.neighbours.closeness) == 2
    assert figures.diversity is not None
    assert figures.diversity.same > 0
    json.dumps(dataclasses.asdict(figures), allow_nan=False)
    write_report(Report(title="Drawings", sections=(section,)), tmp_path / "report.html")
    check_page(tmp_path / "report.html")
    again = drawing_figures(model, held_out, known, items, dual, counts, seed=1)
    assert again is not None
    assert again[0] == figures
    other = drawing_figures(model, held_out, known, items, dual, dataclasses.replace(counts, frechet=False), seed=2)
    assert other is not None
    for kind, depends in {"real": False, "reconstructed": False, "drawn": True, "bigram": True}.items():
        pair = [each.frechet[-1].to_real[kind] for each in (figures, other[0])]
        assert (pair[0] != pair[1]) == depends, kind


def test_the_first_tries_stand_beside_the_best(
    model: Emulus, training: list[Example], held_out: list[Example], data: Path, dual: DualEncoder
) -> None:
    items = open_source(data).select(split="train", kind="image")
    counts = DrawingConfig(pictures=4, various=0, frechet=False)
    choosy = Emulus(dataclasses.replace(model.bundle, defaults=dataclasses.replace(model.defaults, best_of=3)))
    known = [example.tokenized for example in training]
    made = drawing_figures(choosy, held_out, known, items, dual, counts, seed=1)
    plain = drawing_figures(model, held_out, known, items, dual, counts, seed=1)
    assert made is not None
    assert plain is not None
    assert made[0].sampling["best_of"] == 3
    assert made[0].frechet[0].to_real["single"] == plain[0].frechet[0].to_real["drawn"]
    assert made[0].frechet[0].to_real["drawn"] != plain[0].frechet[0].to_real["drawn"]
    tables = [block for block in made[1].blocks if isinstance(block, Table)]
    assert any("the same, each the first try" in row for row in tables[0].rows)


def test_without_a_judge_and_without_pictures(model: Emulus, training: list[Example], held_out: list[Example]) -> None:
    known = [example.tokenized for example in training]
    counts = DrawingConfig(pictures=2, various=0, frechet=False)
    made = drawing_figures(model, held_out, known, [example.item for example in training], None, counts)
    assert made is not None
    assert (made[0].retrieval, made[0].lookalikes, made[0].frechet, made[0].diversity) == (None, None, (), None)
    assert drawing_figures(model, [], known, [], None, counts) is None
