"""One row over several processes: who has which ids, and how each layer's keys and values come together."""

from __future__ import annotations

import dataclasses
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor

from emulus.errors import EmulusError
from emulus.model.attention import Row, chunk_of
from emulus.parallel.processes import Processes, all_gather, reduce_scatter


def slice_row(row: Row, processes: Processes) -> tuple[Row, Int64[Tensor, " here"]]:
    """The part of a row that is this process's.

    Later ids see more than earlier ones, so each of n processes takes one chunk of the first n and its mirror image of
    the last n: all have about as much to do.

    Args:
        row: The whole row; its length is a multiple of ``2 x context``.
        processes: Who shares it.

    Returns:
        What the ids that are here may see, and which ids of the row they are.

    Raises:
        EmulusError: The length is not such a multiple.
    """
    parts, total = processes.sizes.context, sum(row.lengths)
    if parts == 1:
        return row, torch.arange(total)
    if total % (2 * parts):
        raise EmulusError(
            f"a row of {total} ids cannot be shared by {parts} processes; pad it to a multiple of {2 * parts}"
        )
    assert processes.roles is not None, "several processes share the row"
    size = total // (2 * parts)
    mine = (processes.context_rank, 2 * parts - 1 - processes.context_rank)
    chunks = tuple(chunk_of(row.lengths, place * size, (place + 1) * size) for place in mine)
    here = torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])
    group = processes.roles.get_group("context")
    return dataclasses.replace(row, chunks=chunks, gather=partial(gather_row, group=group)), here


def gather_row(
    x: Float[Tensor, "batch heads here width"], group: dist.ProcessGroup
) -> Float[Tensor, "batch heads row width"]:
    """Bring the processes' chunks together in the row's order; the gradient goes back to whose the chunk is."""
    return _Gather.apply(x, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        parts = group.size()
        everyone = x.new_empty(parts, *x.shape)
        all_gather(everyone.view(-1), x.contiguous().view(-1), group=group)
        first, mirrored = everyone.chunk(2, dim=3)
        return torch.cat([*first.unbind(0), *mirrored.flip(0).unbind(0)], dim=2)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        group: dist.ProcessGroup = ctx.group  # type: ignore[attr-defined]
        parts = group.size()
        chunks = grads[0].chunk(2 * parts, dim=2)
        mine = torch.stack([torch.cat([chunks[rank], chunks[-1 - rank]], dim=2) for rank in range(parts)])
        grad = torch.empty_like(mine[0])
        reduce_scatter(grad.view(-1), mine.view(-1), group=group)
        return grad, None
