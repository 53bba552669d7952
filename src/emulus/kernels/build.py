"""Compile the C++ kernels with the system's compiler, once for each source, compiler and kind of processor."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from emulus.errors import EmulusError
from emulus.files import write_file
from emulus.log import logger

SOURCE = Path(__file__).with_name("native.cpp")

# Fusing a * b + c where the source does not say so would make results depend on what the optimiser saw.
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off")
# What a compiler may not know is left out, in this order.
_OPTIONAL = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
_SECONDS = 180


def library(check: Callable[[Path], object], *, macros: Sequence[str] = ()) -> Path:
    """Give the compiled kernels, from the user's cache or made now.

    A file appears in the cache only when it is whole and has passed the check, so that several processes may do this
    at once. Where the cache cannot be written to, a temporary folder is used.

    Args:
        check: Loads a library and raises :class:`EmulusError` if it does not work.
        macros: Names defined for the compiler.

    Returns:
        The library's path.

    Raises:
        EmulusError: There is no compiler, or what it makes does not work.
    """
    compiler = _compiler()
    defines = [f"-D{name}" for name in macros]
    name = f"native-{_key(compiler, defines)}.so"
    path = _cache() / name
    if path.is_file() and _is_ours(path.parent) and _is_ours(path):
        try:
            check(path)
        except EmulusError:
            logger.info("%s does not work and is made again", path)
        else:
            return path

    def write(temporary: Path) -> None:
        _compile(compiler, defines, temporary)
        check(temporary)

    logger.info("compiling the CPU kernels; this is done once and takes some seconds")
    try:
        os.makedirs(path.parent, mode=0o700, exist_ok=True)
        if not _is_ours(path.parent):
            raise OSError("others may write there")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="emulus-")) / name
    write_file(path, write)
    return path


def _compiler() -> list[str]:
    """The command that compiles C++: what ``CXX`` says, else the first that is there."""
    chosen = os.environ.get("CXX")
    commands = [shlex.split(chosen)] if chosen else [["c++"], ["g++"], ["clang++"]]
    for command in filter(None, commands):
        program = shutil.which(command[0])
        if program is not None:
            return [program, *command[1:]]
    names = chosen or "c++, g++, clang++"
    raise EmulusError(f"no C++ compiler was found ({names}); install one, or name it in CXX")


def _compile(compiler: Sequence[str], defines: Sequence[str], path: Path) -> None:
    problem = ""
    for optional in _OPTIONAL:
        command = [*compiler, *_FLAGS, *optional, *defines, str(SOURCE), "-o", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EmulusError(f"{compiler[0]} could not be run ({error})") from error
        if done.returncode == 0 and path.is_file():
            return
        problem = problem or next(iter(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
    raise EmulusError(f"{compiler[0]} could not compile {SOURCE.name} ({problem[:200]})")


def _key(compiler: Sequence[str], defines: Sequence[str]) -> str:
    """A name for everything that the library depends on."""
    program = Path(compiler[0]).resolve()
    stat = program.stat()
    parts = [SOURCE.read_bytes(), repr((_FLAGS, _OPTIONAL, defines, compiler)).encode()]
    parts.append(f"{program} {stat.st_size} {stat.st_mtime_ns} {sys.platform} {_processor()}".encode())
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """What -march=native looks at: model and instructions, of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU ")
    kept = [line for line in lines if line.startswith(wanted)]
    return "\n".join(kept) or f"{platform.machine()} {platform.processor()}"


def _cache() -> Path:
    """The user's cache folder for Emulus."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "emulus"
    try:
        return Path.home() / ".cache" / "emulus"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.mkdtemp(prefix="emulus-"))


def _is_ours(path: Path) -> bool:
    """Whether nobody else may have put it there, or changed it: what lies in it is going to be run."""
    if not hasattr(os, "getuid"):
        return True
    stat = path.stat()
    return stat.st_uid == os.getuid() and not stat.st_mode & 0o022
