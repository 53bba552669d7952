"""What a recipe is."""

from __future__ import annotations

from dataclasses import dataclass

from emulus.data.tokens import TokenizeConfig
from emulus.train.pretrain import PretrainConfig
from emulus.train.tokenizer import TokenizerTrainConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The three stages from media files to a model, each reading what the one before it wrote."""

    tokenizer: TokenizerTrainConfig
    tokens: TokenizeConfig
    decoder: PretrainConfig
