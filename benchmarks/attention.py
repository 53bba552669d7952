"""Attention in training rows on the CPU, in bfloat16: ours against PyTorch's kernel, document by document.

``python -m benchmarks.attention --json``: forward and backward of one layer of the shipped decoder (4 heads, 2 of keys
and values, width 64) over rows of about 1,536 ids: documents of pictures of 16, 32 and 64 pixels, a clip with what fits
beside it, and a mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from benchmarks.harness import Case, Options, case, interleave, main, require
from emulus.model.attention import causal
from emulus.model.short import attend_short

Way = Literal["library", "ours"]
WAYS: tuple[Way, ...] = get_args(Way)

ROWS = {
    "16-pixels": [45] * 34,
    "32-pixels": [95] * 16,
    "64-pixels": [295] * 5,
    "clip": [1075, 295, 95, 45],
    "mixed": [295] * 3 + [95] * 3 + [45] * 8,
}
TOY = [12, 7, 3]
HEADS, GROUPS, WIDTH = 4, 2, 64
TOLERANCE = 0.02
"""Relative root mean square difference of values and gradients from those in float32."""


class Layer:
    """Forward and backward over the same numbers in either way."""

    def __init__(self, lengths: list[int]) -> None:
        """Make the numbers.

        Args:
            lengths: Ids of each document of the row.
        """
        source = torch.Generator().manual_seed(0)

        def drawn(heads: int) -> Tensor:
            # As the projections leave them: the heads of one id beside one another.
            return torch.randn(1, sum(lengths), heads, WIDTH, generator=source).bfloat16().transpose(1, 2)

        self.lengths = lengths
        self.inputs = [drawn(heads).requires_grad_() for heads in (HEADS, GROUPS, GROUPS)]
        self.towards = drawn(HEADS)

    def run(self, way: Way) -> list[Tensor]:
        """Values, then the gradients of queries, keys and values."""
        q, k, v = self.inputs
        out = attend_short(q, k, v, self.lengths) if way == "ours" else by_document(self.inputs, self.lengths)
        return [out.detach(), *torch.autograd.grad(out, self.inputs, self.towards)]

    def exact(self) -> list[Tensor]:
        """The same in float32."""
        wide = [each.detach().float().requires_grad_() for each in self.inputs]
        out = by_document(wide, self.lengths)
        return [out.detach(), *torch.autograd.grad(out, wide, self.towards.float())]


def by_document(inputs: list[Tensor], lengths: list[int]) -> Tensor:
    """PyTorch's kernel, once for each document."""
    parts = zip(*(each.split(lengths, dim=2) for each in inputs), strict=True)
    return torch.cat([causal(*part) for part in parts], dim=2)


def speed(name: str, options: Options) -> Case:
    """How many times faster ours is."""
    lengths = TOY if options.toy else ROWS[name]
    layer = Layer(lengths)
    exact = layer.exact()
    differ = {way: _differ(layer.run(way), exact) for way in WAYS}
    require(max(differ.values()) < TOLERANCE, f"values or gradients differ from float32's: {differ}")
    repeats = range(1 if options.toy else 10)
    timings = interleave(
        lambda: [layer.run("library") for _ in repeats],
        lambda: [layer.run("ours") for _ in repeats],
        pairs=options.pairs,
        clock=options.clock,
    )
    found = {f"{way}_differs": most for way, most in differ.items()}
    return case(name, timings, options, documents=len(lengths), ids=sum(lengths), passes=len(repeats), **found)


def _differ(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((mine.float() - other).norm() / other.norm()) for mine, other in zip(found, exact, strict=True))


CASES: dict[str, Callable[[Options], Case]] = {name: partial(speed, name) for name in ROWS}

if __name__ == "__main__":
    raise SystemExit(main(CASES))
