"""Data sets as codes: what is written, how it is resumed, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from emulus.data.media_dataset import MediaDataset, decode_item, shifted, to_pixels
from emulus.data.source import open_source
from emulus.data.tokens import TokenizeConfig, Tokens, tokenize
from emulus.errors import EmulusError
from emulus.pipeline import Emulus
from emulus.sequence import Image, Video


@pytest.fixture(scope="module")
def config(tiny: Emulus, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenizeConfig:
    folder = tmp_path_factory.mktemp("tokens")
    tiny.save(folder / "model")
    return TokenizeConfig(
        data=shapes, vision=folder / "model", out=folder / "tokens", size=16, views=2, shift=1, text_size=300, batch=5
    )


def test_codes_are_those_of_the_vision_tokenizer(config: TokenizeConfig, tiny: Emulus, shapes: Path) -> None:
    tokens = Tokens.open(tokenize(config))
    assert (len(tokens.items("train")), len(tokens.items("validation"))) == (2 * 32, 8)
    assert tokens.vocabulary.visual_size == 64
    by_id = {item.id: item for item in open_source(shapes)}
    for found in tokens.items("validation"):
        frames, fps = decode_item(by_id[found.id], size=16)
        pixels = to_pixels(frames)
        expected = tiny.vision.encode(pixels if len(frames) == 1 else pixels[None])[0]
        assert torch.equal(found.media.codes, expected)
        assert isinstance(found.media, Video if len(frames) > 1 else Image)
        if isinstance(found.media, Video):
            assert found.media.fps == fps == 8.0
        assert found.captions == by_id[found.id].captions


def test_resuming_makes_the_same_files(config: TokenizeConfig, tmp_path: Path) -> None:
    whole = tokenize(config)
    torn = dataclasses.replace(config, out=tmp_path / "torn")
    tokenize(torn)
    (torn.out / "train-00000.parquet").unlink()
    (torn.out / "tokens.json").rename(torn.out / "making.json")
    with pytest.raises(EmulusError, match="not finished"):
        Tokens.open(torn.out)
    tokenize(torn)
    for path in whole.glob("*.parquet"):
        assert path.read_bytes() == (torn.out / path.name).read_bytes()


def test_other_settings_are_refused(config: TokenizeConfig) -> None:
    tokenize(config)
    with pytest.raises(EmulusError, match="other settings"):
        tokenize(dataclasses.replace(config, views=3))


def test_damage_is_named(config: TokenizeConfig, tmp_path: Path) -> None:
    mine = dataclasses.replace(config, out=tmp_path / "mine")
    tokenize(mine)
    vocabulary = json.loads((mine.out / "vocabulary.json").read_text())
    (mine.out / "vocabulary.json").write_text(json.dumps({**vocabulary, "visual_size": 2}))
    with pytest.raises(EmulusError, match="outside the vocabulary of 2"):
        Tokens.open(mine.out).items("train")
    shard = mine.out / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(EmulusError, match=r"train-00000\.parquet is damaged"):
        Tokens.open(mine.out).items("train")
    with pytest.raises(EmulusError, match="holds no tokens"):
        Tokens.open(tmp_path)


def test_an_item_that_cannot_be_read_is_left_out(
    config: TokenizeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in config.data.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:40])
    broken = dataclasses.replace(config, data=data, out=tmp_path / "out")
    tokens = Tokens.open(tokenize(broken))
    assert len(tokens.items("train")) == 2 * 31
    items = open_source(data).select(split="train", kind="image")
    dataset = MediaDataset(items, size=16)
    place = next(number for number, item in enumerate(items) if item.id.startswith("3."))
    assert torch.equal(dataset[place], dataset[place + 1])
    assert len(dataset.bad) == 1


def test_the_tables_frame_rate_wins(shapes: Path) -> None:
    item = open_source(shapes).select(kind="video")[0]
    frames, fps = decode_item(item, size=16)
    assert (len(frames), fps) == (8, 8.0)
    slow = dataclasses.replace(item, fps=2.0)
    assert [len(decode_item(slow, size=16, fps=rate)[0]) for rate in (None, 2.0, 1.0, 4.0)] == [8, 8, 4, 16]
    assert decode_item(slow, size=16)[1] == 2.0


def test_changed_words_are_other_settings(config: TokenizeConfig, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in config.data.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    mine = dataclasses.replace(config, data=data, out=tmp_path / "out")
    tokenize(mine)
    table = data / "captions.jsonl"
    table.write_text(table.read_text().replace("a red square", "a crimson square"))
    with pytest.raises(EmulusError, match="other settings"):
        tokenize(mine)


def test_shifting() -> None:
    import numpy as np

    frames = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).reshape(2, 3, 6, 6)
    moved = [shifted(frames, np.random.default_rng(seed), 2) for seed in range(20)]
    assert all(m.shape == frames.shape for m in moved)
    assert len({m.numpy().tobytes() for m in moved}) > 5
    assert torch.equal(shifted(frames, np.random.default_rng(0), 0), frames)
