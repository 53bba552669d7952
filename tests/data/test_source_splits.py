"""A data set's own splits: by columns, files, folders and cards."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emulus.data.source import Source, open_source, split_of_key
from emulus.errors import EmulusError


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".tar":
        with tarfile.open(path, "w") as archive:
            for number, row in enumerate(rows):
                for suffix, content in ((".png", row["image"]), (".txt", row["caption"].encode())):
                    member = tarfile.TarInfo(f"{number:03}{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    else:
        texts = [{"text": row["caption"]} for row in rows]
        if path.suffix == ".csv":
            path.write_text("text\n" + "".join(f"{row['text']}\n" for row in texts))
        elif path.suffix == ".json":
            path.write_text(json.dumps(texts))
        elif path.suffix == ".txt":
            path.write_text(rows[0]["caption"])
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in texts))


def write(root: Path, *names: str, rows: int = 3) -> Path:
    for name in names:
        write_rows(root / name, [{"image": PICTURE, "caption": f"{name} {number}"} for number in range(rows)])
    return root


def splits(source: Source) -> dict[str, set[str]]:
    """Of each file, the splits of its items."""
    found: dict[str, set[str]] = {}
    for item in source:
        words = item.captions[0] if item.captions else item.text
        found.setdefault(words.split()[0], set()).add(item.split)
    return found


@pytest.mark.parametrize(
    "files",
    [
        {"data/train-00000-of-00001.parquet": "train", "data/test-00000-of-00001.parquet": "test"},
        {"train.jsonl": "train", "dev.jsonl": "validation", "test.jsonl": "test"},
        {"train_0.csv": "train", "validation_0.csv": "validation", "evaluation.csv": "test"},
        {"data/train-0.tar": "train", "data/val-0.tar": "validation", "data/eval-0.tar": "test"},
        {"train/0000.parquet": "train", "valid/0000.parquet": "validation"},
        {"default/Test/0.jsonl": "test", "default/TRAINING/0.jsonl": "train"},
        {"my-train2017.tar": "train", "my-val2017.tar": "validation"},
        {"trainA.jsonl": "train", "testA.jsonl": "test"},
        {"train.json": "train", "test.json": "test"},
        {"wiki.train.txt": "train", "wiki.valid.txt": "validation", "test.txt": "test"},
        {"train/a.txt": "train", "test/a.txt": "test"},
        {"data/train_sft-0.parquet": "train", "data/test_sft-0.parquet": "test"},
        {"data/train.parquet": "train", "data/test2.parquet": "test"},
        # The name of the file says more than that of its folder.
        {"eval-sets/train.jsonl": "train", "eval-sets/test.jsonl": "test"},
        # Files that name no split are there to train on.
        {"extra.parquet": "train", "test.parquet": "test", "unsupervised-0000.parquet": "train"},
        {"a.jsonl": "train", "validation.jsonl": "validation"},
        {"train.parquet": "train", "more.parquet": "train"},
        {"train.parquet": "train"},
        # Letters on both sides are another word.
        {"constrained.parquet": "hash", "contest.parquet": "hash", "latest-evaluated.parquet": "hash"},
    ],
)
def test_files_and_folders_name_splits(tmp_path: Path, files: dict[str, str]) -> None:
    source = open_source(write(tmp_path / "set", *files))
    found = splits(source)
    assert set(found) == set(files)
    for name, split in files.items():
        if split == "hash":
            assert all(item.split == split_of_key(item.id) for item in source)
        else:
            assert found[name] == {split}, name
    assert not source.left_out


def test_the_column_goes_before_the_name(tmp_path: Path) -> None:
    rows = [{"image": PICTURE, "text": split, "split": split} for split in ("train", "validation", "Test2")]
    rows += [{"image": PICTURE, "text": "none", "split": None}, {"image": PICTURE, "text": "odd", "split": "extra"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    source = open_source(tmp_path)
    found = {item.captions[0]: item.split for item in source if item.captions != ("",)}
    assert found == {"train": "train", "validation": "validation", "Test2": "test", "none": "train"}
    assert [str(entry) for entry in source.left_out] == [
        "1 row: the split 'extra' is not one of train, validation, test (train.parquet row 5)"
    ]


@pytest.mark.parametrize("words", ["txt", "caption", "table"])
def test_folders_of_pictures_name_splits(tmp_path: Path, words: str) -> None:
    rows = []
    for folder in ("images/train2017/a", "images/val2017", "more"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.png").write_bytes(PICTURE)
        if words == "table":
            rows.append({"file_name": f"{folder}/x.png", "text": "a dot"})
        else:
            (tmp_path / folder / f"x.{words}").write_text("a dot")
    if rows:
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {item.id.removesuffix(".png"): item.split for item in open_source(tmp_path)}
    assert found == {"images/train2017/a/x": "train", "images/val2017/x": "validation", "more/x": "train"}


def test_what_a_picture_is_called_says_nothing(tmp_path: Path) -> None:
    """There are pictures of trains and of tests, and folders of them beside those of cars."""
    for name in ("train/1", "train/2", "car/1", "car/test-1", "car/val"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(PICTURE)
        (tmp_path / f"{name}.txt").write_text("a dot")
    assert all(item.split == split_of_key(item.id) for item in open_source(tmp_path))


def test_folders_inside_of_tars_name_splits(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for name in ("train/0", "test/1"):
            for suffix, content in ((".png", PICTURE), (".txt", b"a")):
                member = tarfile.TarInfo(name + suffix)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert [(item.id, item.split) for item in open_source(tmp_path)] == [
        ("all/train/0", "train"),
        ("all/test/1", "test"),
    ]


def test_a_part_of_a_data_set_that_is_named_by_itself(tmp_path: Path) -> None:
    write(tmp_path, "set/test/0.parquet", "set/data/validation-0.parquet", rows=20)
    for name, split in {
        "set/test": "test",
        "set/test/0.parquet": "test",
        "set/test/*.parquet": "test",
        "set/data/validation-0.parquet": "validation",
        "set/data/val*": "validation",
        "set/data": "validation",
    }.items():
        assert {item.split for item in open_source(tmp_path / name)} == {split}, name


CARD = """---
license: mit
pretty_name: 2024-01-01
configs:
{configs}
dataset_info:
  features: []
