"""The choice of the next id."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emulus.kernels.gpu import launch

if find_spec("triton") is not None:
    from emulus.kernels.programs import choice as programs

# Logits of a row that one program keeps in registers, and that it reads at a time else.
_REGISTERS = 32768
_CHUNK = 4096


def choose(
    cond: Float[Tensor, "n ids"],
    null: Float[Tensor, "n ids"] | None,
    *,
    scale: float,
    temperature: float,
    k: int,
    seeds: Int[Tensor, " n"],
    positions: Int[Tensor, " n"],
    first_id: int,
) -> Int[Tensor, " n"]:
    """Choose each row's next id: guidance, temperature, top-k, then the largest of logits plus noise.

    Args:
        cond: Logits given the prompt, of ids that follow one another.
        null: Logits given the null prompt, laid out alike; ``None`` for no guidance.
        scale: Strength of guidance.
        temperature: 0 takes the largest logit.
        k: How many of the largest logits may be chosen (and what ties with the last); 0 for all.
        seeds: Each row's seed, int64.
        positions: Where each row's id will stand, int64.
        first_id: The id of the first column.

    Returns:
        Columns, int64.
    """
    n, ids = cond.shape
    out = torch.empty(n, dtype=torch.int64, device=cond.device)
    cond = cond.contiguous()
    launch.run(
        programs.choose,
        (n,),
        *(cond, cond if null is None else null.contiguous(), seeds, positions, out, ids, cond.stride(0), k, first_id),
        *(float(scale), 1 / temperature if temperature else 1.0),
        GUIDED=null is not None and scale != 1,
        FILTERED=temperature != 0 and 0 < k < ids,
        NOISY=temperature != 0,
        WHOLE=launch.power(ids) if ids <= _REGISTERS else 0,
        CHUNK=_CHUNK,
        num_warps=16,
    )
    return out
