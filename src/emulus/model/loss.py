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
    job = _Job(
        products=_type_of_products(hidden, weight),
        z_loss=z_loss,
        group=group,
        first_id=first_id,
        most_rows=_most_rows(len(weight), hidden.device, group),
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
    most_rows: int
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


# Fewer tokens at a time cost time, since the head's gradient is read and written once per chunk. Smaller blocks and
# fewer rows are no faster, and threads that meet more often wait longer where others use the processors, too.
_CPU = _Sizes(logits=96 << 20, tokens=512, block=1 << 21, rows=16384)
_GPU = _Sizes(logits=1 << 30, tokens=8192, block=1 << 26, rows=32768)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, job: _Job
    ) -> tuple[Tensor, Tensor]:
        hidden_grad, weight_grad = grads = [
            torch.zeros_like(tensor, dtype=job.sums) if job.gradients and needed else None
            for tensor, needed in zip((hidden, weight), ctx.needs_input_grad, strict=False)
        ]
        chunks = _Chunks(hidden, weight, targets, weights.to(job.sums), hidden_grad, weight_grad, job)
        with torch.autocast(hidden.device.type, enabled=False):
            total, tokens = chunks.run()
        if hidden_grad is not None and job.group is not None:
            dist.all_reduce(hidden_grad, group=job.group)
        ctx.save_for_backward(
            *(None if grad is None else grad.to(like.dtype) for grad, like in zip(grads, (hidden, weight), strict=True))
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


class _Chunks(NamedTuple):
    """The work on all tokens; the gradients are added to."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    weights: Tensor
    hidden_grad: Tensor | None
    weight_grad: Tensor | None
    job: _Job

    def run(self) -> tuple[Tensor, Tensor]:
        """Go over the chunks; total, and the losses of the tokens."""
        ids, dtype, device = len(self.weight), self.job.products, self.hidden.device
        sizes = _GPU if self.hidden.is_cuda else _CPU
        size = _chunk_size(len(self.hidden), self.job.most_rows * dtype.itemsize, sizes)
        # One piece of memory for all chunks, since a CPU spends time on fresh pages. Its rows begin at round places,
        # without which a GPU multiplies slowly.
        padded = torch.empty(size, -(-ids // 64) * 64, dtype=dtype, device=device)
        # Products on some processors (bfloat16 on Intel's AMX) also read what lies behind a row's end and multiply it
        # by zeros. That must not be unwritten memory: 0 * NaN is NaN.
        padded[:, ids:].zero_()
        buffer = padded[:, :ids]
        losses, partition = (torch.empty(len(self.hidden), dtype=self.job.sums, device=device) for _ in range(2))
        for part in _slices(len(self.hidden), size):
            logits = buffer[: len(self.hidden[part])]
            losses[part], partition[part] = self._chunk(part, logits, sizes)
        total = (self.weights * (losses + self.job.z_loss * partition.square())).sum()
        return total, losses

    def _chunk(self, part: slice, logits: Tensor, sizes: _Sizes) -> tuple[Tensor, Tensor]:
        """Losses and log-partitions of some tokens."""
        _multiply(self.hidden[part], self.weight, logits, sizes)
        target = _Target.find(logits, self.targets[part] - self.job.first_id)
        peak, mass = _exponentials(logits, self.job.sums, sizes)
        whole = _over_group(peak, mass, target, self.targets[part], self.job.group)
        log_mass = whole.mass.log()
        partition = log_mass + whole.peak
        if self.hidden_grad is not None or self.weight_grad is not None:
            # 60: where all ids here are so unlikely, their gradients vanish, but a target's does not, and its entry in
            # the row must not overflow.
            scale = whole.mass * (whole.peak - peak).clamp_(max=60).exp_()
            slope = 1 + 2 * self.job.z_loss * partition
            _put_targets(logits, peak, scale / slope, target)
            self._add_gradients(part, logits, self.weights[part] * slope / scale, sizes)
        # Small differences first: of large logits, the log-partition has few digits left.
        return log_mass + (whole.peak - whole.target), partition

    def _add_gradients(self, part: slice, logits: Tensor, factor: Tensor, sizes: _Sizes) -> None:
        """Add to both gradients, given those of the logits but for a factor of each row."""
        scaled = self.hidden[part].mul(factor[:, None]).to(logits.dtype)
        for rows in _slices(len(self.weight), sizes.rows):
            columns = logits[:, rows]
            if self.hidden_grad is not None:
                _add_product(self.hidden_grad[part], columns, self.weight[rows].to(logits.dtype))
            if self.weight_grad is not None:
                _add_product(self.weight_grad[rows], columns.T, scaled)
        if self.hidden_grad is not None:
            self.hidden_grad[part] *= factor[:, None]


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
    if _has_kernel(logits, sums):
        from emulus.kernels.gpu.loss import exponentials

        return exponentials(logits)
    peak, mass = (torch.empty(len(logits), dtype=sums, device=logits.device) for _ in range(2))
    for rows in _slices(len(logits), max(1, sizes.block // logits.shape[1])):
        block = logits[rows].to(sums)
        torch.amax(block, 1, out=peak[rows])
        block.sub_(peak[rows, None]).exp_()
        torch.sum(block, 1, out=mass[rows])
        if block.dtype != logits.dtype:
            logits[rows] = block
    return peak, mass


def _has_kernel(logits: Tensor, sums: torch.dtype) -> bool:
    """Whether one kernel does it all, where plain PyTorch goes over the numbers in float32 seven times."""
    if not logits.is_cuda or sums != torch.float32:
        return False
    from emulus.kernels import gpu

    return gpu.available()


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


def _most_rows(rows: int, device: torch.device, group: dist.ProcessGroup | None) -> int:
    """The most rows of the head that a process has: all must take equally many tokens at a time."""
    most, least = rows, rows
    if group is not None:
        counts = torch.tensor([rows, -rows], device=device)
        dist.all_reduce(counts, dist.ReduceOp.MAX, group=group)
        most, least = counts.abs().tolist()
    if not least:
        raise EmulusError("a process has no rows of the head: more share it than it has rows; use fewer")
    return most


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
