"""From logits of the legal ids to one id per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from emulus.device import numbers
from emulus.kernels import gpu, native
from emulus.sampling.filters import apply_temperature, top_k, top_p
from emulus.sampling.guidance import apply_guidance
from emulus.sampling.noise import gumbel
from emulus.sampling.params import SamplingParams

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One id to be chosen.

    Attributes:
        ranges: Half-open ranges of the ids that may come.
        params: How to choose.
        position: Where in its sequence the id will stand; with the seed it keys the noise.
        cond: Which row of logits is the prompt's.
        null: Which one is the null prompt's; None without guidance.
    """

    ranges: Ranges
    params: SamplingParams
    position: int
    cond: int
    null: int | None = None

    @property
    def kind(self) -> tuple[Ranges, float | None, float, int, float]:
        """What questions must share to be answered together."""
        p = self.params
        return self.ranges, None if self.null is None else p.guidance_scale, p.temperature, p.top_k, p.top_p


def choose(
    logits: Callable[[list[int], Ranges], Float[Tensor, "rows ids"]], questions: Sequence[Question]
) -> Int64[Tensor, " questions"]:
    """Choose one id for every question.

    Args:
        logits: Gives logits of rows, of the ids of these ranges only.
        questions: What is to be chosen, at least one; those of one kind are answered together.

    Returns:
        The ids, in order, on the logits' device: the host need not wait for them.
    """
    groups: dict[object, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(question.kind, []).append(index)
    answers = [_answer(logits, [questions[index] for index in indices]) for indices in groups.values()]
    if len(answers) == 1:
        return answers[0]
    order = [index for indices in groups.values() for index in indices]
    chosen = torch.cat(answers)
    return torch.empty_like(chosen).index_copy_(0, numbers(order, chosen.device), chosen)


def _answer(logits: Callable[[list[int], Ranges], Tensor], group: Sequence[Question]) -> Tensor:
    """Answer questions of one kind."""
    ranges, first = group[0].ranges, group[0].params
    null_rows = [question.null for question in group if question.null is not None]
    both = logits([question.cond for question in group] + null_rows, ranges)
    cond, null = both[: len(group)], both[len(group) :] if null_rows else None
    kernels = _kernels(both.device) if len(ranges) == 1 and first.top_p == 1 else None
    if kernels is None:
        guided = cond.float() if null is None else apply_guidance(cond, null, first.guidance_scale)
        legal = torch.cat([torch.arange(start, stop, device=both.device) for start, stop in ranges])
        return sample(guided, legal, [question.params for question in group], [q.position for q in group])
    start = ranges[0][0]
    columns: Tensor = kernels.choose(
        cond,
        null,
        scale=first.guidance_scale,
        temperature=first.temperature,
        k=first.top_k,
        seeds=numbers([question.params.seed for question in group], both.device),
        positions=numbers([question.position for question in group], both.device),
        first_id=start,
    )
    return columns + start


def _kernels(device: torch.device) -> ModuleType | None:
    """Kernels that choose on this device, if there are."""
    if device.type == "cuda":
        return gpu if gpu.available() else None
    return native if device.type == "cpu" and native.available() else None


def sample(
    logits: Float[Tensor, "batch ids"],
    ids: Int[Tensor, " ids"],
    params: Sequence[SamplingParams],
    positions: Sequence[int],
) -> Int64[Tensor, " batch"]:
    """Choose each row's next id, in plain PyTorch.

    Temperature, then top-k, then top-p, then the largest of logits plus noise.

    Args:
        logits: Guided logits of the legal ids only.
        ids: Which id each column is.
        params: Each row's settings (guidance is already applied).
        positions: Where in its sequence each row's id will stand; with the seed it keys the noise.

    Returns:
        One id per row.
    """
    chosen = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    for setting, rows in _groups(params).items():
        part = logits[rows]
        chosen[rows] = ids[_choose(part, ids, setting, [params[r].seed for r in rows], [positions[r] for r in rows])]
    return chosen


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
    noise = gumbel(numbers(seeds, device), numbers(positions, device), ids.expand(kept.shape))
    return (kept + noise).argmax(-1)
