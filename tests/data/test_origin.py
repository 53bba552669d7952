"""What is stored knows what it was made from: changes are noticed, touched and copied files are not encoded again."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emulus.data import origin
from emulus.data.item import Item
from emulus.data.records import MANIFEST, read_manifest
from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.data.tokens import MAKING, SETTINGS, Tokens
from emulus.errors import EmulusError
from emulus.pipeline import Emulus
from emulus.tokenizer.text import TextTokenizer


def png(colour: str, side: int = 16) -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def model(tiny: Emulus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


def loose(data: Path, colours: list[str]) -> Path:
    data.mkdir(exist_ok=True)
    rows = [{"file": f"{number}.png", "caption": "a square", "split": "train"} for number in range(len(colours))]
    (data / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, colour in enumerate(colours):
        (data / f"{number}.png").write_bytes(png(colour))
    return data


def tarred(data: Path, colours: list[str]) -> Path:
    with tarfile.open(data.with_suffix(".tar"), "w") as tar:
        for number, colour in enumerate(colours):
            word = json.dumps({"caption": "a square", "split": "train"}).encode()
            for name, content in ((f"{number}.png", png(colour)), (f"{number}.json", word)):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return data.with_suffix(".tar")


def parquet(data: Path, colours: list[str]) -> Path:
    rows = [{"image": {"bytes": png(colour)}, "caption": "a square", "split": "train"} for colour in colours]
    pq.write_table(pa.Table.from_pylist(rows), data.with_suffix(".parquet"), row_group_size=2)
    return data.with_suffix(".parquet")


def linked(data: Path, colours: list[str]) -> Path:
    """Parquet that only names files."""
    data.mkdir(exist_ok=True)
    for number, colour in enumerate(colours):
        (data / f"{number}.png").write_bytes(png(colour))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        {"image": {"bytes": None, "path": f"{number}.png"}, "caption": "a square", "split": "train"}
        for number in range(len(colours))
    ]
    schema = pa.schema([("image", kind), ("caption", pa.string()), ("split", pa.string())])
    if not (data / "all.parquet").exists():
        pq.write_table(pa.Table.from_pylist(rows, schema), data / "all.parquet")
    return data / "all.parquet"


def texts(data: Path, colours: list[str]) -> Path:
    table = data.with_suffix(".jsonl")
    table.write_text("".join(json.dumps({"text": f"about {each}", "split": "train"}) + "\n" for each in colours))
    return table


def shards(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.arrayrecord")}


def remade(config: TokenizeConfig) -> set[str]:
    """Names of the shards that another call makes again."""
    before = shards(config.out)
    tokenize(config)
    return {name for name, time in shards(config.out).items() if before.get(name) != time}


@pytest.mark.parametrize("make", [loose, tarred, parquet, linked, texts])
def test_only_shards_of_changed_content_are_made_again(
    make: Callable[[Path, list[str]], Path], model: Path, tmp_path: Path
) -> None:
    source = make(tmp_path / "data", ["red", "green", "blue", "black"])
    items = 1 if make is texts else 2
    config = TokenizeConfig(
        sources=(source,), vocabulary=str(model), out=tmp_path / "tokens", size=16, shard_items=items
    )
    tokenize(config)
    kind = "text" if make is texts else "image"
    assert len(shards(config.out)) == (1 if make is texts else 2)
    assert remade(config) == set()
    made = {line.name: line for line in read_manifest(config.out)}
    make(tmp_path / "data", ["red", "green", "blue", "white"])
    assert remade(config) == {f"train-{kind}-{0 if make is texts else 1:05d}.arrayrecord"}
    assert made.keys() == {line.name for line in read_manifest(config.out)}
    # As if it had been made from these at once.
    fresh = dataclasses.replace(config, out=tmp_path / "fresh")
    tokenize(fresh)
    assert [line.sha256 for line in read_manifest(fresh.out)] == [line.sha256 for line in read_manifest(config.out)]
    assert remade(config) == set()


@pytest.mark.parametrize("make", [loose, tarred, parquet, linked, texts])
def test_touched_and_moved_files_are_not_encoded_again(
    make: Callable[[Path, list[str]], Path], model: Path, tmp_path: Path
) -> None:
    source = make(tmp_path / "data", ["red", "green"])
    config = TokenizeConfig(sources=(source,), vocabulary=str(model), out=tmp_path / "tokens", size=16)
    tokenize(config)
    for path in (source, *tmp_path.glob("data/*")):
        os.utime(path, (1, 1))
    before = (config.out / MANIFEST).read_bytes()
    assert remade(config) == set()
    # The new times are noted, so the content is not read each time.
    noted = (config.out / MANIFEST).read_bytes()
    assert noted.startswith(before)
    assert len(noted) > len(before)
    assert remade(config) == set()
    assert (config.out / MANIFEST).read_bytes() == noted
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(tmp_path / "data", elsewhere / "data") if (tmp_path / "data").is_dir() else shutil.copy(
        source, elsewhere
    )
    moved = elsewhere / source.relative_to(tmp_path)
    assert remade(dataclasses.replace(config, sources=(moved,))) == set()


def test_equal_size_and_time_do_not_hide_a_change(model: Path, tmp_path: Path) -> None:
    data = loose(tmp_path / "data", ["red", "green"])
    config = TokenizeConfig(sources=(data,), vocabulary=str(model), out=tmp_path / "tokens", size=16)
    tokenize(config)
    path = data / "0.png"
    status, content = path.stat(), png("blue")
    content += bytes(max(status.st_size - len(content), 0))
    path.write_bytes(content)
    os.truncate(path, status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert remade(config) == {"train-image-00000.arrayrecord"}


def test_changed_words_are_encoded_again(model: Path, tmp_path: Path) -> None:
    data = loose(tmp_path / "data", ["red", "green", "blue"])
    config = TokenizeConfig(sources=(data,), vocabulary=str(model), out=tmp_path / "tokens", size=16, shard_items=1)
    tokenize(config)
    table = data / "captions.jsonl"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], lines[1].replace("a square", "an apple"), lines[2]]))
    assert remade(config) == {"train-image-00001.arrayrecord"}
    (item,) = [each for each in Tokens.open(config.out).items("train") if each.id == "1.png"]
    assert item.captions == ("an apple",)
    table.write_text("\n".join(lines[:2]))
    with pytest.raises(EmulusError, match=r"other settings \(the items' names\); delete it or choose another --out"):
        tokenize(config)


def test_items_that_were_repaired_are_encoded(model: Path, tmp_path: Path) -> None:
    """With the same command; also where not one of them could be read, whatever else changed then."""
    data = loose(tmp_path / "data", ["red", "green", "blue"])
    config = TokenizeConfig(sources=(data,), vocabulary=str(model), out=tmp_path / "tokens", size=16, shard_items=1)
    for number in range(3):
        (data / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(EmulusError, match=r"none of the items .* fix the sources and run the same command again"):
        tokenize(config)
    (data / "1.png").write_bytes(png("green"))
    tokenize(config)
    assert [item.id for item in Tokens.open(config.out).items("train")] == ["1.png"]
    (data / "0.png").write_bytes(png("red"))
    assert remade(config) == {"train-image-00000.arrayrecord"}
    assert [item.id for item in Tokens.open(config.out).items("train")] == ["0.png", "1.png"]


def test_a_folder_without_rows_is_begun_anew(model: Path, tmp_path: Path) -> None:
    data = loose(tmp_path / "data", ["red", "green"])
    for number in range(2):
        (data / f"{number}.png").write_bytes(b"no picture")
    config = TokenizeConfig(sources=(data,), vision=model, out=tmp_path / "tokens", size=16, text_size=300)
    with pytest.raises(EmulusError, match="none of the items"):
        tokenize(config)
    loose(data, ["red", "green", "blue"])
    changed = dataclasses.replace(config, views=2)
    tokenize(changed)
    assert len(Tokens.open(config.out).items("train")) == 6
    with pytest.raises(EmulusError, match="views"):
        tokenize(config)


def test_a_file_that_changes_while_it_is_read_equals_nothing(tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    path.write_bytes(b"red")
    item = Item(id="0", kind="image", captions=("a",), split="train", stored=path)
    before = origin.file_state(item)
    path.write_bytes(b"green")
    unsettled = origin.origin_of([item], [origin.see(item, before)])
    assert unsettled.content == ""
    assert origin.origin_of([item], [origin.see(item)]).content != ""


def test_of_large_files_samples_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(origin, "_WHOLE", 1000)
    monkeypatch.setattr(origin, "_BLOCK", 10)
    path = tmp_path / "film"
    item = Item(id="0", kind="video", captions=("a",), split="train", stored=path)
    seen = set()
    for place in (None, 0, 4999, 5000 - 11):
        content = bytearray(5000)
        if place is not None:
            content[place] = 1
        path.write_bytes(content)
        seen.add(origin.see(item).content)
    assert len(seen) == 3  # what lies between two samples is not read
    path.write_bytes(bytes(5001))
    assert origin.see(item).content not in seen


def test_folders_of_older_versions_go_on_and_cannot_be_checked(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = loose(tmp_path / "data", ["red", "green"])
    config = TokenizeConfig(sources=(data,), vocabulary=str(model), out=tmp_path / "tokens", size=16)
    tokenize(config)
    lines = [json.loads(line) for line in (config.out / MANIFEST).read_text().splitlines()]
    for line in lines:
        del line["origin"]
    (config.out / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = json.loads((config.out / SETTINGS).read_text())
    for name in ("names_sha256", "words_sha256", "text_sha256"):
        del settings[name]
    # Computed by the version before this one.
    settings["data_sha256"] = OLD_DIGEST
    (config.out / SETTINGS).write_text(json.dumps(settings))
    Tokens.open(config.out).check()
    caplog.clear()
    assert remade(config) == set()
    assert len([record for record in caplog.records if "cannot be told" in record.getMessage()]) == 1
    (data / "captions.jsonl").write_text((data / "captions.jsonl").read_text().replace("square", "circle"))
    with pytest.raises(EmulusError, match=r"other settings \(the data\)"):
        tokenize(config)


WORDS = "quartz vexing jackdaws sphinx waltz nymph glyph dwarf pyjamas liquor wizard fjord brick zephyr crypt mixture"
OLD_DIGEST = "cb6e941ae2a7752ef27f2d3ef93f4af5b8e237002433a76b57d5e26f245703ca"


def test_other_tokenizers_in_the_folder_are_noticed(model: Path, tmp_path: Path) -> None:
    data = loose(tmp_path / "data", ["red", "green"])
    config = TokenizeConfig(sources=(data,), vocabulary=str(model), out=tmp_path / "tokens", size=16, shard_items=1)
    tokenize(config)
    shard = config.out / "train-image-00001.arrayrecord"
    made, right = shard.read_bytes(), Tokens.open(config.out).text
    other = TextTokenizer.train([f"{word} and {word}" for word in WORDS.split()] * 3, size=right.size)
    assert other.size == right.size
    other.save(config.out)
    with pytest.raises(EmulusError, match="is not the one that its ids were made with"):
        Tokens.open(config.out)
    shard.unlink()
    with pytest.raises(EmulusError, match="is not the one that its shards were made with"):
        tokenize(config)
    right.save(config.out)
    # Its vision tokenizer is known from the model, and written again.
    weights = config.out / "vision/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4000:] = bytes(4000)
    weights.write_bytes(content)
    (config.out / "vision/config.json").unlink()
    tokenize(config)
    assert shard.read_bytes() == made
    assert not (config.out / MAKING).exists()
