from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from emulus.data.media_dataset import decode_item
from emulus.data.source import SPLITS, Item, Source, open_source, split_of_key
from emulus.errors import EmulusError


def picture(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 90, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def animation() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 90, 200)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=100)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures and a clip, without a table."""
    (tmp_path / "more").mkdir()
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "more" / "b.webp").write_bytes(picture(2))
    (tmp_path / "c.webp").write_bytes(animation())
    return tmp_path


ROWS: list[dict[str, Any]] = [
    {"file": "a.png", "caption": "a red dot"},
    {"file": "more/b.webp", "caption": 'ein "roter" Punkt, 赤い'},
    {"file": "c.webp", "caption": "a dot,\nmoving"},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    # Half characters can only be written as JSON spells them.
    whole = all(text.isprintable() for row in rows for text in map(str, row.values()))
    path.write_text("".join(json.dumps(row, ensure_ascii=not whole) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


WRITERS = {"jsonl": write_jsonl, "csv": write_csv, "parquet": write_parquet}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("stem", ["captions", "metadata"])
def test_a_folder_with_a_table_of_captions(folder: Path, suffix: str, stem: str) -> None:
    WRITERS[suffix](folder / f"{stem}.{suffix}", ROWS)
    source = open_source(folder)
    assert [item.id for item in source] == ["a.png", "more/b.webp", "c.webp"]
    assert [item.kind for item in source] == ["image", "image", "video"]
    assert [item.captions for item in source] == [(row["caption"],) for row in ROWS]
    assert [item.media for item in source] == [folder / row["file"] for row in ROWS]
    assert [item.split for item in source] == [split_of_key(item.id) for item in source]


@pytest.mark.parametrize("column", ["file", "file_name", "path", "image", "video", "media"])
@pytest.mark.parametrize("words", ["caption", "captions", "text"])
def test_the_names_that_columns_go_by(folder: Path, column: str, words: str) -> None:
    write_jsonl(folder / "captions.jsonl", [{column: "c.webp", words: "a dot"}])
    (item,) = open_source(folder)
    assert item.captions == ("a dot",)
    assert item.kind == ("image" if column == "image" else "video")


def test_rows_of_one_file_are_one_item(folder: Path) -> None:
    rows = [
        {"file": "a.png", "captions": ["one", " two "], "split": "test", "fps": None},
        {"file": "a.png", "captions": ["two", "three", ""], "split": "test"},
        {"file": "c.webp", "captions": "four", "split": "val", "kind": "video", "fps": 8, "id": 17},
    ]
    write_jsonl(folder / "captions.jsonl", rows)
    first, second = open_source(folder)
    assert first == Item(
        id="a.png",
        kind="image",
        captions=("one", "two", "three"),
        split="test",
        stored=folder / "a.png",
        source=folder.name,
    )
    assert (second.id, second.split, second.fps) == ("17", "validation", 8.0)


@pytest.mark.parametrize("suffix", WRITERS)
def test_what_else_a_table_may_say(folder: Path, suffix: str) -> None:
    questions: Any = [{"question": "what is it? ", "answer": "a dot"}, {"question": "which?", "answer": "red"}]
    row = {**ROWS[0], "score": 5.5, "source": "mine", "questions": questions}
    plain = {**ROWS[1], "score": None, "source": None, "questions": None}
    if suffix == "csv":
        row["questions"] = json.dumps(questions)
        plain |= {"score": "", "source": "", "questions": ""}
    WRITERS[suffix](folder / f"captions.{suffix}", [row, plain])
    full, bare = open_source(folder)
    assert (full.score, full.source) == (5.5, "mine")
    assert full.questions == (("what is it?", "a dot"), ("which?", "red"))
    assert (bare.score, bare.source, bare.questions) == (0.0, folder.name, ())


def test_splits_can_be_chosen(folder: Path) -> None:
    write_jsonl(folder / "captions.jsonl", [{**row, "split": split} for row, split in zip(ROWS, SPLITS, strict=True)])
    assert [item.id for item in open_source(folder).select(split="validation")] == ["more/b.webp"]
    assert [item.id for item in open_source(folder).select(kind="video")] == ["c.webp"]
    assert open_source(folder).counts() == {"test video": 1, "train image": 1, "validation image": 1}


def test_parquet_with_the_media_in_it(tmp_path: Path) -> None:
    media = [picture(1), picture(2), animation(), picture(3), picture(4)]
    rows = [{"media": content, "captions": [f"number {n}", "again"]} for n, content in enumerate(media)]
    path = tmp_path / "set.parquet"
    write_parquet(path, rows)
    for source in (open_source(path), open_source(tmp_path)):
        assert [item.id for item in source] == [f"set/{n}" for n in range(5)]
        assert [item.media for item in source] == media
        assert [item.kind for item in source] == ["image", "image", "video", "image", "image"]
        assert source[4].media == media[4]
        assert source[0].captions == ("number 0", "again")
        part = source[1:3]
        assert isinstance(part, Source)
        assert [item.id for item in part] == ["set/1", "set/2"]


def test_hugging_face_parquet_in_parts(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "beside.png").write_bytes(picture(9))
    first = [{"image": {"bytes": picture(1), "path": "x.png"}, "text": "one"}]
    second = [
        {"image": {"bytes": picture(2), "path": None}, "text": "two"},
        {"image": {"bytes": None, "path": "beside.png"}, "text": "three"},
        {"image": {"bytes": None, "path": "../beside.png"}, "text": "four"},
        {"image": None, "text": "five"},
    ]
    write_parquet(tmp_path / "data" / "train-00000.parquet", first)
    write_parquet(tmp_path / "data" / "train-00001.parquet", second)
    source = open_source(tmp_path)
    assert [item.id for item in source][:2] == ["data/train-00000/0", "data/train-00001/0"]
    assert [item.media for item in source[:3]] == [picture(1), picture(2), tmp_path / "data" / "beside.png"]
    with pytest.raises(EmulusError, match=r"row 1 of group 2: '\.\./beside\.png' is outside"):
        _ = source[3].media
    with pytest.raises(EmulusError, match="row 2 of group 2 has no media and names no file"):
        _ = source[4].media


def test_the_media_of_a_rewritten_parquet_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    write_parquet(path, [{"image": picture(1), "text": "one"}])
    (item,) = open_source(path)
    assert item.media == picture(1)
    write_parquet(path, [{"image": picture(2) + bytes(100), "text": "one"}])
    assert item.media == picture(2) + bytes(100)
    path.unlink()
    with pytest.raises(EmulusError, match=r"set\.parquet is no whole Parquet file"):
        _ = item.media


def test_a_broken_medium_does_not_keep_the_others_from_being_read(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"no picture")
    (folder / "c.webp").write_bytes(b"")
    write_jsonl(folder / "captions.jsonl", ROWS)
    assert len(open_source(folder)) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file": "gone.png"}, "line 2: 'gone.png' is not in .*; restore that file or remove the row"),
        ({"file": "../a.png"}, r"line 2: '\.\./a\.png' is outside"),
        ({"file": "more/../../a.png"}, "line 2: .* is outside"),
        ({"file": "/etc/hostname"}, "line 2: '/etc/hostname' is outside"),
        ({"file": "C:\\a.png"}, "line 2: .* is outside"),
        ({"file": "..\\a.png"}, "line 2: .* is outside"),
        ({"file": ""}, "line 2 has no media and names no file"),
        ({"file": None}, "line 2 has no media and names no file"),
        ({"file": 3}, "line 2 has no media and names no file"),
        ({"file": "a\0.png"}, "line 2 has no media and names no file"),
        ({"caption": "  "}, "line 2: 'caption' is empty"),
        ({"caption": []}, "line 2: 'caption' is empty"),
        ({"caption": None}, "line 2: 'caption' is empty"),
        ({"caption": [None, ""]}, "line 2: 'caption' is empty"),
        ({"caption": ["a", 3]}, "line 2: 'caption' is neither a text nor a list of texts"),
        ({"split": "tran"}, r"line 2: the split 'tran' is unknown; did you mean 'train'\?"),
        ({"kind": "movie"}, "line 2: the kind 'movie' is unknown; did you mean 'video'"),
        ({"file": "x" * 5000}, r"line 2: 'x+ \.\.\. x+' cannot be looked for"),
        ({"file": "a\nb.png"}, r"line 2: 'a b.png' is not in"),
        ({"file": "http://x/a.png"}, "line 2: 'http://x/a.png' is an address, and nothing is downloaded"),
        ({"fps": "fast"}, "line 2: fps 'fast' is not a number"),
        ({"fps": 1e-9}, "line 2: fps 1e-09 is not a number from 0.001 to 999.999"),
        ({"fps": 999.9996}, "line 2: fps 999.9996 is not a number"),
        ({"fps": -1}, "line 2: fps -1 is not a number"),
        ({"fps": "8/0"}, "line 2: fps '8/0' is not a number"),
        ({"score": "good"}, "line 2: score 'good' is not a number"),
        ({"score": float("inf")}, "line 2: score inf is not a number"),
        ({"questions": "what?"}, "line 2: questions are a list of"),
        ({"questions": [{"question": "what?"}]}, "line 2: questions are a list of"),
        ({"questions": [{"question": "what?", "answer": " "}]}, "line 2: questions are a list of"),
        ({"caption": "half a \ud83d"}, "line 2 has half a character"),
        ({"id": "\ud83d"}, "line 2 has half a character"),
        ({"id": "long" * 2000}, "line 2: an id of 8,000 letters"),
    ],
)
def test_rows_that_are_wrong_cost_no_others(folder: Path, row: dict[str, Any], message: str) -> None:
    write_jsonl(folder / "captions.jsonl", [ROWS[2], {**ROWS[0], **row}])
    source = open_source(folder)
    assert [item.id for item in source] == ["c.webp", "captions/1"]
    with pytest.raises(EmulusError, match=message):
        _ = source[1].media
    (entry,) = [entry for entry in source.left_out if entry.unit == "row"]
    assert (entry.count, entry.examples) == (1, ["captions.jsonl line 2"])
    # Where no other row is there, the table is refused.
    write_jsonl(folder / "captions.jsonl", [{**ROWS[0], **row}])
    with pytest.raises(EmulusError, match=message.replace("line 2", "line 1")) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)
    assert "captions.jsonl" in str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
def test_missing_columns_are_named(folder: Path, suffix: str) -> None:
    table = folder / f"captions.{suffix}"
    WRITERS[suffix](table, [{"file": "a.png", "captoin": "a dot"}])
    with pytest.raises(
        EmulusError,
        match=r"no column captions or caption or text; it has file, captoin; "
        r"did you mean 'caption' for 'captoin'\?",
    ):
        open_source(folder)
    WRITERS[suffix](table, [{"url": "a.png", "caption": "a dot"}])
    with pytest.raises(EmulusError, match=r"no column media or image or .*; it has url, caption"):
        open_source(folder)


def test_tables_that_are_not_tables(folder: Path) -> None:
    table = folder / "captions.jsonl"
    line = json.dumps(ROWS[0])
    for content, message in (
        (f"{line}\n{{half", "line 2 is not valid JSON"),
        (f"{line}\n" + "[" * 100_000, "line 2 is nested deeper"),
        ("{half\n", "line 1 is not valid JSON"),
        ("", "has no rows"),
    ):
        table.write_text(content)
        with pytest.raises(EmulusError, match=message):
            open_source(folder)
    # A line in between costs itself.
    table.write_text(f"{line}\n{{half\n\n[1]\n")
    assert len(open_source(folder)) == 3
    assert str(open_source(folder).left_out[0]) == (
        "2 rows: lines that are not JSON objects (captions.jsonl line 2, captions.jsonl line 4)"
    )
    table.write_bytes(line.encode() + b'\n{"file": "a.png", "caption": "\xff"}\n')
    with pytest.raises(EmulusError, match=r"captions\.jsonl line 2 is not UTF-8"):
        open_source(folder)
    table.unlink()
    table = folder / "captions.csv"
    for text, message in (
        ("file,caption\na.png,a dot, moving\n", "line 2 has not as many fields"),
        ("file,caption\na.png\n", "line 2 has not as many fields"),
        ('file,caption\na.png,"a dot', "line 2 is not CSV"),
        ("", "has no rows"),
        ("file,caption\n", "has no rows"),
    ):
        table.write_text(text)
        with pytest.raises(EmulusError, match=message):
            open_source(folder)


def test_a_byte_order_mark_is_no_part_of_the_first_column(folder: Path) -> None:
    (folder / "captions.csv").write_text("file,caption\r\na.png,a dot\r\n", encoding="utf-8-sig")
    assert open_source(folder)[0].captions == ("a dot",)


def test_things_that_are_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(EmulusError, match=r"neither a table of captions \(captions\.jsonl"):
        open_source(tmp_path)
    (tmp_path / "a.png").write_bytes(picture())
    with pytest.raises(EmulusError, match=r"a\.png is no data set"):
        open_source(tmp_path / "a.png")


def test_truncated_parquet_is_refused_at_any_place(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    write_parquet(path, [{"image": picture(n), "text": f"number {n}"} for n in range(5)])
    whole = path.read_bytes()
    for length in (0, 3, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(EmulusError, match=r"set\.parquet is no whole Parquet file"):
            open_source(path)


@settings(max_examples=60, deadline=None)
@given(place=st.integers(0, 10_000), value=st.integers(0, 255))
@example(place=1234, value=71)  # of a column's figures, at which pyarrow aborts the process where it is asked for them
def test_damaged_parquet_raises_nothing_else(tmp_path_factory: pytest.TempPathFactory, place: int, value: int) -> None:
    path = tmp_path_factory.mktemp("damaged") / "set.parquet"
    write_parquet(path, [{"image": picture(n), "text": f"number {n}"} for n in range(5)])
    content = bytearray(path.read_bytes())
    content[place % len(content)] = value
    path.write_bytes(content)
    try:
        assert all(isinstance(item.media, bytes) or item.mark for item in open_source(path))
    except EmulusError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_of_two_items_of_one_id_the_first_is_used(tmp_path: Path) -> None:
    write_parquet(tmp_path / "set.parquet", [{"image": picture(n), "text": f"{n}", "id": "same"} for n in range(2)])
    source = open_source(tmp_path)
    assert [(item.id, item.captions) for item in source] == [("same", ("0",))]
    assert str(source.left_out[0]) == "1 row: an id that was used before (same)"


def test_tables_of_one_name_in_several_folders(folder: Path) -> None:
    for split in ("train", "test"):
        (folder / "default" / split).mkdir(parents=True)
        write_parquet(folder / "default" / split / "0000.parquet", [{"image": picture(), "text": split}])
    assert [item.id for item in open_source(folder)] == ["default/test/0000/0", "default/train/0000/0"]
    assert [item.id for item in open_source(folder / "default/*/0000.parquet")] == ["test/0000/0", "train/0000/0"]
    assert [item.id for item in open_source(folder / "default" / "train" / "0000.parquet")] == ["0000/0"]


def test_tables_in_several_folders_that_name_files_alike(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(picture())
        write_jsonl(tmp_path / name / "captions.jsonl", [{"file": "0.png", "caption": name}] * 2)
    assert {item.id: item.captions for item in open_source(tmp_path)} == {"a/0.png": ("a",), "b/0.png": ("b",)}


@pytest.mark.parametrize("nested", [False, True])
def test_a_small_parquet_of_endless_words_is_refused(tmp_path: Path, nested: bool) -> None:
    path = tmp_path / "set.parquet"
    words: Any = "a" * 2**20
    captions = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), [words])
    columns = {"image": [b"x"] * 300, "caption": captions}
    if nested:
        columns["caption"] = pa.ListArray.from_arrays(list(range(301)), captions)
    pq.write_table(pa.table(columns), path, compression="zstd", dictionary_pagesize_limit=2**24)
    assert path.stat().st_size < 10_000
    with pytest.raises(EmulusError, match=r"set\.parquet unpacks to far more words"):
        open_source(path)
    write_parquet(path, [{"image": picture(), "caption": "a" * (2**24 + 1)}])
    with pytest.raises(EmulusError, match=r"set\.parquet has words of more than the 16,777,216 bytes"):
        open_source(path)


@settings(max_examples=40, deadline=None)
@given(own=st.floats(0.5, 60), target=st.none() | st.floats(0.5, 60), most=st.integers(1, 9))
def test_a_clip_that_is_cut_is_the_start_of_the_whole(own: float, target: float | None, most: int) -> None:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (4, 4), (20 * number, 0, 0)) for number in range(12)]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    item = Item(id="a", kind="video", captions=("a",), split="train", stored=buffer.getvalue(), fps=own)
    whole, rate = decode_item(item, size=4, fps=target)
    part, same = decode_item(item, size=4, fps=target, max_frames=most)
    assert part.tolist() == whole[:most].tolist()
    assert rate == same == (target or own)


def test_rates_that_would_make_endless_clips_are_refused() -> None:
    item = Item(id="slow", kind="video", captions=("a",), split="train", stored=animation(), fps=0.001)
    assert len(decode_item(item, size=4, fps=8.0, max_frames=3)[0]) == 3
    with pytest.raises(EmulusError, match=r"slow: a clip of 3 frames at 0\.001 per second, brought to 8, has 24,000"):
        decode_item(item, size=4, fps=8.0)
    with pytest.raises(EmulusError, match="slow: fps 1e-09 is not a number"):
        decode_item(replace(item, fps=1e-9), size=4, fps=8.0, max_frames=3)
