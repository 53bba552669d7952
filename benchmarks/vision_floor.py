"""What encoding and decoding a picture cost on a GPU at least, by arithmetic from the shapes of the layers.

``python -m benchmarks.vision_floor --height 720 --width 720`` prints a table. Nothing is computed and nothing measured:
every convolution takes its products at a rate that such convolutions reach, or its maps at the speed of memory,
whichever is longer, and everything between convolutions the bytes that it reads and writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.blocks import AttentionBlock, Downsample, GroupNorm, ResnetBlock, SpatialNorm, Upsample

Way = Literal["fp32", "bf16-plain", "bf16-fused"]
"""Float32; bfloat16 as autocast runs it (channels first, norms in float32), and with channels last and fused norms."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a GPU reaches.

    Attributes:
        bandwidth: Bytes a second of a copy.
        products: FLOP/s of convolutions, by the bytes of a number. Those of float32 are not TF32.
        attention: FLOP/s of attention with heads of 1,024, which no flash kernel takes.
    """

    bandwidth: float = 4.3e12
    products: tuple[tuple[int, float], ...] = ((2, 470e12), (4, 45e12))
    attention: tuple[tuple[int, float], ...] = ((2, 150e12), (4, 25e12))


H200 = Card()
"""Assumed: 60 % of 790 TFLOP/s of dense bfloat16, two thirds of 67 TFLOP/s in float32; nothing of it measured."""

# Bytes an element for a norm with SiLU: moments, then the result. In float32 each step by itself; under autocast casts
# to float32 and back beside; fused, the map is read twice and written once. Steered ones in PyTorch also write and
# read a scale and a shift at full size.
_NORM = {"fp32": 20, "bf16-plain": 32, "bf16-fused": 6}
_STEERED = {"fp32": 24, "bf16-plain": 16, "bf16-fused": 0}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a pass takes.

    Attributes:
        flop: Operations of convolutions and matrix products.
        bytes: Read and written.
        seconds: At least, layer after layer.
        convolutions: The part of the seconds in convolutions.
    """

    flop: float
    bytes: float
    seconds: float
    convolutions: float


class _Sum:
    """Adds up the layers of a pass through modules of the meta device."""

    def __init__(self, way: Way, card: Card) -> None:
        self.way, self.card = way, card
        self.size = 4 if way == "fp32" else 2
        self.flop = self.bytes = self.seconds = self.convolutions = 0.0

    def convolution(self, conv: nn.Conv2d | nn.Conv3d, args: Any, out: Tensor) -> None:
        maps = (args[0].numel() + out.numel()) * self.size
        # cuDNN's 16-bit kernels turn maps whose channels come first, reading and writing each once more.
        maps *= 3 if self.way == "bf16-plain" else 1
        flop = 2.0 * out.numel() * conv.weight[0].numel()
        self.convolutions += self._add(flop, maps + conv.weight.numel() * self.size, self.card.products)

    def norm(self, norm: GroupNorm | SpatialNorm, args: Any, out: Tensor) -> None:
        steered = _STEERED[self.way] if isinstance(norm, SpatialNorm) else 0
        self._add(0, out.numel() * (_NORM[self.way] + steered), self.card.products)

    def skip(self, block: nn.Module, args: Any, out: Tensor) -> None:
        self._add(0, 3 * out.numel() * self.size, self.card.products)

    def attention(self, block: AttentionBlock, args: Any, out: Tensor) -> None:
        places = out.shape[-2] * out.shape[-1]
        self._add(4.0 * out.numel() * places, 4 * out.numel() * self.size, self.card.attention)
        self.skip(block, args, out)

    def resize(self, block: Downsample | Upsample, args: Any, out: Tensor) -> None:
        # Padding copies the map; repetition reads it and writes it four times as large.
        larger = 2 * args[0].numel() if isinstance(block, Downsample) else args[0].numel() + out.numel()
        self._add(0, larger * self.size, self.card.products)

    def _add(self, flop: float, moved: float, rates: tuple[tuple[int, float], ...]) -> float:
        seconds = max(flop / dict(rates)[self.size], moved / self.card.bandwidth)
        self.flop += flop
        self.bytes += moved
        self.seconds += seconds
        return seconds


def cost(
    config: VisionTokenizerConfig,
    half: Literal["encode", "decode"],
    way: Way,
    *,
    height: int,
    width: int,
    count: int = 1,
    card: Card = H200,
) -> Cost:
    """Add up what one pass costs.

    Args:
        config: The tokenizer's configuration.
        half: Pictures to latents, or codebook vectors to pictures. The temporal layers of a few channels and
            the search for codes are left out.
        way: Precision and kernels.
        height: Pixels, a multiple of the spatial factor.
        width: Pixels, a multiple of the spatial factor.
        count: Pictures in a batch.
        card: What the GPU reaches.
    """
    with torch.device("meta"):
        model = VisionTokenizer(config).eval()
        pixels = torch.empty(count, config.in_channels, height, width)
        factor = config.spatial_factor
        latents = torch.empty(count, config.z_channels, height // factor, width // factor)
        vectors = torch.empty(count, config.embed_dim, height // factor, width // factor)
    total = _Sum(way, card)
    kinds: tuple[tuple[Any, Callable[..., None]], ...] = (
        ((nn.Conv2d, nn.Conv3d), total.convolution),
        ((GroupNorm, SpatialNorm), total.norm),
        (AttentionBlock, total.attention),
        (ResnetBlock, total.skip),
        ((Downsample, Upsample), total.resize),
    )
    for module in model.modules():
        for kind, count_up in kinds:
            if isinstance(module, kind):
                module.register_forward_hook(count_up)
    with torch.inference_mode():
        if half == "encode":
            model.encoder.frames(pixels)
        else:
            model.decoder.frames(latents, vectors)
    return Cost(flop=total.flop, bytes=total.bytes, seconds=total.seconds, convolutions=total.convolutions)


def main() -> None:
    """Print a table of the released tokenizer's costs on an H200."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=720)
    parser.add_argument("--count", type=int, default=1, help="pictures in a batch")
    options = vars(parser.parse_args())
    print("| by arithmetic | TFLOP | GB | ms | of it convolutions |\n|---|---|---|---|---|")
    halves: tuple[Literal["encode", "decode"], ...] = ("encode", "decode")
    for half in halves:
        for way in get_args(Way):
            found = cost(VisionTokenizerConfig(), half, way, **options)
            spent = f"{1e3 * found.seconds:.1f} | {1e3 * found.convolutions:.1f}"
            print(f"| {half} {way} | {found.flop / 1e12:.2f} | {found.bytes / 1e9:.1f} | {spent} |")


if __name__ == "__main__":
    main()
