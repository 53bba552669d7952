"""captioned pictures -> a dual encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from emulus.data.media_dataset import MediaDataset, media_state, to_pixels, warn_of_other_media
from emulus.data.source import open_source
from emulus.dual.model import DualConfig, DualEncoder
from emulus.dual.names import Names, name_of, ranks, texts_of
from emulus.errors import EmulusError, at_least
from emulus.files import check_out
from emulus.log import progress
from emulus.parallel.processes import start_processes
from emulus.train.config import TrainConfig
from emulus.train.loop import check_run, train
from emulus.train.objective import Evaluation, Objective, StepLoss
from emulus.weights import on_meta


@dataclass(frozen=True, kw_only=True)
class VaryConfig:
    """How training pictures and texts are varied, so that few of them teach more.

    Attributes:
        shift: Pictures are moved by up to this share of their side.
        zoom: And scaled by up to this share, up or down.
        turn: And turned by up to so many degrees.
        flip: Whether half of them are mirrored.
        colour: Brightness, contrast and the weight of each colour change by up to this share.
        blur: Share of the pictures that lose their finest detail, as drawn ones do.
        hide: Share of the pictures of which a square is painted over.
        drop_words: Share of a text's words that are left out.
    """

    shift: float = 0.12
    zoom: float = 0.2
    turn: float = 12.0
    flip: bool = True
    colour: float = 0.2
    blur: float = 0.3
    hide: float = 0.3
    drop_words: float = 0.15

    def __post_init__(self) -> None:
        at_least(0, shift=self.shift, zoom=self.zoom, turn=self.turn, colour=self.colour, blur=self.blur)
        at_least(0, hide=self.hide, drop_words=self.drop_words)


_TRAIN = TrainConfig(
    steps=3000, learning_rate=4e-3, warmup_steps=100, ema_decay=0.998, evaluate_every=250, save_every=250, log_every=50
)


@dataclass(frozen=True, kw_only=True)
class DualTrainConfig:
    """A dual encoder from scratch, on the training split alone.

    Attributes:
        data: A data set (see docs/data.md).
        out: Folder of the run.
        pictures_per_batch: Each is told from all the others of its batch by its text, so more are harder.
        evaluation_items: Held-out pictures that are looked up among their names at each evaluation; 0 takes all.
    """

    data: Path
    out: Path
    model: DualConfig = field(default_factory=DualConfig)
    vary: VaryConfig = field(default_factory=VaryConfig)
    train: TrainConfig = _TRAIN
    pictures_per_batch: int = 256
    evaluation_items: int = 0

    def __post_init__(self) -> None:
        at_least(2, pictures_per_batch=self.pictures_per_batch)
        at_least(0, evaluation_items=self.evaluation_items)


@dataclass(frozen=True, kw_only=True)
class DualBatch:
    """Pictures in [-1, 1], a text of each, and what each shows (equal numbers are never held against each other)."""

    pixels: Float[Tensor, "n 3 h w"]
    texts: Sequence[str]
    things: Tensor


class DualObjective(Objective[DualBatch, DualEncoder]):
    """Every picture of a batch is to find its text among the batch's, and every text its picture.

    Source: Radford et al. 2021, "Learning transferable visual models from natural language supervision" (CLIP).
    """

    unit = "pictures"

    def __init__(self, config: DualTrainConfig) -> None:
        """Open the data and make the model.

        Raises:
            EmulusError: There is nothing to train on, or several processes were started.
        """
        self.config = config
        self.processes = start_processes(config.train.parallel, config.train.device)
        if self.processes.world > 1:
            raise EmulusError("a dual encoder is trained by one process; start it without torchrun")
        torch.manual_seed(config.train.seed)
        self.model = DualEncoder(config.model).to(self.processes.device)
        source = open_source(config.data)
        items = source.select(split="train", kind="image")
        if not items:
            raise EmulusError(f"{config.data} has no training pictures")
        self.pictures = MediaDataset(items, size=config.model.size)
        self._files = media_state(self.pictures)
        # Read once in the order in which they are stored: in another, each costs as much as its whole row group.
        for place in progress(range(len(items)), what="reading pictures"):
            _ = self.pictures[place]
        self.texts = [texts_of(item) for item in items]
        numbers: dict[str, int] = {}
        self.things = torch.tensor([numbers.setdefault(name_of(item), len(numbers)) for item in items])
        held_out = source.select(split="validation", kind="image")
        self.held_out = MediaDataset(held_out, size=config.model.size) if held_out else None

    def fingerprint(self) -> str:
        """Of the training items' names."""
        return hashlib.sha256("\n".join(item.id for item in self.pictures.items).encode()).hexdigest()

    def reading_state(self, step: int) -> dict[str, Any]:
        """The training pictures' sizes and times, to tell that they changed."""
        return {"files": self._files}

    def load_reading_state(self, state: dict[str, Any]) -> None:
        """Say if the pictures are not the same files any more; they are read as they are."""
        warn_of_other_media(state, self._files)

    def batches(self, step: int) -> list[DualBatch]:
        """The next pictures of an order that is drawn anew for every epoch, each varied and with one of its texts."""
        config = self.config
        draw = np.random.default_rng([config.train.seed, step])
        count = min(config.pictures_per_batch, len(self.pictures))
        chosen = [self._at(step * count + place) for place in range(count)]
        pixels = to_pixels(torch.cat([self.pictures[i] for i in chosen]).to(self.processes.device))
        texts = [_shortened(draw.choice(self.texts[i]), draw, config.vary.drop_words) for i in chosen]
        return [DualBatch(pixels=varied(pixels, draw, config.vary), texts=texts, things=self.things[chosen])]

    def _at(self, place: int) -> int:
        """Which picture is the ``place``-th of all that are seen."""
        epoch, place = divmod(place, len(self.pictures))
        return int(_order(self.config.train.seed, epoch, len(self.pictures))[place])

    def loss(self, batch: DualBatch, step_weight: float) -> StepLoss:
        """Cross-entropy in both directions."""
        pictures = self.model.picture_tower(batch.pixels)
        texts = self.model.text_tower(self.model.pieces(batch.texts))
        total, right = contrast(pictures, texts, self.model.log_scale, batch.things.to(pictures.device))
        scale = self.model.log_scale.detach().exp()
        figures = {"right": (right, 1.0), "scale": (scale, 1.0)}
        return StepLoss(total=total, figures=figures, items=len(batch.texts))

    def evaluate(self, model: DualEncoder) -> Evaluation:
        """How often a held-out picture's name is the nearest of all held-out names, or among the nearest ten."""
        if self.held_out is None:
            return Evaluation(metrics={})
        count = min(self.config.evaluation_items or len(self.held_out), len(self.held_out))
        places = [place * len(self.held_out) // count for place in range(count)]
        pixels = to_pixels(torch.cat([self.held_out[place] for place in places]))
        names = Names.of([self.held_out.items[place] for place in places])
        above = ranks(model.images(pixels), names.vectors(model), names.places)
        return Evaluation(
            metrics={
                "top1": float((above < 1).float().mean()),
                "top10": float((above < 10).float().mean()),
                "chance10": names.chance(10),
                "median_rank": float(above.float().median()) + 1,
            }
        )

    def save_model(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write the encoder in bfloat16."""
        model = on_meta(lambda: DualEncoder(self.config.model))
        model.load_state_dict(dict(tensors), assign=True)
        model.save(folder)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, 1, epoch]).permutation(count)


def contrast(
    pictures: Float[Tensor, "n d"], texts: Float[Tensor, "n d"], log_scale: Tensor, things: Tensor
) -> tuple[Tensor, Tensor]:
    """The symmetric contrastive loss of matching rows, and how many pictures find their text.

    Args:
        pictures: Unit vectors.
        texts: Unit vectors.
        log_scale: The logarithm of what their products are multiplied with; it is kept below 100.
        things: Rows of equal numbers show the same thing and are not held against each other.
    """
    logits = pictures @ texts.T * log_scale.clamp(max=4.6).exp()
    same = (things[:, None] == things[None]).fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.detach().argmax(1) == target).float().mean()


def varied(pixels: Float[Tensor, "n 3 h w"], draw: np.random.Generator, config: VaryConfig) -> Float[Tensor, "n 3 h w"]:
    """The pictures moved, scaled, turned, mirrored, tinted, blurred and partly hidden, each differently."""
    count, side = len(pixels), pixels.shape[-1]

    def within(reach: float, *shape: int) -> Tensor:
        return torch.from_numpy(draw.uniform(-reach, reach, (count, *shape)).astype(np.float32)).to(pixels.device)

    def chosen(share: float) -> Tensor:
        return torch.from_numpy(draw.random(count) < share).to(pixels.device)[:, None, None, None]

    angle, scale = torch.deg2rad(within(config.turn)), torch.exp(within(np.log1p(config.zoom)))
    mirror = torch.where(chosen(0.5 if config.flip else 0.0)[:, 0, 0, 0], -1.0, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    moves = within(2 * config.shift, 2)
    matrix = torch.stack(
        [torch.stack([cos * mirror, -sin, moves[:, 0]], 1), torch.stack([sin * mirror, cos, moves[:, 1]], 1)], 1
    )
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    result = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    coarse = F.interpolate(F.avg_pool2d(result, 2), (side, side), mode="bilinear")
    result = torch.where(chosen(config.blur), coarse, result)
    result = result * (1 + within(config.colour, 3, 1, 1)) * (1 + within(config.colour, 1, 1, 1))
    result = (result + within(config.colour, 1, 1, 1)).clamp(-1, 1)
    return torch.where(
        chosen(config.hide) & _squares(count, side, draw).to(pixels.device), within(1.0, 3, 1, 1), result
    )


def _squares(count: int, side: int, draw: np.random.Generator) -> Tensor:
    """A square of a quarter to half the side somewhere in each picture, as a mask ``(count, 1, side, side)``."""
    sizes = draw.uniform(side / 4, side / 2, (count, 1))
    places = np.arange(side)[None]
    inside = []
    for _ in range(2):
        start = draw.uniform(0, side, (count, 1)) - sizes / 2
        inside.append((places >= start) & (places < start + sizes))
    return torch.from_numpy(inside[0][:, None, :, None] & inside[1][:, None, None, :])


def _shortened(text: str, draw: np.random.Generator, share: float) -> str:
    """The text without some of its words, but never without all."""
    words = text.split()
    kept = [word for word, number in zip(words, draw.random(len(words)), strict=True) if number >= share]
    return " ".join(kept or words)


def train_dual(config: DualTrainConfig) -> Path:
    """Run (or go on with) the training; the folder of the final encoder. See :func:`emulus.train.loop.train`."""
    check_run(config.out)
    check_out(config.out, data_set=config.data)
    return train(config.train, DualObjective(config), config.out)
