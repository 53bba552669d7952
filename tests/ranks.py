"""Processes that work together over gloo, as training does."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_AFTER_A_FAILURE = 30.0
"""Seconds that the other processes have when one has failed."""


def run_ranks(world: int, work: Callable[..., Any], *args: object, seconds: float = 240) -> list[Any]:
    """What ``work(*args)`` returns on each of ``world`` gloo processes; ``None`` for one that ended without a word.

    The processes are forked off one that has imported torch and done nothing else, which saves seconds for each.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["emulus.train.pretrain", "torch.distributed.fsdp", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(world)]
        processes = [
            context.Process(target=_rank, args=(rank, world, f"{folder}/store", pipe[1], seconds, work, args))
            for rank, pipe in enumerate(pipes)
        ]
        for process, pipe in zip(processes, pipes, strict=True):
            process.start()
            pipe[1].close()
        results: dict[Connection, Any] = {}
        try:
            while len(results) < world:
                # The others may wait for one that failed, and need not notice.
                patience = min(seconds, _AFTER_A_FAILURE) if _failures(results) else seconds
                ready = wait([pipe[0] for pipe in pipes if pipe[0] not in results], patience)
                if not ready:
                    break
                for pipe in ready:
                    results[pipe] = _receive(pipe)
        finally:
            # Also where the time limit of the test ends the wait.
            for process in processes:
                if len(results) < world:
                    process.kill()
                process.join()
    failures = _failures(results)
    assert not failures, "\n".join(failures)
    assert len(results) == world, "a process hangs"
    return [results[pipe[0]] for pipe in pipes]


class Failure(str):
    """The traceback of a process."""


def _failures(results: dict[Connection, Any]) -> list[Failure]:
    return [result for result in results.values() if isinstance(result, Failure)]


def _receive(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return None


def _die_with_parent() -> None:
    """End this process when the tests' process is gone: others may wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "it was started by run_ranks"
    parent.join()
    os._exit(1)


def _rank(
    rank: int, world: int, store: str, pipe: Connection, seconds: float, work: Callable[..., Any], args: tuple
) -> None:
    # Where it is, just before the tests give up on it.
    faulthandler.dump_traceback_later(0.9 * seconds)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # What torchrun would say.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        pipe.send(work(*args))
    except BaseException:
        pipe.send(Failure(traceback.format_exc()))
    # Not by destroying the group, which may wait for a process that is gone.
    pipe.close()
    os._exit(0)
