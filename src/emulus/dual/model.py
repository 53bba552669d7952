"""A small dual encoder: a tower for pictures, a tower for texts, one space for both."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from emulus.codec import decode_fields
from emulus.errors import EmulusError, shown
from emulus.files import read_config, write_json
from emulus.weights import CONFIG, WEIGHTS, check_shapes, fill, find_model, find_tensors, on_meta, save_tensors

KIND = "emulus-dual"
_MOST_PIXELS = 2**20
"""Pictures go through their tower 256 at a time at 64 pixels."""
_WORDS = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class DualConfig:
    """Shape of a dual encoder.

    Attributes:
        size: Side of the pictures in pixels that it looks at; others are scaled to it.
        widths: Channels of the picture tower's stages, each at half the side of the one before, from ``size / 4`` on.
        blocks: Residual blocks in each stage.
        dimensions: Of the space that pictures and texts meet in.
        buckets: Rows of the table of word pieces. Pieces are hashed, so names that were never seen have vectors, too.
        piece_width: Numbers in each row.
        hidden: Width of the text tower's hidden layer.
        shortest: Letters of the shortest piece of a word.
        longest: Letters of the longest; the whole word is a piece besides.
    """

    size: int = 64
    widths: tuple[int, ...] = (32, 64, 128)
    blocks: int = 1
    dimensions: int = 96
    buckets: int = 4096
    piece_width: int = 48
    hidden: int = 192
    shortest: int = 3
    longest: int = 5

    def __post_init__(self) -> None:
        for name, (least, most) in _BOUNDS.items():
            _check_whole(name, getattr(self, name), least, most)
        if not 1 <= len(self.widths) <= _MOST_STAGES:
            raise EmulusError(f"widths must be 1 to {_MOST_STAGES} whole numbers, got {len(self.widths)}")
        for width in self.widths:
            # The first stage begins with half its width.
            _check_whole("widths", width, 2, 4096)
        _check_whole("longest", self.longest, self.shortest, 64)
        _check_whole("size", self.size, 4 * 2 ** (len(self.widths) - 1), 4096)


# Sizes beyond these are damaged or hostile, and refused before anything is built from them.
_MOST_STAGES = 8
_BOUNDS = {
    "blocks": (1, 64),
    "dimensions": (1, 2**14),
    "buckets": (1, 2**24),
    "piece_width": (1, 2**14),
    "hidden": (1, 2**14),
    "shortest": (1, 64),
}


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise EmulusError(f"{name} must be a whole number from {least} to {most}, got {shown(value)}")


class DualEncoder(nn.Module):
    """pictures, texts -> unit vectors; the larger the product of two, the better they go together."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        self.config = config
        self.picture_tower = PictureTower(config)
        self.text_tower = TextTower(config)
        # The logarithm of what cosines are multiplied with before the softmax; it is learnt.
        self.log_scale = nn.Parameter(torch.full((1,), math.log(14.0)))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.log_scale.device

    @classmethod
    def load(cls, folder: Path | str, device: torch.device | str = "cpu") -> DualEncoder:
        """Read a dual encoder, in eval mode and float32.

        Args:
            folder: Its own, or that of the run that trained it.
            device: Where it shall lie.

        Raises:
            EmulusError: A file is missing or damaged, or holds something else.
        """
        folder = find_model(Path(folder))
        values = read_config(folder / CONFIG)
        if values.pop("model_type", None) != KIND:
            raise EmulusError(f"{folder} holds no dual encoder; train one with emulus dual-train")
        config = decode_fields(DualConfig, values, str(folder / CONFIG))
        model = on_meta(lambda: cls(config))
        tensors = find_tensors(folder)
        check_shapes(folder, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, tensors)
        fill(model, tensors, dtype=torch.float32, device=device)
        return model.eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, in bfloat16.

        Raises:
            EmulusError: The disk is full or the folder may not be written to.
        """
        tensors = {
            name: tensor.bfloat16() if tensor.is_floating_point() else tensor
            for name, tensor in self.state_dict().items()
        }
        save_tensors(tensors, folder / WEIGHTS)
        write_json(folder / CONFIG, {"model_type": KIND, **asdict(self.config)})

    @torch.no_grad()
    def images(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Unit vectors of pictures in [-1, 1], on the CPU; the model must be in eval mode."""
        at_once = max(_MOST_PIXELS // self.config.size**2, 1)
        parts = [self.picture_tower(part.to(self.device)).float().cpu() for part in pixels.split(at_once)]
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Unit vectors of texts, on the CPU."""
        if not texts:
            return torch.empty(0, self.config.dimensions)
        vectors: Tensor = self.text_tower(self.pieces(texts))
        return vectors.float().cpu()

    def pieces(self, texts: Sequence[str]) -> Pieces:
        """The texts' word pieces as the text tower takes them."""
        return Pieces.of(texts, self.config, self.device)


class PictureTower(nn.Module):
    """pixels -> unit vectors: a residual network with batch norms."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        self.size = config.size
        first = config.widths[0]
        layers: list[nn.Module] = [*_convolution(3, first // 2, 3, 2), *_convolution(first // 2, first, 3, 2)]
        for place, width in enumerate(config.widths):
            if place:
                layers += _convolution(config.widths[place - 1], width, 2, 2)
            layers += [_Residual(width) for _ in range(config.blocks)]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(config.widths[-1], config.dimensions)

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
        """Scale the pictures to the size that it knows, and look at them."""
        if pixels.shape[-2:] != (self.size, self.size):
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bilinear", antialias=True)
        hidden = self.layers(pixels.contiguous(memory_format=torch.channels_last))
        return F.normalize(self.out(hidden.mean((2, 3))).float(), dim=-1)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2 if kernel % 2 else 0, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_convolution(width, width, 3), *_convolution(width, width, 3)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


class TextTower(nn.Module):
    """Word pieces -> unit vectors: a text is the sum of its words, and a word that of its pieces."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(config.buckets, config.piece_width, mode="sum")
        self.norm = nn.LayerNorm(config.piece_width)
        self.hidden = nn.Linear(config.piece_width, config.hidden)
        self.out = nn.Linear(config.hidden, config.dimensions)

    def forward(self, pieces: Pieces) -> Float[Tensor, "n d"]:
        """Vectors of as many texts as the pieces are of."""
        summed = self.table(pieces.buckets, pieces.starts, per_sample_weights=pieces.weights)
        hidden = F.gelu(self.hidden(self.norm(summed)))
        return F.normalize(self.out(hidden).float(), dim=-1)


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """Word pieces of some texts, end to end.

    Attributes:
        buckets: Row of the table of each piece.
        weights: How much each counts. Their squares add up to 1 for every word, so long and short ones count alike.
        starts: Where each text's begin.
    """

    buckets: Int[Tensor, " p"]
    weights: Float[Tensor, " p"]
    starts: Int[Tensor, " n"]

    @classmethod
    def of(cls, texts: Sequence[str], config: DualConfig, device: torch.device | str = "cpu") -> Pieces:
        """Take texts apart."""
        buckets: list[int] = []
        weights: list[float] = []
        starts: list[int] = []
        for text in texts:
            starts.append(len(buckets))
            for word in words_of(text):
                rows = _rows(word, config.shortest, config.longest, config.buckets)
                buckets += rows
                weights += [len(rows) ** -0.5] * len(rows)
        return cls(
            buckets=torch.tensor(buckets, dtype=torch.long, device=device),
            weights=torch.tensor(weights, dtype=torch.float32, device=device),
            starts=torch.tensor(starts, dtype=torch.long, device=device),
        )


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORDS.findall(text.lower())


@lru_cache(maxsize=2**16)
def _rows(word: str, shortest: int, longest: int, buckets: int) -> tuple[int, ...]:
    """Rows of the table of a word's pieces.

    Source: Bojanowski et al. 2017, "Enriching word vectors with subword information".
    """
    bounded = f"<{word}>"
    # A word of one or two letters, or a sign that is a word by itself, is a piece as it is.
    pieces = {bounded} | {
        bounded[start : start + length]
        for length in range(shortest, longest + 1)
        for start in range(len(bounded) - length + 1)
    }
    return tuple(zlib.crc32(piece.encode("utf-8", "surrogatepass")) % buckets for piece in sorted(pieces))
