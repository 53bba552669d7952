"""pixels -> latents."""

from __future__ import annotations

import math
from typing import cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from emulus.tokenizer.vision.blocks import (
    Downsample,
    GroupNorm,
    Level,
    Middle,
    TemporalDownsample,
    TemporalResnetBlock,
)
from emulus.tokenizer.vision.config import VisionTokenizerConfig


class Encoder(nn.Module):
    """Frames one by one to ``z_channels`` features, then causal convolutions along time."""

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        self.temporal_factor = config.temporal_factor
        widths = [config.ch, *(config.ch * mult for mult in config.ch_mult)]
        last = len(config.ch_mult) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, kernel_size=3, padding=1)
        self.down = nn.ModuleList()
        for index in range(last + 1):
            level = Level(
                widths[index],
                widths[index + 1],
                blocks=config.num_res_blocks,
                attention=index in config.attn_resolutions,
                code_channels=None,
                dropout=config.dropout,
            )
            if index != last:
                level.downsample = Downsample(widths[index + 1])
            self.down.append(level)
        self.mid = Middle(widths[-1], code_channels=None, dropout=config.dropout)
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, kernel_size=3, padding=1)
        halvings = int(math.log2(config.temporal_factor))
        self.time_conv = nn.ModuleList(TemporalDownsample(config.z_channels) for _ in range(halvings))
        self.time_res_stack = nn.ModuleList(
            TemporalResnetBlock(config.z_channels, dropout=config.dropout) for _ in range(config.num_res_blocks)
        )

    def frames(self, pixels: Float[Tensor, "n c H W"]) -> Float[Tensor, "n z h w"]:
        """The part that sees each frame alone."""
        hidden = self.conv_in(pixels)
        for level in self.down:
            hidden = level(hidden)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(self.mid(hidden)))))

    def time(self, features: Float[Tensor, "b z T h w"]) -> Float[Tensor, "b z t h w"]:
        """The part that looks back along time; ``T`` shrinks by the temporal factor."""
        for conv in self.time_conv:
            features = F.silu(conv(features))
        for block in self.time_res_stack:
            features = block(features)
        return features
