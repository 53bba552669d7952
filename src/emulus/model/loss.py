"""hidden states and targets -> cross-entropy and its gradients, without the logits of all tokens ever existing.

A few tokens at a time: their logits, the exponentials in place, and at once what they add to both gradients. So each
product is computed once, as in the plain loss, but only a chunk of logits is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from emulus.errors import EmulusError


class Losses(NamedTuple):
    """What :func:`linear_cross_entropy` computes.

    Attributes:
        total: Weighted sum over the tokens; the only part through which gradients flow.
        tokens: Cross-entropy of each token in nats.
    """

    total: Float[Tensor, ""]
    tokens: Float[Tensor, " n"]


def linear_cross_entropy(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    targets: Int64[Tensor, " n"],
    weights: Float[Tensor, " n"],
    *,
    z_loss: float = 0.0,
    group: dist.ProcessGroup | None = None,
    first_id: int = 0,
) -> Losses:
    """Cross-entropy of ``hidden @ weight.T`` against ``targets``.

    ``total`` is the sum of ``weights * (cross_entropy + z_loss * log_partition ** 2)``. Its gradients are computed
    here, not in the backward pass, which only scales them, in place: going backward twice is refused. Under autocast
    (to bfloat16; float16 would overflow) the products are in its type; exponentials and sums are in float32 at least.

    Args:
        hidden: One row per token.
        weight: The head, one row per id; or some rows of it (see ``group``).
        targets: The id that each token should predict.
        weights: How much each token counts; one of 0 contributes nothing.
        z_loss: Weight of the squared log-partition.
        group: Processes that share the head's rows among them. All give the same tokens and get the same losses and
            the same gradient of ``hidden``; that of ``weight`` is of their own rows.
        first_id: The id of the first row of ``weight``.

    Raises:
        EmulusError: There are no rows of the head here, or a target is not among the ids. A GPU would have to be waited
            for to see the latter: there the loss is NaN.

    Source: gradients in the forward pass as in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989); vocabulary-parallel
    as in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053); z-loss of PaLM (Chowdhery et al. 2022, arXiv:2204.02311).
    """
    if not len(weight):
        raise EmulusError("a process has no rows of the head: more share it than it has rows; use fewer")
    job = _Job(
        products=_type_of_products(hidden, weight),
        z_loss=z_loss,
        group=group,
        first_id=first_id,
        gradients=torch.is_grad_enabled(),
    )
    return Losses(*_LinearCrossEntropy.apply(hidden, weight, targets, weights, job))


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is not a tensor."""

    products: torch.dtype
    z_loss: float
    group: dist.ProcessGroup | None
    first_id: int
    gradients: bool

    @property
    def sums(self) -> torch.dtype:
        return torch.promote_types(self.products, torch.float32)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """How much is worked on at a time.

    Attributes:
        logits: Bytes of a chunk's logits.
        tokens: Most tokens of a chunk.
        block: Numbers that go through the exponential together; on a CPU they should stay in its cache.
        rows: Rows of the head in one product.
    """

    logits: int
    tokens: int
    block: int
    rows: int


# Fewer tokens at a time cost time, since the head's gradient is read and written once per chunk.
_CPU = _Sizes(logits=96 << 20, tokens=512, block=1 << 20, rows=4096)
_GPU = _Sizes(logits=1 << 30, tokens=8192, block=1 << 26, rows=32768)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, job: _Job
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad
        zeros = [
            torch.zeros_like(tensor, dtype=job.sums) if job.gradients and need else None
            for tensor, need in zip((hidden, weight), needed, strict=False)
        ]
        with torch.autocast(hidden.device.type, enabled=False):
            total, tokens = _all_chunks(hidden, weight, targets, weights.to(job.sums), job, *zeros)
        if zeros[0] is not None and job.group is not None:
            dist.all_reduce(zeros[0], group=job.group)
        ctx.save_for_backward(
            *(None if grad is None else grad.to(like.dtype) for grad, like in zip(zeros, (hidden, weight), strict=True))
        )
        ctx.mark_non_differentiable(tokens)
        ctx.set_materialize_grads(False)
        return total, tokens

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        if scale is None:
            return None, None, None, None, None
        # In place, since a second copy of the head's gradient may be the most memory that a step needs.
        both = [grad if grad is None else grad.mul_(scale) for grad in ctx.saved_tensors]
        return *both, None, None, None


