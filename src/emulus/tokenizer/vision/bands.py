"""Convolutions, norms and attention of wide layers on a CPU without gradients, a band of rows at a time.

The plain layers (``blocks.py``) build a whole feature map for every norm, activation, padding and repetition. Here a
band of rows is normalised, activated, padded and convolved while it lies in the cache, and the result goes straight to
its place, over the input where that is no longer needed: a block holds two maps, and little is left beside products.

3x3 convolutions run as Winograd's F(2x2, 3x3): a tile of 4x4 inputs gives 2x2 outputs with 16 products instead of 36,
exact up to rounding. Behind a nearest upsampling both middle rows of such a tile are equal, so one row and one column
of the transformed tile vanish, and 9 products do instead of 36.

Feature maps are ``(height, width, channels)`` in float32. Products run in the type of the weights.

Sources: Lavin and Gray 2015 (arXiv:1509.09308) for F(2x2, 3x3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

MIN_CHANNELS = 64
"""Narrower layers are too little work for a band to pay."""

# Tiles that are transformed together, and at most so many values of them (8 MiB): enough places for a product at full
# speed, few enough for the cache.
BAND_TILES = 128
TILE_VALUES = 2**21
# Values in a band that is convolved directly.
BAND_VALUES = 2**22
# Transforming the weights costs about as much as the products of this many tiles save.
WINOGRAD_TILES = 256
# Places whose moments are taken, and queries that attend, together.
CHUNK = 512

# Half precision has its own ways on a CPU, and who asks for float64 wants its digits.
_TYPES = (torch.float32, torch.bfloat16)

Map = Float[Tensor, "h w c"]


def usable(x: Tensor, channels: int) -> bool:
    """Whether a layer of this many channels runs in bands."""
    wide = channels >= MIN_CHANNELS and x.numel() > 0
    return wide and x.device.type == "cpu" and x.dtype in _TYPES and not torch.is_grad_enabled()


def each_map(layer: Callable[[Map, Map | None], Map], x: Tensor, zq: Tensor | None = None) -> Tensor:
    """Apply a function of feature maps to each sample of a batch ``(n, channels, height, width)``.

    Args:
        layer: Takes a feature map and its map of codebook vectors.
        x: Features; results lie in memory like them, with the channels last.
        zq: The decoder's codebook vectors.
    """
    # Whoever asks for bfloat16 gets it through the weights; sums and transforms stay in float32.
    with torch.autocast(x.device.type, enabled=False):
        results = [layer(_as_map(x[index]), None if zq is None else _as_map(zq[index])) for index in range(x.shape[0])]
    stacked = results[0][None] if len(results) == 1 else torch.stack(results)
    return stacked.permute(0, 3, 1, 2)


def _as_map(sample: Float[Tensor, "c h w"]) -> Map:
    return sample.permute(1, 2, 0).float().contiguous()


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A norm of one feature map as a multiply-add.

    Attributes:
        scale: Of each channel.
        shift: Of each channel.
        steering: What scales and shifts the result at every place, or ``None``.
    """

    scale: Float[Tensor, " c"]
    shift: Float[Tensor, " c"]
    steering: Steering | None = None

    def apply(self, x: Map, first: int, last: int, out: Map) -> None:
        """Write the normalised rows ``first..last - 1`` of ``x`` to ``out``."""
        rows = x[first:last]
        if self.steering is None:
            torch.addcmul(self.shift, rows, self.scale, out=out)
            return
        # Both multiply-adds as one, on the coarse grid: it has up to 64 times fewer places.
        times, plus, coarse = self.steering.rows(first, last, len(x))
        scale, shift = times * self.scale, plus.addcmul_(times, self.shift)
        blocks = (scale.shape[1], x.shape[1] // scale.shape[1])
        fine = out.unflatten(1, blocks)
        torch.addcmul(shift[coarse, :, None], rows.unflatten(1, blocks), scale[coarse, :, None], out=fine)


class Steering:
    """The scales and shifts that codebook vectors give to places, made for some rows at a time."""

    def __init__(self, zq: Map, times: nn.Conv2d, plus: nn.Conv2d) -> None:
        """Prepare.

        Args:
            zq: Codebook vectors on a grid that divides the map's.
            times: 1x1 convolution to scales.
            plus: To shifts.
        """
        self.zq = zq
        self.times, self.plus = (Pointwise(conv, zq.shape[1]) for conv in (times, plus))

    def rows(self, first: int, last: int, height: int) -> tuple[Map, Map, Int[Tensor, " rows"]]:
        """Scales and shifts of the coarse rows that the rows ``first..last - 1`` of ``height`` lie in, and which."""
        coarse = torch.arange(first, last) // (height // len(self.zq))
        top = int(coarse[0])
        zq = self.zq[top : int(coarse[-1]) + 1]
        return self.times(zq), self.plus(zq), coarse - top


def group_norm(norm: nn.GroupNorm, x: Map) -> Affine:
    """A group norm of this map as a scale and a shift of each channel."""
    places = x.flatten(0, 1)
    means, squares, counts = [], [], []
    for chunk in places.split(CHUNK):
        mean = chunk.mean(0)
        means.append(mean)
        squares.append((chunk - mean).square_().sum(0))
        counts.append(len(chunk))
    # Moments of chunks are put together in float64: the squares of a whole map's values would lose digits.
    share = torch.tensor(counts, dtype=torch.float64)[:, None, None] / len(places)
    mean = torch.stack(means).double().unflatten(1, (norm.num_groups, -1))
    square = torch.stack(squares).double().unflatten(1, (norm.num_groups, -1)) / len(places)
    centre = (share * mean).sum(0).mean(1, keepdim=True)
    variance = (square + share * (mean - centre).square()).sum(0).mean(1, keepdim=True)
    inverse = (variance + norm.eps).rsqrt()
    width = norm.num_channels // norm.num_groups
    scale = norm.weight.double() * inverse.expand(-1, width).flatten()
    shift = norm.bias.double() - centre.expand(-1, width).flatten() * scale
    return Affine(scale=scale.float(), shift=shift.float())


class Product:
    """Matrix products of places with one or several weights, which are packed once for many bands."""

    def __init__(self, weight: Float[Tensor, "g k c"], places: int) -> None:
        """Pack.

        Args:
            weight: One matrix a group.
            places: About how many places will come at a time.
        """
        self.weight = weight
        self.groups, out, width = weight.shape
        self.packed: Tensor | None = None
        if _can_pack(weight.dtype):
            flat = weight.reshape(self.groups * out, width, 1, 1)
            size = (1, self.groups * width, 1, places)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(flat, *_GEOMETRY, self.groups, size)

    def __call__(self, x: Float[Tensor, "n g c"]) -> Float[Tensor, "n g k"]:
        """Each group's product, in the type of the weights."""
        x = x.to(self.weight.dtype)
        if self.packed is None:
            return torch.bmm(x.transpose(0, 1), self.weight.transpose(1, 2)).transpose(0, 1)
        # A 1x1 convolution of one long row of places. F.linear and F.conv2d would go to another library, which is half
        # as fast in float32 on processors that are not its maker's.
        row = x.reshape(1, 1, len(x), -1).permute(0, 3, 1, 2)
        result = torch.ops.mkldnn._convolution_pointwise(
            row, self.packed, None, *_GEOMETRY, self.groups, "none", [], None
        )
        return cast(Tensor, result).permute(0, 2, 3, 1).reshape(len(x), self.groups, -1)


# Padding, stride and dilation of a 1x1 convolution.
_GEOMETRY = ((0, 0), (1, 1), (1, 1))
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_reorder_convolution_weight", "_convolution_pointwise")
)


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this type here: in bfloat16 only on processors with AVX-512 or newer."""
    if not _HAS_ONEDNN or dtype != torch.bfloat16:
        return _HAS_ONEDNN
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


class Pointwise:
    """A 1x1 convolution of places, packed once for many calls; results are float32."""

    def __init__(self, conv: nn.Conv2d, places: int) -> None:
        self.product = Product(conv.weight.flatten(1)[None], places)
        self.bias = cast(Tensor, conv.bias).float()

    def __call__(self, x: Float[Tensor, "*places c"]) -> Float[Tensor, "*places k"]:
        """The convolution of any number of places."""
        places = self.product(x.flatten(0, -2)[:, None])[:, 0]
        return (places + self.bias).unflatten(0, x.shape[:-1])


def linear(x: Float[Tensor, "n c"], conv: nn.Conv2d) -> Float[Tensor, "n k"]:
    """A 1x1 convolution of places, once."""
    return Pointwise(conv, len(x))(x)


class Attention:
    """Single-head attention to all places of a map, some queries at a time."""

    def __init__(self, key: Float[Tensor, "n c"], value: Float[Tensor, "n c"]) -> None:
        self.scores = Product(key[None] * key.shape[1] ** -0.5, CHUNK)
        self.mix = Product(value.T[None], CHUNK)

    def __call__(self, query: Float[Tensor, "m c"]) -> Float[Tensor, "m c"]:
        """What a few queries see."""
        return self.mix(self.scores(query[:, None]).softmax(-1))[:, 0]


Rows = Callable[[int, int], Tensor]
"""Gives the rows ``first..last - 1`` of a map."""


def rows_of(x: Map) -> Rows:
    """The rows of a map that is there."""
    return lambda first, last: x[first:last]


def pointwise_rows(x: Map, conv: nn.Conv2d) -> Rows:
    """The rows of a map's 1x1 convolution, which is never there as a whole."""
    apply = Pointwise(conv, CHUNK)
    return lambda first, last: apply(x[first:last])


