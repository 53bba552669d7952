"""Texts: tables with a column of text, and files of their own."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.data.source import Source, open_source, split_of_key
from emulus.errors import EmulusError

TEXTS = ["one line", "zwei\nZeilen, \u2028drei", '"vier" 赤い', "  five\r\n"]


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("column", ["text", "content"])
@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_table_of_texts(tmp_path: Path, suffix: str, column: str, whole_folder: bool) -> None:
    table = tmp_path / f"web.{suffix}"
    write_table(table, [{column: text, "url": "http://x", "score": 2} for text in TEXTS])
    source = open_source(tmp_path if whole_folder else table)
    assert [item.text for item in source] == TEXTS
    assert [item.text for item in reversed(source)] == TEXTS[::-1]
    assert {item.kind for item in source} == {"text"}
    assert [item.id for item in source] == [f"web/{number}" for number in range(4)]
    assert [item.split for item in source] == [split_of_key(item.id) for item in source]
    assert {item.source for item in source} == {tmp_path.name if whole_folder else "web"}
    assert {(item.score, item.captions) for item in source} == {(2.0, ())}
    assert len(source.select(kind="image")) == 0
    with pytest.raises(EmulusError, match="is a text, not a picture"):
        _ = source[0].media


def test_files_of_text(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXTS[1].encode())
    (tmp_path / "deep" / "b.md").write_text(TEXTS[2], encoding="utf-8")
    (tmp_path / "c.TXT").write_text("\n")
    (tmp_path / "d.txt").write_bytes(b"good\n\xff")
    (tmp_path / "e.pdf").write_bytes(b"no text")
    (tmp_path / ".hidden.txt").write_text("no")
    found = {item.id: item for item in open_source(tmp_path)}
    assert list(found) == ["a.txt", "c.TXT", "d.txt", "deep/b.md"]
    assert [found["a.txt"].text, found["deep/b.md"].text] == TEXTS[1:3]
    with pytest.raises(EmulusError, match=r"d\.txt line 2 is not UTF-8"):
        _ = found["d.txt"].text
    with pytest.raises(EmulusError, match=r"c\.TXT is an empty text"):
        _ = found["c.TXT"].text
    (tmp_path / "a.txt").unlink()
    with pytest.raises(EmulusError, match=r"a\.txt cannot be read"):
        _ = found["a.txt"].text
    (single,) = open_source(tmp_path / "deep" / "b.md")
    assert (single.id, single.text) == ("b.md", TEXTS[2])


def test_patterns_name_several_files(tmp_path: Path) -> None:
    for name in ("a/1", "a/2", "b/1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_table(tmp_path / f"{name}.jsonl", [{"text": name, "id": name}])
    assert [item.text for item in open_source(tmp_path / "*" / "1.jsonl")] == ["a/1", "b/1"]
    assert {item.source for item in open_source(tmp_path / "a" / "*.jsonl")} == {"a"}
    with pytest.raises(EmulusError, match=r"\*\.tar matches no file"):
        open_source(tmp_path / "*.tar")
    (tmp_path / "a" / "x.zip").touch()
    source = open_source(tmp_path / "a" / "*")
    assert [item.text for item in source] == ["a/1", "a/2"]
    assert [str(entry) for entry in source.left_out] == ["1 file: compressed archives; unpack them (x.zip)"]


def test_patterns_over_links_that_lead_elsewhere(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / "blobs").mkdir(exist_ok=True)
        (tmp_path / "blobs" / name).write_text(name)
        (tmp_path / "snap" / name).mkdir(parents=True)
        (tmp_path / "snap" / name / "0.txt").symlink_to(tmp_path / "blobs" / name)
    source = open_source(tmp_path / "snap" / "*" / "*.txt")
    assert {item.id: item.text for item in source} == {"test/0.txt": "test", "train/0.txt": "train"}
    assert {item.source for item in source} == {"snap"}


def test_long_texts_and_empty_ids_in_csv(tmp_path: Path) -> None:
    texts = ["words " * 30_000, "b"]
    write_table(tmp_path / "web.csv", [{"id": "", "text": text} for text in texts])
    source = open_source(tmp_path)
    assert [(item.id, item.text) for item in source] == [("web/0", texts[0]), ("web/1", texts[1])]


@pytest.mark.parametrize("name", ["web.jsonl", "web.parquet", "web.csv", "web.txt"])
def test_marks_tell_other_words(tmp_path: Path, name: str) -> None:
    def marks(texts: list[str]) -> list[object]:
        if name.endswith(".txt"):
            for number, text in enumerate(texts):
                (tmp_path / f"{number}.txt").write_text(text)
        else:
            write_table(tmp_path / name, [{"text": text} for text in texts])
        return [item.mark for item in open_source(tmp_path)]

    before = marks(["red", "blue"])
    assert len(set(before)) == 2
    assert marks(["red", "blue"]) == before
    assert marks(["red", "lube"])[1] != before[1]
    (item, *_) = open_source(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    assert item.mark is None or name in ("web.jsonl", "web.csv")


def test_a_line_that_changed_is_found_out(tmp_path: Path) -> None:
    table = tmp_path / "web.jsonl"
    write_table(table, [{"text": "first"}, {"text": "second"}])
    first, second = open_source(table)
    table.write_text(table.read_text().replace("first", "third"))
    assert second.text == "second"
    with pytest.raises(EmulusError, match="is not what it was"):
        _ = first.text
    table.write_text("")
    with pytest.raises(EmulusError, match="shorter than it was"):
        _ = second.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": 3}], "line 1: 'text' is not a text"),
        ([{"text": None}], "line 1: 'text' is empty"),
        ([{"image": "a.png", "text": "a"}], "'a.png' is not in"),
        ([{"image": None, "text": "a"}], "line 1 has no media"),
        ([{"kind": "text", "caption": "a"}], "line 1 has no column text or content"),
    ],
)
def test_rows_that_are_wrong(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    write_table(tmp_path / "web.jsonl", rows)
    with pytest.raises(EmulusError, match=message):
        open_source(tmp_path)


def test_half_characters_are_refused_when_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "web.jsonl").write_text('{"text": "good"}\n{"text": "half \\ud83d"}\n')
    good, half = open_source(tmp_path)
    assert good.text == "good"
    with pytest.raises(EmulusError, match="half a character"):
        _ = half.text


def test_a_parquet_column_of_numbers_is_no_text(tmp_path: Path) -> None:
    write_table(tmp_path / "web.parquet", [{"text": 3}])
    with pytest.raises(EmulusError, match="the column 'text' holds int64, not texts"):
        open_source(tmp_path)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("texts")
    for suffix in ("jsonl", "parquet"):
        write_table(folder / f"t.{suffix}", [{"text": text} for text in texts])
        source = open_source(folder / f"t.{suffix}")
        assert isinstance(source, Source)
        assert [item.text for item in source] == texts
