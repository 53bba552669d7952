"""The learning rate and the size of a model, for models of one ladder."""

from __future__ import annotations

from emulus.model.config import DecoderConfig
from emulus.train.flops import block_matrices

WIDTH_POWER = 0.5
"""With 0 all widths share a rate; 1 is the rule of muP for the matrices alone (arXiv:2203.03466), too much for one rate
that tables and norms share."""


def rate_at_width(rate: float, width: int, *, of: int, power: float = WIDTH_POWER) -> float:
    """The learning rate of a model of another width: ``rate * (of / width) ** power``.

    Args:
        rate: That suits width ``of``.
        width: The model's ``hidden_size``.
        of: The width that ``rate`` was found at.
        power: How fast the rate falls with the width.
    """
    return rate * (of / width) ** power


def counted_parameters(config: DecoderConfig) -> int:
    """N of the law: the parameters that multiply every id, which are the blocks' matrices and the output head.

    The input table is looked up, and norms are few: neither is counted. So 6 N D is what training computes, but for
    attention.
    """
    return config.num_hidden_layers * block_matrices(config) + config.hidden_size * config.vocab_size
