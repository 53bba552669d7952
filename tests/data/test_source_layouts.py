"""Layouts that people's data sets already have, read as they are."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emulus.data import parquet
from emulus.data.item import Missing
from emulus.data.source import Source, open_source
from emulus.data.sources.jsonrows import array_elements
from emulus.errors import EmulusError
from tests.data.files import lay, lines


def picture(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 90, 90)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()


def usable(source: Source) -> list[str]:
    return [item.id for item in source if not isinstance(item.stored, Missing)]


MEDIA_NAMES = [
    *("images", "image_path", "img", "img_path", "image_file", "filename", "filepath", "file_path", "image_name"),
    *("jpg", "png", "webp", "mp4", "video_path", "Image", "FILE_NAME", "frame", "my_own"),
]


@pytest.mark.parametrize("column", MEDIA_NAMES)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_columns_that_name_files(tmp_path: Path, column: str, suffix: str) -> None:
    rows = [{column: "a.png", "text": "a dot"}]
    lay(tmp_path, {"a.png": PICTURE, "set.jsonl": lines(*rows), "set.csv": f"{column},text\na.png,a dot\n"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    for other in {"jsonl", "csv", "parquet"} - {suffix}:
        (tmp_path / f"set.{other}").unlink()
    (item,) = open_source(tmp_path)
    assert (item.id, item.kind, item.captions) == ("a.png", "image", ("a dot",))


@pytest.mark.parametrize("column", ["image", "images", "img", "jpg", "png", "webp", "picture", "my_own"])
@pytest.mark.parametrize("shape", ["bytes", "struct", "list"])
def test_columns_that_hold_media(tmp_path: Path, column: str, shape: str) -> None:
    value: Any = PICTURE if shape == "bytes" else {"bytes": PICTURE, "path": "x.png"}
    rows = [{column: [value] if shape == "list" else value, "text": "a dot"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    (item,) = open_source(tmp_path)
    assert (item.id, item.kind, item.captions, item.media) == ("set/0", "image", ("a dot",), PICTURE)


def test_rows_of_several_images(tmp_path: Path) -> None:
    two = [{"bytes": PICTURE, "path": None}] * 2
    pq.write_table(pa.table({"images": [two, two[:1]], "text": ["two", "one"]}), tmp_path / "set.parquet")
    first, second = open_source(tmp_path)
    with pytest.raises(EmulusError, match="row 1 of group 1 has 2 images or clips, and an item holds one"):
        _ = first.media
    assert second.media == PICTURE
    (tmp_path / "set.parquet").unlink()
    lay(
        tmp_path,
        {
            "a.png": PICTURE,
            "x.jsonl": lines({"images": ["a.png"] * 2, "text": "2"}, {"images": ["a.png"], "text": "1"}),
        },
    )
    source = open_source(tmp_path)
    assert usable(source) == ["a.png"]
    assert [entry.reason for entry in source.left_out] == ["several media in one row"]


@pytest.mark.parametrize(
    "column", ["captions", "caption", "text", "prompt", "description", "sentences", "Caption", "label"]
)
def test_columns_of_captions(tmp_path: Path, column: str) -> None:
    lay(tmp_path, {"a.png": PICTURE, "metadata.jsonl": lines({"file_name": "a.png", column: ["a dot"], "width": 4})})
    assert open_source(tmp_path)[0].captions == ("a dot",)


def test_numbers_of_classes_are_no_captions(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [PICTURE], "label": [3]}), tmp_path / "set.parquet")
    with pytest.raises(EmulusError, match="has no column captions or caption or text; it has image, label"):
        open_source(tmp_path)


def test_captions_go_before_other_words(tmp_path: Path) -> None:
    row = {"file": "a.png", "prompt": "no", "title": "no", "label": "no", "caption": "yes"}
    source = open_source(lay(tmp_path, {"a.png": PICTURE, "x.jsonl": lines(row, {**row, "caption": None})}))
    assert [item.captions for item in source] == [("yes",), ("",)]


LLAVA = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A dot."},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "Red."},
]
OPENAI = [
    {"role": "system", "content": "You see."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A dot."}]},
    {"role": "user", "content": "Which colour?"},
    {"role": "assistant", "content": "Red."},
]
QUESTIONS = (("What is it?", "A dot."), ("Which colour?", "Red."))


@pytest.mark.parametrize(("column", "turns"), [("conversations", LLAVA), ("messages", OPENAI)])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "sidecar"])
def test_conversations(tmp_path: Path, column: str, turns: Any, kind: str) -> None:
    row = {"id": "x1", "image": "a.png", column: turns}
    lay(tmp_path, {"a.png": PICTURE})
    if kind == "sidecar":
        lay(tmp_path, {"a.json": json.dumps({column: turns, "id": "x1"})})
    elif kind == "parquet":
        # A column has one type: contents that are texts here and lists there are written as lists.
        if column == "messages":
            turns = [
                {**turn, "content": [{"type": "text", "text": turn["content"]}]}
                if isinstance(turn["content"], str)
                else turn
                for turn in turns
            ]
        pq.write_table(pa.Table.from_pylist([{**row, column: turns}]), tmp_path / "t.parquet")
    elif kind == "csv":
        text = json.dumps(turns).replace('"', '""')
        lay(tmp_path, {"t.csv": f'id,image,{column}\nx1,a.png,"{text}"\n'})
    else:
        lay(tmp_path, {f"t.{kind}": json.dumps([row]) if kind == "json" else lines(row)})
    (item,) = open_source(tmp_path)
    assert (item.id, item.captions, item.questions) == ("x1", (), QUESTIONS)
    assert item.caption == "A dot."


def test_conversations_that_show_their_images_inside(tmp_path: Path) -> None:
    part = {"type": "image", "image": "file://a.png"}
    turns = [
        {"role": "user", "content": [part, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A dot."},
    ]
    url = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}, turns[1]]
    source = open_source(lay(tmp_path, {"a.png": PICTURE, "t.jsonl": lines({"messages": turns}, {"messages": url})}))
    assert [(item.id, item.questions, item.captions) for item in source] == [
        ("a.png", (("What?", "A dot."),), ("A dot.",))
    ]


def test_conversations_that_cannot_be_used_cost_no_others(tmp_path: Path) -> None:
    good = {"image": "a.png", "conversations": LLAVA}
    bad = [
        [],
        "what?",
        [{"from": "human", "value": "<image> What?"}],
        [{"from": "narrator", "value": "x"}],
        [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "x"}],
        [{"from": "human", "value": 5}],
        [5],
    ]
    rows = [good, *({"id": f"{n}", "image": "a.png", "conversations": turns} for n, turns in enumerate(bad))]
    rows.append({"id": "text", "conversations": LLAVA[2:]})
    source = open_source(lay(tmp_path, {"a.png": PICTURE, "t.json": json.dumps(rows)}))
    assert usable(source) == ["a.png"]
    assert sum(entry.count for entry in source.left_out) == len(bad) + 1


def test_questions_in_columns_of_their_own(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "question": "What?", "answer": "A dot"},
        {"image": "a.png", "question": "How?", "answers": ["So", "x"]},
    ]
    (item,) = open_source(lay(tmp_path, {"a.png": PICTURE, "vqa.jsonl": lines(*rows)}))
    assert item.questions == (("What?", "A dot"), ("How?", "So"))


@pytest.mark.parametrize(
    "content",
    [
        '[{"file": "a.png", "caption": "a dot"}]',
        '\ufeff [\n {"file": "a.png",\n "caption": "a dot"}\n]\n',
        '{"a.png": {"file": "a.png", "caption": "a dot"}}',
        '{"data": [{"file": "a.png", "caption": "a dot"}], "version": 1}',
        '{"file": "a.png", "caption": "a dot"}\n{"file": "a.png", "caption": "a dot"}\n',
        '{"images": [{"id": 7, "file_name": "a.png"}], "annotations": [{"image_id": 7, "caption": "a dot"}]}',
    ],
)
def test_json_of_all_forms(tmp_path: Path, content: str) -> None:
    (item,) = open_source(lay(tmp_path, {"a.png": PICTURE, "all.json": content}))
    assert item.captions == ("a dot",)
    (item,) = open_source(tmp_path / "all.json")
    assert item.captions == ("a dot",)


def test_texts_in_a_json_array_are_read_where_they_lie(tmp_path: Path) -> None:
    texts = ["one", 'zwei "ü" 赤い', "[{", "3\n4"]
    path = (
        lay(tmp_path, {"t.json": json.dumps([{"text": text} for text in texts], ensure_ascii=False, indent=2)})
        / "t.json"
    )
    source = open_source(path)
    assert [item.text for item in reversed(source)] == texts[::-1]
    path.write_text(path.read_text().replace("one", "eno"))
    with pytest.raises(EmulusError, match="is not what it was"):
        _ = source[0].text


@pytest.mark.parametrize(
    "content",
    ["", "[", "[1", '[{"text": "a"}', '[{"text": "a"},]', "{", "5", "null", "[" * 5000, "[" + "9" * 5000 + "]", "\xff"],
)
def test_damaged_json_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(EmulusError) as caught:
        open_source(tmp_path / "t.json")
    assert "t.json" in str(caught.value)
    assert len(str(caught.value)) <= 1000


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=8,
    ),
    st.sampled_from([None, 0, 3]),
    st.booleans(),
)
def test_the_elements_of_any_array_are_found(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(
        json.dumps(values, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", errors="surrogatepass"
    )
    content = path.read_bytes()
    found = list(array_elements(path))
    assert [json.loads(each.decode("utf-8", "surrogatepass")) for _, each in found] == values
    assert all(content[offset : offset + len(each)] == each for offset, each in found)


def test_a_long_array_is_read_in_parts(tmp_path: Path) -> None:
    rows = [{"text": "x" * size} for size in (5, 3_000_000, 10, 1_048_560, 1_048_570, 1)] * 2
    path = lay(tmp_path, {"t.json": json.dumps(rows)}) / "t.json"
    assert [len(item.text) for item in open_source(path)] == [len(row["text"]) for row in rows]


def test_files_of_words_as_trainers_write_them(tmp_path: Path) -> None:
    lay(tmp_path, {f"{letter}.png": PICTURE for letter in "abcdef"})
    lay(
        tmp_path,
        {
            "a.caption": "one",
            "b.txt": "tags, two",
            "b.caption": "two",
            "c.json": '{"prompt": "three"}',
            "d.png.txt": "four",
            "e.png.json": '{"caption": "five", "text": null}',
            "f.txt": "six",
            "f.json": '{"caption": null, "description": "not asked for", "score": 2}',
        },
    )
    source = open_source(tmp_path)
    captions = {item.id: item.captions for item in source}
    assert captions == {
        "a": ("one",),
        "b": ("tags, two", "two"),
        "c": ("three",),
        "d": ("four",),
        "e": ("five",),
        "f": ("six",),
    }
    assert not source.left_out


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_image_folders_with_a_table_in_each_split(tmp_path: Path, kind: str) -> None:
    for split in ("train", "test"):
        table = lines({"file_name": "a.png", "text": split}) if kind == "jsonl" else f"file_name,text\na.png,{split}\n"
        lay(tmp_path / split, {"a.png": PICTURE, "b.png": PICTURE, f"metadata.{kind}": table})
    source = open_source(tmp_path)
    assert [(item.id, item.split, item.captions) for item in source] == [
        ("test/a.png", "test", ("test",)),
        ("train/a.png", "train", ("train",)),
    ]
    assert [str(entry) for entry in source.left_out] == [
        "2 files: images and clips that no table names (test/b.png, train/b.png)"
    ]


def test_names_without_the_folder_of_the_images(tmp_path: Path) -> None:
    """As COCO, LLaVA and Flickr have them; which of two files is meant is not guessed."""
    coco = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    lay(tmp_path / "coco", {"annotations/captions_val2017.json": json.dumps(coco), "val2017/1.jpg": PICTURE})
    assert [(item.id, item.split) for item in open_source(tmp_path / "coco")] == [("val2017/1.jpg", "validation")]
    lay(tmp_path / "flickr", {"captions.txt": "image,caption\n1.jpg,a\n1.jpg,b\n", "Images/1.jpg": PICTURE})
    assert [item.captions for item in open_source(tmp_path / "flickr")] == [("a", "b")]
    lay(tmp_path / "30k", {"results.csv": "image_name| comment_number| comment\n1.jpg| 0| a dot\n", "x/1.jpg": PICTURE})
    assert [item.captions for item in open_source(tmp_path / "30k")] == [("a dot",)]
    rows = [{"file": "1.png", "text": "?"}, {"file": "b/1.png", "text": "b"}]
    lay(tmp_path / "two", {"x/a/1.png": PICTURE, "x/b/1.png": PICTURE, "t.jsonl": lines(*rows)})
    assert usable(open_source(tmp_path / "two")) == ["x/b/1.png"]


def test_words_of_a_picture_called_captions(tmp_path: Path) -> None:
    source = open_source(lay(tmp_path, {"captions.png": PICTURE, "captions.txt": "a list of captions"}))
    assert [(item.id, item.captions) for item in source] == [("captions", ("a list of captions",))]


def test_paths_relative_to_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path / "set", {"a.png": PICTURE, "a.txt": "a", "t/x.jsonl": lines({"text": "b"}), "t/_SUCCESS": ""})
    monkeypatch.chdir(tmp_path / "set")
    assert [item.id for item in open_source(".")] == ["a"]
    assert [item.id for item in open_source("*.png")] == ["a"]
    assert [item.id for item in open_source("**/*.jsonl")] == ["x/0"]
    assert [item.id for item in open_source("t")] == ["x/0"]
    assert [item.id for item in open_source("t/../t/x.jsonl")] == ["x/0"]


def test_names_relative_to_the_data_set(tmp_path: Path) -> None:
    lay(tmp_path, {"images/a.png": PICTURE, "tables/x.jsonl": lines({"file": "images/a.png", "text": "a"})})
    assert usable(open_source(tmp_path)) == ["images/a.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("suffix", "delimiter"), [("csv", ","), ("csv", ";"), ("csv", "\t"), ("csv", "|"), ("tsv", "\t")]
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_dialects_of_csv(tmp_path: Path, encoding: str, suffix: str, delimiter: str, end: str) -> None:
    rows = [
        ["file", "caption", "score"],
        ["a.png", f'"ein ""Punkt"" 赤{delimiter}{end}ੈ x"', "2"],
        ["b.png", "zwei", ""],
    ]
    text = "".join(delimiter.join(row) + end for row in rows)
    (tmp_path / f"t.{suffix}").write_bytes(text.encode(encoding))
    lay(tmp_path, {"a.png": PICTURE, "b.png": PICTURE})
    first, second = open_source(tmp_path)
    assert (first.captions, first.score) == ((f'ein "Punkt" 赤{delimiter}{end}ੈ x',), 2.0)
    assert second.captions == ("zwei",)
    texts = [["text", "score"], [f'"ein ""Punkt"" 赤{delimiter}{end} x"', "2"], ["zwei\u2028", ""]]
    path = tmp_path / "texts" / f"t.{suffix}"
    path.parent.mkdir()
    path.write_bytes("".join(delimiter.join(row) + end for row in texts).encode(encoding))
    source = open_source(path)
    assert [item.text for item in reversed(source)] == ["zwei\u2028", f'ein "Punkt" 赤{delimiter}{end} x']


def test_texts_of_programs_are_texts(tmp_path: Path) -> None:
    source = open_source(lay(tmp_path, {"code.jsonl": lines({"path": "src/a.py", "content": "print()"})}))
    assert [(item.kind, item.text) for item in source] == [("text", "print()")]


@pytest.mark.parametrize("rows", [[{"URL": "http://x/a.jpg", "TEXT": "a"}], [{"image_url": "http://x/1", "text": "a"}]])
def test_captions_of_images_elsewhere_are_no_texts(tmp_path: Path, rows: list[dict[str, str]]) -> None:
    with pytest.raises(EmulusError, match="address"):
        open_source(lay(tmp_path, {"t.jsonl": lines(*rows)}))


def write_arrow(path: Path, table: pa.Table, *, compression: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2)


def test_what_datasets_saves_to_disk(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [{"image": {"bytes": picture(n), "path": None}, "text": f"{split} {n}"} for n in range(5)]
        write_arrow(tmp_path / split / "data-00000-of-00001.arrow", pa.Table.from_pylist(rows))
        lay(tmp_path / split, {"state.json": "{}", "dataset_info.json": "{}"})
    lay(tmp_path, {"dataset_dict.json": '{"splits": ["train", "test"]}'})
    source = open_source(tmp_path)
    assert [(item.captions[0].split()[0], item.split) for item in source] == [("test", "test")] * 5 + [
        ("train", "train")
    ] * 5
    assert [item.media for item in source] == [picture(n) for n in range(5)] * 2
    assert not source.left_out
    assert source[0].mark != source[1].mark
    write_arrow(tmp_path / "texts.arrow", pa.table({"text": ["one", None, "three"]}))
    one, none, three = open_source(tmp_path / "texts.arrow")
    assert (one.text, three.text) == ("one", "three")
    with pytest.raises(EmulusError, match="row 2"):
        _ = none.text
    path = tmp_path / "cut.arrow"
    path.write_bytes((tmp_path / "texts.arrow").read_bytes()[:300])
    with pytest.raises(EmulusError, match=r"cut\.arrow is no whole Arrow file"):
        open_source(path)


@pytest.fixture
def pool() -> Iterator[pa.MemoryPool]:
    """Counts what pyarrow allocates from now on, and the most of it at a time."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    yield pool
    pa.set_memory_pool(before)
    parquet.close_files()  # they must not outlive the pool