def _all_chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    job: _Job,
    hidden_grad: Tensor | None,
    weight_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Go over the tokens; total, losses of the tokens, and the gradients added to what is given."""
    sizes = _GPU if hidden.is_cuda else _CPU
    partition, losses = (torch.empty(len(hidden), dtype=job.sums, device=hidden.device) for _ in range(2))
    size = _chunk_size(len(hidden), len(weight) * job.products.itemsize, sizes)
    # One piece of memory for all chunks: fresh pages cost a CPU time.
    buffer = torch.empty(size, len(weight), dtype=job.products, device=hidden.device)
    for part in _slices(len(hidden), size):
        logits = buffer[: len(hidden[part])]
        _multiply(hidden[part], weight, logits, sizes)
        target = _Target.find(logits, targets[part] - job.first_id)
        peak, mass = _exponentials(logits, job.sums, sizes)
        whole = _over_group(peak, mass, target, targets[part], job.group)
        log_mass = whole.mass.log()
        # Small differences first: of large logits, the sum of mass and peak would keep few digits.
        losses[part] = log_mass + (whole.peak - whole.target)
        partition[part] = log_mass + whole.peak
        if hidden_grad is None and weight_grad is None:
            continue
        # 60: where all ids here are so unlikely, their gradients vanish, but a target's does not, and its entry in
        # the row must not overflow.
        scale = whole.mass * (whole.peak - peak).clamp_(max=60).exp_()
        slope = 1 + 2 * job.z_loss * partition[part]
        _put_targets(logits, peak, scale / slope, target)
        factor = weights[part] * slope / scale
        scaled = hidden[part].mul(factor[:, None]).to(job.products)
        for rows in _slices(len(weight), sizes.rows):
            columns = logits[:, rows]
            if hidden_grad is not None:
                _add_product(hidden_grad[part], columns, weight[rows].to(job.products))
            if weight_grad is not None:
                _add_product(weight_grad[rows], columns.T, scaled)
        if hidden_grad is not None:
            hidden_grad[part] *= factor[:, None]
    total = (weights * (losses + job.z_loss * partition.square())).sum()
    return total, losses


def _multiply(hidden: Tensor, weight: Tensor, logits: Tensor, sizes: _Sizes) -> None:
    """Logits of a few tokens. The head is cast piece by piece: a cast copy of all of it would take more memory."""
    low = hidden.to(logits.dtype)
    for rows in _slices(len(weight), sizes.rows):
        torch.mm(low, weight[rows].to(logits.dtype).T, out=logits[:, rows])


class _Target(NamedTuple):
    """Where the targets are among the logits that are here."""

    column: Int64[Tensor, "n 1"]
    here: Bool[Tensor, " n"]
    logit: Tensor

    @classmethod
    def find(cls, logits: Tensor, places: Int64[Tensor, " n"]) -> _Target:
        here = (places >= 0) & (places < logits.shape[1])
        column = places.clamp(0, logits.shape[1] - 1)[:, None]
        return cls(column, here, logits.gather(1, column)[:, 0])


def _exponentials(logits: Tensor, sums: torch.dtype, sizes: _Sizes) -> tuple[Tensor, Tensor]:
    """Replace each row by ``exp(row - peak)``; the rows' peaks, and the sums of what they became."""
    peak, mass = (torch.empty(len(logits), dtype=sums, device=logits.device) for _ in range(2))
    for rows in _slices(len(logits), max(1, sizes.block // logits.shape[1])):
        block = logits[rows].to(sums)
        torch.amax(block, 1, out=peak[rows])
        block.sub_(peak[rows, None]).exp_()
        torch.sum(block, 1, out=mass[rows])
        if block.dtype != logits.dtype:
            logits[rows] = block
    return peak, mass


class _Whole(NamedTuple):
    """Of each token over all ids: the largest logit, the sum of ``exp(logit - peak)``, and the target's logit."""

    peak: Tensor
    mass: Tensor
    target: Tensor


def _over_group(
    peak: Tensor, mass: Tensor, target: _Target, targets: Tensor, group: dist.ProcessGroup | None
) -> _Whole:
    """Put together what each process knows of the ids that it has."""
    known = torch.stack((mass, torch.where(target.here, target.logit, 0), target.here))
    if group is not None:
        highest = peak.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        known[0] *= (peak - highest).exp_()
        dist.all_reduce(known, group=group)
        peak = highest
    mass, logit, found = known
    if found.is_cpu and not found.all():
        wrong = int(targets[found == 0][0])
        raise EmulusError(f"target {wrong} is not an id of the model; were the data made with another vocabulary?")
    return _Whole(peak, mass, torch.where(found > 0, logit, torch.nan))


def _put_targets(exps: Tensor, peak: Tensor, loss: Tensor, target: _Target) -> None:
    """Take ``loss`` from each target's exponential.

    Rows become the gradients of their logits but for a factor, which is cheaper to apply to what is as wide as the
    model than to what is as wide as the vocabulary.
    """
    places = (torch.arange(len(exps), device=exps.device), target.column[:, 0])
    # In float32: of a likely target little is left, and that must not be the error of rounding 1.
    left = (target.logit - peak).exp_() - loss
    # Not scatter_, which on a CPU copies all of a bfloat16 matrix to float32 and back.
    exps.index_put_(places, torch.where(target.here, left.to(exps.dtype), exps[places]))


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right``."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += left @ right


def _chunk_size(tokens: int, bytes_per_token: int, sizes: _Sizes) -> int:
    """Tokens of a chunk, so that all chunks are about equally long."""
    most = max(1, min(tokens, sizes.tokens, sizes.logits // bytes_per_token))
    return -(-tokens // -(-tokens // most)) if tokens else 1


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _type_of_products(hidden: Tensor, weight: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)
