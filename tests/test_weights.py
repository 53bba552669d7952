"""What stands in the place of a file of tensors is named for what it is; nothing hangs on it."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from emulus.errors import EmulusError
from emulus.weights import INDEX, WEIGHTS, fill, find_model, find_tensors, on_meta

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def replace(path: Path, content: bytes | None = None) -> Path:
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    return path


def header(values: Any, *, claimed: int | None = None, data: bytes = b"") -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: replace(f, POINTER), "is a Git LFS pointer, not the file itself; run 'git lfs install"),
        (lambda f: replace(f, b"<!DOCTYPE html><html>no</html>"), "is a web page .*fetch it again"),
        (lambda f: replace(f, b"\n <HTML><body>404"), "is a web page"),
        (lambda f: replace(f, b""), r"truncated \(it is empty\); fetch it again"),
        (lambda f: replace(f, bytes(4096)), "begins with zeros, as unfinished downloads do"),
        (lambda f: replace(f).mkdir(), "is not a regular file"),
        (lambda f: os.mkfifo(replace(f)), "is not a regular file"),
        (lambda f: replace(f).symlink_to("/dev/zero"), "is not a regular file"),
        (lambda f: replace(f, header({}, claimed=2**62)), "is damaged or truncated"),
        (lambda f: replace(f, header([])), "is damaged or truncated"),
        (
            lambda f: replace(f, header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})),
            "damaged",
        ),
        (
            lambda f: replace(f, header({"a\n\x1b[2J" * 9999: {"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}})),
            "dam",
        ),
        (lambda f: f.rename(f.with_name("model.safetensors.part")), "holds no .*: its download has not finished"),
        (lambda f: f.rename(f.with_suffix(".bin")), "a pickle"),
        (lambda f: f.unlink(), "holds no model.safetensors; is it the folder of a model"),
    ],
)
def test_what_is_no_file_of_tensors_is_one_line(folder: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(folder / WEIGHTS)
    with pytest.raises(EmulusError, match=says) as caught:
        find_tensors(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ([], "holds a list, not fields"),
        ({}, "has no weight_map"),
        ({"weight_map": None}, "has no weight_map"),
        ({"weight_map": [1]}, "weight_map holds a list"),
        ({"weight_map": {"weight": 3}}, "weight_map, weight must be a text"),
        ({"weight_map": {"weight": ["model.safetensors"]}}, "weight must be a text"),
        ({"weight_map": {"weight": "../model.safetensors"}}, "is not read"),
        ({"weight_map": {"weight": "/etc/passwd"}}, "is not read"),
        ({"weight_map": {"weight": "a\n\x1b[2J.safetensors"}}, "is missing; fetch the shard"),
        ({"weight_map": {"weight": "model.safetensors"}}, "1 misplaced"),
        ({"weight_map": {"weight": "\ud800.safetensors"}}, "must be a text"),
    ],
)
def test_a_wrong_index_is_one_line(folder: Path, index: Any, says: str) -> None:
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(EmulusError, match=says) as caught:
        find_tensors(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unfinished_download_of_the_hub_is_named(folder: Path) -> None:
    cache = folder / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    (cache / "abc.incomplete").write_bytes(b"x")
    (folder / INDEX).write_text('{"weight_map": {"weight": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(EmulusError, match=r"is missing: its download has not finished \(abc\.incomplete\)"):
        find_tensors(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_tensors_of_another_kind_are_refused(folder: Path, dtype: torch.dtype) -> None:
    save_file({"weight": torch.ones(3, 2).to(dtype), "bias": torch.zeros(3)}, folder / WEIGHTS)
    model = on_meta(lambda: nn.Linear(2, 3))
    with pytest.raises(EmulusError, match=r"weight is of torch\..*, not torch\.float32"):
        fill(model, find_tensors(folder), dtype=torch.float32, device="cpu")


def test_types_that_torch_cannot_read_are_one_line(folder: Path) -> None:
    """Newer files have types of less than a byte."""
    for kind, size in {"F4": 3, "F8_E8M0": 6, "F6_E2M3": 6, "C64": 48}.items():
        values = {"weight": {"dtype": kind, "shape": [3, 2], "data_offsets": [0, size]}}
        (folder / WEIGHTS).write_bytes(header(values, data=bytes(size)))
        with contextlib.suppress(EmulusError):
            fill(on_meta(lambda: nn.Linear(2, 3, bias=False)), find_tensors(folder), dtype=None, device="cpu")


@pytest.mark.parametrize("name", ["x" * 300, "a/" * 3000])
def test_a_name_that_is_too_long(name: str) -> None:
    with pytest.raises(EmulusError, match="cannot be opened"):
        find_model(Path(name))
