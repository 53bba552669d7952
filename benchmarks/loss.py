"""The loss of the head against the plain one, ``F.cross_entropy(F.linear(hidden, head), targets)``.

``python -m benchmarks.loss --json``: forward and backward on random hidden states, in float32 and under bfloat16
autocast, with Emu3's vocabulary and with one of a small model; and the peak memory of each in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from benchmarks.harness import Case, Options, case, conditions, held, interleave, main, require
from emulus.errors import EmulusError
from emulus.model.loss import linear_cross_entropy

Kind = Literal["fp32", "bf16"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Way = Literal["plain", "ours"]
WAYS: tuple[Way, ...] = get_args(Way)

MEMORY_LIMIT = 0.5e9
"""What a step at Emu3's vocabulary and 2,048 tokens may take beside weights, hidden states and targets."""

# Relative root mean square difference: of losses, then of gradients.
TOLERANCE: dict[Kind, tuple[float, float]] = {"fp32": (1e-5, 1e-4), "bf16": (1e-5, 1e-2)}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a case."""

    vocabulary: int
    hidden: int
    tokens: int


EMU3, SMALL = 184_622, 2_048
SIZES = {
    "emu3-512": Sizes(vocabulary=EMU3, hidden=256, tokens=512),
    "emu3-2048": Sizes(vocabulary=EMU3, hidden=256, tokens=2_048),
    "small-4096": Sizes(vocabulary=SMALL, hidden=256, tokens=4_096),
}
TOY = Sizes(vocabulary=300, hidden=16, tokens=64)


class Step:
    """Forward and backward of the loss on the same numbers in either way."""

    def __init__(self, sizes: Sizes, kind: Kind) -> None:
        """Make the numbers.

        Args:
            sizes: How many.
            kind: Whether products are in float32 or bfloat16.
        """
        source = torch.Generator().manual_seed(0)
        self.kind = kind
        self.hidden: Float32[Tensor, "n d"] = torch.randn(sizes.tokens, sizes.hidden, generator=source)
        # Logits get a standard deviation of 2.
        self.head: Float32[Tensor, "v d"] = torch.empty(sizes.vocabulary, sizes.hidden)
        self.head.normal_(std=2 * sizes.hidden**-0.5, generator=source)
        self.targets: Int64[Tensor, " n"] = torch.randint(sizes.vocabulary, (sizes.tokens,), generator=source)
        visual = torch.rand(sizes.tokens, generator=source) < 0.5
        self.weights: Float32[Tensor, " n"] = torch.where(visual, 0.5, 1.0) / sizes.tokens
        self.hidden.requires_grad_()
        self.head.requires_grad_()

    def run(self, way: Way) -> Float[Tensor, " n"]:
        """Each token's loss; the gradients are in ``.grad`` afterwards."""
        self.hidden.grad = self.head.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=self.kind == "bf16"):
            if way == "ours":
                total, tokens = linear_cross_entropy(self.hidden, self.head, self.targets, self.weights)
            else:
                tokens = F.cross_entropy(F.linear(self.hidden, self.head), self.targets, reduction="none")
                total = (tokens * self.weights).sum()
        total.backward()
        return tokens.detach()


def speed(name: str, kind: Kind, options: Options) -> Case:
    """How many times faster ours is."""
    sizes = TOY if options.toy else SIZES[name]
    step = Step(sizes, kind)
    found = _compare(step)
    timings = interleave(lambda: step.run("plain"), lambda: step.run("ours"), pairs=options.pairs, clock=options.clock)
    return case(f"{name}-{kind}", timings, options, **vars(sizes), **found)


def _compare(step: Step) -> dict[str, float]:
    """Check that losses and gradients are the same; by how much they differ."""
    results = []
    for way in WAYS:
        tokens = step.run(way)
        assert step.hidden.grad is not None
        assert step.head.grad is not None
        results.append((tokens, step.hidden.grad, step.head.grad))
    differences = [float((ours - plain).norm() / plain.norm()) for plain, ours in zip(*results, strict=True)]
    for what, difference, most in zip(
        ("losses", "gradients of the hidden states", "gradients of the head"),
        differences,
        (TOLERANCE[step.kind][0], *[TOLERANCE[step.kind][1]] * 2),
        strict=True,
    ):
        require(difference < most, f"{what} differ by {difference:.1e}, more than {most:.0e}")
    return dict(zip(("losses_differ", "hidden_gradients_differ", "head_gradients_differ"), differences, strict=True))


def memory(kind: Kind, options: Options) -> Case:
    """How many times less memory ours takes beside weights, hidden states and targets, in processes of their own."""
    name = "toy" if options.toy else "emu3-2048"
    plain, ours = (_peak_in_a_process(name, kind, way, options) for way in WAYS)
    sizes = {"baseline_bytes": plain, "ours_bytes": ours, "limit_bytes": int(MEMORY_LIMIT)}
    require(ours <= MEMORY_LIMIT, f"the step takes {ours / 1e6:.0f} MB, more than {MEMORY_LIMIT / 1e6:.0f}")
    about = {**vars(TOY if options.toy else SIZES[name]), **sizes, **conditions(options)}
    # What fits into what was there already took nothing: count a page.
    ratio = plain / max(ours, 4096)
    return Case(case=f"memory-{kind}", ratio=ratio, spread=(ratio, ratio), conditions=about)


def _peak_in_a_process(name: str, kind: Kind, way: Way, options: Options) -> int:
    command = [sys.executable, "-m", "benchmarks.loss", "peak", name, kind, way, str(options.threads)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    if ran.returncode:
        raise EmulusError(f"a step in a process of its own failed: {ran.stderr.strip()[-300:]}")
    return int(ran.stdout)


def peak(name: str, kind: str, way: str, threads: str) -> None:
    """Go forward and backward once, and print how many bytes more than before the process held at most."""
    torch.set_num_threads(int(threads))
    # What libraries keep for themselves is taken first.
    Step(TOY, cast(Kind, kind)).run(cast(Way, way))
    step = Step(TOY if name == "toy" else SIZES[name], cast(Kind, kind))
    before = held("VmRSS")
    step.run(cast(Way, way))
    print(held("VmHWM") - before)


CASES: dict[str, Callable[[Options], Case]] = {
    **{f"{name}-{kind}": partial(speed, name, kind) for name in SIZES for kind in KINDS},
    **{f"memory-{kind}": partial(memory, kind) for kind in KINDS},
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        peak(*sys.argv[2:])
    else:
        raise SystemExit(main(CASES))