def convolve(
    x: Map, conv: nn.Conv2d, *, affine: Affine | None = None, out: Map | None = None, add: Rows | None = None
) -> Map:
    """A 3x3 convolution that keeps the size, or halves it (stride 2: zeros right and below only).

    Args:
        x: Features.
        conv: Whose weights and stride.
        affine: Normalise with it, then SiLU, before the convolution.
        out: Where to write; may be ``x`` itself.
        add: What to add to the result; of a map that is not ``out``.
    """
    stride = conv.stride[0]
    height, width = x.shape[:2]
    if out is None:
        out = x.new_empty(height // stride, width // stride, conv.out_channels)
    if _suits_winograd(conv, height, width):
        tiles = _Tiles(conv, _Plain, height // 2, width // 2)
        rows, product = 2 * tiles.high, tiles.convolve
    else:
        rows, product = max(2, BAND_VALUES // (width * conv.in_channels) // 2 * 2), partial(_direct, conv)
    for first, last, window in _windows(x, rows, affine=affine, before=int(stride == 1)):
        target = out[first // stride : last // stride]
        product(window, target)
        if add is not None:
            target += add(first, last)
    return out


def upsample(x: Map, conv: nn.Conv2d) -> Map:
    """A 3x3 convolution of the map at twice its size (each value repeated), which is never built."""
    height, width = x.shape[:2]
    out = x.new_empty(2 * height, 2 * width, conv.out_channels)
    tiles = _Tiles(conv, _Doubled, height, width)
    for first, last, window in _windows(x, tiles.high, affine=None, before=1):
        tiles.convolve(window, out[2 * first : 2 * last])
    return out


def _suits_winograd(conv: nn.Conv2d, height: int, width: int) -> bool:
    even = height % 2 == 0 and width % 2 == 0
    wide = min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS
    return conv.stride[0] == 1 and even and wide and height * width // 4 >= WINOGRAD_TILES


def _windows(x: Map, rows: int, *, affine: Affine | None, before: int) -> Iterator[tuple[int, int, Map]]:
    """Bands of rows ready to be convolved: normalised, activated, with their neighbours and zeros around.

    A row is read once, before the band above it is given out, so whoever takes a band may overwrite its rows.

    Args:
        x: Features.
        rows: Rows of a band; the last band may have fewer.
        affine: See :func:`convolve`.
        before: Zero rows above and columns to the left; there is one below and to the right.

    Yields:
        First row, the row behind the last one, and the band with ``before`` rows above and one below.
    """
    height, width, channels = x.shape
    around = before + 1
    rows = min(rows, height)
    buffer = x.new_zeros(rows + around, width + around, channels)
    inner = buffer[:, before : before + width]
    ready = 0
    for first in range(0, height, rows):
        last = min(first + rows, height)
        until = min(last + 1, height)
        if first:
            overlap = buffer[rows : rows + around]
            buffer[:around] = overlap if rows >= around else overlap.clone()
        start = ready - first + before
        fresh = inner[start : start + until - ready]
        if affine is None:
            fresh.copy_(x[ready:until])
        else:
            affine.apply(x, ready, until, fresh)
            F.silu(fresh, inplace=True)
        if until == last:
            buffer[last - first + before] = 0
        ready = until
        yield first, last, buffer[: last - first + around]


def _direct(conv: nn.Conv2d, window: Map, out: Map) -> None:
    """Convolve a padded band as PyTorch does."""
    kind = conv.weight.dtype
    bias = cast(Tensor, conv.bias).to(kind)
    result = F.conv2d(window.to(kind).permute(2, 0, 1)[None], conv.weight, bias, cast(tuple[int, int], conv.stride))
    out.copy_(result[0].permute(1, 2, 0))


class _Plain:
    """F(2x2, 3x3) along one side: four inputs, two of them shared with the next tile, to two outputs."""

    points = 4
    step = 2
    weights = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))

    @staticmethod
    def split(x: list[Tensor], out: list[Tensor]) -> None:
        torch.sub(x[0], x[2], out=out[0])
        torch.add(x[1], x[2], out=out[1])
        torch.sub(x[2], x[1], out=out[2])
        torch.sub(x[1], x[3], out=out[3])

    @staticmethod
    def join(x: list[Tensor], out: list[Tensor]) -> None:
        torch.add(x[1], x[2], out=out[0]).add_(x[0])
        torch.sub(x[1], x[2], out=out[1]).sub_(x[3])


class _Doubled:
    """The same where each input stands for two equal ones: the third point would be the difference of equals."""

    points = 3
    step = 1
    # The middle one of the plain form is the sum of equals: its factor 2 is here.
    weights = ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0))

    @staticmethod
    def split(x: list[Tensor], out: list[Tensor]) -> None:
        torch.sub(x[0], x[1], out=out[0])
        out[1].copy_(x[1])
        torch.sub(x[1], x[2], out=out[2])

    @staticmethod
    def join(x: list[Tensor], out: list[Tensor]) -> None:
        torch.add(x[0], x[1], out=out[0])
        torch.sub(x[1], x[2], out=out[1])


