"""pixels -> latents."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from emulus.tokenizer.vision import bands, on_gpu
from emulus.tokenizer.vision.blocks import (
    Downsample,
    GroupNorm,
    Layer,
    Level,
    Middle,
    Past,
    TemporalDownsample,
    TemporalResnetBlock,
    heavy_convolutions,
    precision_of,
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
        with precision_of(self.mid):
            hidden = on_gpu.laid_out(pixels, self.mid.block_1.conv1, lambda: heavy_convolutions(self))
            for layer in self._layers():
                hidden = layer(hidden, None)
            return hidden

    def _layers(self) -> Iterator[Layer]:
        yield self._start
        for level in self.down:
            yield from cast(Level, level).layers()
        yield from self.mid.layers()
        yield self._finish

    def _start(self, pixels: Tensor, _: Tensor | None) -> Tensor:
        if bands.usable(pixels, self.conv_in.out_channels):
            return bands.each_map(lambda sample, _: bands.convolve(sample, self.conv_in), pixels)
        return cast(Tensor, self.conv_in(pixels))

    def _finish(self, x: Tensor, _: Tensor | None) -> Tensor:
        if bands.usable(x, self.conv_out.in_channels):
            return bands.each_map(self._gather, x)
        return cast(Tensor, self.conv_out(self.norm_out(x, silu=True)))

    def _gather(self, x: bands.Map, _: bands.Map | None) -> bands.Map:
        return bands.convolve(x, self.conv_out, affine=self.norm_out.factors(x))

    def time(self, features: Float[Tensor, "b z T h w"], past: Past | None = None) -> Float[Tensor, "b z t h w"]:
        """The part that looks back along time; ``T`` shrinks by the temporal factor."""
        for conv in self.time_conv:
            features = F.silu(conv(features, past))
        for block in self.time_res_stack:
            features = block(features, past)
        return features
