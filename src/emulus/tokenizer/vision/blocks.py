"""The layers of Emu3's vision tokenizer (a MoVQ with causal temporal convolutions).

Frames are independent in every 2-D layer, ``(frames, channels, height, width)``. Only the causal 3-D layers,
``(batch, channels, time, height, width)``, mix them, and they look backwards only.

Without gradients, wide 2-D layers on a CPU run in bands of rows (``bands.py``), faster and in less memory, and norms of
16-bit maps on a GPU as Triton kernels (``on_gpu.py``); narrow layers, float32 on a GPU and training take the plain way
written here. All give the same up to rounding.

Source: released ``modeling_emu3visionvq.py``; MoVQ (arXiv:2209.09002) for the spatial norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from emulus.tokenizer.vision import bands, on_gpu
from emulus.tokenizer.vision.bands import Affine, Map
from emulus.tokenizer.vision.config import NORM_GROUPS

NORM_EPS = 1e-6


class GroupNorm(nn.GroupNorm):
    """Group norm of the encoder; takes and ignores the codebook vectors that :class:`SpatialNorm` uses."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, eps=NORM_EPS, affine=True)

    def forward(
        self, x: Float[Tensor, "n c h w"], zq: Tensor | None = None, *, silu: bool = False
    ) -> Float[Tensor, "n c h w"]:
        """Normalise each sample's channel groups, with SiLU behind if so asked."""
        if on_gpu.usable(x):
            return on_gpu.group_norm(x, self, silu=silu)
        normed = super().forward(x)
        return F.silu(normed) if silu else normed

    def factors(self, x: Map, zq: Map | None = None) -> Affine:
        """The same for one feature map, as a scale and a shift."""
        return bands.group_norm(self, x)


class SpatialNorm(nn.Module):
    """Group norm of the decoder, scaled and shifted at every place by the codebook vector there."""

    def __init__(self, channels: int, code_channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS, affine=True)
        self.conv_y = nn.Conv2d(code_channels, channels, kernel_size=1)
        self.conv_b = nn.Conv2d(code_channels, channels, kernel_size=1)

    def forward(
        self, x: Float[Tensor, "n c h w"], zq: Float[Tensor, "n d i j"], *, silu: bool = False
    ) -> Float[Tensor, "n c h w"]:
        """Normalise ``x`` by the vectors ``zq``, which may lie on a coarser grid, with SiLU behind if so asked."""
        # A 1x1 convolution commutes with nearest resizing, and the coarse grid has up to 64 times fewer places.
        scale, shift = self.conv_y(zq), self.conv_b(zq)
        if on_gpu.usable(x):
            return on_gpu.group_norm(x, self.norm_layer, (scale, shift), silu=silu)
        scale, shift = (F.interpolate(each, size=x.shape[-2:], mode="nearest") for each in (scale, shift))
        normed = torch.addcmul(shift, self.norm_layer(x), scale)
        return F.silu(normed) if silu else normed

    def factors(self, x: Map, zq: Map | None) -> Affine:
        """The same for one feature map, as a scale and a shift, steered by its codebook vectors."""
        # Whoever passes no codebook vectors has built no spatial norm.
        steering = bands.Steering(cast(Tensor, zq), self.conv_y, self.conv_b)
        return dataclasses.replace(bands.group_norm(self.norm_layer, x), steering=steering)


Norm = GroupNorm | SpatialNorm


def make_norm(channels: int, code_channels: int | None) -> Norm:
    """The encoder's norm, or the decoder's when there are codebook vectors to be steered by."""
    return GroupNorm(channels) if code_channels is None else SpatialNorm(channels, code_channels)


