"""gradients -> steps, for plain parameters and for those spread over processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from emulus.device import computes_in_bfloat16
from emulus.train.config import TrainConfig

_MOMENTUM = 0.95
_STEPS = 5
# Of x -> a x + b x^3 + c x^5, which takes a matrix's singular values to about 1, the small ones as fast as can be.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def make_optimizer(named_parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices inside the blocks and AdamW for the rest.

    Only matrices and kernels decay. All of the state is there from the start, as tensors, so that a checkpoint can be
    loaded into it.

    Args:
        named_parameters: Those of a model, on their device and spread as they will be.
        config: Names the optimiser and its settings.
    """
    groups: dict[Any, list[nn.Parameter]] = {}
    products: torch.dtype | None = None
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            products = torch.bfloat16 if computes_in_bfloat16(parameter.device, config.precision) else None
            muon = config.optimizer == "muon" and parameter.ndim == 2 and ".layers." in name
            # A fused step takes parameters of one mesh only.
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((muon, parameter.ndim >= 2, mesh), []).append(parameter)
    optimizer = Muon(
        [
            {"params": parameters, "muon": muon, "weight_decay": config.weight_decay if decays else 0.0}
            for (muon, decays, _), parameters in groups.items()
        ],
        products=products,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
    )
    optimizer.make_state()
    return optimizer


class Muon(torch.optim.AdamW):
    """Muon for the groups that say ``"muon": True``, AdamW for the others.

    Momentum is a matrix; a step goes along the nearest orthogonal one, as long as an AdamW step usually is, so that
    both take the same learning rate. The matrix is orthogonalised whole: where processes share it, each brings it
    together and keeps its part.

    Source: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); length of the step: Liu et al. 2025
    (arXiv:2502.16982).
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, products: torch.dtype | None = None, **settings: Any
    ) -> None:
        """Take the groups.

        Args:
            groups: As any optimiser takes them, each with ``"muon"``.
            products: Type in which matrices are orthogonalised; by default bfloat16 on a GPU, float32 on a CPU.
            **settings: AdamW's; ``lr`` and ``weight_decay`` are Muon's, too.
        """
        super().__init__(groups, fused=True, **settings)
        self.products = products

    def make_state(self) -> None:
        """Make the state's tensors, which otherwise the first step does."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if group["muon"]:
                    state.setdefault("momentum", torch.zeros_like(parameter))
                elif not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, parameter.grad, group["lr"], group["weight_decay"])
        return loss

    def _move(self, parameter: Tensor, grad: Tensor, rate: float, decay: float) -> None:
        momentum = self.state[parameter]["momentum"]
        momentum.lerp_(grad, 1 - _MOMENTUM)
        ahead = torch.lerp(grad, momentum, _MOMENTUM)
        whole = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
        products = self.products or (torch.bfloat16 if whole.is_cuda else torch.float32)
        direction = _spread_like(orthogonalize(whole, products), parameter)
        parameter.mul_(1 - rate * decay)
        # An orthogonal matrix of this size times this has the root mean square of a usual AdamW step, 0.2.
        parameter.add_(direction, alpha=-rate * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalize(matrix: Float[Tensor, "rows columns"], products: torch.dtype) -> Float[Tensor, "rows columns"]:
    """Set a matrix's singular values to about 1 by a few steps of Newton and Schulz.

    Args:
        matrix: Any.
        products: Type to compute in.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.to(products)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def _spread_like(whole: Tensor, like: Tensor) -> Tensor:
    """Keep the part that this process has of ``like``."""
    if not isinstance(like, DTensor):
        return whole
    everywhere = [Replicate()] * like.device_mesh.ndim
    spread = DTensor.from_local(whole, like.device_mesh, everywhere, run_check=False)
    return spread.redistribute(placements=like.placements)


@torch.no_grad()
def total_norm(parameters: Iterable[Tensor]) -> Float64[Tensor, ""]:
    """Norm of all gradients together, over all processes; the same bits on each.

    Args:
        parameters: Plain ones, which every process has whole with the same gradient, and spread ones.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    sums: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is not None:
            part, copies = _part_and_copies(parameter.grad, world)
            sums.append(_sum_of_squares(part) / copies)
    total = torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)
    if world > 1:
        dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip_(parameters: Iterable[Tensor], norm: float | Tensor, most: float) -> None:
    """Shorten all gradients so that their norm is ``most``, if it is more; they are not touched if it is not.

    Args:
        parameters: Those whose gradients have the norm.
        norm: What :func:`total_norm` said. A number, or a GPU is waited for.
        most: The largest norm.
    """
    factor = most / (float(norm) + 1e-6)
    grads = [_part_and_copies(each.grad, 1)[0] for each in parameters if each.grad is not None]
    if factor < 1 and grads:
        torch._foreach_mul_(grads, factor)


def _part_and_copies(tensor: Tensor, world: int) -> tuple[Tensor, int]:
    """What this process has of a tensor, and how many of ``world`` processes have the same."""
    if not isinstance(tensor, DTensor):
        return tensor, world
    parts = 1
    for placement, size in zip(tensor.placements, tensor.device_mesh.shape, strict=True):
        assert not placement.is_partial(), "gradients are summed before they are measured"
        parts *= 1 if placement.is_replicate() else size
    return tensor.to_local(), world // parts


def _sum_of_squares(tensor: Tensor) -> Float64[Tensor, ""]:
    # Row by row: over tens of millions of numbers PyTorch's float32 norm is off by half a percent on a CPU.
    rows = torch.linalg.vector_norm(tensor.flatten(1) if tensor.ndim > 1 else tensor[None], dim=1)
    return rows.double().square().sum()
