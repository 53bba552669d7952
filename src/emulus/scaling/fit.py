"""losses of small runs -> the loss of a larger one: L(N, D) = E + A / N^alpha + B / D^beta."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from emulus.errors import EmulusError, at_least

NAMES = ("e", "a", "b", "alpha", "beta")
FEWEST_RUNS = len(NAMES) + 1
"""Five would lie on the law exactly, and say nothing of how far runs scatter around it."""
FEWEST_KINDS = 3
"""Different sizes, and different numbers of tokens: with two of either, E and the exponents cannot be told apart."""

_EXPONENTS = (0.1, 0.2, 0.35, 0.55, 0.8, 1.2)
# More change no digit that is shown.
_ITERATIONS = 200


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a run reached.

    Attributes:
        parameters: N, counted the same way for every run.
        tokens: D, ids seen in training.
        loss: L, in any unit.
    """

    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Law:
    """L(N, D) = e + a / N^alpha + b / D^beta."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss of a model of this size after this many tokens."""
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value, and the range that holds the given share of the bootstrap's draws."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law and what the bootstrap says about it.

    Attributes:
        law: The best fit.
        draws: The law fitted to each of the bootstrap's draws.
        residuals: Of the runs' logarithmic losses, widened for the five constants that were fitted to them.
        level: Share of the draws that intervals hold.
        seed: Of the draws.
    """

    law: Law
    draws: tuple[Law, ...]
    residuals: tuple[float, ...]
    level: float
    seed: int

    def constants(self) -> dict[str, Interval]:
        """Each constant with its interval."""
        return {
            name: self._interval(getattr(self.law, name), [getattr(draw, name) for draw in self.draws])
            for name in NAMES
        }

    def predict(self, parameters: float, tokens: float) -> Interval:
        """What a run of this size is expected to measure.

        The interval is for one measurement: it holds the law's uncertainty and the scatter of single runs around it.

        Args:
            parameters: N of the run.
            tokens: D of the run.
        """
        generator = torch.Generator().manual_seed(self.seed + 1)
        chosen = torch.randint(len(self.residuals), (len(self.draws),), generator=generator).tolist()
        losses = [
            draw.loss(parameters, tokens) * math.exp(self.residuals[index])
            for draw, index in zip(self.draws, chosen, strict=True)
        ]
        return self._interval(self.law.loss(parameters, tokens), losses)

    def _interval(self, value: float, draws: Sequence[float]) -> Interval:
        ends = torch.tensor([(1 - self.level) / 2, (1 + self.level) / 2], dtype=torch.float64)
        low, high = torch.tensor(draws, dtype=torch.float64).quantile(ends).tolist()
        return Interval(value=value, low=min(low, value), high=max(high, value))


def fit(points: Sequence[Point], *, delta: float = 1e-3, draws: int = 1000, level: float = 0.9, seed: int = 0) -> Fit:
    """Fit the law to runs, as in the third approach of Hoffmann et al.

    The Huber loss of the difference of logarithms is summed over the runs and minimised over the logarithms of all five
    constants (so that none is negative: a law in which larger models are worse foretells nothing), from a grid of
    starts. Theirs used L-BFGS; here all starts and all of the bootstrap's draws go down together by damped Gauss-Newton
    steps (Levenberg-Marquardt, with Huber's weights), to the same minimum.

    Intervals are a bootstrap over runs: each draw gives every run the fitted loss times the scatter of a run drawn
    with replacement, and fits again. (Drawing the runs themselves would leave a ladder of a dozen without a size.)

    Args:
        points: At least six runs, of at least three sizes and three numbers of tokens.
        delta: Where Huber's loss turns from squares to absolute values; theirs is 1e-3.
        draws: Of the bootstrap.
        level: Share of the draws that intervals hold.
        seed: Of the draws.

    Raises:
        EmulusError: Too few runs, sizes or numbers of tokens, or a value that is not positive.

    Source: Hoffmann et al. 2022 (arXiv:2203.15556), section 3.3 and appendix D.3; the sum instead of the mean after
    Besiroglu et al. 2024 (arXiv:2404.10102), who found that the mean stopped their fit early.
    """
    at_least(1, draws=draws)
    if not 0 < level < 1:
        raise EmulusError(f"level must be between 0 and 1, got {level}")
    _check(points)
    sizes, tokens, losses = (
        torch.tensor([getattr(point, name) for point in points], dtype=torch.float64).log()
        for name in ("parameters", "tokens", "loss")
    )
    # Centred: constants and exponents hardly depend on each other then.
    problem = _Problem(sizes=sizes - sizes.mean(), tokens=tokens - tokens.mean(), delta=delta)
    starts = _starts(problem, losses)
    found, heights = problem.minimise(starts, losses.expand(len(starts), -1))
    best = found[heights.argmin()]
    fitted = problem.predict(best)
    residuals = (losses - fitted) * math.sqrt(len(points) / (len(points) - len(NAMES)))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(points), (draws, len(points)), generator=generator)
    # A draw's minimum is near that of the data.
    drawn, _ = problem.minimise(best.expand(draws, -1), fitted + residuals[chosen])
    means = float(sizes.mean()), float(tokens.mean())
    return Fit(
        law=_law(best, means),
        draws=tuple(_law(each, means) for each in drawn),
        residuals=tuple(residuals.tolist()),
        level=level,
        seed=seed,
    )


def _check(points: Sequence[Point]) -> None:
    for point in points:
        for name in ("parameters", "tokens", "loss"):
            if not 0 < getattr(point, name) < math.inf:
                raise EmulusError(f"a run's {name} must be positive, got {getattr(point, name)}; leave it out")
    if len(points) < FEWEST_RUNS:
        raise EmulusError(
            f"{len(points)} runs cannot give five constants and their scatter: at least {FEWEST_RUNS} are needed"
        )
    for name, what in (("parameters", "sizes"), ("tokens", "numbers of tokens")):
        kinds = len({getattr(point, name) for point in points})
        if kinds < FEWEST_KINDS:
            raise EmulusError(
                f"the runs are of {kinds} different {what}, and the law needs at least {FEWEST_KINDS}; train more"
            )


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Many fits to runs of the same sizes and tokens, side by side."""

    sizes: Float64[Tensor, " runs"]
    tokens: Float64[Tensor, " runs"]
    delta: float

    def predict(self, values: Float64[Tensor, "*fits 5"]) -> Float64[Tensor, "*fits runs"]:
        """Logarithmic losses."""
        return self._parts(values).logsumexp(-1)

    def _parts(self, values: Float64[Tensor, "*fits 5"]) -> Float64[Tensor, "*fits runs 3"]:
        """Logarithms of the law's three parts."""
        e, a, b, *exponents = values.unsqueeze(-1).unbind(-2)
        alpha, beta = (exponent.exp() for exponent in exponents)
        return torch.stack(
            [e.expand(*values.shape[:-1], len(self.sizes)), a - alpha * self.sizes, b - beta * self.tokens], -1
        )

    def height(
        self, values: Float64[Tensor, "fits 5"], targets: Float64[Tensor, "fits runs"]
    ) -> Float64[Tensor, " fits"]:
        """What is minimised."""
        distance = (self.predict(values) - targets).abs()
        square = distance.clamp(max=self.delta)
        return (square * (distance - square / 2)).sum(-1)

    def minimise(
        self, values: Float64[Tensor, "fits 5"], targets: Float64[Tensor, "fits runs"]
    ) -> tuple[Float64[Tensor, "fits 5"], Float64[Tensor, " fits"]]:
        """Go down from each start; where it ended and how high that is."""
        values, damping = values.clone(), torch.full((len(values), 1), 1e-2, dtype=torch.float64)
        height = self.height(values, targets)
        for _ in range(_ITERATIONS):
            parts = self._parts(values)
            distance = parts.logsumexp(-1) - targets
            share = parts.softmax(-1)
            exponents = values[:, None, 3:].exp()
            slope = torch.cat([share, -share[..., 1:] * exponents * torch.stack([self.sizes, self.tokens], -1)], -1)
            # Huber's loss is that of squares with these weights.
            weighted = slope * (self.delta / distance.abs().clamp(min=self.delta)).unsqueeze(-1)
            curvature = weighted.mT @ slope
            # A constant that no run depends on (E far below every loss) is left where it is.
            diagonal = curvature.diagonal(dim1=-2, dim2=-1)
            ridge = damping * diagonal + 1e-12 * diagonal.amax(-1, keepdim=True)
            down = torch.linalg.solve(curvature + ridge.diag_embed(), weighted.mT @ distance.unsqueeze(-1)).squeeze(-1)
            trial = values - down.clamp(-2, 2)
            reached = self.height(trial, targets)
            better = reached < height
            values = torch.where(better.unsqueeze(-1), trial, values)
            settled = torch.where(better, height - reached <= 1e-10 * height, damping.squeeze(-1) > 1e8)
            height = torch.where(better, reached, height)
            damping = torch.where(better.unsqueeze(-1), damping / 4, damping * 8).clamp(1e-9, 1e9)
            if bool(settled.all()):
                break
        return values, height


def _starts(problem: _Problem, losses: Float64[Tensor, " runs"]) -> Float64[Tensor, "starts 5"]:
    """Pairs of exponents, each with a part of the least loss as the floor and the rest shared."""
    least = losses.min()
    starts = [
        [
            float(least) + math.log(floor),
            *[float(least) + math.log((1 - floor) / 2)] * 2,
            math.log(alpha),
            math.log(beta),
        ]
        for floor in (0.1, 0.5, 0.9)
        for alpha in _EXPONENTS
        for beta in _EXPONENTS
    ]
    return torch.tensor(starts, dtype=torch.float64)


def _law(values: Float64[Tensor, " 5"], means: tuple[float, float]) -> Law:
    """Constants of the law out of those of the centred problem."""
    e, a, b = values[:3].tolist()
    alpha, beta = values[3:].exp().tolist()
    return Law(e=math.exp(e), a=math.exp(a + alpha * means[0]), b=math.exp(b + beta * means[1]), alpha=alpha, beta=beta)
