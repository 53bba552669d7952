"""codebook vectors -> pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from emulus.tokenizer.vision import bands, on_gpu
from emulus.tokenizer.vision.blocks import (
    Layer,
    Level,
    Middle,
    Past,
    SpatialNorm,
    TemporalResnetBlock,
    TemporalUpsample,
    Upsample,
    heavy_convolutions,
    precision_of,
)
from emulus.tokenizer.vision.config import VisionTokenizerConfig


class Decoder(nn.Module):
    """Causal convolutions along time, then frames one by one, every norm steered by the codebook vectors."""

    def __init__(self, config: VisionTokenizerConfig) -> None:
        super().__init__()
        codes = config.embed_dim
        widths = [config.ch * mult for mult in config.ch_mult]
        last = len(widths) - 1
        self.time_res_stack = nn.ModuleList(
            TemporalResnetBlock(config.z_channels, dropout=config.dropout) for _ in range(config.num_res_blocks)
        )
        doublings = int(math.log2(config.temporal_factor))
        self.time_conv = nn.ModuleList(TemporalUpsample(config.z_channels) for _ in range(doublings))
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], kernel_size=3, padding=1)
        self.mid = Middle(widths[-1], code_channels=codes, dropout=config.dropout)
        self.up = nn.ModuleList()
        for index in range(last + 1):
            level = Level(
                widths[min(index + 1, last)],
                widths[index],
                blocks=config.num_res_blocks + 1,
                attention=index in config.attn_resolutions,
                code_channels=codes,
                dropout=config.dropout,
            )
            if index:
                level.upsample = Upsample(widths[index])
            self.up.append(level)
        self.norm_out = SpatialNorm(widths[0], codes)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, kernel_size=3, padding=1)

    def time(
        self,
        latents: Float[Tensor, "b z t h w"],
        vectors: Float[Tensor, "b z t h w"],
        past: Past | None = None,
        *,
        first_frame: bool,
    ) -> tuple[Float[Tensor, "b z T h w"], Float[Tensor, "b z T h w"]]:
        """Spread latents and codebook vectors over the frames, both through the same layers.

        Args:
            latents: What the decoder paints from.
            vectors: The codebook vectors that steer the norms.
            past: Of the stream that they are a piece of.
            first_frame: Skip the repetitions: the result's first frame is the same and the only right one.
        """
        both = torch.cat((latents, vectors))
        for block in self.time_res_stack:
            both = block(both, past)
        for conv in self.time_conv:
            both = F.silu(conv(both, past, repeat=not first_frame))
        painted, steering = both.chunk(2)
        return painted, steering

    def frames(self, latents: Float[Tensor, "n z h w"], vectors: Float[Tensor, "n z h w"]) -> Float[Tensor, "n c H W"]:
        """The part that paints each frame alone."""
        with precision_of(self.mid):
            latents = on_gpu.laid_out(latents, self.mid.block_1.conv1, lambda: heavy_convolutions(self))
            hidden = self.conv_in(latents)
            for layer in self._layers():
                hidden = layer(hidden, vectors)
            return hidden

    def _layers(self) -> Iterator[Layer]:
        yield from self.mid.layers()
        for level in reversed(self.up):
            yield from cast(Level, level).layers()
        yield self._finish

    def _finish(self, x: Tensor, zq: Tensor | None) -> Tensor:
        if bands.usable(x, self.conv_out.in_channels):
            return bands.each_map(self._paint, x, zq)
        return cast(Tensor, self.conv_out(self.norm_out(x, zq, silu=True)))

    def _paint(self, x: bands.Map, zq: bands.Map | None) -> bands.Map:
        return bands.convolve(x, self.conv_out, affine=self.norm_out.factors(x, zq))
