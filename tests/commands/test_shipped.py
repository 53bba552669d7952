"""The model in the repository: as small as promised, trained by what lies beside it, and able to do everything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

import emulus
from emulus.config import merge, read_yaml
from emulus.data.source import open_source
from emulus.dual import DualEncoder
from emulus.pipeline import Emulus
from emulus.recipes import recipe
from emulus.train.metrics import read_metrics

REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "checkpoints/emoji"
MB, MIB = 10**6, 2**20


@pytest.fixture(scope="module")
def model() -> Emulus:
    return emulus.load(SHIPPED, device="cpu")


def test_its_size() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24 * MB
    assert max(path.stat().st_size for path in files) <= 16 * MIB


def test_the_repositorys_size() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a repository")
    paths = [REPOSITORY / name for name in listed.stdout.decode().split("\0") if name]
    assert sum(path.stat().st_size for path in paths if path.is_file()) < 40 * MB


def test_its_weights_have_few_bits() -> None:
    with safe_open(SHIPPED / "model.safetensors", framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys() if not name.endswith(".scale")}  # noqa: SIM118
    assert kinds == {"I8", "BF16"}


def test_what_made_it_lies_beside_it() -> None:
    made_by = recipe("emoji")
    for folder, config in ((SHIPPED, made_by.decoder), (SHIPPED / "vision", made_by.tokenizer)):
        read = merge(config, read_yaml(folder / "training.yaml"), "training.yaml")
        assert read.out.parts[:2] == ("runs", "emoji")
    for folder, figure in ((SHIPPED, "visual_bits"), (SHIPPED / "vision", "clip_psnr")):
        assert any(figure in line for line in read_metrics(folder) if line["kind"] == "evaluation")
    assert "How far it got" in (SHIPPED / "README.md").read_text()


def test_all_five_tasks(model: Emulus) -> None:
    item = open_source(REPOSITORY / "data/emoji").select(split="validation", kind="image")[0]
    drawn = model.generate_image(item.captions[0], seed=0)
    assert drawn.size == (64, 64)
    clip = model.generate_video("an animated 3D clip of a rocket", num_frames=4, seed=0)
    assert len(model.continue_video(clip, num_frames=8, seed=0).frames) == 8
    assert model.describe(drawn)
    assert model.answer(drawn, "which style?")


def test_its_judge() -> None:
    vectors = DualEncoder.load(SHIPPED / "dual").texts(["a red apple", "red apple", "a blue bus"])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
