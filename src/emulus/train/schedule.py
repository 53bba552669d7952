"""How the learning rate moves over the steps."""

from __future__ import annotations

import math

from emulus.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of a step (the first is 0): linear warm-up, then cosine or stable-then-linear ("WSD").

    Args:
        config: Peak, length and shape.
        step: 0 to ``config.steps - 1``.

    Returns:
        The rate; never zero before the last step.
    """
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    floor = config.final_learning_rate
    if config.schedule == "cosine":
        span = max(config.steps - config.warmup_steps, 1)
        done = min(max(step + 1 - config.warmup_steps, 0) / span, 1.0)
        shape = floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
    else:
        left = (config.steps - step) / max(config.steps * config.decay_share, 1)
        shape = floor + (1 - floor) * min(left, 1.0)
    return config.learning_rate * warmup * shape
