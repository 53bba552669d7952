"""A dual encoder learns which text goes with which picture, resumes, and is small."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.data.item import Item, Question
from emulus.dual import DualConfig, DualEncoder
from emulus.dual.model import words_of
from emulus.dual.names import Names, name_of, ranks
from emulus.dual.train import DualObjective, DualTrainConfig, VaryConfig, contrast, train_dual, varied
from emulus.errors import EmulusError
from emulus.train.config import TrainConfig

SMALL = DualConfig(size=16, widths=(8, 16), dimensions=16, buckets=256, piece_width=16, hidden=32)
STILL = VaryConfig(shift=0.05, zoom=0.1, turn=0.0, colour=0.05, blur=0.0, hide=0.0, drop_words=0.0)


def config(data: Path, out: Path, steps: int) -> DualTrainConfig:
    loop = TrainConfig(
        steps=steps, learning_rate=1e-2, warmup_steps=2, ema_decay=0.9, schedule="wsd", save_every=5, evaluate_every=0
    )
    return DualTrainConfig(data=data, out=out, model=SMALL, vary=STILL, train=loop, pictures_per_batch=16)


@pytest.fixture(scope="module")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_dual(config(shapes, tmp_path_factory.mktemp("dual") / "run", 60))


def test_it_finds_the_colours_of_held_out_squares(trained: Path, shapes: Path) -> None:
    objective = DualObjective(config(shapes, trained, 60))
    assert {item.split for item in objective.pictures.items} == {"train"}
    metrics = objective.evaluate(DualEncoder.load(trained)).metrics
    assert metrics["top1"] == 1.0
    untrained = objective.evaluate(DualObjective(config(shapes, trained, 60)).model.eval()).metrics
    assert untrained["top1"] < 1.0


def test_a_stopped_run_goes_on_to_the_same_bits(shapes: Path, tmp_path: Path) -> None:
    straight = train_dual(config(shapes, tmp_path / "straight", 8))
    # As if it had been stopped at step 5: that checkpoint is there, later ones are not. The schedule must know the end.
    again = config(shapes, tmp_path / "again", 8)
    train_dual(again)
    for path in (tmp_path / "again/checkpoints/step-00000008").rglob("*"):
        path.unlink() if path.is_file() else None
    resumed = train_dual(again)
    assert (resumed / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()


def test_what_is_saved_is_small_and_the_same(tmp_path: Path) -> None:
    model = DualEncoder(DualConfig()).eval()
    model.save(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1.5e6
    again = DualEncoder.load(tmp_path)
    assert again.config == model.config
    pixels = torch.rand(3, 3, 64, 64) * 2 - 1
    assert torch.allclose(again.images(pixels), model.images(pixels), atol=0.02)
    assert again.images(pixels).norm(dim=-1).allclose(torch.ones(3))
    # Other sizes are scaled.
    assert again.images(torch.rand(2, 3, 40, 80)).shape == (2, 96)
    assert again.texts([]).shape == (0, 96)


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    DualEncoder(SMALL).save(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EmulusError, match="no dual encoder"):
        DualEncoder.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "emulus-dual"}')
    with pytest.raises(EmulusError, match="mis-shaped"):
        DualEncoder.load(tmp_path)


def test_words_share_their_pieces() -> None:
    model = DualEncoder(DualConfig()).eval()
    fighter, fighters, cucumber = model.texts(["a firefighter", "firefighters", "a cucumber"])
    assert fighter @ fighters > fighter @ cucumber
    assert torch.equal(*model.texts(["Red heart!", "red, HEART"]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=1, max_size=4))
def test_any_text_has_a_unit_vector(texts: list[str]) -> None:
    model = DualEncoder(SMALL).eval()
    together = model.texts(texts)
    assert together.norm(dim=-1).allclose(torch.ones(len(texts)), atol=1e-4)
    alone = torch.cat([model.texts([text]) for text in texts])
    assert together.allclose(alone, atol=1e-5)


def test_words_are_words() -> None:
    assert words_of("A 3D render of: Piñata,  ✨ 'cake'") == ["a", "3d", "render", "of", "piñata", "cake"]


def item(id: str, *captions: str, name: str = "") -> Item:
    questions = (Question("what is it?", name),) if name else ()
    return Item(id=id, kind="image", captions=captions, split="test", stored=b"", questions=questions)


def test_pictures_of_one_name_share_it() -> None:
    items = [
        item("flat/1", "a flat apple", name="apple"),
        item("round/1", "a round apple", name="apple"),
        item("x", "a pear"),
    ]
    assert [name_of(each) for each in items] == ["apple", "apple", "a pear"]
    names = Names.of(items)
    assert names.names == ("apple", "a pear")
    assert names.texts[0] == ("apple", "a flat apple", "a round apple")
    assert names.places.tolist() == [0, 0, 1]
    assert names.chance(1) == 0.5
    assert names.chance(10) == 1.0
    assert names.vectors(DualEncoder(SMALL).eval()).norm(dim=-1).allclose(torch.ones(2))


def test_ranks_count_the_nearer_names() -> None:
    names = torch.eye(3)
    pictures = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 0.0]])
    # Where all are equally near, none has been found.
    assert ranks(pictures, names, torch.tensor([0, 0, 2])).tolist() == [0, 1, 2]
    own = torch.tensor([[0.0, 1.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    assert ranks(pictures, names, torch.tensor([0, 0, 2]), own).tolist() == [2, 0, 2]


def test_equal_things_are_not_held_against_each_other() -> None:
    vectors = torch.eye(4)
    vectors[1] = vectors[0]
    scale = torch.full((1,), 3.0)
    apart, _ = contrast(vectors, vectors, scale, torch.tensor([0, 1, 2, 3]))
    same, right = contrast(vectors, vectors, scale, torch.tensor([0, 0, 2, 3]))
    assert same < apart
    assert right == 1.0


def test_pictures_are_varied_as_much_as_was_asked() -> None:
    pixels = torch.rand(8, 3, 16, 16) * 2 - 1
    zeros = {field.name: 0 for field in dataclasses.fields(VaryConfig)}
    still = varied(pixels, np.random.default_rng(0), VaryConfig(**zeros))
    assert torch.allclose(still, pixels, atol=1e-4)
    mirrored = varied(pixels, np.random.default_rng(0), VaryConfig(**zeros | {"flip": True}))
    kinds = [
        (bool(torch.allclose(a, b, atol=1e-4)), bool(torch.allclose(a, b.flip(-1), atol=1e-4)))
        for a, b in zip(mirrored, pixels, strict=True)
    ]
    assert set(kinds) == {(True, False), (False, True)}
    first, again, other = (varied(pixels, np.random.default_rng(seed), VaryConfig()) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)
    assert first.abs().max() <= 1


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(EmulusError, match="no training pictures"):
        DualObjective(config(tmp_path, tmp_path / "run", 1))


@pytest.mark.parametrize(
    "change",
    [
        {"widths": []},
        {"widths": [1]},
        {"widths": [8] * 3000},
        {"widths": [[8]]},
        {"widths": [8.0]},
        {"widths": 8},
        {"widths": [10**9, 16]},
        {"blocks": 10**7},
        {"blocks": True},
        {"dimensions": 2**63},
        {"dimensions": 10**400},
        {"buckets": "256"},
        {"hidden": 0},
        {"piece_width": None},
        {"longest": 2},
        {"longest": 10**9},
        {"size": 4},
        {"size": 10**9},
        {"sise": 16},
        {"model_type": ["emulus-dual"]},
    ],
)
def test_a_hostile_config_is_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    DualEncoder(SMALL).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EmulusError) as caught:
        DualEncoder.load(tmp_path)
    assert len(str(caught.value)) < 500
