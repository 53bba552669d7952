"""A disk that fails: at the n-th write, rename or flush, for any n."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import safetensors.torch
from safetensors import SafetensorError

KILLED = 9


class Disk:
    """Counts what is done to the disk; the ``fail_at``-th time it fails. Flushes are noted and take no time.

    Args:
        fail_at: From 1; 0 never.
        kill: End the process instead of raising "no space left". As if the power went, files that were written and not
            flushed lose their content.
    """

    def __init__(self, fail_at: int, *, kill: bool) -> None:
        self.fail_at, self.kill = fail_at, kill
        self.count = 0
        self.unflushed: set[str] = set()

    def step(self, where: object) -> None:
        """One more; ``where`` is what it is done to."""
        self.count += 1
        if self.count == self.fail_at:
            if not self.kill:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(where))
            for path in self.unflushed:
                if os.path.exists(path):
                    os.truncate(path, 0)
            os._exit(KILLED)

    @contextmanager
    def failing(self) -> Iterator[Disk]:
        """All of this process's work on files goes through here within the block."""
        plain = {name: getattr(os, name) for name in ("mkdir", "rmdir", "unlink", "remove", "open", "replace", "fsync")}
        open_file, serialize = io.open, safetensors.torch.serialize_file

        def simple(name: str) -> Callable[..., Any]:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                self.step(path)
                return plain[name](path, *args, **kwargs)

            return call

        def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.step(path)
            return plain["open"](path, flags, *args, **kwargs)

        def replace(source: Any, target: Any) -> None:
            self.step(source)
            plain["replace"](source, target)
            start = str(source)
            self.unflushed = {
                str(target) + path.removeprefix(start) if path.startswith(start) else path for path in self.unflushed
            }

        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self.step(path)
            self.unflushed.discard(path)

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+"):
                return open_file(path, mode, *args, **kwargs)
            self.step(path)
            file = open_file(path, mode, *args, **kwargs)
            self.unflushed.add(os.path.abspath(path))
            return _File(file, self)

        def serialized(tensors: Any, path: Any, **kwargs: Any) -> None:
            self.unflushed.add(os.path.abspath(path))
            serialize(tensors, path, **kwargs)
            try:
                self.step(path)
            except OSError as error:
                os.truncate(path, os.path.getsize(path) // 2)
                raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None

        with (
            patch.multiple(os, **{name: simple(name) for name in ("mkdir", "rmdir", "unlink", "remove")}),
            patch.multiple(os, open=os_open, replace=replace, rename=replace, fsync=fsync),
            patch.object(io, "open", opened),
            patch.object(builtins, "open", opened),
            patch.object(safetensors.torch, "serialize_file", serialized),
        ):
            yield self


class _File:
    """A file whose writes count."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: Any) -> int:
        self.disk.step(self.file.name)
        return self.file.write(data)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)
