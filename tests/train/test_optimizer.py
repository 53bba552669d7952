"""Steps and norms of gradients, alone and over processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from emulus.errors import EmulusError
from emulus.train.config import TrainConfig
from emulus.train.float8 import to_float8
from emulus.train.optimizer import Muon, clip_, make_optimizer, orthogonalize, total_norm
from tests.ranks import run_ranks

ADAMW = TrainConfig(learning_rate=1e-2, weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-6)
MUON = dataclasses.replace(ADAMW, optimizer="muon")


class Block(nn.Module):
    """Four divides the inner size only."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 12, bias=False)
        self.down = nn.Linear(12, 6, bias=False)
        self.norm = nn.RMSNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Inner()
        self.head = nn.Linear(6, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.model(ids))


def backward(model: nn.Module, step: int = 0) -> None:
    """Gradients that are the same on every process, or the mean over them."""
    ids = torch.arange(step, step + 21) % 7
    logits = model(ids[:-1])
    (logits.square().sum() - 5 * logits[torch.arange(20), ids[1:]].sum()).backward()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(model: nn.Module, config: TrainConfig, steps: int = 3) -> list[Tensor]:
    optimizer = make_optimizer(model.named_parameters(), config)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return [whole(parameter.detach()) for parameter in model.parameters()]


def test_adamw_is_pytorchs() -> None:
    theirs = Model()
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, fused=True)
    for step in range(3):
        backward(theirs, step)
        reference.step()
        reference.zero_grad()
    ours = Model()
    run(ours, ADAMW)
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_muon_is_pytorchs() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 20), (20, 8), (6, 6))]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1}
    reference = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    # PyTorch's computes in bfloat16 everywhere.
    optimizer = Muon([{"params": ours, "muon": True}], products=torch.bfloat16, **settings)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        optimizer.make_state()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


