"""units of work -> finished shards, by whoever works: this process, several on this machine, or Daft on a cluster."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Generator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from emulus.codec import decode
from emulus.data.encoder import Encoder, Unit
from emulus.data.records import ShardLine
from emulus.data.tokenize_config import TokenizeConfig
from emulus.device import pick_device
from emulus.errors import EmulusError
from emulus.tokenizer.vision import VisionTokenizer

_DIED = "a worker process died, perhaps for want of memory; run the same command again, with fewer --workers"


def finished(
    config: TokenizeConfig, units: Sequence[Unit], vision: VisionTokenizer | None = None
) -> Generator[ShardLine, None, None]:
    """Work through units.

    Args:
        config: Says who works.
        units: What to do; their shards are the same whoever does it.
        vision: The run's vision tokenizer, if it is loaded already.

    Yields:
        The manifest line of each shard as soon as it is on the disk, in any order.

    Raises:
        EmulusError: A source is gone, the disk refuses, a worker died, or Daft is not installed.
    """
    if config.engine == "daft":
        return _by_daft(config, units)
    if config.workers > 1 and len(units) > 1:
        return _by_processes(config, units)
    return _here(config, units, vision)


def _here(
    config: TokenizeConfig, units: Sequence[Unit], vision: VisionTokenizer | None
) -> Generator[ShardLine, None, None]:
    encoder = Encoder(config, pick_device(config.device), vision)
    for unit in units:
        yield encoder.make(unit)


def _by_processes(config: TokenizeConfig, units: Sequence[Unit]) -> Generator[ShardLine, None, None]:
    """Each process is handed the next unit when it is done with one, over a pipe of its own.

    A pipe ends with the process at its other end: a worker that dies is noticed, and workers whose parent was killed
    end by themselves.
    """
    context = multiprocessing.get_context("spawn")
    left = iter(units)
    busy: set[Connection] = set()
    processes = []
    try:
        for number in range(min(config.workers, len(units))):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, config, _device(config, number)), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            busy.add(here)
        # A large unit does not fit into a pipe, so this waits until the worker reads: all are on their way by now.
        for here in busy:
            _hand(here, next(left))
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                line = _answer(pipe)
                unit = next(left, None)
                if unit is None:
                    busy.remove(pipe)
                else:
                    _hand(pipe, unit)
                yield line
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _hand(pipe: Connection, unit: Unit) -> None:
    try:
        pipe.send(unit)
    except (BrokenPipeError, ConnectionResetError):
        _answer(pipe)  # it may have said why it is gone
        raise EmulusError(_DIED) from None


def _answer(pipe: Connection) -> ShardLine:
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise EmulusError(_DIED) from None
    if isinstance(answer, ShardLine):
        return answer
    raise EmulusError(str(answer))


def serve(pipe: Connection, config: TokenizeConfig, device: str) -> None:
    """What a worker process does until its parent is gone, or something is wrong.

    Args:
        pipe: Units come in, lines of the manifest go out; at last perhaps a message.
        config: Of the run.
        device: Where to compute.
    """
    torch.set_num_threads(1)
    try:
        encoder = Encoder(config, device)
        while True:
            pipe.send(encoder.make(pipe.recv()))
    except BaseException as error:
        known = isinstance(error, EmulusError)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        failed = f"a worker process failed ({reason}); finished shards are kept, and the same command goes on"
        try:
            pipe.send(str(error) if known else failed)
        except OSError:
            return  # the parent is gone, which is why there is an error
        if not known and not isinstance(error, KeyboardInterrupt):
            raise


def _device(config: TokenizeConfig, number: int) -> str:
    """Workers take the GPUs in turn."""
    device = pick_device(config.device)
    if device.type == "cuda" and device.index is None:
        return f"cuda:{number % torch.cuda.device_count()}"
    return str(device)


def _by_daft(config: TokenizeConfig, units: Sequence[Unit]) -> Generator[ShardLine, None, None]:
    """Daft holds a column of units and runs a class over it, here or (``DAFT_RUNNER=ray``) on a cluster."""
    # Both report home unless they are told not to before they are imported.
    os.environ.update(DO_NOT_TRACK="1", SCARF_NO_ANALYTICS="1", RAY_USAGE_STATS_ENABLED="0")
    try:
        import daft
    except ImportError:
        raise EmulusError("engine daft needs the package daft: pip install 'emulus[daft]'") from None

    class DaftEncoder(_DaftEncoder):
        # One unit at a time, so that each shard is known to be finished as soon as it is.
        encode = daft.method.batch(return_dtype=daft.DataType.string(), batch_size=1)(_DaftEncoder.encode)

    gpus = 1 if pick_device(config.device).type == "cuda" else 0
    worker = daft.cls(DaftEncoder, max_concurrency=config.workers, gpus=gpus, use_process=True)
    encode = worker(config).encode
    frame = daft.from_pydict({"unit": list(units)})
    if os.environ.get("DAFT_RUNNER") == "ray":
        frame = frame.into_partitions(len(units))
    for row in frame.select(encode(frame["unit"]).alias("line")).iter_rows(results_buffer_size=1):
        values = json.loads(row["line"])
        if "error" in values:
            raise EmulusError(values["error"])
        yield decode(ShardLine, values, "a worker's answer")


class _DaftEncoder:
    """What Daft makes one of in every worker. Shards go to the run's folder, which all workers see."""

    def __init__(self, config: TokenizeConfig) -> None:
        torch.set_num_threads(1)
        self._encoder = Encoder(config, pick_device(config.device))

    def encode(self, units: Any) -> list[str]:
        lines = []
        for unit in units.to_pylist():
            try:
                lines.append(json.dumps(asdict(self._encoder.make(unit))))
            except EmulusError as error:
                lines.append(json.dumps({"error": str(error)}))
        return lines
