"""The perceptual distance: the package's numbers, and what a distance must do."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from emulus.errors import EmulusError
from emulus.tokenizer.vision import perceptual
from emulus.tokenizer.vision.perceptual import Backbone, PerceptualDistance, available

pytestmark = pytest.mark.skipif(not available(), reason="the extra is not installed")


@pytest.fixture(scope="module")
def alex() -> PerceptualDistance:
    return PerceptualDistance.load()


def pictures(count: int, side: int = 64) -> torch.Tensor:
    """Smooth ones: coarse noise scaled up."""
    return F.interpolate(torch.rand(count, 3, 8, 8) * 2 - 1, size=(side, side), mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_it_gives_the_packages_numbers(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own module, with empty modules for what it imports and does not use here."""
    for name in ("torchvision", "torchvision.models", "IPython", "torchsummary"):
        if name not in sys.modules:
            module = types.ModuleType(name)
            module.models = module.embed = module.summary = None  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, name, module)
    module = importlib.import_module("stlpips_pytorch.stlpips")
    # Its VGG draws a classifier of half a gigabyte first and throws it away.
    with torch.device("meta"):
        theirs = module.LPIPS(net=backbone, variant="shift_tolerant", verbose=False, pretrained=False)
    tensors = torch.load(perceptual._weights(backbone), map_location="cpu", weights_only=True)
    assert not theirs.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    ours = PerceptualDistance.load(backbone)
    for height, width in ((64, 64), (32, 45)):
        first = torch.rand(2, 3, height, width) * 2 - 1
        second = (first + torch.rand_like(first)) / 2
        with torch.no_grad():
            torch.testing.assert_close(ours(first, second), theirs(first, second).flatten(), rtol=1e-4, atol=1e-6)


def test_equal_pictures_have_no_distance(alex: PerceptualDistance) -> None:
    first = pictures(2)
    assert alex(first, first).tolist() == [0.0, 0.0]


def test_what_looks_less_alike_is_farther(alex: PerceptualDistance) -> None:
    first = pictures(4)
    little, more = (alex(first + noise * torch.randn_like(first), first) for noise in (0.02, 0.2))
    other = alex(first.roll(1, 0), first)
    assert (little < more).all()
    assert (more < other).all()


def test_a_shift_by_a_pixel_is_forgiven(alex: PerceptualDistance) -> None:
    first = pictures(4)
    moved = first.roll(1, -1)
    noise = torch.randn_like(first) * (moved - first).square().mean((1, 2, 3), keepdim=True).sqrt()
    assert (alex(moved, first) < alex(first + noise, first)).all()


def test_its_gradient_leads_to_the_picture(alex: PerceptualDistance) -> None:
    second = pictures(1)
    first = (second + 0.3 * torch.randn_like(second)).requires_grad_()
    optimizer = torch.optim.Adam([first], lr=0.02)
    distances = []
    for _ in range(10):
        optimizer.zero_grad()
        distance = alex(first, second).sum()
        distance.backward()
        optimizer.step()
        distances.append(distance.item())
    assert distances[-1] < 0.5 * distances[0]


def test_flat_pictures_have_a_gradient(alex: PerceptualDistance) -> None:
    """Nothing is active in them, and the root of zero has no slope."""
    first = torch.full((1, 3, 64, 64), -1.0).requires_grad_()
    alex(first, pictures(1)).sum().backward()
    assert first.grad is not None
    assert first.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(8, 8), (16, 24), (24, 64), (33, 47)])
def test_small_pictures_have_pixels_for_every_stage(alex: PerceptualDistance, shape: tuple[int, int]) -> None:
    first = torch.rand(2, 3, *shape) * 2 - 1
    assert (alex(first, -first) > 0).all()
    assert alex.features(first).shape == (2, 256)


def test_bfloat16_is_close(alex: PerceptualDistance) -> None:
    first, second = pictures(2), pictures(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = alex(first, second)
    torch.testing.assert_close(rounded, alex(first, second), rtol=0.02, atol=0)


def test_it_is_frozen_and_sees_no_torchvision(alex: PerceptualDistance) -> None:
    assert not any(parameter.requires_grad for parameter in alex.parameters())
    assert not alex.training
    assert "torchvision" not in sys.modules


def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match="no perceptual backbone 'squeeze'"):
        PerceptualDistance.load("squeeze")  # type: ignore[arg-type]
    broken = tmp_path / "stlpips_broken"
    (broken / "weights/vST0.0").mkdir(parents=True)
    (broken / "__init__.py").touch()
    (broken / "weights/vST0.0/alex_shift_tolerant.pth").write_bytes(b"nothing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(perceptual, "PACKAGE", "stlpips_broken")
    with pytest.raises(EmulusError, match=r"alex_shift_tolerant\.pth is damaged"):
        PerceptualDistance.load()
    monkeypatch.setattr(perceptual, "PACKAGE", "stlpips_missing")
    assert not available()
    with pytest.raises(EmulusError, match=r"pip install 'emulus\[perceptual\]'"):
        PerceptualDistance.load()
