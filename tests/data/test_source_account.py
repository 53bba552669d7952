"""Every file and row is used, or left out with a reason and counted; nothing is guessed."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import tarfile
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from emulus.data.item import Missing
from emulus.data.source import Source, open_source
from emulus.data.sources.walk import check_holds_no_data
from emulus.errors import EmulusError
from emulus.media import read_media
from tests.data.files import film, lay, lines, tar

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


def picture(kind: str = "PNG", frames: int = 1) -> bytes:
    buffer = io.BytesIO()
    first, *rest = (Image.new("RGB", (8, 8), (9, 40 * frame, 9)) for frame in range(frames))
    more = {"save_all": True, "append_images": rest} if rest else {}
    first.save(buffer, kind, **more)
    return buffer.getvalue()


PICTURE = picture()


def parquet(*rows: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def ids(source: Source) -> list[str]:
    return [item.id for item in source if not isinstance(item.stored, Missing)]


def left_out(source: Source) -> list[str]:
    return sorted(map(str, source.left_out))


PAIR: dict[str, bytes | str] = {"a.png": PICTURE, "a.txt": "a dot"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("x.jfif", "JPEG"), ("x.jpe", "JPEG"), ("x", "PNG"), ("x.tga", "TGA"), ("x.data", "WEBP"), ("x.2021", "GIF")],
)
@pytest.mark.parametrize("text", ["x.txt", None])
def test_pictures_are_told_by_their_content(tmp_path: Path, name: str, kind: str, text: str | None) -> None:
    lay(tmp_path, {name: picture(kind), text or f"{name}.txt": "a dot"})
    (item,) = open_source(tmp_path)
    assert (item.kind, item.captions) == ("image", ("a dot",))
    assert read_media(item.media)


def test_wrong_suffixes(tmp_path: Path) -> None:
    moving, clip = picture("GIF", frames=3), film(tmp_path)
    files = {"a.jpg": clip, "b.mp4": PICTURE, "c.png": moving, "d.jpg": moving, "e": clip, "f.png": picture("JPEG")}
    kinds = ["video", "image", "video", "video", "video", "image"]
    lay(tmp_path / "loose", files | {f"{letter}.txt": "words" for letter in "abcdef"})
    lay(tmp_path / "named", files | {"captions.jsonl": lines(*({"file": name, "text": "words"} for name in files))})
    lay(tmp_path, {"a.tar": tar({**files, **{f"{letter}.txt": b"words" for letter in "abcdef"}})})
    for source in map(open_source, (tmp_path / "loose", tmp_path / "named")):
        assert [item.kind for item in source] == kinds
    kinds[2:3] = ["video"]
    assert [item.kind for item in open_source(tmp_path / "a.tar")] == kinds


@pytest.mark.parametrize("name", ["x.heic", "x.svg", "x.wav", "x.dng", "x.xyz"])
def test_captions_of_files_that_cannot_be_read_are_no_texts(tmp_path: Path, name: str) -> None:
    heads = {".svg": b"<svg xmlns='x'></svg>", ".wav": b"RIFF0000WAVEfmt ", ".xyz": b"ab\0c"}
    content = heads.get(Path(name).suffix, b"II*\0\0\0\0\0")
    lay(tmp_path, {name: content, "x.txt": "a dot", "y.txt": "another", f"y{Path(name).suffix}": content})
    archive = lay(tmp_path / "more", {"t.tar": tar({name: content, "x.txt": b"a dot"})}) / "t.tar"
    if content.startswith(b"II*"):
        # Such raw images are TIFF files, which are opened.
        assert {item.kind for item in open_source(archive)} == {"image"}
        return
    with pytest.raises(EmulusError, match=r"t/x has words but no picture or clip"):
        open_source(archive)
    archive.unlink()
    with pytest.raises(EmulusError, match=f"left out .*{name}"):
        open_source(tmp_path)


def test_a_messy_folder(tmp_path: Path) -> None:
    lay(
        tmp_path,
        {
            **PAIR,
            "b.png": PICTURE,
            "c.txt": "about nothing",
            "d.svg": "<svg></svg>",
            "e.bin": b"\0\1",
            "f.png": LFS,
            "f.txt": "a dot",
            "g.zip": b"PK\3\4",
            "log.csv": "step,loss\n1,2\n",
            "notes.jsonl": lines({"text": "not about these"}),
            "stats.json": '{"mean": 3}',
            "guide.md": "# Guide",
            "README.md": "# Set",
            "LICENSE": "free",
            "Thumbs.db": b"x",
            ".DS_Store": b"x",
            ".git/config": "x",
            "__MACOSX/._a.png": b"x",
            ".ipynb_checkpoints/a-checkpoint.png": PICTURE,
            ".ipynb_checkpoints/a-checkpoint.txt": "old",
            "sub/.cache/a.png": PICTURE,
        },
    )
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    source = open_source(tmp_path)
    assert ids(source) == ["a"]
    assert left_out(source) == [
        "1 file: Git LFS pointers, not the files themselves; run 'git lfs install && git lfs pull' in their clone (f)",
        "1 file: SVG drawings, which cannot be read; convert them to PNG (d.svg)",
        "1 file: compressed archives; unpack them (g.zip)",
        "1 file: links to nothing (gone.png)",
        "1 file: neither images, clips, texts nor tables (e.bin)",
        "1 file: no caption beside them (b)",
        "1 file: not a regular file but a device, pipe or socket (pipe)",
        "1 file: not read beside images and clips; name them by a pattern to read them (notes.jsonl)",
        "1 file: tables with neither texts nor media and captions (log.csv)",
        "1 file: texts beside images or clips; name them by a pattern to read them (guide.md)",
        "2 files: texts without an image or clip of the same name (c.txt, stats.json)",
    ]
    over = {(entry.unit, entry.count) for entry in source.account.passed_over}
    assert over == {("folder", 4), ("file", 2)}
    assert all("\n" not in line for line in source.account.lines())


def test_kinds_of_containers_in_one_folder(tmp_path: Path) -> None:
    row = {"image": {"bytes": PICTURE, "path": None}, "text": "a dot"}
    named = lines({"file": "a.png", "text": "a dot"})
    files = {**PAIR, "t.tar": tar({"0.png": PICTURE, "0.txt": b"a"}), "set.parquet": parquet(row), "x.jsonl": named}
    lay(tmp_path, files)
    for first, found in (("set.parquet", "set/0"), ("t.tar", "t/0"), ("x.jsonl", "a.png"), ("a.txt", None)):
        if found is None:
            (tmp_path / "a.txt").unlink()
            with pytest.raises(EmulusError, match="has no table of captions"):
                open_source(tmp_path)
            continue
        source = open_source(tmp_path)
        assert ids(source) == [found]
        count = sum(1 for path in tmp_path.iterdir())
        assert sum(entry.count for entry in source.left_out) == count - (2 if found == "a.png" else 1)
        (tmp_path / first).unlink()


def test_what_img2dataset_writes(tmp_path: Path) -> None:
    """A table of what was fetched lies beside each tar, with the captions and the addresses."""
    rows = [{"url": "http://x/0.jpg", "caption": "a dot", "key": "0", "status": "success"}]
    shard = tar({"0.jpg": picture("JPEG"), "0.txt": b"a dot", "0.json": json.dumps(rows[0]).encode()})
    texts = parquet({"url": "http://x/0.jpg", "text": "a dot"})
    lay(tmp_path, {"0.tar": shard, "0.parquet": parquet(*rows), "1.parquet": texts, "0_stats.json": '{"count": 1}'})
    source = open_source(tmp_path)
    assert [(item.id, item.kind, item.captions) for item in source] == [("0/0", "image", ("a dot",))]
    assert sum(entry.count for entry in source.left_out) == 3
    # Alone, neither is a corpus of texts.
    for name in ("0.parquet", "1.parquet"):
        with pytest.raises(EmulusError, match="addresses"):
            open_source(tmp_path / name)


def test_texts_stay_texts_where_there_are_no_media(tmp_path: Path) -> None:
    files = {"a.txt": "one", "deep/b.md": "two", "c.pdf": b"%PDF-1.4 \0", "c.txt": "three", "LICENSE.txt": "free"}
    source = open_source(lay(tmp_path, files))
    assert [(item.id, item.kind) for item in source] == [("a.txt", "text"), ("c.txt", "text"), ("deep/b.md", "text")]
    assert left_out(source) == ["1 file: PDF documents, which cannot be read (c.pdf)"]
    # Files that are named are read, whatever they are called and whatever lies beside them.
    lay(tmp_path, {"README.md": "four", "c.png": PICTURE})
    assert ids(open_source(tmp_path / "*.md")) == ["README.md"]
    assert ids(open_source(tmp_path / "*.txt")) == ["LICENSE.txt", "a.txt", "c.txt"]
    assert [item.kind for item in open_source(tmp_path)] == ["image"]


def test_pictures_named_by_a_pattern_have_the_words_beside_them(tmp_path: Path) -> None:
    lay(tmp_path, {**PAIR, "b.png": PICTURE, "b.caption": "b", "c.png": PICTURE, "d.txt": "d"})
    source = open_source(tmp_path / "*.png")
    assert ids(source) == ["a", "b"]
    assert left_out(source) == ["1 file: no caption beside them (c)"]
    assert ids(open_source(tmp_path / "a.png")) == ["a"]


def test_folders_of_classes_are_refused_with_a_remedy(tmp_path: Path) -> None:
    lay(tmp_path, {"cat/1.png": PICTURE, "dog/1.png": PICTURE})
    with pytest.raises(EmulusError, match=r"add captions\.jsonl, .*names of folders are not taken for captions"):
        open_source(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    lay(tmp_path / "set", {"a/1.png": PICTURE, "a/1.txt": "one"})
    lay(tmp_path / "far", {"2.png": PICTURE, "2.txt": "two", "deep/3.png": PICTURE, "deep/3.txt": "three"})
    for link, target in {"b": "far", "0": "set/a", "loop": "set", "c": "far/deep"}.items():
        (tmp_path / "set" / link).symlink_to(tmp_path / target)
    (tmp_path / "far" / "back").symlink_to(tmp_path)
    source = open_source(tmp_path / "set")
    assert ids(source) == ["a/1", "b/2", "b/deep/3"]
    (tmp_path / "whole").symlink_to(tmp_path / "set")
    assert ids(open_source(tmp_path / "whole")) == ids(source)


def test_patterns_over_links_end(tmp_path: Path) -> None:
    lay(tmp_path, {"f/x.jsonl": lines({"text": "one"}), "f/deep/y.jsonl": lines({"text": "two"})})
    for name in ("l1", "l2"):
        (tmp_path / "f" / name).symlink_to(".")
    (tmp_path / "f" / "deep" / "up").symlink_to(tmp_path / "f")
    assert ids(open_source(tmp_path / "f" / "**" / "*.jsonl")) == ["deep/y/0", "x/0"]
    assert ids(open_source(tmp_path / "**" / "[xy].jsonl")) == ["deep/y/0", "x/0"]
    assert ids(open_source(tmp_path / "f*")) == ["deep/y/0", "x/0"]


@pytest.mark.parametrize("pattern", ["", "**/*", "*", "**/*.jsonl"])
def test_what_emulus_wrote_is_no_data(tmp_path: Path, pattern: str) -> None:
    lay(
        tmp_path,
        {
            "words.jsonl": lines({"text": "one"}),
            "tokens/making.json": "{}",
            "tokens/manifest.jsonl": lines({"name": "x", "text": "y"}),
            "done/tokens.json": "{}",
            "done/manifest.jsonl": lines({"name": "x"}),
            "run/metrics.jsonl": lines({"text": "y"}),
            "run/config.yaml": "a: 1",
            "run/checkpoints/step-1/trainer.json": "{}",
            "model/config.json": "{}",
            "model/model.safetensors": b"",
            "other/manifest.jsonl": lines({"text": "two"}),
        },
    )
    source = open_source(tmp_path / pattern)
    assert [item.text for item in source] == ["two", "one"]
    with pytest.raises(EmulusError, match="tokens is written by Emulus"):
        open_source(tmp_path / "tokens")


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s"))
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path / "s"):
        with pytest.raises(EmulusError, match="is a device, pipe or socket, not a data set"):
            open_source(path)
    server.close()
    for path in ("x" * 5000, "a\0b"):
        with pytest.raises(EmulusError, match=r"(cannot be read|does not exist)"):
            open_source(path)


def test_names_that_are_not_utf8(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", "emulus")  # reports of parallel test processes must be UTF-8
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    lay(folder, {os.fsdecode(b"\xff.png"): PICTURE, os.fsdecode(b"\xff.txt"): "a dot", "b.png": PICTURE})
    source = open_source(folder)
    assert len(ids(source)) == 1
    assert all(line.isprintable() for line in source.account.lines())
    assert read_media(source[1].media) if not isinstance(source[1].stored, Missing) else read_media(source[0].media)


ROWS: list[dict[str, Any]] = [
    {"file": "a.png", "caption": "one"},
    {"file": "b.png", "caption": "two"},
    {"file": "c.png", "caption": "three"},
]


@pytest.mark.parametrize("value", [None, float("nan"), "", "  ", "<NA>", "NaT", "nan", []])
@pytest.mark.parametrize("column", ["caption", "fps", "score", "split", "id", "kind", "source", "questions", "file"])
def test_what_is_not_given_costs_the_value(tmp_path: Path, column: str, value: Any) -> None:
    lay(tmp_path, {f"{letter}.png": PICTURE for letter in "abc"})
    rows = [dict(row) for row in ROWS]
    rows[1][column] = value
    lay(tmp_path, {"captions.jsonl": lines(*rows)})
    source = open_source(tmp_path)
    if column in ("caption", "file"):
        assert ids(source) == ["a.png", "c.png"]
        assert sum(entry.count for entry in source.left_out if entry.unit == "row") == 1
    else:
        assert ids(source) == ["a.png", "b.png", "c.png"]
        assert (source[1].score, source[1].fps, source[1].questions) == (0.0, None, ())
        assert not source.left_out


def test_values_from_pandas_in_csv_and_parquet(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": [PICTURE] * 3,
            "caption": pa.array(["one", None, "three"]),
            "fps": [float("nan"), 8.0, 8.0],
            "score": [5.5, float("nan"), 1.0],
            "split": pa.array([None, "test", "train"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert ids(source) == ["a/0", "a/2"]
    assert [(item.fps, item.score) for item in source][0::2] == [(None, 5.5), (8.0, 1.0)]
    lay(tmp_path / "csv", {"a.png": PICTURE, "captions.csv": ",file,caption,fps\n0,a.png,one,\n1,a.png,,8.0\n"})
    assert ids(open_source(tmp_path / "csv")) == ["a.png"]


def test_captions_of_which_some_are_not_given(tmp_path: Path) -> None:
    lay(tmp_path, {"a.png": PICTURE, "captions.jsonl": lines({"file": "a.png", "captions": ["a", None, float("nan")]})})
    assert open_source(tmp_path)[0].captions == ("a",)


@pytest.mark.parametrize(("fps", "rate"), [("30000/1001", 30000 / 1001), ("25/1", 25.0), ("12.5", 12.5), (8, 8.0)])
def test_frame_rates(tmp_path: Path, fps: Any, rate: float) -> None:
    lay(tmp_path, {"a.gif": picture("GIF", 2), "captions.jsonl": lines({"file": "a.gif", "text": "a", "fps": fps})})
    assert open_source(tmp_path)[0].fps == pytest.approx(rate)


def test_names_as_other_systems_write_them(tmp_path: Path) -> None:
    composed = unicodedata.normalize("NFC", "café/ü.png")
    lay(tmp_path, {"cats/1.png": PICTURE, composed: PICTURE, unicodedata.normalize("NFD", "é.png"): PICTURE})
    lay(tmp_path, {"Upper/Two.PNG": PICTURE, "both/x.png": PICTURE, "both/X.png": PICTURE})
    names = [
        "cats\\1.png",
        unicodedata.normalize("NFD", composed),
        "é.png",
        "upper/two.png",
        str(tmp_path / "cats/1.png"),
    ]
    rows = [{"file": name, "text": f"{number}"} for number, name in enumerate([*names, "BOTH/x.PNG", "./cats/1.png"])]
    source = open_source(lay(tmp_path, {"captions.jsonl": lines(*rows)}))
    assert ids(source) == [
        "cats/1.png",
        composed,
        unicodedata.normalize("NFD", "é.png"),
        "Upper/Two.PNG",
    ]
    assert source[0].captions == ("0", "4", "6")
    # Which of two is meant is not guessed.
    assert "1 row: names files that do not exist (captions.jsonl line 6)" in left_out(source)


def test_links_may_lead_elsewhere_and_names_may_not(tmp_path: Path) -> None:
    lay(tmp_path, {"far/a.png": PICTURE, "set/captions.jsonl": lines({"file": "link/a.png", "text": "a"})})
    (tmp_path / "set" / "link").symlink_to(tmp_path / "far")
    assert ids(open_source(tmp_path / "set")) == ["link/a.png"]


@pytest.mark.parametrize("name", ["f.parquet", "f.tar", "f.jsonl", "f.csv", "f.txt"])
def test_lfs_pointers(tmp_path: Path, name: str) -> None:
    lay(tmp_path / "alone", {name: LFS})
    with pytest.raises(EmulusError, match="git lfs pull"):
        open_source(tmp_path / "alone")
    if name != "f.txt":
        with pytest.raises(EmulusError, match="git lfs pull"):
            open_source(tmp_path / "alone" / name)
    source = open_source(lay(tmp_path / "both", {name: LFS, f"a{name}": good(name)}))
    assert len(ids(source)) == 1
    assert [entry.reason.split(",")[0] for entry in source.left_out] == ["Git LFS pointers"]


def good(name: str) -> bytes | str:
    return {
        "f.parquet": parquet({"text": "a"}),
        "f.tar": tar({"0.png": PICTURE, "0.txt": b"a"}),
        "f.jsonl": lines({"text": "a"}),
        "f.csv": "text\na\n",
        "f.txt": "a",
    }[name]


def test_dots_in_the_names_of_a_tar(tmp_path: Path) -> None:
    pair = {".png": PICTURE, ".txt": b"a"}
    names = ("0.05", "0.10", "7", "v1.2/3.5")
    files = {name + suffix: content for name in names for suffix, content in pair.items()}
    files |= {"8.png": PICTURE, "8.txt": b"a", "8.seg.png": PICTURE, "8.left.txt": b"b"}
    files |= {"9.png": PICTURE, "9.txt": b"a", "9.5.png": PICTURE, "9.5.txt": b"b"}
    source = open_source(lay(tmp_path, {"a.tar": tar(files)}) / "a.tar")
    assert ids(source) == ["a/0.05", "a/0.10", "a/7", "a/v1.2/3.5", "a/8", "a/9", "a/9.5"]
    assert [entry.count for entry in source.account.passed_over] == [2]
    with pytest.raises(EmulusError, match=r"0\.05"):
        open_source(lay(tmp_path, {"b.tar": tar({"0.05.png": PICTURE})}) / "b.tar")


def test_a_name_that_a_tar_has_twice(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for content in (PICTURE, b"a", b"b"):
            member = tarfile.TarInfo("0.png" if content == PICTURE else "0.txt")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    source = open_source(lay(tmp_path, {"a.tar": buffer.getvalue()}) / "a.tar")
    assert [item.captions for item in source] == [("a",)]
    assert left_out(source) == ["1 file: a name that the tar has twice (a.tar: 0.txt)"]


def test_compressed_tables(tmp_path: Path) -> None:
    lay(tmp_path, {"a.png": PICTURE, "t/x.jsonl.gz": gzip.compress(lines({"text": "one"}).encode())})
    lay(tmp_path, {"train.csv.gz": gzip.compress(b"file,caption\na.png,one\n")})
    assert [(item.id, item.split) for item in open_source(tmp_path)] == [("a.png", "train")]
    assert [item.text for item in open_source(tmp_path / "t")] == ["one"]
    lay(tmp_path, {"t/x.jsonl.gz": gzip.compress(lines({"text": "one"}).encode())[:-4]})
    with pytest.raises(EmulusError, match=r"x\.jsonl\.gz cannot be read"):
        open_source(tmp_path / "t")


def test_many_reasons_are_put_together(tmp_path: Path) -> None:
    rows = [{"file": "a.png", "text": "a", "split": f"odd {chr(97 + n // 26)}{chr(97 + n % 26)}"} for n in range(90)]
    source = open_source(
        lay(tmp_path, {"a.png": PICTURE, "captions.jsonl": lines({"file": "a.png", "text": "a"}, *rows)})
    )
    assert sum(entry.count for entry in source.left_out) == 90
    assert len(source.left_out) <= 41


def test_parts_of_a_source_keep_the_account(tmp_path: Path) -> None:
    source = open_source(lay(tmp_path, {**PAIR, "b.png": PICTURE}))
    assert source.select(kind="image").left_out == source[:1].left_out == source.left_out != ()


def test_an_output_among_ones_own_data_is_refused(tmp_path: Path) -> None:
    lay(tmp_path / "mixed", {"1.dat": PICTURE, "notes.txt": "x"})
    lay(tmp_path / "tables", {"a.CSV": "file,caption"})
    for name, file in (("mixed", "1.dat"), ("tables", "a.CSV")):
        with pytest.raises(EmulusError, match=rf"{name} holds other files \({file}\); choose a folder that is new"):
            check_holds_no_data(tmp_path / name)
    lay(tmp_path / "notes", {"notes.txt": "x", ".hidden.png": PICTURE})
    lay(tmp_path / "tokens", {"making.json": "{}", "1.png": PICTURE})
    for name in ("notes", "tokens", "nowhere"):
        check_holds_no_data(tmp_path / name)


def test_a_card_that_names_nothing_is_told(tmp_path: Path) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files: elsewhere/*\n---\n"
    lay(tmp_path, {"README.md": card, "1.png": PICTURE, "1.txt": "a"})
    assert any("its configs name no file" in line for line in open_source(tmp_path).account.lines())


def test_a_file_stays_in_the_split_that_it_was_put_into_first(tmp_path: Path) -> None:
    rows = [{"file": "1.png", "caption": words, "split": split} for words, split in (("a", "train"), ("b", "test"))]
    lay(tmp_path, {"1.png": PICTURE, "captions.jsonl": lines(*rows)})
    source = open_source(tmp_path)
    assert [(item.split, item.captions) for item in source] == [("train", ("a",))]
    assert any("in the split train already" in line for line in source.account.lines())


def test_captions_by_the_names_of_files(tmp_path: Path) -> None:
    lay(tmp_path, {"1.png": PICTURE, "2.png": PICTURE, "captions.json": '{"1.png": "a cat", "2.png": ["b", "c"]}'})
    assert {item.id: item.captions for item in open_source(tmp_path)} == {"1.png": ("a cat",), "2.png": ("b", "c")}


def test_rows_that_are_left_out_do_not_count(tmp_path: Path) -> None:
    rows = [{"file": f"{name}.png", "caption": "a", "split": "train"} for name in "12"]
    lay(tmp_path, {"1.png": PICTURE, "captions.jsonl": lines(*rows)})
    assert open_source(tmp_path).counts() == {"train image": 1}
