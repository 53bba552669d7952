"""From guided logits of the legal ids to one id per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from emulus.sampling.filters import apply_temperature, top_k, top_p
from emulus.sampling.noise import gumbel
from emulus.sampling.params import SamplingParams


def sample(
    logits: Float[Tensor, "batch ids"],
    ids: Int[Tensor, " ids"],
    params: Sequence[SamplingParams],
    positions: Sequence[int],
) -> list[int]:
    """Choose each row's next id.

    Temperature, then top-k, then top-p, then the largest of logits plus noise.

    Args:
        logits: Guided logits of the legal ids only.
        ids: Which id each column is.
        params: Each row's settings (guidance is already applied).
        positions: Where in its sequence each row's id will stand; with the seed it keys the noise.

    Returns:
        One id per row.
    """
    chosen = torch.empty(len(params), dtype=torch.long, device=logits.device)
    for setting, rows in _groups(params).items():
        part = logits[rows]
        chosen[rows] = ids[_choose(part, ids, setting, [params[r].seed for r in rows], [positions[r] for r in rows])]
    return chosen.tolist()


def _groups(params: Sequence[SamplingParams]) -> dict[tuple[float, int, float], list[int]]:
    """Rows that are filtered alike, so that each filter runs once for all of them."""
    groups: dict[tuple[float, int, float], list[int]] = {}
    for row, p in enumerate(params):
        groups.setdefault((p.temperature, p.top_k, p.top_p), []).append(row)
    return groups


def _choose(
    logits: Tensor,
    ids: Tensor,
    setting: tuple[float, int, float],
    seeds: Sequence[int],
    positions: Sequence[int],
) -> Int[Tensor, " batch"]:
    """Give the chosen column of each row."""
    temperature, k, p = setting
    if temperature == 0:
        return logits.argmax(-1)
    kept = top_p(top_k(apply_temperature(logits, temperature), k), p)
    device = logits.device
    noise = gumbel(torch.tensor(seeds, device=device), torch.tensor(positions, device=device), ids.expand(kept.shape))
    return (kept + noise).argmax(-1)
