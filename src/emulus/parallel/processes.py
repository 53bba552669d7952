"""Who this process is among those that train together."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from emulus.device import pick_device
from emulus.errors import EmulusError
from emulus.log import logger
from emulus.parallel.config import ParallelConfig

# How long a process waits for the others: they may be reading a large model, or drawing.
_PATIENCE = timedelta(minutes=30)
# Newer names of the same calls; the older ones warn.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process and the others.

    Attributes:
        device: Where this one computes.
        rank: Its number.
        world: How many there are.
        sizes: How they share the work; ``replicate`` is settled.
        weights: Mesh of the parameters, ``(replicate, shard, tensor)``; processes that share a row count as ``shard``
            here, since each may keep a part of the weights. None for a process alone.
        roles: Mesh of the work, ``(replicate, shard, context, tensor)``. None for a process alone.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    sizes: ParallelConfig = field(default_factory=lambda: ParallelConfig(replicate=1))
    weights: DeviceMesh | None = None
    roles: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the rows this process computes."""
        return self.rank // (self.sizes.context * self.sizes.tensor)

    @property
    def data_size(self) -> int:
        """Into how many shares the rows are dealt."""
        return self.world // (self.sizes.context * self.sizes.tensor)

    @property
    def context_rank(self) -> int:
        """Which part of each row this process computes."""
        return self.rank // self.sizes.tensor % self.sizes.context

    @property
    def summed_over(self) -> int:
        """How many processes' gradients make a whole one: those that do not share the same ids."""
        return self.world // self.sizes.tensor

    def gather(self, values: Sequence[float]) -> Float64[Tensor, "world n"]:
        """Everyone's numbers, by rank; all must give equally many."""
        mine = torch.tensor(values, dtype=torch.float64)
        if self.world == 1:
            return mine[None]
        everyone = torch.empty(self.world, len(mine), dtype=torch.float64)
        # On the host, so that a GPU is not waited for.
        all_gather(everyone.view(-1), mine)
        return everyone

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes that have different ids; all get the same bits."""
        return (self.gather(values)[:: self.sizes.tensor]).sum(0).tolist()

    def barrier(self) -> None:
        """Wait until all are here."""
        if self.world > 1:
            self.gather([0.0])


def start_processes(sizes: ParallelConfig, device: str) -> Processes:
    """Find the other processes and agree with them on who does what.

    Which process this is comes from the environment: ``RANK``, ``WORLD_SIZE`` and the rest as ``torchrun`` sets them,
    or what Slurm's ``srun`` sets. Without either it is alone.

    Args:
        sizes: How they shall share the work.
        device: ``auto``, ``cpu``, ``cuda`` ... Of ``cuda`` each takes the GPU of its local rank.

    Raises:
        EmulusError: Their number does not fit the sizes, or the device is not there.
    """
    _from_slurm(os.environ)
    world, rank = (_number(name, default) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    settled = settle(sizes, world)
    if world == 1:
        alone = pick_device(device)
        if alone.type == "cuda" and alone.index is not None:
            torch.cuda.set_device(alone)
        return Processes(device=alone, sizes=settled)
    chosen = pick_device(device)
    if chosen.type == "cuda":
        # A task of Slurm may see only the GPU that is its own.
        chosen = pick_device(f"cuda:{_number('LOCAL_RANK', rank) % torch.cuda.device_count()}")
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        # Numbers of the host go over gloo, so that asking for them never waits for a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", timeout=_PATIENCE)
    if rank:
        logger.setLevel(logging.ERROR)
    weights = (settled.replicate, settled.shard * settled.context, settled.tensor)
    roles = (settled.replicate, settled.shard, settled.context, settled.tensor)
    return Processes(
        device=chosen,
        rank=rank,
        world=world,
        sizes=settled,
        weights=init_device_mesh(chosen.type, weights, mesh_dim_names=("replicate", "shard", "tensor")),
        roles=init_device_mesh(chosen.type, roles, mesh_dim_names=("replicate", "shard", "context", "tensor")),
    )


@contextmanager
def running(sizes: ParallelConfig, device: str) -> Iterator[Processes]:
    """:func:`start_processes`, and let go of the others at the end of the block."""
    processes = start_processes(sizes, device)
    yield processes
    # Not after an error: the others may be gone, and the process is about to end anyway.
    if processes.world > 1:
        dist.destroy_process_group()


def settle(sizes: ParallelConfig, world: int) -> ParallelConfig:
    """The sizes with ``replicate`` filled in.

    Raises:
        EmulusError: They do not multiply to the number of processes.
    """
    rest = sizes.shard * sizes.context * sizes.tensor
    replicate = sizes.replicate or world // rest
    if replicate * rest == world:
        return dataclasses.replace(sizes, replicate=replicate)
    wanted = " x ".join(
        f"{name} {size}"
        for name, size in (
            ("replicate", sizes.replicate or "any"),
            ("shard", sizes.shard),
            ("context", sizes.context),
            ("tensor", sizes.tensor),
        )
    )
    remedy = f"start {rest} with torchrun --nproc-per-node {rest} -m emulus ..." if world == 1 else "change one of them"
    raise EmulusError(f"{world} processes cannot be shared out as {wanted}; {remedy}")


@contextmanager
def peers(processes: Processes) -> Iterator[None]:
    """Say in one line that another process is gone, instead of what the network says of it."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
        if processes.world == 1 or not lost:
            raise
        raise EmulusError(
            "another process of this run has stopped (its own message says why); "
            "run the same command again to go on from the newest checkpoint"
        ) from error


def _from_slurm(environment: MutableMapping[str, str]) -> None:
    """Translate what ``srun`` says into what ``torchrun`` would."""
    if "RANK" in environment or _number("SLURM_NTASKS", 1, environment) == 1 or "SLURM_PROCID" not in environment:
        return
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    environment.update({name: environment[slurm] for name, slurm in names.items() if slurm in environment})
    environment.setdefault("MASTER_ADDR", first_host(environment.get("SLURM_JOB_NODELIST", "127.0.0.1")))
    # One port per job, so that two jobs on a machine do not meet.
    environment.setdefault("MASTER_PORT", str(20_000 + _number("SLURM_JOB_ID", 0, environment) % 20_000))


def first_host(nodes: str) -> str:
    """The first of Slurm's list of machines: ``gpu[007-010,012],cpu3`` begins with ``gpu007``."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _number(name: str, default: int, environment: Mapping[str, str] | None = None) -> int:
    value = (os.environ if environment is None else environment).get(name, str(default))
    if not value.isdigit():
        raise EmulusError(f"the environment says {name}={value!r}, which is no number; unset it or start with torchrun")
    return int(value)
