"""Building the native kernels: kept for the next time, and plain PyTorch with one line where it cannot be done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulus.errors import EmulusError
from emulus.kernels import build, native

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler")

OTHERS = "\n".join(f"void {name}() {{}}" for name in native._SIGNATURES if name != "emulus_linear")

# A library of the right names, which is quickly compiled.
SMALL = f"""
extern "C" {{
int emulus_interface() {{ return {native._INTERFACE}; }}
int emulus_linear(const float* x, long n, long, long in, const void* weight, int, long out, float* y, int) {{
    for (long t = 0; t < n; t++)
        for (long r = 0; r < out; r++) {{
            y[t * out + r] = 0;
            for (long i = 0; i < in; i++) y[t * out + r] += x[t * in + i] * ((const float*)weight)[r * in + i];
        }}
    return 0;
}}
{OTHERS}
}}
"""

ASK = """
import logging, sys
logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
import torch
from emulus.kernels import native
x, weight = torch.ones(1, 8), torch.ones(2, 8)
print(native.available(), native.available(), native.linear(x, weight).tolist() if native.available() else "")
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EMULUS_NATIVE", raising=False)
    return tmp_path / "cache" / "emulus"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build a few lines instead of the whole."""
    source = tmp_path / "small.cpp"
    source.write_text(SMALL)
    monkeypatch.setattr(build, "SOURCE", source)
    return source


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def ask(**environment: str) -> subprocess.CompletedProcess[str]:
    """What a new process says."""
    return subprocess.run(
        [sys.executable, "-c", ASK], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


@needs_compiler
def test_is_built_once(small: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.library(native.load)
    assert path.parent == cache
    assert [file.name for file in cache.iterdir()] == [path.name]
    monkeypatch.setattr(build, "_compile", None)  # calling it would fail
    assert build.library(native.load) == path


@needs_compiler
def test_another_source_another_file(small: Path) -> None:
    first = build.library(native.load)
    small.write_text(small.read_text() + "\n// changed\n")
    assert build.library(native.load) != first
    assert build.library(native.load, macros=["OTHER"]) not in (first, build.library(native.load))


@needs_compiler
def test_a_damaged_file_is_made_again(small: Path) -> None:
    path = build.library(native.load)
    path.unlink()
    path.write_bytes(b"rubbish")
    assert build.library(native.load) == path
    assert path.read_bytes() != b"rubbish"


@needs_compiler
@pytest.mark.parametrize(
    "change", [("y[t * out + r] = 0", "y[t * out + r] = 1"), (f"return {native._INTERFACE}", "return -1")]
)
def test_a_wrong_library_is_refused_and_not_kept(small: Path, cache: Path, change: tuple[str, str]) -> None:
    assert change[0] in SMALL
    small.write_text(SMALL.replace(*change))
    with pytest.raises(EmulusError, match=r"wrong products|another version"):
        build.library(native.load)
    assert list(cache.iterdir()) == []


@needs_compiler
def test_what_a_compiler_does_not_know_is_left_out(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build._compiler()[0]
    picky = f'case "$*" in *-fopenmp*|*-march*) echo "what is that?" >&2; exit 1;; esac\nexec {real} "$@"'
    monkeypatch.setenv("CXX", script(tmp_path / "picky", picky))
    assert build.library(native.load).is_file()


@needs_compiler
def test_a_command_with_arguments(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{build._compiler()[0]} -DNOTHING")
    assert build.library(native.load).is_file()


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_not_be_written_to(small: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    path = build.library(native.load)
    assert path.is_file()
    assert cache not in path.parents


@needs_compiler
def test_a_cache_that_is_a_file(small: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    path = build.library(native.load)
    assert path.is_file()
    assert cache not in path.parents


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        (None, "no C++ compiler was found"),
        ("echo 'no space left' >&2; exit 1", "no space left"),
        ("exit 3", "exit status 3"),
        ("exit 0", "exit status 0"),
        ('for last; do :; done; echo rubbish > "$last"', "cannot be loaded"),
    ],
)
def test_a_compiler_that_does_not_work(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None, says: str
) -> None:
    path = str(tmp_path / "nowhere") if compiler is None else script(tmp_path / "compiler", compiler)
    monkeypatch.setenv("CXX", path)
    with pytest.raises(EmulusError, match=says.replace("+", r"\+")):
        build.library(native.load)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_without_it_one_line_is_said(tmp_path: Path) -> None:
    said = ask(CXX=script(tmp_path / "compiler", "echo 'cannot, sorry' >&2; exit 1"))
    assert said.stdout.split() == ["False", "False"]
    assert len(said.stderr.splitlines()) == 1
    assert "cannot, sorry" in said.stderr
    assert "PyTorch" in said.stderr


def test_switched_off() -> None:
    said = ask(EMULUS_NATIVE="0", CXX="/nonexistent")
    assert said.stdout.split() == ["False", "False"]
    assert said.stderr == ""


@needs_compiler
def test_two_processes_at_once(small: Path, cache: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from emulus.kernels import build, native\n"
        "build.SOURCE = Path(sys.argv[1]); print(build.library(native.load))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(small)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in both}
    assert all(process.returncode == 0 for process in both)
    assert len(paths) == 1
    assert [str(file) for file in cache.iterdir()] == list(paths)
