"""Data sets as ids: what is written, how it is resumed, what is left out and what is refused."""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import pytest
import torch

from emulus.bundle import load_bundle
from emulus.config import write_yaml
from emulus.data.encoder import Encoder, Unit, run_ahead
from emulus.data.media_dataset import MediaDataset, decode_item, shifted, to_pixels, whole_codes
from emulus.data.records import MANIFEST, Record, Shard, ShardLine, Skipped, read_manifest
from emulus.data.source import Item, Kind, open_source
from emulus.data.tokenize import plan, tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.data.tokens import Tokens
from emulus.data.workers import finished, serve
from emulus.errors import EmulusError
from emulus.files import only_run
from emulus.media import smart_resize
from emulus.pipeline import Emulus
from emulus.sequence import Document, Grammar, Image, Text, Video
from emulus.sequence.templates import caption_first, caption_last, question_answer
from tests.halted import halted


@pytest.fixture(scope="module")
def model(tiny: Emulus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


@pytest.fixture(scope="module")
def few(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the shapes, five pictures and clips to train on and one each of both other splits."""
    folder = tmp_path_factory.mktemp("few")
    rows = [json.loads(line) for line in (shapes / "captions.jsonl").read_text().splitlines()]
    rows = [row for row in rows if int(Path(row["file"]).stem) in (0, 1, 2, 3, 4, 16, 20)]
    for row in rows:
        shutil.copy(shapes / row["file"], folder)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def config(model: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenizeConfig:
    """14 items in 12 shards; done once."""
    config = TokenizeConfig(
        sources=(few,),
        vision=model,
        out=tmp_path_factory.mktemp("tokens") / "tokens",
        size=16,
        views=2,
        shift=1,
        text_size=300,
        batch=5,
        shard_items=2,
    )
    assert tokenize(config) == config.out
    return config


def records(out: Path, split: str, kind: Kind | None = None) -> list[Record]:
    found = []
    for line in Tokens.open(out).shards(split, kind):
        shard = Shard(out / line.name)
        found += shard.read(range(len(shard)))
    return found


def files(out: Path) -> dict[str, bytes]:
    """What must not depend on how it was made; the manifest's lines may come in any order."""
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found[MANIFEST] = b"".join(sorted(found[MANIFEST].splitlines(keepends=True)))
    return found


def in_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def png(width: int, height: int, shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture = PIL.Image.new("RGB", (width, height), (shade, 90, 255 - shade))
    picture.paste((0, 0, shade), (0, 0, width // 2, height // 2))
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def test_records_are_what_the_grammar_writes(config: TokenizeConfig, tiny: Emulus, few: Path) -> None:
    by_id = {item.id: item for item in open_source(few)}
    tokens = Tokens.open(config.out)
    grammar = Grammar(tokens.vocabulary, tokens.text)
    counts = {split: len(records(config.out, split)) for split in ("train", "validation", "test")}
    assert counts == {"train": 2 * 10, "validation": 2, "test": 2}
    assert [line.rows for line in tokens.shards("train", "image")] == [4, 4, 2]
    assert [line.rows for line in tokens.shards("train", "video")] == [2] * 5  # at least one clip, in two views
    v = tokens.vocabulary
    for record in [*records(config.out, "validation"), *records(config.out, "test")]:
        item = by_id[record.id]
        frames, fps = decode_item(item, size=16)
        codes = tiny.vision.encode(to_pixels(frames) if record.kind == "image" else to_pixels(frames)[None])[0]
        medium = Image(codes) if record.kind == "image" else Video(codes, fps=fps)
        (caption,), (block,) = record.of("caption"), record.of("media")
        first = [v.bos, *caption.tolist(), *block.tolist(), v.eos]
        last = [v.bos, *block.tolist(), *caption.tolist(), v.eos]
        assert first == grammar.build(caption_first(item.captions[0], medium))
        assert last == grammar.build(caption_last(medium, item.captions[0]))
        assert (record.shape, record.fps) == (tuple(codes.shape), fps)
        assert (record.source, record.score) == (few.name, 0.0)


def test_views_are_shifted_and_the_first_is_not(config: TokenizeConfig, tiny: Emulus, few: Path) -> None:
    by_id = {item.id: item for item in open_source(few)}
    found = records(config.out, "train", "image")
    assert [record.id for record in found[::2]] == [record.id for record in found[1::2]]
    v = Tokens.open(config.out).vocabulary
    for number, record in enumerate(found):
        draw = np.random.default_rng([0, number % 2, *record.id.encode()])
        frames = shifted(decode_item(by_id[record.id], size=16)[0], draw, number % 2)
        codes = tiny.vision.encode(to_pixels(frames))[0]
        (block,) = record.of("media")
        assert (block[(block >= v.visual_start) & (block < v.visual_start + 64)] - v.visual_start).tolist() == (
            codes.flatten().tolist()
        )


def test_everything_that_an_item_may_say(model: Path, tiny: Emulus, tmp_path: Path) -> None:
    about = {
        "captions": ["one", "zwei 赤"],
        "score": 5.25,
        "source": "web",
        "split": "train",
        "questions": [{"question": "what?", "answer": "a square"}, {"question": "<|image end|>?", "answer": "no"}],
    }
    tar = in_tar(tmp_path / "t.tar", {"0.png": png(16, 16), "0.json": json.dumps(about).encode()})
    out = tokenize(TokenizeConfig(sources=(tar,), vocabulary=str(model), out=tmp_path / "out", size=16))
    (record,) = records(out, "train")
    assert (record.id, record.score, record.source) == ("t/0", 5.25, "web")
    assert [span.role for span in record.spans] == [*["caption"] * 2, *["question", "answer"] * 2, "media"]
    grammar, v = tiny.grammar, tiny.grammar.vocabulary
    medium = Image(tiny.vision.encode(to_pixels(decode_item(open_source(tar)[0], size=16)[0]))[0])
    (block,) = record.of("media")
    assert block.tolist() == grammar.media_ids(medium).tolist()
    for pair, question, answer in zip(about["questions"], record.of("question"), record.of("answer"), strict=True):
        document = [v.bos, *block.tolist(), *question.tolist(), *answer.tolist(), v.eos]
        assert document == grammar.build(question_answer(medium, **pair))


@pytest.mark.parametrize("area", [16 * 16, 20 * 20])
def test_pictures_that_keep_their_aspect(model: Path, tiny: Emulus, tmp_path: Path, area: int) -> None:
    sizes = [(16, 16), (32, 8), (20, 30), (8, 32), (64, 64), (33, 9), (16, 16), (20, 30)]
    words = json.dumps({"caption": "a", "split": "test"}).encode()
    members = {f"{number}.png": png(*size, shade=20 * number) for number, size in enumerate(sizes)}
    members |= {f"{number}.json": words for number in range(len(sizes))}
    tar = in_tar(tmp_path / "t.tar", members)
    config = TokenizeConfig(sources=(tar,), vocabulary=str(model), out=tmp_path / "out", area=area, batch=3)
    found = records(tokenize(config), "test")
    assert [record.id for record in found] == [f"t/{number}" for number in range(len(sizes))]
    for item, record, (width, height) in zip(open_source(tar), found, sizes, strict=True):
        sides = smart_resize(height, width, factor=4, min_pixels=area, max_pixels=area)
        assert record.shape == (sides[0] // 4, sides[1] // 4)
        frames, _ = decode_item(item, size=0, area=area, factor=4)
        codes = tiny.vision.encode(to_pixels(frames))[0]
        assert record.of("media")[0].tolist() == tiny.grammar.media_ids(Image(codes)).tolist()


def test_clips_of_one_shape_share_a_batch(model: Path, tiny: Emulus, tmp_path: Path) -> None:
    """Batches hold clips of equal frames and size only; a clip of one frame is held, others to whole codes."""
    rows = []
    for number, frames in enumerate([5, 8, 1, 8, 4, 8, 5]):
        pictures = [PIL.Image.open(io.BytesIO(png(16, 16, 9 * number + 30 * frame % 250))) for frame in range(frames)]
        pictures[0].save(tmp_path / f"{number}.gif", save_all=True, append_images=pictures[1:], duration=100)
        rows.append({"file": f"{number}.gif", "caption": "a", "split": "test", "kind": "video", "fps": 10})
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    tokenize(TokenizeConfig(sources=(tmp_path,), vocabulary=str(model), out=out, size=16, batch=16, shard_items=64))
    found = records(out, "test")
    assert [record.shape[0] for record in found] == [2, 2, 1, 2, 1, 2, 2]
    for item, record in zip(open_source(tmp_path), found, strict=True):
        frames, fps = decode_item(item, size=16)
        frames = torch.cat([frames, frames]) if len(frames) == 1 else frames
        codes = tiny.vision.encode(to_pixels(whole_codes(frames, 4))[None])[0]
        assert record.of("media")[0].tolist() == tiny.grammar.media_ids(Video(codes, fps=fps)).tolist()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [{"text": f"text number {number} " * (number % 5), "split": "train"} for number in range(40)]
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "web.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "web"


def test_texts_alone(config: TokenizeConfig, texts: Path, tmp_path: Path) -> None:
    """They take the vocabulary of an earlier folder, so that both can be mixed."""
    mine = TokenizeConfig(sources=(texts,), vocabulary=str(config.out), out=tmp_path / "out", shard_items=2)
    tokens, earlier = Tokens.open(tokenize(mine)), Tokens.open(config.out)
    assert tokens.digest() == earlier.digest()
    assert [line.rows for line in tokens.shards("train")] == [12, 13, 7]
    found = records(mine.out, "train")
    grammar = Grammar(earlier.vocabulary, earlier.text)
    for item, record in zip([item for item in open_source(texts) if item.stored.size > 40], found, strict=True):  # type: ignore[union-attr]
        v = tokens.vocabulary
        assert [v.bos, *record.of("text")[0].tolist(), v.eos] == grammar.build(Document((Text(item.text),)))
        assert (record.id, record.kind, record.source) == (item.id, "text", "web")
    skipped = [each for line in tokens.shards("train") for each in line.skipped]
    assert skipped == [Skipped(f"web/{number}", f"web/{number} is an empty text") for number in range(0, 40, 5)]
    assert tokens.items("train") == []


def test_long_texts_become_several_records(config: TokenizeConfig, texts: Path, tmp_path: Path) -> None:
    whole = TokenizeConfig(sources=(texts,), vocabulary=str(config.out), out=tmp_path / "whole")
    parts = dataclasses.replace(whole, out=tmp_path / "parts", max_text_ids=7)
    found = records(tokenize(parts), "train")
    assert max(len(record.ids) for record in found) == 7
    joined: dict[str, list[int]] = {}
    for record in found:
        joined.setdefault(record.id.partition("#")[0], []).extend(record.ids.tolist())
    assert joined == {record.id: record.ids.tolist() for record in records(tokenize(whole), "train")}


@pytest.mark.parametrize("layout", ["BAAI/Emu3-Gen", "BAAI/Emu3-Chat-hf"])
def test_the_vocabulary_of_published_models(
    layout: str, published: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any layout; where the vision tokenizer is a model of its own, it is found too."""
    monkeypatch.chdir(tmp_path)
    out = tokenize(TokenizeConfig(sources=(few,), vocabulary=layout, out=tmp_path / "out", size=16, splits=("test",)))
    tokens = Tokens.open(out)
    assert tokens.vocabulary == load_bundle(layout, vision=published / "Emu3-VisionTokenizer").vocabulary
    assert tokens.vocabulary.visual_size == 32768
    assert tokens.vocabulary.surface(tokens.vocabulary.boi) == "<|image start|>"
    grammar = Grammar(tokens.vocabulary, tokens.text)
    for item in tokens.items("test"):
        assert item.media.codes.shape[-2:] == (2, 2)
        assert grammar.parse(grammar.build(caption_first(item.captions[0], item.media))).complete


def test_what_does_not_fit_together(config: TokenizeConfig, published: Path, model: Path, tmp_path: Path) -> None:
    mine = dataclasses.replace(config, out=tmp_path / "out")
    for changes, message in [
        ({"vocabulary": str(published / "Emu3-Gen")}, "has 64 codes but the vocabulary of .* 32768"),
        ({"vision": None}, "name a --vision tokenizer or a --vocabulary"),
        ({"vocabulary": str(published / "Emu3-VisionTokenizer")}, "holds no text tokenizer"),
        ({"vision": Path("nowhere")}, "no folder nowhere"),
        ({"size": 18}, "size 18 is not a multiple of 4, .* take 16"),
        ({"area": 3}, "an area of 3 pixels"),
        ({"sources": (tmp_path / "nothing",)}, "nothing does not exist"),
    ]:
        with pytest.raises(EmulusError, match=message) as caught:
            tokenize(dataclasses.replace(mine, **changes))
        assert "\n" not in str(caught.value)
        assert not mine.out.exists()
    for changes, message in [
        ({"views": 0}, "views must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"splits": ("tran",)}, "did you mean 'train'"),
        ({"engine": "dafd"}, "did you mean 'daft'"),
        ({"sources": ()}, "no source is named"),
    ]:
        with pytest.raises(EmulusError, match=message):
            dataclasses.replace(mine, **changes)


def test_folders_that_are_read_are_not_written_to(
    config: TokenizeConfig, model: Path, texts: Path, tmp_path: Path
) -> None:
    data = config.sources[0]
    inside = dataclasses.replace(config, sources=(data,), out=data / "../few-tokens")
    before = {path: sorted(path.rglob("*")) for path in (data, model, texts)}
    link = tmp_path / "link"
    link.symlink_to(model)
    for changes, says in [
        ({"out": data}, "is the source"),
        ({"out": model}, "is the vision tokenizer"),
        ({"out": link}, "is the vision tokenizer"),
        ({"out": model, "vision": None, "vocabulary": str(model)}, "is the vocabulary"),
        ({"out": model, "vision": model / "vision"}, "is not a tokens folder"),
        ({"out": texts, "sources": (texts / "*.jsonl",)}, "looks for files"),
        ({"out": texts, "sources": (texts,)}, "is the source"),
        ({"sources": (Path("data\udcff"),)}, "is not UTF-8"),
    ]:
        with pytest.raises(EmulusError, match=says):
            tokenize(dataclasses.replace(inside, **changes))  # type: ignore[arg-type]
    assert {path: sorted(path.rglob("*")) for path in before} == before
    with only_run(tmp_path / "taken"), pytest.raises(EmulusError, match="another run is writing to"):
        # Before anything is opened.
        tokenize(dataclasses.replace(config, out=tmp_path / "taken", sources=(tmp_path / "none",)))


def test_finished_is_not_done_again(config: TokenizeConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*")}
    assert tokenize(dataclasses.replace(config, batch=7, workers=3)) == config.out
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*")} == before


class CountingPath(type(Path())):  # type: ignore[misc]
    """Notes what is read."""

    asked: ClassVar[list[str]] = []

    def open(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(self.name)
        return super().open(*args, **kwargs)


def test_the_manifest_is_read_once_however_many_shards_there_are(config: TokenizeConfig) -> None:
    CountingPath.asked.clear()
    tokenize(dataclasses.replace(config, out=CountingPath(config.out)))
    assert CountingPath.asked.count(MANIFEST) == 1


def test_only_what_is_missing_is_made(config: TokenizeConfig, tmp_path: Path) -> None:
    """A shard that was deleted, one without a line, a line that was torn: made again, to the same bytes."""
    torn = dataclasses.replace(config, out=tmp_path / "torn")
    tokenize(torn)
    (torn.out / "tokens.json").rename(torn.out / "making.json")
    with pytest.raises(EmulusError, match="not finished"):
        Tokens.open(torn.out)
    (torn.out / "train-video-00002.arrayrecord").unlink()
    (torn.out / "train-video-00003.lengths.safetensors").unlink()
    manifest = torn.out / MANIFEST
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join(lines[1:-1]) + lines[-1][:40])
    kept = {path: path.stat().st_mtime_ns for path in torn.out.glob("*.arrayrecord")}
    tokenize(torn)
    made = {path.name for path, changed in kept.items() if path.stat().st_mtime_ns != changed}
    assert made == {json.loads(line)["name"] for line in (lines[0], lines[-1])} | {"train-video-00003.arrayrecord"}
    lines_of = {each.name: each for each in read_manifest(torn.out)}
    assert lines_of == {each.name: each for each in read_manifest(config.out)}
    assert {k: v for k, v in files(torn.out).items() if k != MANIFEST} == {
        k: v for k, v in files(config.out).items() if k != MANIFEST
    }
    Tokens.open(torn.out).check()


def test_killed_and_resumed(config: TokenizeConfig, tmp_path: Path) -> None:
    """SIGKILL of the real command: what is finished stays, and at most the shard that was being made is made again."""
    mine = dataclasses.replace(config, out=tmp_path / "killed")
    write_yaml(tmp_path / "config.yaml", mine)
    arguments = ["tokenize", str(mine.sources[0]), "--config", str(tmp_path / "config.yaml")]
    process = halted(tmp_path / "halted", "emulus.data.encoder:write_shard", 6, arguments)
    process.kill()
    assert process.wait() == -9
    kept = {line.name: (mine.out / line.name).stat().st_mtime_ns for line in read_manifest(mine.out)}
    assert len(kept) == 5
    assert not (mine.out / "tokens.json").exists()
    assert len({path.name for path in mine.out.glob("[a-z]*.arrayrecord")} - kept.keys()) <= 1
    tokenize(mine)
    assert {name: (mine.out / name).stat().st_mtime_ns for name in kept} == kept
    assert files(mine.out) == files(config.out)


def runs(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_stopped_workers(config: TokenizeConfig, tmp_path: Path, how: signal.Signals) -> None:
    """Neither a process nor, after the next run, a file."""
    mine = dataclasses.replace(config, out=tmp_path / "killed", workers=2)
    write_yaml(tmp_path / "config.yaml", mine)
    arguments = ["tokenize", str(mine.sources[0]), "--config", str(tmp_path / "config.yaml")]
    # While its workers are busy with the next shards.
    place = "emulus.data.tokenize:add_to_manifest"
    process = halted(tmp_path / "halted", place, 1, arguments, start_new_session=True)
    process.send_signal(how)
    assert process.wait() == (-9 if how == signal.SIGKILL else 143)
    until = time.monotonic() + 120
    while runs(process.pid) and time.monotonic() < until:
        time.sleep(0.01)
    assert not runs(process.pid)
    for name in (".train-image-00000.1.tmp.arrayrecord", ".train-video-00000.lengths.1.tmp.safetensors"):
        (mine.out / name).write_bytes(b"half")
    tokenize(dataclasses.replace(mine, workers=1))
    assert files(mine.out) == files(config.out)


def test_only_one_run_writes_to_a_folder(config: TokenizeConfig, tmp_path: Path) -> None:
    mine = dataclasses.replace(config, out=tmp_path / "mine")
    with only_run(mine.out), pytest.raises(EmulusError, match="another run is writing to"):
        tokenize(mine)
    tokenize(mine)


def test_two_processes_make_the_same(config: TokenizeConfig, tmp_path: Path) -> None:
    """And one that dies is noticed."""
    mine = dataclasses.replace(config, out=tmp_path / "mine", workers=2)
    shutil.copytree(config.out, mine.out, ignore=shutil.ignore_patterns("*.arrayrecord", "*.safetensors", MANIFEST))
    shutil.copy(config.out / "vision/model.safetensors", mine.out / "vision")
    units = plan(mine, open_source(config.sources[0]))
    lines = finished(mine, units * 30)
    found: dict[str, ShardLine] = {}
    # However much slower than the other one of them is.
    while len(found) < len(units):
        line = next(lines)
        found[line.name] = line
    assert found == {line.name: line for line in read_manifest(config.out)}
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(EmulusError, match="a worker process died"):
        list(lines)


def test_daft_makes_the_same(config: TokenizeConfig, tmp_path: Path) -> None:
    pytest.importorskip("daft")
    mine = dataclasses.replace(config, out=tmp_path / "mine", engine="daft")
    tokenize(mine)
    assert files(mine.out) == files(config.out)


def test_a_source_that_vanishes(model: Path, tmp_path: Path) -> None:
    names = [f"{number}.{suffix}" for number in range(9) for suffix in ("png", "txt")]
    tar = in_tar(tmp_path / "t.tar", {name: png(16, 16) if name.endswith("png") else b"a" for name in names})
    config = TokenizeConfig(sources=(tar,), vocabulary=str(model), out=tmp_path / "out", size=16, shard_items=2)
    tokenize(config)
    units = plan(config, open_source(tar))
    tar.unlink()
    with pytest.raises(EmulusError, match=r"t\.tar has vanished while it was read; bring it back") as caught:
        list(finished(config, units))
    assert "\n" not in str(caught.value)
    with pytest.raises(EmulusError, match=r"t\.tar does not exist"):
        tokenize(config)
    # What a worker process tells its parent.
    here, there = multiprocessing.Pipe()
    here.send(units[0])
    threads = torch.get_num_threads()
    serve(there, config, "cpu")
    torch.set_num_threads(threads)
    assert here.recv() == str(caught.value)


def test_items_that_cannot_be_read_are_listed(
    config: TokenizeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in config.sources[0].iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    (data / "3.png").write_bytes((data / "3.png").read_bytes()[:40])
    (data / "20.webp").write_bytes(b"no clip")
    broken = dataclasses.replace(config, sources=(data,), out=tmp_path / "out")
    with caplog.at_level("INFO", logger="emulus"):
        tokens = Tokens.open(tokenize(broken))
    assert (len(records(broken.out, "train")), len(records(broken.out, "test"))) == (2 * 9, 1)
    skipped = {each.id: each.reason for line in tokens.lines for each in line.skipped}
    assert skipped.keys() == {"3.png", "20.webp"}
    (told,) = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert "left out 2 items" in told
    assert "\n" not in told
    assert all(f"{id}: {reason}" in told for id, reason in skipped.items())
    items = open_source(data).select(split="train", kind="image")
    dataset = MediaDataset(items, size=16)
    place = next(number for number, item in enumerate(items) if item.id.startswith("3."))
    assert torch.equal(dataset[place], dataset[place + 1])
    assert len(dataset.bad) == 1


def encoded(encoder: Encoder, unit: Unit, out: Path) -> tuple[list[str], dict[str, str]]:
    """Whose records were written, and what was left out, once each."""
    line: ShardLine = encoder.make(unit)
    assert len({each.id for each in line.skipped}) == len(line.skipped)
    shard = Shard(out / line.name)
    return [record.id for record in shard.read(range(len(shard)))], {each.id: each.reason for each in line.skipped}


def test_what_no_document_can_hold_is_left_out(config: TokenizeConfig, few: Path, tmp_path: Path) -> None:
    """Wherever it is found out: before it is encoded, or when its record is written."""
    out = tmp_path / "out"
    shutil.copytree(config.out, out, ignore=shutil.ignore_patterns("*.arrayrecord", "*.lengths.*", MANIFEST))
    encoder = Encoder(dataclasses.replace(config, out=out), "cpu")
    clip = open_source(few).select(split="train", kind="video")[0]
    slow = dataclasses.replace(clip, id="slow", fps=0.0004)
    many = dataclasses.replace(clip, id="many", captions=("a",) * 70_000)
    odd = dataclasses.replace(clip, id="odd", score=float("nan"))
    torn = dataclasses.replace(clip, id="torn", captions=("\ud800",))
    items = (slow, many, clip, odd, torn)
    kept, skipped = encoded(encoder, Unit(split="train", kind="video", number=0, items=items), out)
    assert kept == [clip.id] * 2
    assert skipped.keys() == {"slow", "many", "odd", "torn"}
    assert "0.0004" in skipped["slow"]
    assert "number of captions" in skipped["many"]
    encoder.grammar.max_cells = 31
    kept, skipped = encoded(encoder, Unit(split="train", kind="video", number=1, items=(clip,)), out)
    assert not kept
    assert "more than 31 cells" in skipped[clip.id]


def test_a_text_that_the_text_tokenizer_gives_up_on(published: Path, tmp_path: Path) -> None:
    """The released tokenizer panics at a million blanks."""
    table = tmp_path / "t.jsonl"
    rows = [{"text": text, "split": "train"} for text in ("one", " " * 1_000_000 + "x", "two")]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = str(published / "Emu3-Gen")
    vision = published / "Emu3-VisionTokenizer"
    out = tokenize(TokenizeConfig(sources=(table,), vocabulary=words, vision=vision, out=tmp_path / "out"))
    assert len(records(out, "train")) == 2
    ((skipped,),) = (line.skipped for line in read_manifest(out))
    assert "characters in a row" in skipped.reason


def test_what_is_longer_than_a_context_is_left_out(model: Path, tiny: Emulus, tmp_path: Path) -> None:
    """Its longest document counts: with its longest caption, or a question and its answer."""
    pair = {"question": "what is that?", "answer": "a square"}
    words = [{"captions": ["a"]}, {"captions": ["a", "a long caption"]}, {"captions": ["a"], "questions": [pair]}]
    members = {f"{number}.png": png(16, 16) for number in range(3)}
    members |= {f"{n}.json": json.dumps({**each, "split": "train"}).encode() for n, each in enumerate(words)}
    tar = in_tar(tmp_path / "t.tar", members)
    picture = Image(torch.zeros(4, 4, dtype=torch.int64))
    documents = [
        caption_first("a", picture),
        caption_first("a long caption", picture),
        question_answer(picture, **pair),
    ]
    lengths = [len(tiny.grammar.build(document)) for document in documents]
    assert len(set(lengths)) == 3
    config = TokenizeConfig(sources=(tar,), vocabulary=str(model), out=tmp_path, size=16)
    for number, most in enumerate([max(lengths), *lengths, max(lengths) - 1]):
        mine = dataclasses.replace(config, out=tmp_path / str(number), max_ids=most)
        found = {record.id for record in records(tokenize(mine), "train")}
        assert found == {f"t/{number}" for number, length in enumerate(lengths) if length <= most}
    with pytest.raises(EmulusError, match="other settings"):
        tokenize(dataclasses.replace(mine, max_ids=0))


def test_texts_longer_than_a_context_are_left_out_or_divided(
    config: TokenizeConfig, texts: Path, tmp_path: Path
) -> None:
    whole = TokenizeConfig(sources=(texts,), vocabulary=str(config.out), out=tmp_path / "whole", max_ids=40)
    skipped = [each for line in read_manifest(tokenize(whole)) for each in line.skipped]
    assert any("more than max_ids 40" in each.reason for each in skipped)
    assert max(len(record.ids) for record in records(whole.out, "train")) <= 38
    parts = dataclasses.replace(whole, out=tmp_path / "parts", max_text_ids=38)
    assert not any("max_ids" in each.reason for line in read_manifest(tokenize(parts)) for each in line.skipped)


def test_what_goes_wrong_in_a_worker_is_said(config: TokenizeConfig) -> None:
    here, there = multiprocessing.Pipe()
    here.send("no unit")
    threads = torch.get_num_threads()
    with pytest.raises(AttributeError):
        serve(there, config, "cpu")
    torch.set_num_threads(threads)
    assert here.recv().startswith("a worker process failed (AttributeError: 'str' object has no attribute")


def test_folders_of_before_there_was_a_limit_are_whole(config: TokenizeConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(config.out, out)
    settings = json.loads((out / "tokens.json").read_text())
    del settings["max_ids"]
    (out / "tokens.json").write_text(json.dumps(settings))
    assert tokenize(dataclasses.replace(config, out=out)) == out
    with pytest.raises(EmulusError, match="other settings"):
        tokenize(dataclasses.replace(config, out=out, max_ids=9))


def test_nothing_that_can_be_read_is_an_error(model: Path, tmp_path: Path) -> None:
    tar = in_tar(tmp_path / "t.tar", {"0.png": b"no", "0.txt": b"a", "1.png": b"no", "1.txt": b"b"})
    config = TokenizeConfig(sources=(tar,), vocabulary=str(model), out=tmp_path / "out", size=16)
    for _ in range(2):
        with pytest.raises(EmulusError, match=r"none of the items could be encoded; the first: t/0: .*not an image"):
            tokenize(config)


def test_other_settings_are_refused(config: TokenizeConfig, texts: Path, tmp_path: Path) -> None:
    for changes in ({"views": 3}, {"shard_items": 9}, {"area": 64}, {"sources": (texts,)}, {"seed": 1}):
        with pytest.raises(EmulusError, match="other settings"):
            tokenize(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
    with pytest.raises(EmulusError, match="the items' names"):
        tokenize(dataclasses.replace(config, sources=(*config.sources, texts)))


def test_changed_words_are_other_settings_and_another_place_is_not(config: TokenizeConfig, tmp_path: Path) -> None:
    """Where the text tokenizer was trained on them; see test_origin for the others."""
    data, out = tmp_path / config.sources[0].name, tmp_path / "out"
    data.mkdir()
    for path in config.sources[0].iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    shutil.copytree(config.out, out)
    moved = dataclasses.replace(config, sources=(data,), out=out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.arrayrecord")}
    assert tokenize(moved) == out
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.arrayrecord")} == before
    table = data / "captions.jsonl"
    table.write_text(table.read_text().replace("a red square", "a crimson square"))
    with pytest.raises(EmulusError, match="the words that the text tokenizer was trained on"):
        tokenize(moved)


def test_plans_follow_from_the_sources_alone(config: TokenizeConfig, few: Path) -> None:
    items = open_source(few)
    units = plan(config, items)
    assert units == plan(config, list(items))
    assert [(unit.split, unit.kind, unit.number) for unit in units][:4] == [
        *(("train", "image", number) for number in range(3)),
        ("train", "video", 0),
    ]
    assert sorted(item.id for unit in units for item in unit.items) == sorted(item.id for item in items)
    assert all({(item.split, item.kind) for item in unit.items} == {(unit.split, unit.kind)} for unit in units)
    assert isinstance(units[0], Unit)


def test_running_ahead() -> None:
    seen: list[int] = []

    def double(number: int) -> int:
        seen.append(number)
        if number == 30:
            raise EmulusError("thirty")
        return 2 * number

    results = run_ahead(double, range(100), threads=3, ahead=5)
    assert [next(results) for _ in range(20)] == [2 * number for number in range(20)]
    assert len(seen) <= 26
    with pytest.raises(EmulusError, match="thirty"):
        list(results)
    assert len(seen) < 40
    assert list(run_ahead(double, range(3), threads=1, ahead=1)) == [0, 2, 4]
    assert list(run_ahead(double, [], threads=1, ahead=4)) == []


def test_the_tables_frame_rate_wins(shapes: Path) -> None:
    item = open_source(shapes).select(kind="video")[0]
    frames, fps = decode_item(item, size=16)
    assert (len(frames), fps) == (8, 8.0)
    slow = dataclasses.replace(item, fps=2.0)
    assert [len(decode_item(slow, size=16, fps=rate)[0]) for rate in (None, 2.0, 1.0, 4.0)] == [8, 8, 4, 16]
    assert decode_item(slow, size=16)[1] == 2.0


def test_shifting() -> None:
    frames = torch.arange(2 * 3 * 6 * 6, dtype=torch.uint8).reshape(2, 3, 6, 6)
    moved = [shifted(frames, np.random.default_rng(seed), 2) for seed in range(20)]
    assert all(m.shape == frames.shape for m in moved)
    assert len({m.numpy().tobytes() for m in moved}) > 5
    assert torch.equal(shifted(frames, np.random.default_rng(0), 0), frames)
    padded = torch.nn.functional.pad(frames.float(), (2,) * 4, mode="replicate").to(frames.dtype)
    for seed, found in enumerate(moved):
        down, right = np.random.default_rng(seed).integers(5, size=2)
        assert torch.equal(found, padded[..., down : down + 6, right : right + 6])


def test_a_text_is_no_picture() -> None:
    item = Item(id="a", kind="text", captions=(), split="train", stored="words")
    with pytest.raises(EmulusError, match="a is a text"):
        decode_item(item, size=16)
