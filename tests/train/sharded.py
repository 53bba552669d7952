"""A sharded decoder's steps and checkpoints in a group of one process: every call of several, but for the network."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from emulus.device import autocast
from emulus.model import Decoder, sized
from emulus.model.attention import Row
from emulus.parallel.spread import shard
from emulus.train.config import TrainConfig
from emulus.train.optimizer import clip_, make_optimizer, total_norm
from emulus.train.parts import HostCopy, fill, read_table

LENGTHS = (20, 1, 43)
CLIP = 0.05
"""Less than the gradients' norm, so that they are clipped."""


def train_sharded(kind: str, optimizer: str, folder: Path) -> tuple[list[float], list[float]]:
    """Train two steps sharded and two plain, and take the sharded state through a checkpoint.

    Args:
        kind: ``cpu`` or ``cuda``.
        optimizer: ``adamw`` or ``muon``.
        folder: An empty one.

    Returns:
        Losses and gradient norms of the sharded model, and of the plain one.
    """
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    # As emulus.parallel.processes does it.
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
    config = TrainConfig(optimizer=optimizer, precision="bf16", learning_rate=1e-2, device=kind)  # type: ignore[arg-type]
    figures: list[list[float]] = []
    for sharded in (True, False):
        torch.manual_seed(0)
        model = Decoder(sized("tiny", vocab_size=96, attention_dropout=0.0)).to(device).train()
        if sharded:
            shard(model, init_device_mesh(kind, (1,), mesh_dim_names=("shard",)), bfloat16=True)
        figures.append(_steps(model, config, device, folder if sharded else None))
    dist.destroy_process_group()
    return figures[0], figures[1]


def _steps(model: Decoder, config: TrainConfig, device: torch.device, folder: Path | None) -> list[float]:
    optimizer = make_optimizer(model.named_parameters(), config)
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) == (folder is not None) for parameter in parameters)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(96, (sum(LENGTHS) + 1,), generator=draw).to(device)
    places = torch.cat([torch.arange(length) for length in LENGTHS]).to(device)
    count = sum(LENGTHS)
    figures = []
    for _ in range(2):
        with autocast(device, config.precision):
            losses = model.losses(
                ids[:-1],
                places,
                Row.whole(LENGTHS),
                supervised=torch.arange(count, device=device),
                targets=ids[1:],
                weights=torch.full((count,), 1 / count, device=device),
                z_loss=1e-4,
            )
        losses.total.backward()
        norm = total_norm(parameters)
        clip_(parameters, norm, CLIP)
        torch.testing.assert_close(total_norm(parameters), torch.full_like(norm, CLIP), rtol=1e-4, atol=0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        figures += [float(losses.total.detach()), float(norm)]
    if folder is not None:
        _through_a_checkpoint(model, optimizer, folder)
    return figures


def _through_a_checkpoint(model: Decoder, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Copied, written, spoilt and read again, the state is to the bit what it was."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        state |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    copy = HostCopy()
    copy.take(state)
    before = {name: _here(tensor).clone() for name, tensor in state.items()}
    (folder / "parts").mkdir()
    shapes = copy.write(folder / "parts", None)
    with torch.no_grad():
        for tensor in state.values():
            _here(tensor).fill_(7)
    fill(state, folder / "parts", read_table(folder / "parts", shapes))
    for name, tensor in state.items():
        assert torch.equal(_here(tensor), before[name]), name


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