---
# A data set
"""


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        (
            "- config_name: default\n  data_files:\n  - split: train\n    path: data/a-*\n  - split: test\n"
            "    path:\n    - data/b-*\n    - data/c.parquet\n",
            {"data/a-0.parquet": "train", "data/b-0.parquet": "test", "data/c.parquet": "test"},
        ),
        ("- config_name: x\n  data_files: '**/a-*.parquet'\n", {"data/a-0.parquet": "train"}),
        (
            "- config_name: x\n  data_files: [data/a-0.parquet, data/b-0.parquet]\n",
            {"data/a-0.parquet": "train", "data/b-0.parquet": "train"},
        ),
        (
            "- config_name: one\n  data_files: data/a-*\n- config_name: two\n  default: true\n  data_files:\n"
            "  - split: validation\n    path: data/b-*\n",
            {"data/b-0.parquet": "validation"},
        ),
        (
            "- config_name: x\n  data_dir: data\n  data_files:\n    train: a-*\n    test: b-*\n",
            {"data/a-0.parquet": "train", "data/b-0.parquet": "test"},
        ),
    ],
)
def test_the_card_says_which_files_are_of_which_split(tmp_path: Path, configs: str, expected: dict[str, str]) -> None:
    write(tmp_path, "data/a-0.parquet", "data/b-0.parquet", "data/c.parquet")
    (tmp_path / "README.md").write_text(CARD.format(configs=configs))
    source = open_source(tmp_path)
    assert splits(source) == {name: {split} for name, split in expected.items()}
    assert sum(entry.count for entry in source.left_out) == 3 - len(expected)


def test_several_configs_without_a_default(tmp_path: Path) -> None:
    write(tmp_path, "en/train.parquet", "de/test.parquet")
    configs = "- config_name: en\n  data_files: en/*\n- config_name: de\n  data_files: de/*\n"
    (tmp_path / "README.md").write_text(CARD.format(configs=configs))
    with pytest.raises(
        EmulusError, match=r"README.md lists 2 configs \(en, de\) and none is the default; name the fol"
    ):
        open_source(tmp_path)
    assert Counter(item.split for item in open_source(tmp_path / "de")) == {"test": 3}


@pytest.mark.parametrize(
    "configs",
    [
        "- [",
        "- config_name: x\n  data_files: 5\n",
        "- 3\n#\n...\n--- x\n",
        "- 3\n",
        "  data_files: {a: {b: c}}\n",
        "- data_files: z/*\n",
    ],
)
def test_cards_that_say_nothing_of_use(tmp_path: Path, configs: str) -> None:
    write(tmp_path, "train.parquet", "test.parquet")
    (tmp_path / "README.md").write_text(CARD.format(configs=configs))
    assert splits(open_source(tmp_path)) == {"train.parquet": {"train"}, "test.parquet": {"test"}}


def test_a_stray_table_names_no_split(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", rows=40)
    (tmp_path / "test_results.csv").write_text("step,loss\n1,2\n")
    source = open_source(tmp_path)
    assert all(item.split == split_of_key(item.id) for item in source)
    assert [entry.count for entry in source.left_out] == [1]