def read_all(path: Path) -> int:
    return sum(len(item.media if item.kind == "image" else item.text) for item in open_source(path))  # type: ignore[arg-type]


def test_memory_of_a_large_row_group(tmp_path: Path, pool: pa.MemoryPool) -> None:
    media = [bytes([n % 256]) * 2**18 for n in range(240)]
    table = pa.table({"image": media, "text": ["a"] * 240})
    # Pages of a few values, as all have whose values are large.
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, write_batch_size=4, compression=None)
    before = pool.bytes_allocated()
    assert read_all(tmp_path / "a.parquet") == 240 * 2**18
    # 60 MiB in all: a window of 32 MiB and a page.
    assert pool.max_memory() - before < 40 * 2**20


@pytest.mark.parametrize("column", ["image", "text"])
def test_memory_of_a_small_file_that_unpacks_to_gigabytes(tmp_path: Path, column: str, pool: pa.MemoryPool) -> None:
    value: Any = bytes(2**22) if column == "image" else "a" * 2**22
    columns = {column: pa.DictionaryArray.from_arrays(pa.array([0] * 80, pa.int32()), [value])}
    table = pa.table(columns if column == "text" else {**columns, "caption": ["a"] * 80})
    path = tmp_path / "bomb.parquet"
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=2**25)
    assert path.stat().st_size < 20_000
    before = pool.bytes_allocated()
    assert read_all(path) == 80 * 2**22
    assert pool.max_memory() - before < 24 * 2**22


def test_rows_out_of_order(tmp_path: Path) -> None:
    media = [bytes([n % 250]) * 2000 for n in range(3000)]
    rows = pa.table({"image": media, "text": ["a"] * 3000})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=1500)
    source = open_source(tmp_path)
    places = [0, 2999, 5, 4, 1499, 1500, 2, 2900, 1, 2999]
    assert [source[place].media for place in places] == [media[place] for place in places]
