"""What a recipe is."""

from __future__ import annotations

from dataclasses import dataclass

from emulus.data.tokenize_config import TokenizeConfig
from emulus.train.pretrain import PretrainConfig
from emulus.train.tokenizer import TokenizerTrainConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The three stages from media files to a model, each reading what the one before it wrote.

    Attributes:
        tokenizer: None where a vision tokenizer is taken that others have trained.
        tokens: Of the data.
        decoder: On these tokens.
    """

    tokenizer: TokenizerTrainConfig | None
    tokens: TokenizeConfig
    decoder: PretrainConfig
