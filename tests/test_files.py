"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from emulus.errors import EmulusError
from emulus.files import write_file, write_text


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
