"""Functions run by several processes that talk over gloo, as training does."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.multiprocessing


def run_ranks(function: Callable[..., None], world: int, *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in ``world`` new processes of one thread each; their errors are raised here.

    Inside, :func:`as_rank` makes some of them a group.
    """
    torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        _begin, (function, arguments), nprocs=world, start_method="spawn"
    )


def _begin(rank: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    function(rank, *arguments)


@contextmanager
def as_rank(rank: int, world: int, port: int) -> Iterator[None]:
    """The environment in which ``torchrun`` would start process ``rank`` of ``world``."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    try:
        yield
    finally:
        for name in (*names, "MASTER_ADDR"):
            del os.environ[name]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