def test_muon_is_for_matrices_inside_blocks() -> None:
    model = Model()
    optimizer = make_optimizer(model.named_parameters(), MUON)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon = {names[id(each)] for group in optimizer.param_groups if group["muon"] for each in group["params"]}
    assert muon == {f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("up", "down")}
    decays = {names[id(each)]: group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    assert {name for name, decay in decays.items() if decay} == {*muon, "model.embed.weight", "head.weight"}
    assert set(decays) == set(names.values())


@pytest.mark.parametrize("config", [ADAMW, MUON])
def test_all_state_is_there_from_the_start(config: TrainConfig) -> None:
    model = Model()
    optimizer = make_optimizer(model.named_parameters(), config)
    before = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    assert set(before) == set(model.parameters())
    assert all(isinstance(tensor, Tensor) for state in before.values() for tensor in state.values())
    backward(model)
    optimizer.step()
    for parameter, state in optimizer.state.items():
        assert all(state[name] is tensor for name, tensor in before[parameter].items())
        assert len(state) == len(before[parameter])
        assert all(tensor.any() for tensor in state.values())


@pytest.mark.parametrize("config", [ADAMW, MUON])
def test_the_loop_sets_the_rate(config: TrainConfig) -> None:
    model = Model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = make_optimizer(model.named_parameters(), config)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    backward(model)
    optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("config", [ADAMW, MUON])
def test_training_lowers_the_loss(config: TrainConfig) -> None:
    model = Model()
    optimizer = make_optimizer(model.named_parameters(), config)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(torch.arange(7)), torch.arange(7).roll(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_frozen_parameters_stay_out() -> None:
    model = Model()
    model.head.requires_grad_(False)
    optimizer = make_optimizer(model.named_parameters(), ADAMW)
    frozen = {id(parameter) for parameter in model.head.parameters()}
    assert not frozen & {id(each) for group in optimizer.param_groups for each in group["params"]}


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_orthogonal(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    # A matrix whose singular values are not too far apart, at any scale.
    spread = left @ torch.linspace(0.2, 1, len(right)).diag() @ right * 1e-3
    values = torch.linalg.svdvals(orthogonalize(spread, torch.float32))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_norm_and_clipping_alone() -> None:
    model = Model()
    backward(model)
    expected = nn.utils.get_total_norm([parameter.grad.double() for parameter in model.parameters()])
    norm = total_norm(model.parameters())
    assert abs(norm / expected - 1) < 1e-6
    versions = [parameter.grad._version for parameter in model.parameters()]
    clip_(model.parameters(), norm, 2 * float(norm))
    assert [parameter.grad._version for parameter in model.parameters()] == versions, "a pass that changes nothing"
    clip_(model.parameters(), norm, 0.5)
    assert abs(total_norm(model.parameters()) - 0.5) < 1e-6


def test_norm_of_nothing() -> None:
    assert total_norm(Model().parameters()) == 0


def test_norm_of_many_numbers() -> None:
    parameter = nn.Parameter(torch.empty(20_000, 256))
    parameter.grad = torch.full_like(parameter, 0.1)
    assert abs(total_norm([parameter]) / (parameter.numel() * 0.1**2) ** 0.5 - 1) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_that_is_not_finite(bad: float) -> None:
    model = Model()
    backward(model)
    model.head.weight.grad[0, 0] = bad
    assert not total_norm(model.parameters()).isfinite()


def spread(replicate: int, shard: int, tensor: int) -> Model:
    """A model over all processes. Sharding leaves out the head's bias, which every process has whole."""
    model = Model()
    mesh = init_device_mesh("cpu", (replicate, shard, tensor), mesh_dim_names=("replicate", "shard", "tensor"))
    if tensor > 1:
        plan = {"model.layers.*.up": ColwiseParallel(), "model.layers.*.down": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
    if replicate * shard > 1:
        over = mesh["shard"] if replicate == 1 else mesh["replicate", "shard"]
        for layer in model.model.layers:
            fully_shard(layer, mesh=over)
        fully_shard(model, mesh=over, ignored_params={model.head.bias})
    return model


def norms(layouts: Iterable[tuple[int, int, int]]) -> list[list[float]]:
    found = []
    for layout in layouts:
        model = spread(*layout)
        backward(model)
        norm = total_norm(model.parameters())
        clip_(model.parameters(), norm, 0.5)
        clipped = float(total_norm(model.parameters()))
        if dist.get_rank() == 1:
            next(whole for whole in model.parameters() if isinstance(whole, DTensor)).grad.to_local()[..., 0] = (
                torch.nan
            )
        found.append([float(norm), clipped, float(total_norm(model.parameters()))])
    return found


LAYOUTS = [(1, 4, 1), (1, 2, 2), (2, 2, 1), (4, 1, 1), (1, 1, 4), (2, 1, 2)]


def test_norm_over_four_processes() -> None:
    alone = Model()
    backward(alone)
    expected = float(total_norm(alone.parameters()))
    everyone = run_ranks(4, norms, LAYOUTS)
    assert all(str(found) == str(everyone[0]) for found in everyone)
    for norm, clipped, broken in everyone[0]:
        assert abs(norm / expected - 1) < 1e-6
        assert abs(clipped - 0.5) < 1e-6
        assert broken != broken


def steps(layouts: Iterable[tuple[int, int, int]], config: TrainConfig) -> list[list[list[float]]]:
    return [[each.flatten().tolist() for each in run(spread(*layout), config)] for layout in layouts]


def test_steps_over_four_processes() -> None:
    layouts = [(1, 4, 1), (1, 2, 2), (2, 1, 2)]
    alone = [parameter.flatten() for parameter in run(Model(), MUON)]
    for found in run_ranks(4, steps, layouts, MUON):
        for layout in found:
            for mine, other in zip(layout, alone, strict=True):
                torch.testing.assert_close(torch.tensor(mine), other, rtol=0, atol=2e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be such a GPU here")
def test_float8_needs_its_gpu() -> None:
    with pytest.raises(EmulusError, match="Hopper"):
        to_float8(Model())
