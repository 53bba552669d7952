"""Each setting is changed by itself, and the model's own is among the values tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emulus.data.source import open_source
from emulus.dual import DualConfig, DualEncoder
from emulus.errors import EmulusError
from emulus.evaluate.drawing import draw
from emulus.evaluate.held_out import Example, encode_examples
from emulus.evaluate.report import Curves, Report, Table, write_report
from emulus.evaluate.sweeps import SweepConfig, Sweeps, sweeps, sweeps_section
from emulus.pipeline import Emulus

FEW = SweepConfig(drawings=3, guidance_scales=(1.0, 2.0), temperatures=(1.0, 0.0), top_ks=(4, 0, 500), best_ofs=(2,))


@pytest.fixture(scope="module")
def examples(model: Emulus, data: Path) -> list[Example]:
    items = [item for item in open_source(data) if item.split != "train" and item.kind == "image"]
    return encode_examples(model, items)


@pytest.fixture(scope="module")
def dual() -> DualEncoder:
    return DualEncoder(DualConfig(size=16, widths=(8, 8), dimensions=8, buckets=64, piece_width=8, hidden=8)).eval()


@pytest.fixture(scope="module")
def found(model: Emulus, examples: list[Example], dual: DualEncoder) -> Sweeps:
    figures = sweeps(model, examples, dual, FEW, seed=3)
    assert figures is not None
    return figures


def test_points(found: Sweeps) -> None:
    values = {setting: [p.value for p in found.points if p.setting == setting] for setting in found.defaults}
    # The model has guidance 3, temperature 1 and no top-k; there are 64 codes, so 500 of them are all.
    assert found.defaults == {"guidance_scale": 3.0, "temperature": 1.0, "top_k": 0.0, "best_of": 1.0}
    assert values == {"guidance_scale": [1, 2, 3], "temperature": [0, 1], "top_k": [4, 0], "best_of": [1, 2]}
    own = [point for point in found.points if point.value == found.defaults[point.setting]]
    assert len({(point.distance, point.found.top10.right) for point in own if point.found}) == 1
    assert {point.found.top1.asked for point in found.points if point.found} == {found.count} == {3}
    for setting, best in found.best.items():
        shares = {
            point.value: point.found.top10.share for point in found.points if point.setting == setting and point.found
        }
        assert shares[best] == max(shares.values())


def choosy(model: Emulus) -> Emulus:
    """The same model, which keeps the best of three drawings."""
    return Emulus(dataclasses.replace(model.bundle, defaults=dataclasses.replace(model.defaults, best_of=3)))


def test_settings_are_compared_by_single_drawings(
    model: Emulus, examples: list[Example], dual: DualEncoder, found: Sweeps
) -> None:
    again = sweeps(choosy(model), examples, dual, FEW, seed=3)
    assert again is not None
    assert again.defaults == {**found.defaults, "best_of": 3.0}
    assert [p for p in again.points if p.setting != "best_of"] == [p for p in found.points if p.setting != "best_of"]
    assert [p.value for p in again.points if p.setting == "best_of"] == [2, 3]
    with pytest.raises(EmulusError, match="best_ofs must be at least 1"):
        SweepConfig(best_ofs=(0,))


def test_a_point_is_what_the_model_draws_so(
    model: Emulus, examples: list[Example], dual: DualEncoder, found: Sweeps
) -> None:
    likeliest = next(point for point in found.points if (point.setting, point.value) == ("temperature", 0))
    again = sweeps(
        model,
        examples,
        dual,
        SweepConfig(drawings=3, guidance_scales=(), temperatures=(0.0,), top_ks=(), best_ofs=()),
        seed=9,
    )
    assert again is not None
    # Without noise the seed does not matter.
    assert next(point for point in again.points if point.value == 0 and point.setting == "temperature") == likeliest
    captions = [example.caption for example in examples[:2]]
    assert not draw(model, captions, seed=3).pixels.equal(draw(model, captions, seed=3, temperature=0.0).pixels)


def test_section(found: Sweeps, tmp_path: Path, check_page: Callable[[Path], Any]) -> None:
    section = sweeps_section(found, 64)
    assert "guidance scale 3, temperature 1, top-k all, best of 1" in section.text
    curves, table, _ = section.blocks
    assert isinstance(curves, Curves)
    assert isinstance(table, Table)
    assert len(curves.charts) == 8
    assert [len(line.points) for line in curves.charts[0].lines] == [3, 1]
    assert max(x for x, _ in curves.charts[5].lines[0].points) == 6
    assert len(table.rows) == len(found.points)
    write_report(Report(title="t", sections=(section,)), tmp_path / "r.html")
    check_page(tmp_path / "r.html")


def test_too_few_pictures(model: Emulus, examples: list[Example], dual: DualEncoder) -> None:
    assert sweeps(model, examples[:3], dual, FEW) is None
    with pytest.raises(EmulusError, match="at least 2"):
        SweepConfig(drawings=1)
