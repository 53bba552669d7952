"""The resize rules against what the released code computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emulus.errors import EmulusError
from emulus.media import fit, generation_size, image_to_pixels, read_image, resize, smart_resize


def test_smart_resize_is_the_released_one(official: Path) -> None:
    entries = json.loads((official / "expected.json").read_text())["smart_resize"]
    assert entries
    for entry in entries:
        if isinstance(entry["result"], str):
            with pytest.raises(EmulusError, match=f"{entry['w']}×{entry['h']} pixels.*; (use|crop)"):
                smart_resize(entry["h"], entry["w"])
        else:
            assert smart_resize(entry["h"], entry["w"]) == tuple(entry["result"])


def test_preprocessed_pictures_are_the_released_ones(official: Path) -> None:
    for entry in json.loads((official / "expected.json").read_text())["understand_prompts"]:
        image = read_image(official / entry["image"])
        height, width = smart_resize(
            image.height, image.width, min_pixels=entry["min_pixels"], max_pixels=entry["max_pixels"]
        )
        pixels = image_to_pixels(resize(image, height, width))
        assert [1, *pixels.shape] == entry["pixel_shape"]
        assert pixels.mean().item() == pytest.approx(entry["pixel_mean"], abs=1e-6)
        assert pixels.std().item() == pytest.approx(entry["pixel_std"], abs=1e-6)


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((256, 256), (512, 512)),
        ((1080, 1920), (768, 1360)),
        ((2000, 3000), (832, 1248)),
        ((8, 40), (232, 1152)),
    ],
)
def test_smart_resize_of_known_sizes(size: tuple[int, int], resized: tuple[int, int]) -> None:
    assert smart_resize(*size) == resized


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    factor=st.sampled_from([4, 8, 16]),
    least=st.integers(1, 512).map(lambda side: side * side),
    times=st.integers(1, 8),
)
def test_smart_resize_keeps_to_the_grid_and_the_area(
    height: int, width: int, factor: int, least: int, times: int
) -> None:
    most = max(least * times, 5 * factor**2)  # room for the longest picture there is
    if min(height, width) < factor or max(height, width) > 5 * min(height, width):
        with pytest.raises(EmulusError):
            smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
        return
    rows, columns = smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)
    assert rows % factor == columns % factor == 0
    assert rows >= factor
    assert columns >= factor
    # Where it is scaled up, rounding up may pass the greatest area by part of a cell along each side.
    assert rows * columns <= max(most, (least**0.5 * 5**0.5 + factor) ** 2)
    if height * width <= most:
        assert smart_resize(width, height, factor=factor, min_pixels=least, max_pixels=most) == (
            columns,
            rows,
        )


def test_smart_resize_never_floors_a_side_to_nothing() -> None:
    assert smart_resize(100, 500, min_pixels=1, max_pixels=64) == (8, 16)


TABLE = {  # facts of the released calculate_generate_size: (512², 720²)
    "1:1": ((64, 64), (90, 90)),
    "4:3": ((55, 74), (78, 104)),
    "3:4": ((74, 55), (104, 78)),
    "3:2": ((52, 78), (73, 110)),
    "2:3": ((78, 52), (110, 73)),
    "16:9": ((48, 85), (68, 120)),
    "9:16": ((85, 48), (120, 68)),
    "21:9": ((42, 98), (59, 137)),
}


@pytest.mark.parametrize("ratio", TABLE)
def test_generation_size_is_the_released_one(ratio: str) -> None:
    assert (generation_size(ratio, 512**2), generation_size(ratio, 720**2)) == TABLE[ratio]


def test_generation_size_of_the_released_prompts(official: Path) -> None:
    for entry in json.loads((official / "expected.json").read_text())["generate_prompts"]:
        assert generation_size(entry["ratio"], entry["image_area"]) == tuple(entry["size"])


@pytest.mark.parametrize("ratio", ["", "16x9", "16:", "0:1", "-1:2", "nan:1", "1e9:1", "1:2:3", "9" * 400 + ":1"])
def test_a_ratio_that_is_none_is_refused(ratio: str) -> None:
    with pytest.raises(EmulusError, match="write it like 16:9"):
        generation_size(ratio, 512**2)


@pytest.mark.parametrize("area", [-1, 0, 8])
def test_an_area_of_no_cells_is_refused(area: int) -> None:
    with pytest.raises(EmulusError, match="ask for a larger area"):
        generation_size("1:1", area)


def test_resize_scales_and_fit_cuts_the_centre() -> None:
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    assert resize(image, 5, 7).size == (7, 5)
    assert fit(image, 8, 8).size == (8, 8)
    assert fit(image, 8, 8).getpixel((4, 4)) == (0, 0, 255)
    assert resize(image, 10, 30) is image


def test_a_sliver_is_not_cut_to_a_square() -> None:
    assert fit(Image.new("RGB", (50, 10)), 8, 8).size == (8, 8)
    with pytest.raises(EmulusError, match=r"51×10 .* crop or pad it"):
        fit(Image.new("RGB", (51, 10)), 8, 8)