class ResnetBlock(nn.Module):
    """norm, SiLU, 3x3 convolution, twice, around a skip (1x1 when the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, *, code_channels: int | None, dropout: float) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels, code_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = make_norm(out_channels, code_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Float[Tensor, "n c h w"], zq: Tensor | None = None) -> Float[Tensor, "n k h w"]:
        """Refine features in place; ``zq`` are the decoder's codebook vectors."""
        if bands.usable(x, self.conv1.in_channels) and not (self.training and self.dropout.p):
            return bands.each_map(self._in_bands, x, zq)
        hidden = self.conv1(self.norm1(x, zq, silu=True))
        hidden = self.conv2(self.dropout(self.norm2(hidden, zq, silu=True)))
        return cast(Tensor, (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + hidden)

    def _in_bands(self, x: Map, zq: Map | None) -> Map:
        hidden = bands.convolve(x, self.conv1, affine=self.norm1.factors(x, zq))
        skip = bands.pointwise_rows(x, self.nin_shortcut) if hasattr(self, "nin_shortcut") else bands.rows_of(x)
        return bands.convolve(hidden, self.conv2, affine=self.norm2.factors(hidden, zq), out=hidden, add=skip)


class AttentionBlock(nn.Module):
    """Single-head attention among all places of one frame, around a skip. Quadratic in height times width."""

    def __init__(self, channels: int, *, code_channels: int | None) -> None:
        super().__init__()
        self.norm = make_norm(channels, code_channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Float[Tensor, "n c h w"], zq: Tensor | None = None) -> Float[Tensor, "n c h w"]:
        """Let every place of a frame see every other."""
        if bands.usable(x, self.q.in_channels):
            return bands.each_map(self._in_bands, x, zq)
        hidden = self.norm(x, zq)
        query, key, value = (conv(hidden).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return cast(Tensor, x + self.proj_out(attended.transpose(1, 2).reshape_as(x)))

    def _in_bands(self, x: Map, zq: Map | None) -> Map:
        hidden = torch.empty_like(x)
        self.norm.factors(x, zq).apply(x, 0, len(x), hidden)
        places = hidden.flatten(0, 1)
        attention = bands.Attention(bands.linear(places, self.k), bands.linear(places, self.v))
        query, project = (bands.Pointwise(conv, bands.CHUNK) for conv in (self.q, self.proj_out))
        for chunk in places.split(bands.CHUNK):
            chunk.copy_(project(attention(query(chunk))))
        return hidden.add_(x)


class Downsample(nn.Module):
    """Halve height and width: a zero column right and a zero row below, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Float[Tensor, "n c h w"], zq: Tensor | None = None) -> Float[Tensor, "n c i j"]:
        """Features at half the height and width."""
        if bands.usable(x, self.conv.in_channels):
            return bands.each_map(lambda sample, _: bands.convolve(sample, self.conv), x)
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Double height and width by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Float[Tensor, "n c h w"], zq: Tensor | None = None) -> Float[Tensor, "n c i j"]:
        """Features at twice the height and width."""
        if bands.usable(x, self.conv.in_channels):
            return bands.each_map(lambda sample, _: bands.upsample(sample, self.conv), x)
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


Past = dict[nn.Module, Tensor]
"""What the causal convolutions of a stream remember: each its last two input frames."""


class CausalConv3d(nn.Module):
    """3-D convolution that sees the past only: two zero frames in front, none behind, whatever the kernel.

    With a ``past``, the first call's two frames in front are zero and each further one's are the last of the call
    before, so that a clip may come in pieces.

    Height and width keep their size: along each, ``kernel - 1`` zeros, the larger half before.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: tuple[int, int, int] = (3, 1, 1), time_stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride=(time_stride, 1, 1))
        height, width = kernel[1] - 1, kernel[2] - 1
        self.padding = (width - width // 2, width // 2, height - height // 2, height // 2)

    def forward(self, x: Float[Tensor, "b c t h w"], past: Past | None = None) -> Float[Tensor, "b k s h w"]:
        """Convolve; time shrinks by ``time_stride``."""
        front = None if past is None else past.get(self)
        x = F.pad(x, (0, 0, 0, 0, 2, 0)) if front is None else torch.cat((front, x), dim=2)
        if past is not None:
            past[self] = x[:, :, -2:].clone()
        return cast(Tensor, self.conv(F.pad(x, self.padding)))


class TemporalDownsample(nn.Module):
    """Halve the number of frames (an even number) with one causal convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, kernel=(4, 3, 3), time_stride=2)

    def forward(self, x: Float[Tensor, "b c t h w"], past: Past | None = None) -> Float[Tensor, "b c s h w"]:
        """Features at half the frame rate."""
        return cast(Tensor, self.conv(x, past))


class TemporalUpsample(nn.Module):
    """Double the number of frames by repetition, then a causal convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(channels, channels, kernel=(3, 3, 3))

    def forward(
        self, x: Float[Tensor, "b c t h w"], past: Past | None = None, *, repeat: bool = True
    ) -> Float[Tensor, "b c s h w"]:
        """Features at twice the frame rate.

        Args:
            x: Features.
            past: Of the stream that they are a piece of.
            repeat: ``False`` skips the repetition: the first frame of the result is the same, since it sees no later
                one, and for a single image only that frame is wanted.
        """
        return cast(Tensor, self.conv(x.repeat_interleave(2, dim=2) if repeat else x, past))


class TemporalResnetBlock(nn.Module):
    """Batch norm, SiLU, causal 3x3x3 convolution, twice, around a skip."""

    def __init__(self, channels: int, *, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv1 = CausalConv3d(channels, channels, kernel=(3, 3, 3))
        self.norm2 = nn.BatchNorm3d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(channels, channels, kernel=(3, 3, 3))

    def forward(self, x: Float[Tensor, "b c t h w"], past: Past | None = None) -> Float[Tensor, "b c t h w"]:
        """Refine features along time."""
        hidden = self.conv1(F.silu(self.norm1(x)), past)
        return cast(Tensor, x + self.conv2(self.dropout(F.silu(self.norm2(hidden))), past))


Layer = Callable[[Tensor, Tensor | None], Tensor]
"""Takes features and the decoder's codebook vectors, which some layers ignore.

Whoever runs layers one by one holds no features but the last: while a module runs, its caller holds what it was given.
"""


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where the level has it, then a resize."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        blocks: int,
        attention: bool,
        code_channels: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (blocks - 1)
        self.block = nn.ModuleList(
            ResnetBlock(width, out_channels, code_channels=code_channels, dropout=dropout) for width in widths
        )
        self.attn = nn.ModuleList(
            AttentionBlock(out_channels, code_channels=code_channels) for _ in range(blocks if attention else 0)
        )

    def layers(self) -> Iterator[Layer]:
        """Blocks (and attention) of the level in their order, then its resize if it has one."""
        for index, block in enumerate(self.block):
            yield block
            if len(self.attn):
                yield self.attn[index]
        for resize in ("downsample", "upsample"):
            if resize in self._modules:
                yield cast(nn.Module, getattr(self, resize))


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    def __init__(self, channels: int, *, code_channels: int | None, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, code_channels=code_channels, dropout=dropout)
        self.attn_1 = AttentionBlock(channels, code_channels=code_channels)
        self.block_2 = ResnetBlock(channels, channels, code_channels=code_channels, dropout=dropout)

    def layers(self) -> Iterator[Layer]:
        """Its parts in their order."""
        yield from (self.block_1, self.attn_1, self.block_2)


def heavy_convolutions(half: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of an encoder or a decoder that hold nearly all its weights, by name.

    Left out are those at its ends, those of the norms and the temporal ones: they cost next to nothing, and rounding
    them would show.
    """
    kinds = (ResnetBlock, AttentionBlock, Downsample, Upsample)
    return {
        f"{name}.{child}": conv
        for name, block in half.named_modules()
        if isinstance(block, kinds)
        for child, conv in block.named_children()
        if isinstance(conv, nn.Conv2d)
    }


def precision_of(middle: Middle) -> AbstractContextManager[object]:
    """Context in which the plain layers around ``middle`` run in bfloat16 if their weights are held so."""
    weight = middle.block_1.conv1.weight
    if weight.dtype != torch.bfloat16:
        return nullcontext()
    return torch.autocast(weight.device.type, dtype=weight.dtype)
