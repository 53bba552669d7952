"""The choice of the next id."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emulus.kernels.gpu import launch

if find_spec("triton") is not None:
    import triton

    from emulus.kernels.programs import choice as programs

# Most programs that share a row, and logits that one of them counts and scores at a time.
_PARTS = 16
_COUNTED = 2048
_SCORED = 1024
# Logits near the k-th largest that one program keeps in registers while it looks for it.
_LIST = 8192


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

    Ties go to the first column. A logit that is not a number is never chosen and counts as the smallest;
    a row without any other gives column 0.

    Args:
        cond: Logits given the prompt, of ids that follow one another; bfloat16 or float32.
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
    filtered = temperature != 0 and 0 < k < ids
    parts = min(_PARTS, triton.next_power_of_2(launch.blocks(ids, _COUNTED)))

    def some(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(n, *shape, dtype=dtype, device=cond.device)

    counts = some(parts, programs.BINS.value if filtered else 0, dtype=torch.int32)
    ends, bests, out = some(2, dtype=torch.int32), some(parts, dtype=torch.int64), some(dtype=torch.int64)
    orders, scores = (some(ids if filtered else 0, dtype=dtype) for dtype in (torch.int32, torch.int64))
    guided = null is not None and scale != 1
    logits = cond.contiguous(), null.contiguous() if guided and null is not None else cond
    row = ids, logits[0].stride(0)
    factors = float(scale), 1 / temperature if temperature else 1.0
    shape = {"GUIDED": guided, "FILTERED": filtered, "PARTS": parts, "num_warps": 8}
    launch.run(programs.count, (n, parts), *logits, counts, ends, *row, *factors, **shape, CHUNK=_COUNTED)
    launch.run(
        programs.choose,
        (n, parts),
        *(*logits, seeds, positions, counts, ends, bests, orders, scores, out),
        *(*row, k, first_id, *factors),
        **shape,
        NOISY=temperature != 0,
        CHUNK=_SCORED,
        LIST=_LIST,
    )
    return out
