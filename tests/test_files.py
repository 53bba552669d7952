"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import fnmatch
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from emulus.data.tokenize import _TEMPORARY
from emulus.errors import EmulusError
from emulus.files import (
    COMPLETE,
    LOCK,
    check_not_running,
    check_out,
    check_path,
    new_folder,
    only_run,
    write_file,
    write_text,
)


def test_every_writer_makes_files_that_others_may_read(tmp_path: Path) -> None:
    """As the umask says, though safetensors would give them to their owner alone."""
    (tmp_path / "plain").touch()
    write_text(tmp_path / "text.json", "{}")
    write_file(tmp_path / "weights.safetensors", lambda path: save_file({"a": torch.zeros(1)}, path))
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_writer_that_writes_nothing_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match="could not write"):
        write_file(tmp_path / "file.txt", lambda temporary: None)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_whole_does_not_appear(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "first")

    def stopped(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, stopped)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def _at_once(work: Callable[[int], object], threads: int = 8) -> None:
    start = threading.Barrier(threads)

    def run(number: int) -> None:
        start.wait()
        for _ in range(10):
            work(number)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))


def test_threads_that_write_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    _at_once(lambda number: write_text(path, str(number) * 10_000))
    text = path.read_text()
    assert text == text[0] * 10_000
    assert list(tmp_path.iterdir()) == [path]


def test_threads_that_fill_one_folder_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "folder"

    def fill(number: int) -> None:
        with new_folder(path) as temporary:
            for name in "ab":
                (temporary / name).write_text(str(number))

    _at_once(fill, threads=4)
    assert (path / "a").read_text() == (path / "b").read_text()
    assert {file.name for file in path.iterdir()} == {"a", "b", COMPLETE}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a" * 251 + ".png", "a" + "é" * 125 + ".png", "a." + "b" * 250])
def test_a_name_as_long_as_names_may_be(name: str, tmp_path: Path) -> None:
    write_file(tmp_path / name, lambda temporary: temporary.write_text(temporary.name, encoding="utf-8"))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with new_folder(tmp_path / "folders" / name) as temporary:
        (temporary / "a").touch()
    assert (tmp_path / "folders" / name / "a").exists()


def test_temporary_names_are_those_that_are_cleaned_up(tmp_path: Path) -> None:
    """A run that was killed leaves them; whoever goes on knows them by their form."""
    seen: list[str] = []
    write_file(tmp_path / "shard.arrayrecord", lambda path: (seen.append(path.name), path.touch()))
    with new_folder(tmp_path / "step-00000001") as temporary:
        seen.append(temporary.name)
    assert all(_TEMPORARY.fullmatch(name) for name in seen)
    assert fnmatch.fnmatch(seen[1], ".step-*.tmp")


def test_all_processes_of_a_run_may_ask_whether_another_writes_to_its_folder(tmp_path: Path) -> None:
    with only_run(tmp_path):
        pass

    def ask(_: int) -> None:
        check_not_running(tmp_path)

    # Each opens the file anew, and so holds a lock of its own, as processes do.
    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(ask, range(4000)))) == 4000


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "a/run"
    check_not_running(folder)
    assert not folder.exists()
    with only_run(folder):
        for second in (only_run(folder).__enter__, lambda: check_not_running(folder)):
            with pytest.raises(EmulusError, match=rf"another run is writing to {folder}; wait until it has ended, or"):
                second()
        with only_run(tmp_path / "other"):
            pass
    # An old lock file alone holds nothing.
    assert (folder / LOCK).exists()
    check_not_running(folder)
    with only_run(folder):
        pass


def test_without_locks_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("emulus.files.fcntl.flock", flock)
    with only_run(tmp_path), only_run(tmp_path):
        assert "cannot be locked here" in caplog.text


def test_folders_to_write_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("link").symlink_to("data")
    Path("file").write_text("")
    check_out(Path("data/tokens"), source=Path("data"))
    check_out(Path("data"), source="", model=None, vocabulary="hub/name")
    for out, says in [
        ("data", "--out data is the source, which is read; choose another --out"),
        ("link", "--out link is the source"),
        ("data/../data/", "is the source"),
        (str(tmp_path / "data"), "is the source"),
        ("file", "file is not a folder; choose another place"),
        ("file/a/b", "file is not a folder, so file/a/b cannot be written"),
        ("x" * 300, "too long to be written"),
        ("a/" + "x" * 300 + "/b", "too long to be written"),
        ("a\udcff", "is not UTF-8"),
        ("a\0b", "holds a zero byte"),
        ("/proc/emulus/x", "cannot be written"),
    ]:
        with pytest.raises(EmulusError, match=says):
            check_out(Path(out), source=Path("data"))
    assert {path.name for path in tmp_path.iterdir()} == {"data", "file", "link"}
    check_path("caf\u00e9", "a name")
