"""Opening a tokens folder: what is in it comes out, and what is damaged is refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulus.commands.info import info
from emulus.data.records import Shard, lengths_path, shard_name
from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.data.tokens import SETTINGS, Tokens, vision_digest
from emulus.errors import EmulusError
from emulus.pipeline import Emulus
from tests.data.folders import CODES, Thing, grammar_of_things, make_folder, make_things, to_record

MEDIA = {
    (split, kind): make_things(kind, count, f"{split}/{kind}")
    for split, kind, count in [("train", "image", 9), ("train", "video", 5), ("test", "image", 2)]
}
TEXTS = {("train", "text"): make_things("text", 4, "train/text")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "tokens", {**MEDIA, **TEXTS})


def test_items_are_what_was_written(folder: Path) -> None:
    tokens = Tokens.open(folder)
    for split in ("train", "validation", "test"):
        things = {thing.id: thing for (of, _), chosen in MEDIA.items() if of == split for thing in chosen}
        items = tokens.items(split)
        assert sorted(item.id for item in items) == sorted(things)
        for item in items:
            assert item.captions == things[item.id].captions
            assert item.media == things[item.id].media


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=30), max_size=3))
def test_captions_come_back_letter_by_letter(words: list[str]) -> None:
    grammar = grammar_of_things()
    thing = make_things("image", 1, "x")[0]
    record = to_record(grammar, Thing(id="x", media=thing.media, captions=tuple(words)))
    for ids, caption in zip(record.of("caption"), words, strict=True):
        back = grammar.text.decode(ids.tolist())
        assert back == unicodedata.normalize("NFC", caption)
        assert grammar.text.encode(back) == ids.tolist()


def test_shards_are_those_of_the_manifest(folder: Path) -> None:
    tokens = Tokens.open(folder)
    assert [line.rows for line in tokens.shards("train", "image")] == [5, 4]
    assert {line.kind for line in tokens.shards("train")} == {"text", "image", "video"}
    assert tokens.shards("validation") == []
    # A shard without its line does not exist.
    copy = folder / shard_name("test", "image", 7)
    copy.write_bytes((folder / shard_name("test", "image", 0)).read_bytes())
    assert len(Tokens.open(folder).items("test")) == 2


def test_unfinished_and_foreign_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match="holds no tokens: make them"):
        Tokens.open(tmp_path)
    (folder / SETTINGS).rename(folder / "making.json")
    with pytest.raises(EmulusError, match="not finished: run the same tokenize command"):
        Tokens.open(folder)
    (folder / SETTINGS).write_text("[]")
    with pytest.raises(EmulusError, match="holds no settings"):
        Tokens.open(folder)


def test_damage_is_named(folder: Path) -> None:
    tokens = Tokens.open(folder)
    tokens.check()
    shard = folder / shard_name("train", "image", 1)
    for path in (shard, lengths_path(shard)):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(EmulusError, match=r"is not what was written \(its SHA-256 differs\)"):
            tokens.check()
        path.write_bytes(whole[:-1])
        with pytest.raises(EmulusError, match=f"{shard} and its lengths are missing or cut off"):
            Tokens.open(folder)
        path.unlink()
        with pytest.raises(EmulusError, match="missing or cut off"):
            Tokens.open(folder)
        path.write_bytes(whole)
    tokens.check()


@pytest.mark.parametrize("name", ["vocabulary.json", "tokenizer.json"])
def test_a_missing_vocabulary_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(EmulusError, match=f"{folder}"):
        Tokens.open(folder)


def test_codes_of_another_vocabulary_are_refused(folder: Path) -> None:
    values = json.loads((folder / "vocabulary.json").read_text())
    (folder / "vocabulary.json").write_text(json.dumps({**values, "visual_size": 2}))
    with pytest.raises(EmulusError, match="codes outside the vocabulary of 2"):
        Tokens.open(folder).items("train")
    (folder / "vocabulary.json").write_text(json.dumps({**values, "text_size": values["text_size"] - 1}))
    with pytest.raises(EmulusError, match="text tokenizer has"):
        Tokens.open(folder)


def test_the_digest_says_what_ids_mean(tmp_path: Path) -> None:
    folders = [
        make_folder(tmp_path / "a", TEXTS),
        make_folder(tmp_path / "b", MEDIA),
        make_folder(tmp_path / "c", TEXTS, vision="other"),
        make_folder(tmp_path / "d", TEXTS, seed=1),
    ]
    first, same, *others = (Tokens.open(folder).digest() for folder in folders)
    assert first == same
    assert len({first, *others}) == 3


def test_what_tokenize_writes_is_opened(tiny: Emulus, shapes: Path, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    config = TokenizeConfig(
        sources=(shapes,), vision=tmp_path / "model", out=tmp_path / "tokens", size=16, text_size=300
    )
    tokens = Tokens.open(tokenize(config))
    assert tokens.vision_sha256 == vision_digest(tiny.vision)
    assert (len(tokens.items("train")), len(tokens.items("validation"))) == (32, 8)
    rows = sum(len(Shard(tokens.folder / line.name)) for line in tokens.lines)
    assert rows == sum(line.rows for line in tokens.lines) == 48
    assert tokens.vocabulary.visual_size == 64 != CODES
    tokens.check()


def test_info_counts_and_checks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info([str(folder), "--check", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["train image"]["rows"], found["train text"]["rows"]) == (9, 4)
    assert "every shard" in found["checked"]
    shard = next(folder.glob("train-image-*.arrayrecord"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(bytes(damaged))
    info([str(folder)])
    with pytest.raises(EmulusError, match="not what was written"):
        info([str(folder), "--check"])
