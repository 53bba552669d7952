"""Records and shards: what is written is read, and what is damaged is refused."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from emulus.data.records import (
    MANIFEST,
    RECORD_KINDS,
    Kind,
    Record,
    Role,
    Shard,
    ShardLine,
    Skipped,
    Span,
    add_to_manifest,
    end_of_lines,
    lengths_path,
    pack_record,
    read_lengths,
    read_manifest,
    shard_digest,
    shard_name,
    unpack_record,
    write_shard,
)
from emulus.errors import EmulusError
from emulus.files import only_run


def record(kind: Kind, lengths: list[int], questions: int = 0, *, id: str = "a", **more: object) -> Record:
    """A record with spans of these lengths: the last is the medium, before it questions with answers."""
    if kind == "text":
        roles: list[Role] = ["text"]
    else:
        captions = len(lengths) - 1 - 2 * questions
        roles = ["caption"] * captions + ["question", "answer"] * questions + ["media"]
    stops = np.cumsum(lengths).tolist()
    spans = tuple(Span(role, stop - length, stop) for role, length, stop in zip(roles, lengths, stops, strict=True))
    shapes = {"text": (), "image": (3, 5), "video": (2, 3, 5)}
    ids = np.random.default_rng(sum(lengths)).integers(0, 2**32, sum(lengths), np.uint32)
    values: dict = {"shape": shapes[kind], "fps": 8.0 if kind == "video" else 0.0, **more}
    return Record(id=id, kind=kind, ids=ids, spans=spans, **values)


@st.composite
def records(draw: st.DrawFn) -> Record:
    kind: Kind = draw(st.sampled_from(RECORD_KINDS))
    questions = 0 if kind == "text" else draw(st.integers(0, 3))
    captions = 0 if kind == "text" else draw(st.integers(0, 4))
    lengths = draw(
        st.lists(st.integers(0, 9), min_size=captions + 2 * questions + 1, max_size=captions + 2 * questions + 1)
    )
    words = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
    return record(
        kind,
        lengths,
        questions,
        id=draw(words),
        source=draw(words),
        score=draw(st.floats(allow_nan=False, allow_infinity=False)),
    )


def same(left: Record, right: Record) -> bool:
    mine, theirs = vars(left).copy(), vars(right).copy()
    return np.array_equal(mine.pop("ids"), theirs.pop("ids")) and mine == theirs


@given(records())
def test_a_record_comes_back(written: Record) -> None:
    assert same(unpack_record(pack_record(written), "here"), written)


@given(records(), st.data())
def test_a_record_that_is_cut_or_longer_is_refused(written: Record, data: st.DataObject) -> None:
    packed = pack_record(written)
    cut = data.draw(st.integers(0, len(packed) - 1))
    for wrong in (packed[:cut], packed + b"\0" * data.draw(st.integers(1, 9))):
        with pytest.raises(EmulusError, match=r"^here .*the same tokenize command"):
            unpack_record(wrong, "here")


@given(records(), st.data())
@settings(max_examples=200)
def test_whatever_bytes_are_given_only_one_error_comes(written: Record, data: st.DataObject) -> None:
    packed = bytearray(pack_record(written))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, min(len(packed), 90) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = unpack_record(bytes(packed), "here")
    except EmulusError:
        return
    assert sum(span.stop - span.start for span in found.spans) == len(found.ids)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"spans": (Span("media", 0, 3),)}, "do not cover"),
        ({"spans": (Span("media", 0, 4), Span("caption", 4, 6))}, "spans b'mc'"),
        ({"spans": (Span("question", 0, 4), Span("media", 4, 6))}, "spans b'qm'"),
        ({"shape": (2, 3, 4)}, "no image has the shape"),
        ({"shape": (0, 3)}, "no image has the shape"),
        ({"fps": 8.0}, "no image has the shape"),
        ({"score": math.nan}, "is no number"),
        ({"ids": np.zeros(6, np.int64)}, "not int64"),
        ({"id": "x" * 70_000}, "shorten it"),
    ],
)
def test_what_is_no_record_is_not_written(wrong: dict, says: str) -> None:
    good = vars(record("image", [2, 4]))
    with pytest.raises(EmulusError, match=says):
        pack_record(Record(**{**good, **wrong}))


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shard") / shard_name("train", "image", 0)
    write_shard(path, MANY)
    return path


MANY = [record("image", [number % 4, 2, 3, 40 + number], number % 2, id=str(number)) for number in range(50)]


def test_a_shard_is_read_in_any_order(shard: Path) -> None:
    opened = Shard(shard)
    assert len(opened) == 50
    order = np.random.default_rng(0).permutation(50).tolist()
    assert all(same(found, MANY[number]) for found, number in zip(opened.read(order), order, strict=True))
    with pytest.raises(EmulusError, match="record 50 is damaged or missing"):
        opened.read([50])


def test_lengths_are_those_of_the_records(shard: Path) -> None:
    found = read_lengths(shard)
    words = [[span for span in each.spans if span.role != "media"] for each in MANY]
    assert found.media.tolist() == [len(each.of("media")[0]) for each in MANY]
    assert np.diff(found.offsets.astype(int)).tolist() == [len(spans) for spans in words]
    assert found.lengths.tolist() == [span.stop - span.start for spans in words for span in spans]
    letters = {"c": "caption", "q": "question", "a": "answer"}
    assert [letters[chr(role)] for role in found.roles] == [span.role for spans in words for span in spans]


def test_the_same_records_give_the_same_bytes(shard: Path, tmp_path: Path) -> None:
    figures = write_shard(tmp_path / shard.name, MANY)
    assert figures.sha256 == shard_digest(shard)
    assert figures.rows == 50
    assert figures.tokens == sum(len(each.ids) for each in MANY)
    assert figures.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in shard.parent.iterdir()}


def test_nothing_is_left_of_a_shard_whose_records_fail(tmp_path: Path) -> None:
    def failing() -> Iterator[Record]:
        yield MANY[0]
        raise RuntimeError("the encoder failed")

    with pytest.raises(RuntimeError, match="the encoder failed"):
        write_shard(tmp_path / shard_name("train", "image", 0), failing())
    assert not list(tmp_path.iterdir())


def test_what_is_no_record_is_left_out_where_that_is_wanted(shard: Path, tmp_path: Path) -> None:
    wrong = record("image", [2, 4], id="wrong", score=math.nan)
    skipped: list[Skipped] = []
    figures = write_shard(tmp_path / shard.name, [MANY[0], wrong, *MANY[1:]], skipped)
    assert figures.sha256 == shard_digest(shard)
    assert [each.id for each in skipped] == ["wrong"]
    assert "is no number" in skipped[0].reason
    with pytest.raises(EmulusError, match="is no number"):
        write_shard(tmp_path / shard.name, [wrong])


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(EmulusError, match=r"could not write .*\(File too large\)"):
            write_shard(tmp_path / shard_name("train", "image", 0), MANY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@given(st.data())
@settings(max_examples=60)
def test_a_damaged_shard_gives_its_records_or_one_error(shard: Path, data: st.DataObject) -> None:
    content = bytearray(shard.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = shard.parent / "damaged.arrayrecord"
    path.write_bytes(content)
    error, found = "", []
    try:
        found = Shard(path).read(range(50))
    except EmulusError as refused:
        error = str(refused)
    if error:
        assert str(path) in error
        assert "\n" not in error
    else:
        assert len(content) == shard.stat().st_size
        assert all(same(*pair) for pair in zip(found, MANY, strict=True))


def test_foreign_and_missing_shards_are_named(tmp_path: Path) -> None:
    path = tmp_path / shard_name("train", "image", 0)
    with pytest.raises(EmulusError, match="is missing"):
        Shard(path)
    path.write_bytes(b"PAR1" * 40_000)
    with pytest.raises(EmulusError, match="cut off, damaged or no ArrayRecord file"):
        Shard(path)


def test_damaged_lengths_are_named(shard: Path, tmp_path: Path) -> None:
    path = tmp_path / shard.name
    with pytest.raises(EmulusError, match="is missing"):
        read_lengths(path)
    good, whole = load_file(lengths_path(shard)), lengths_path(shard).read_bytes()
    for content in (b"", whole[:20], whole[:-1], b"x" * 400):
        lengths_path(path).write_bytes(content)
        with pytest.raises(EmulusError, match="is damaged"):
            read_lengths(path)
    wrong = [
        {**good, "media": good["media"].astype(np.int64)},
        {**good, "media": good["media"][:-1]},
        {**good, "offsets": good["offsets"][::-1].copy()},
        {**good, "offsets": good["offsets"] + np.uint64(1)},
        {**good, "roles": good["roles"][:-1]},
        {name: array for name, array in good.items() if name != "roles"},
        {**good, "offsets": np.empty(0, np.uint64)},
    ]
    for tensors in wrong:
        save_file(tensors, lengths_path(path))
        with pytest.raises(EmulusError, match=r"no file of lengths|do not fit together"):
            read_lengths(path)


def line(number: int, **more: object) -> ShardLine:
    values: dict = {"sha256": "0" * 64, "bytes": 1, "rows": 2, "tokens": 3, **more}
    return ShardLine(name=shard_name("train", "image", number), **values)


def test_the_manifest_keeps_whole_lines_only(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == []
    first, second = line(1, skipped=(Skipped("ü", 'no "picture"'),)), line(0)
    add_to_manifest(tmp_path, first)
    add_to_manifest(tmp_path, second)
    assert read_manifest(tmp_path) == [second, first]
    whole = (tmp_path / MANIFEST).read_bytes()
    with (tmp_path / MANIFEST).open("ab") as file:
        file.write(whole[: len(whole) // 2 - 3])
    torn = (tmp_path / MANIFEST).read_bytes()
    for size in range(len(whole), len(torn)):
        (tmp_path / MANIFEST).write_bytes(torn[:size])
        assert read_manifest(tmp_path) == [second, first]
    add_to_manifest(tmp_path, line(1, rows=9))
    assert [each.rows for each in read_manifest(tmp_path)] == [2, 9]
    assert (first.split, first.kind, first.number) == ("train", "image", 1)


class Counting(io.BytesIO):
    """Says how many bytes were read."""

    asked = 0

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        self.asked += len(found)
        return found


@pytest.mark.parametrize("torn", [0, 1, 65_535, 65_536, 65_537, 200_000])
@pytest.mark.parametrize("whole", [b"", b"\n", b"a line\n", b"x" * 70_000 + b"\n", b"a line\n" * 100_000])
def test_only_the_end_of_a_file_of_lines_is_read(whole: bytes, torn: int) -> None:
    file = Counting(whole + b"t" * torn)
    assert end_of_lines(file) == len(whole)
    assert file.asked <= torn + 2 * 65_536


def test_one_run_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    folder = tmp_path / "tokens"
    with only_run(folder):
        with pytest.raises(EmulusError, match=r"another run is writing to .*tokens; wait") as caught, only_run(folder):
            pass
        assert "\n" not in str(caught.value)
        add_to_manifest(folder, line(0))
    with only_run(folder):
        assert read_manifest(folder) == [line(0)]


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "nonsense",
        '{"name": "../x.arrayrecord", "sha256": "%s", "bytes": 1, "rows": 1, "tokens": 1, "skipped": []}' % ("0" * 64),
        '{"name": "train-image-00000.arrayrecord", "sha256": 1, "bytes": 1, "rows": 1, "tokens": 1, "skipped": []}',
        '{"name": "train-image-00000.arrayrecord", "sha256": "%s", "bytes": -1, "rows": 1, "tokens": 1, "skipped": []}'
        % ("0" * 64),
        '{"name": "train-image-00000.arrayrecord", "sha256": "%s", "bytes": 1, "rows": "1", "tokens": 1, "skipped": []}'
        % ("0" * 64),
    ],
)
def test_a_foreign_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text + "\n")
    with pytest.raises(EmulusError, match="line 1 is damaged"):
        read_manifest(tmp_path)