class _Tiles:
    """One convolution's transformed weights, and the room that its bands are transformed in."""

    def __init__(self, conv: nn.Conv2d, form: type[_Plain | _Doubled], high: int, wide: int) -> None:
        """Prepare.

        Args:
            conv: Its weights.
            form: Whether the map is to be doubled first.
            high: Rows of tiles in the map; a band takes ``self.high`` of them.
            wide: Tiles in a row.
        """
        self.form = form
        self.weight = conv.weight
        points, channels = form.points, conv.in_channels
        together = min(BAND_TILES, TILE_VALUES // (points**2 * channels))
        self.high = min(high, max(1, together // wide))
        self.wide = wide
        self.bias = cast(Tensor, conv.bias).float()
        self.rows = torch.empty(self.high, points, form.step * (wide - 1) + points, channels)
        self.tiles = torch.empty(self.high, wide, points, points, channels)
        # As many outputs at a time as have weights that fit the cache with the tiles.
        width = max(1, TILE_VALUES // (points**2 * channels))
        self.parts = [slice(start, start + width) for start in range(0, conv.out_channels, width)]
        # Several bands share the weights; of a single band's, some are there at a time.
        self.products = [self._product(part) for part in self.parts] if self.high < high else None

    def convolve(self, window: Map, out: Map) -> None:
        """Convolve a padded band; ``out`` has two rows and two columns for each tile."""
        form, points, step = self.form, self.form.points, self.form.step
        high, wide = out.shape[0] // 2, self.wide
        rows, tiles = self.rows[:high], self.tiles[:high]
        form.split([window[index : index + step * high : step] for index in range(points)], list(rows.unbind(1)))
        columns = [rows[:, :, index : index + step * wide : step].transpose(1, 2) for index in range(points)]
        form.split(columns, list(tiles.unbind(3)))
        places = tiles.view(high * wide, points**2, -1).to(self.weight.dtype)
        # By tile row, output row, tile column and output column.
        target = out.view(high, 2, wide, 2, -1)
        products = map(self._product, self.parts) if self.products is None else self.products
        for part, product in zip(self.parts, products, strict=True):
            square = product(places).float().view(high, wide, points, points, -1)
            # The second point enters both outputs along both sides with a plus.
            square[:, :, 1, 1] += self.bias[part]
            joined = square.new_empty(high, wide, 2, points, square.shape[-1])
            form.join(list(square.unbind(2)), list(joined.unbind(2)))
            ends = [target[:, :, :, index, part].transpose(1, 2) for index in range(2)]
            form.join(list(joined.unbind(3)), ends)

    def _product(self, part: slice) -> Product:
        """With the transformed weights of some outputs."""
        points, weight = self.form.points, self.weight[part]
        line = torch.tensor(self.form.weights)
        square = torch.einsum("ia,jb->ijab", line, line).reshape(points**2, 9)
        transformed = (square @ weight.float().reshape(-1, 9).T).view(points**2, *weight.shape[:2])
        return Product(transformed.to(weight.dtype), self.high * self.wide)
