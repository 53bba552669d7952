"""Settings of the training loop (imports no torch)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from emulus.errors import EmulusError, at_least, shown
from emulus.parallel.config import ParallelConfig

MOST_STEPS = 10**8
"""Names of checkpoints have eight digits."""
Board = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One loop for tokenizer and decoder alike.

    Attributes:
        steps: Optimiser steps in all.
        optimizer: ``adamw``, or ``muon`` for the matrices inside the blocks and AdamW for the rest.
        learning_rate: Peak of the schedule.
        warmup_steps: Linear rise from zero.
        schedule: ``cosine`` falls to ``final_learning_rate`` along a half cosine; ``wsd`` stays at the peak and falls
            linearly over the last ``decay_share`` of the steps.
        final_learning_rate: As a share of the peak.
        decay_share: See ``schedule``.
        weight_decay: Of matrices and kernels; norms and biases have none.
        beta1: AdamW's.
        beta2: AdamW's.
        epsilon: AdamW's.
        clip_norm: Largest gradient norm; 0 does not clip.
        skip_norm: Leave out steps whose gradient norm is more than this many times the median of the last steps;
            0 leaves out only those that are not finite.
        ema_decay: Of the averaged weights that are evaluated and saved; 0 keeps none.
        precision: ``auto`` computes in bfloat16 where the device is faster with it. Weights stay float32.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        seed: Of everything random; with the step it gives the batch, the dropout and the initial weights.
        log_every: Steps between lines on the screen (``metrics.jsonl`` has every step).
        evaluate_every: Steps between held-out evaluations; 0 evaluates at the end only.
        save_every: Steps between checkpoints.
        keep: How many of the newest checkpoints stay.
        keep_every: Checkpoints of steps that are a multiple of this stay for good; 0 keeps none for good.
        background_saves: Write checkpoints while training goes on.
        boards: Where figures go beside ``metrics.jsonl``: ``tensorboard``, ``wandb``, ``trackio``; each needs its
            package.
        profile_steps: Record this many steps, from the tenth on, with PyTorch's profiler, into ``profile/``; 0 records
            none.
        parallel: How the model is spread over processes.
    """

    steps: int = 1000
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: Literal["cosine", "wsd"] = "cosine"
    final_learning_rate: float = 0.0
    decay_share: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    skip_norm: float = 0.0
    ema_decay: float = 0.999
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 500
    save_every: int = 500
    keep: int = 2
    keep_every: int = 0
    background_saves: bool = True
    boards: tuple[Board, ...] = ()
    profile_steps: int = 0
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, log_every=self.log_every, save_every=self.save_every, keep=self.keep)
        at_least(0, warmup_steps=self.warmup_steps, evaluate_every=self.evaluate_every, seed=self.seed)
        at_least(0, keep_every=self.keep_every, profile_steps=self.profile_steps, skip_norm=self.skip_norm)
        at_least(0, weight_decay=self.weight_decay, epsilon=self.epsilon, clip_norm=self.clip_norm)
        at_least(0, final_learning_rate=self.final_learning_rate, decay_share=self.decay_share)
        for name in ("weight_decay", "epsilon", "final_learning_rate", "decay_share"):
            if math.isinf(getattr(self, name)):
                raise EmulusError(f"{name} must be finite, got {getattr(self, name)}")
        if self.steps >= MOST_STEPS:
            raise EmulusError(f"steps must be below {MOST_STEPS:,}, got {shown(self.steps)}")
        if not 0 < self.learning_rate < float("inf"):
            raise EmulusError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.seed >= 2**63:
            raise EmulusError(f"seed must be below 2**63, got {self.seed}")
        for name, share in {"ema_decay": self.ema_decay, "beta1": self.beta1, "beta2": self.beta2}.items():
            if not 0 <= share < 1:
                raise EmulusError(f"{name} must be in [0, 1), got {share}")
