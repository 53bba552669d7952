"""WebDataset tars, and folders of files that belong together by their names."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emulus.data.source import open_source, split_of_key
from emulus.errors import EmulusError
from emulus.media import read_image, read_media
from tests.data.files import film


def picture(kind: str, shade: int = 0, frames: int = 1) -> bytes:
    buffer = io.BytesIO()
    first, *rest = (Image.new("RGB", (8, 8), (shade, 30 * frame, 0)) for frame in range(frames))
    more = {"save_all": True, "append_images": rest} if rest else {}
    first.save(buffer, kind, **more)
    return buffer.getvalue()


def write_tar(path: Path, files: Mapping[str, bytes], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def samples(folder: Path) -> dict[str, bytes]:
    return {
        "0.jpg": picture("JPEG", 1),
        "0.txt": b"a red square\n",
        "1.png": picture("PNG", 2),
        "1.json": json.dumps({"caption": "one", "score": 6, "split": "test", "id": "eins"}).encode(),
        "more/2.webp": picture("WEBP", 3),
        "more/2.txt": b"two",
        "more/2.json": json.dumps({"captions": ["two", "zwei"], "key": "2", "url": "http://x"}).encode(),
        "3.webp": picture("WEBP", 3, frames=3),
        "3.txt": "赤い".encode(),
        "4.gif": picture("GIF", 4, frames=2),
        "4.txt": b"four",
        "5.mp4": film(folder),
        "5.jpg": picture("JPEG", 5),
        "5.json": json.dumps({"text": "five", "fps": 4, "questions": [{"question": "a?", "answer": "b"}]}).encode(),
    }


KINDS = ["image", "image", "image", "video", "video", "video"]
CAPTIONS = [("a red square",), ("one",), ("two", "zwei"), ("赤い",), ("four",), ("five",)]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar(tmp_path: Path, kind: int) -> None:
    files = samples(tmp_path)
    source = open_source(write_tar(tmp_path / "shard-00.tar", files, kind))
    ids = ["shard-00/0", "eins", "shard-00/more/2", "shard-00/3", "shard-00/4", "shard-00/5"]
    assert [item.id for item in source] == ids
    assert [item.kind for item in source] == KINDS
    assert [item.captions for item in source] == CAPTIONS
    assert [item.split for item in source] == ["test" if id == "eins" else split_of_key(id) for id in ids]
    names = ("0.jpg", "1.png", "more/2.webp", "3.webp", "4.gif", "5.mp4")
    assert [item.media for item in reversed(source)] == [files[name] for name in reversed(names)]
    assert (source[1].score, source[5].fps, source[5].questions) == (6.0, 4.0, (("a?", "b"),))


def test_folders_of_tars_and_long_names(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    long = "deep/" * 30 + "0"
    for name in ("a/00", "01"):
        write_tar(tmp_path / f"{name}.tar", {f"{long}.png": picture("PNG"), f"{long}.txt": b"a"})
    assert [item.id for item in open_source(tmp_path)] == [f"01/{long}", f"a/00/{long}"]
    assert [item.id for item in open_source(tmp_path / "*.tar")] == [f"01/{long}"]
    assert [read_image(item.media).size for item in open_source(tmp_path)] == [(8, 8)] * 2


def test_loose_files(tmp_path: Path) -> None:
    for name, content in samples(tmp_path).items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "set" / "README.md").write_text("no text of the data set")
    source = open_source(tmp_path / "set")
    found = {item.id: item for item in source}
    assert list(found) == ["0", "eins", "3", "4", "5", "more/2"]
    assert found["more/2"].captions == ("two", "zwei")
    assert [item.kind for item in source] == [*KINDS[:2], *KINDS[3:], KINDS[2]]
    assert all(read_media(item.media) for item in source)
    for path in (tmp_path / "set").rglob("*"):
        if path.suffix in (".txt", ".json"):
            path.unlink()
    with pytest.raises(EmulusError, match=r"has no table of captions; .* beside every picture\.png a picture\.txt"):
        open_source(tmp_path / "set")


def test_what_a_sample_lacks_is_said_when_it_is_read(tmp_path: Path) -> None:
    files = {
        "0.png": picture("PNG"),
        "1.txt": b"words alone",
        "2.png": picture("PNG"),
        "2.txt": b" ",
        "3.png": picture("PNG"),
        "3.json": b"[",
        "4.png": picture("PNG"),
        "4.json": b'{"caption": "a", "fps": "fast"}',
        "5.png": picture("PNG"),
        "5.json": b'{"url": "x"}',
        "6.png": picture("PNG"),
        "6.txt": b"\xff",
        "7.png": b"no picture",
        "7.txt": b"seven",
        "8.png": picture("PNG"),
        "8.txt": b"eight",
    }
    source = open_source(write_tar(tmp_path / "t.tar", files))
    messages = [
        "no words beside",
        "no picture or clip",
        "is empty",
        "not valid JSON",
        "fps 'fast'",
        "is empty",
        "UTF-8",
    ]
    assert len(source) == len(messages) + 2
    for item, message in zip(source, messages, strict=False):
        with pytest.raises(EmulusError, match=message) as caught:
            _ = item.media
        assert "t.tar" in str(caught.value)
    assert source[7].media == b"no picture"
    assert read_image(source[8].media).size == (8, 8)


def test_only_plain_files_count(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in {"0.png": tarfile.SYMTYPE, "1.png": tarfile.LNKTYPE, "2.png": tarfile.DIRTYPE}.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
        for name in ("3.png", "3.txt", "../4.png", "../4.txt", "__5.png", ".6.png"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    assert [(item.id, item.media) for item in open_source(path)] == [("t/3", b"abc"), ("t/../4", b"abc")]


def test_what_is_no_tar_to_use(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(EmulusError, match=r"t\.tar\.gz is compressed"):
        open_source(tmp_path / "t.tar.gz")
    (tmp_path / "t.tar.gz").rename(tmp_path / "t.tar")
    with pytest.raises(EmulusError, match=r"t\.tar is no plain tar"):
        open_source(tmp_path / "t.tar")
    for name, content in {"empty.tar": b"", "zeros.tar": bytes(1024), "text.tar": b"no tar" * 500}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(EmulusError, match=f"{name} (is no plain tar|has no rows)"):
            open_source(tmp_path / name)
    twice = tmp_path / "twice.tar"
    with tarfile.open(twice, "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(EmulusError, match=r"no words beside it"):
        open_source(twice)


def test_a_tar_that_shrinks_or_vanishes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", {"0.txt": b"zero", "0.png": picture("PNG")})
    (item,) = open_source(path)
    path.write_bytes(path.read_bytes()[:1100])
    with pytest.raises(EmulusError, match="shorter than it was"):
        _ = item.media
    path.unlink()
    with pytest.raises(EmulusError, match="cannot be read"):
        _ = item.media


def test_sizes_are_not_taken_on_trust(tmp_path: Path) -> None:
    """Files of holes: what they claim to hold is never asked for."""
    path = tmp_path / "t.tar"
    huge = 6 * 2**30
    with path.open("wb") as file:
        for name, kind, size in (("0.txt", b"0", 1), ("0.png", b"0", huge)):
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, size
            file.write(member.tobuf())
            file.seek(-(-size // 512) * 512, 1)
        file.truncate(file.tell() + 1024)
    with path.open("r+b") as file:
        file.seek(512)
        file.write(b"a")
    (item,) = open_source(path)
    with pytest.raises(EmulusError, match=r"0\.png has 6,442,450,944 bytes, more than"):
        _ = item.media
    # A name, or attributes, of gigabytes.
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        member = tarfile.TarInfo("././@LongLink")
        member.type, member.size = kind, huge
        with path.open("wb") as file:
            file.write(member.tobuf())
            file.truncate(huge + 4096)
        with pytest.raises(EmulusError, match=r"t\.tar has a header of 6,442,450,944 bytes"):
            open_source(path)
    # More than there is.
    member = tarfile.TarInfo("0.png")
    member.size = huge
    path.write_bytes(member.tobuf() + bytes(2048))
    with pytest.raises(EmulusError, match=r"t\.tar is (damaged|no plain tar)"):
        open_source(path)


def test_a_tar_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    files = {f"{n}.{suffix}": content for n in range(3) for suffix, content in (("png", picture("PNG")), ("txt", b"a"))}
    path = write_tar(tmp_path / "t.tar", files)
    whole = path.read_bytes()
    end = 6 * 1024
    for length in range(700, end, 331):
        path.write_bytes(whole[:length])
        if length % 1024 < 512 and length % 1024:
            with pytest.raises(EmulusError, match=r"t\.tar"):
                open_source(path)
    # The end marks may be missing: all files are there.
    path.write_bytes(whole[:end])
    assert len(open_source(path)) == 3


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_raises_nothing_else(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = write_tar(
        folder / "t.tar", {"0.png": picture("PNG"), "0.txt": b"a", "ü" * 60 + ".png": b"b"}, tarfile.PAX_FORMAT
    )
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place] = value
    path.write_bytes(content)
    try:
        for item in open_source(path):
            _ = item.media
    except EmulusError as error:
        assert "\n" not in str(error)  # noqa: PT017


def test_a_tar_of_texts(tmp_path: Path) -> None:
    files = {
        "0.txt": "赤い".encode(),
        "1.txt": b"one",
        "1.json": b'{"split": "test", "score": 2}',
        "2.json": b'{"text": "two",\n"kind": "text"}',
        "3.json": b'{"url": "x"}',
        "4.txt": b"\xff",
    }
    source = open_source(write_tar(tmp_path / "t.tar", files))
    assert [(item.kind, item.captions) for item in source] == [("text", ())] * 5
    assert [item.text for item in source[:3]] == ["赤い", "one", "two"]
    assert (source[1].split, source[1].score) == ("test", 2.0)
    for item, message in zip(source[3:], ("t/3 has no column text", "t/4 .*is not UTF-8"), strict=True):
        with pytest.raises(EmulusError, match=message):
            _ = item.text
    mixed = {**files, "5.png": picture("PNG"), "5.txt": b"five"}
    kinds = [item.kind for item in open_source(write_tar(tmp_path / "t.tar", mixed))]
    assert kinds == ["image", "image", "text", "image", "image", "image"]


def test_pictures_that_share_a_name_are_not_chosen_from(tmp_path: Path) -> None:
    files = {
        "0.jpg": picture("JPEG"),
        "0.png": picture("PNG"),
        "1.png": picture("PNG"),
        "1.PNG": picture("PNG"),
        "2.gif": picture("GIF", frames=2),
        "2.jpg": picture("JPEG"),
        **{f"{number}.txt": b"words" for number in range(3)},
    }
    first, second, clip = open_source(write_tar(tmp_path / "t.tar", files))
    for item, names in ((first, r"\.jpg, \.png"), (second, r"\.png, \.PNG")):
        with pytest.raises(EmulusError, match=f"has several media \\({names}\\)"):
            _ = item.media
    assert (clip.kind, clip.media) == ("video", files["2.gif"])
