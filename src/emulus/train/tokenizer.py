"""pictures and clips -> a vision tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from emulus.data.item import checked_fps
from emulus.data.media_dataset import (
    MediaDataset,
    media_state,
    shifted,
    to_pixels,
    warn_of_other_media,
    whole_codes,
)
from emulus.data.source import Kind, Split, open_source
from emulus.data.tokenize_config import MOST_SIDE
from emulus.errors import EmulusError, at_least
from emulus.files import check_out
from emulus.hub import fetch
from emulus.media import pixels_to_image
from emulus.parallel.processes import start_processes
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.codebook import CodebookConfig, CodebookTrainer
from emulus.tokenizer.vision.discriminator import AdversarialConfig
from emulus.tokenizer.vision.losses import ReconstructionConfig, ReconstructionLoss
from emulus.tokenizer.vision.metrics import codebook_usage, psnr, ssim
from emulus.tokenizer.vision.perceptual import PerceptualDistance, available
from emulus.tokenizer.vision.weights import load_vision_tokenizer, save_vision_tokenizer
from emulus.train.adversary import Adversary
from emulus.train.checkpoint import latest
from emulus.train.config import TrainConfig
from emulus.train.loop import CHECKPOINTS, check_run, train
from emulus.train.objective import Evaluation, Objective, StepLoss
from emulus.weights import on_meta


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainConfig:
    """A vision tokenizer, from scratch or from the weights of another.

    Attributes:
        data: A data set (see docs/data.md).
        out: Folder of the run.
        size: Side of the training pictures in pixels.
        fps: Frame rate clips are brought to; 0 keeps theirs.
        init: A vision tokenizer (or a model, or a run) of the same shape to start from, its codebook as it is; ``""``
            starts from random weights.
        freeze_encoder: Train what paints only. Codes keep their meaning, so tokens made before stay valid.
        pictures_per_batch: Pictures in each batch.
        clips_per_batch: Clips in each batch (0 when the data has none).
        clip_frames: Length of the training clips (windows of longer ones) and of the held-out ones, a multiple of the
            temporal factor. The causal layers see far back, so clips longer than this come out worse.
        shift: Pictures are shifted by up to this many pixels, for variety.
        flip: Pictures are mirrored half of the time.
        batch_norm_share: Share of the steps after which the batch norms keep their running figures: pictures
            and clips differ, and the layers must learn with the statistics that are used later. With ``init`` they
            keep them from the start.
        revive_share: Share of the steps during which dead codes are revived.
        evaluation_items: Held-out pictures, and a tenth as many clips, measured at each evaluation.
    """

    data: Path
    out: Path
    size: int = 64
    fps: float = 0.0
    init: str = ""
    freeze_encoder: bool = False
    model: VisionTokenizerConfig = field(default_factory=VisionTokenizerConfig)
    codebook: CodebookConfig = field(default_factory=CodebookConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pictures_per_batch: int = 12
    clips_per_batch: int = 1
    clip_frames: int = 16
    shift: int = 4
    flip: bool = True
    batch_norm_share: float = 0.1
    revive_share: float = 0.8
    evaluation_items: int = 256

    def __post_init__(self) -> None:
        at_least(1, size=self.size, clip_frames=self.clip_frames, evaluation_items=self.evaluation_items)
        at_least(0, pictures_per_batch=self.pictures_per_batch, clips_per_batch=self.clips_per_batch)
        at_least(0, fps=self.fps, shift=self.shift)
        at_least(0, batch_norm_share=self.batch_norm_share, revive_share=self.revive_share)
        if self.fps:
            checked_fps(self.fps, "--fps")
        if self.size > MOST_SIDE or self.shift > MOST_SIDE:
            raise EmulusError(f"size and shift are at most {MOST_SIDE:,} pixels")
        if self.size % self.model.spatial_factor:
            raise EmulusError(f"size must be a multiple of {self.model.spatial_factor}, got {self.size}")
        if self.clip_frames % self.model.temporal_factor:
            raise EmulusError(f"clip_frames must be a multiple of {self.model.temporal_factor}, got {self.clip_frames}")
        if self.freeze_encoder and not self.init:
            raise EmulusError("freeze_encoder keeps the encoder of a trained tokenizer; name it with --init")


@dataclass(frozen=True, kw_only=True)
class MediaBatch:
    """Pixels in [-1, 1]: pictures ``(B, 3, H, W)`` and clips ``(B, T, 3, H, W)``; either may be missing."""

    pictures: Tensor | None
    clips: Tensor | None


class TokenizerObjective(Objective[MediaBatch, VisionTokenizer]):
    """Reconstruction, adversarial and commitment terms; the codebook follows the latents."""

    unit = "frames"

    def __init__(self, config: TokenizerTrainConfig) -> None:
        self.config = config
        self.processes = start_processes(config.train.parallel, config.train.device)
        if self.processes.world > 1:
            raise EmulusError("a vision tokenizer is trained by one process; start it without torchrun")
        self.device = self.processes.device
        source = open_source(config.data)
        torch.manual_seed(config.train.seed)
        self.model = self._make_model()
        self.codebook = CodebookTrainer(self.model.quantize, config.codebook)
        if config.init:
            self.codebook.adopt()
        self.reconstruction = ReconstructionLoss(config.reconstruction, self.device)
        self.adversary: Adversary | None = None
        if config.adversarial.weight:
            self.adversary = Adversary(config.adversarial, config.train, config.model.out_channels, self.device)
        self._adversarial_weight = 0.0

        def dataset(split: Split, kind: Kind, max_frames: int | None = None) -> MediaDataset | None:
            items = source.select(split=split, kind=kind)
            return (
                MediaDataset(items, size=config.size, fps=config.fps or None, max_frames=max_frames) if items else None
            )

        self.pictures, self.clips = dataset("train", "image"), dataset("train", "video")
        self.held_out = dataset("validation", "image"), dataset("validation", "video", config.clip_frames)
        if (self.pictures is None or not config.pictures_per_batch) and (
            self.clips is None or not config.clips_per_batch
        ):
            raise EmulusError(f"{config.data} has no training pictures or clips")
        # That not one can be read must not be found out at the first evaluation.
        for data in self.held_out:
            if data is not None:
                _ = data[0]
        self._seen: list[tuple[Tensor, Tensor]] = []

    def _make_model(self) -> VisionTokenizer:
        config = self.config
        # A run that goes on needs the first weights no more.
        if config.init and latest(config.out / CHECKPOINTS) is None:
            model = load_vision_tokenizer(fetch(config.init), self.device)
            _check_shape(config.init, model.config, config.model)
            model.config = config.model
        else:
            model = VisionTokenizer(config.model).to(self.device)
        if config.freeze_encoder:
            for part in (model.encoder, model.quant_conv):
                part.requires_grad_(False)
        return model

    def fingerprint(self) -> str:
        """Of the training items' names."""
        names = [item.id for data in (self.pictures, self.clips) if data is not None for item in data.items]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    def reading_state(self, step: int) -> dict[str, Any]:
        """The training media's sizes and times, to tell that they changed."""
        return {"files": self._files}

    @cached_property
    def _files(self) -> str:
        return media_state(self.pictures, self.clips)

    def load_reading_state(self, state: dict[str, Any]) -> None:
        """Say if the media are not the same files any more; they are read as they are."""
        warn_of_other_media(state, self._files)

    def batches(self, step: int) -> list[MediaBatch]:
        """One batch of pictures and windows of clips, drawn at random with replacement."""
        config = self.config
        draw = np.random.default_rng([config.train.seed, step])
        pictures = clips = None
        if self.pictures is not None and config.pictures_per_batch:
            chosen = draw.integers(len(self.pictures), size=config.pictures_per_batch)
            pictures = torch.stack([self._vary(self.pictures[int(i)], draw)[0] for i in chosen])
        if self.clips is not None and config.clips_per_batch:
            chosen = draw.integers(len(self.clips), size=config.clips_per_batch)
            windows = [_window(self.clips[int(i)], config.clip_frames, draw) for i in chosen]
            clips = torch.stack([self._vary(window, draw) for window in windows])
        batch = MediaBatch(
            pictures=None if pictures is None else to_pixels(pictures.to(self.device)),
            clips=None if clips is None else to_pixels(clips.to(self.device)),
        )
        return [batch]

    def _vary(self, frames: Tensor, draw: np.random.Generator) -> Tensor:
        """Shift the frames a little and perhaps mirror them."""
        moved = shifted(frames, draw, self.config.shift)
        return moved.flip(-1) if self.config.flip and draw.integers(2) else moved

    def before_step(self, step: int, steps: int) -> None:
        """Freeze the batch norms in the last part of the run, and what is frozen for good."""
        # A batch's own figures would throw a trained tokenizer back by several dB.
        if self.config.init or step >= self.config.batch_norm_share * steps:
            for module in self.model.modules():
                if isinstance(module, nn.BatchNorm3d):
                    module.eval()
        if self.config.freeze_encoder:
            self.model.encoder.eval()
        self._adversarial_weight = self.config.adversarial.weight_at(step, steps)

    def loss(self, batch: MediaBatch, step_weight: float) -> StepLoss:
        """Pictures and clips weigh by their number of frames."""
        self._seen.clear()
        if self.adversary is not None:
            self.adversary.forget()
        parts = [pixels for pixels in (batch.pictures, batch.clips) if pixels is not None]
        frames = [pixels[..., 0, 0, 0].numel() for pixels in parts]
        total = torch.zeros((), device=self.device)
        figures: dict[str, tuple[Tensor, float]] = {}
        for pixels, count in zip(parts, frames, strict=True):
            kind = "picture" if pixels.ndim == 4 else "clip"
            loss, terms = self._reconstruct(pixels)
            total = total + loss * (count / sum(frames))
            figures |= {f"{kind}_{name}": (value, 1.0) for name, value in terms.items()}
        return StepLoss(total=total, figures=figures, items=sum(frames))

    def _reconstruct(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of pictures or clips; its terms, and the PSNR over all pixels together."""
        vectors, commitment = self._quantize(pixels)
        painted = self.model.paint(vectors, is_image=pixels.ndim == 4)
        loss, terms = self.reconstruction(painted, pixels)
        if self.adversary is not None and self._adversarial_weight:
            adversarial = self.adversary.judge(painted, pixels)
            loss = loss + self._adversarial_weight * adversarial
            terms["adversarial"] = adversarial.detach()
        error = (painted.detach().float() - pixels).square().mean()
        terms |= {"commitment": commitment.detach(), "psnr": 10 * torch.log10(4 / error)}
        return loss + commitment, terms

    def _quantize(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Codebook vectors to paint from, and the commitment term."""
        frozen = self.config.freeze_encoder
        with torch.set_grad_enabled(not frozen):
            latents = self.model.latents(pixels)
        flat = latents.movedim(1, -1).flatten(0, -2)
        self.codebook.start(flat.detach())
        codes = self.model.quantize.encode(latents)
        vectors = self.model.quantize.decode(codes)
        self._seen.append((flat.detach(), codes.flatten()))
        commitment = self.codebook.commitment(latents, vectors)
        # Straight through: the decoder sees the codebook vectors, the encoder gets their gradient.
        return vectors if frozen else latents + (vectors - latents).detach(), commitment

    def after_step(self, step: int, steps: int) -> dict[str, float]:
        """Move the codebook, and train the discriminator."""
        latents, codes = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        figures = {"codes_in_batch": float(len(codes.unique()))}
        if not self.config.freeze_encoder:
            revived = self.codebook.update(latents, codes, revive=step < self.config.revive_share * steps)
            figures["revived"] = float(revived)
        return figures if self.adversary is None else figures | self.adversary.learn(step)

    def extra_tensors(self) -> dict[str, Tensor]:
        """The codebook's running figures; the discriminator with its optimiser."""
        return self.codebook.state() | ({} if self.adversary is None else self.adversary.tensors())

    @cached_property
    def distance(self) -> PerceptualDistance | None:
        """What measures held-out pictures, where it is installed."""
        return PerceptualDistance.load("alex", self.device) if available() else None

    def evaluate(self, model: VisionTokenizer) -> Evaluation:
        """Quality and codebook figures of held-out pictures and clips, and a sheet of input | reconstruction."""
        metrics: dict[str, float] = {}
        pictures: dict[str, PIL.Image.Image] = {}
        codes: list[Tensor] = []
        limits = {"picture": self.config.evaluation_items, "clip": max(self.config.evaluation_items // 10, 1)}
        for (kind, limit), data in zip(limits.items(), self.held_out, strict=True):
            if data is None:
                continue
            figures, sheet, part = self._measure(model, data, limit)
            metrics |= {f"{kind}_{name}": value for name, value in figures.items()}
            pictures[f"{kind}s"] = sheet
            codes.append(part)
        if codes:
            metrics |= codebook_usage(torch.cat(codes), self.config.model.codebook_size)
        return Evaluation(metrics=metrics, pictures=pictures)

    def _measure(
        self, model: VisionTokenizer, data: MediaDataset, limit: int
    ) -> tuple[dict[str, float], PIL.Image.Image, Tensor]:
        measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "ssim": ssim}
        if self.distance is not None:
            measures["stlpips"] = self.distance
        scores: list[Tensor] = []
        codes: list[Tensor] = []
        pairs: list[Tensor] = []
        for index in range(min(limit, len(data))):
            frames = whole_codes(data[index], model.config.temporal_factor)
            pixels = to_pixels(frames.to(self.device))
            is_picture = len(frames) == 1
            code = model.encode(pixels if is_picture else pixels[None])
            painted = model.decode(code).float().reshape_as(pixels).clamp(-1, 1)
            scores.append(torch.stack([measure(painted, pixels).mean() for measure in measures.values()]))
            codes.append(code.flatten())
            if len(pairs) < 16:
                pairs.append(torch.cat([pixels[-1], painted[-1]], dim=2))
        mean = torch.stack(scores).mean(0)
        sheet = torch.cat(
            [torch.cat(pairs[row : row + 4], dim=2) for row in range(0, len(pairs) // 4 * 4, 4)] or pairs[:1], dim=1
        )
        figures = dict(zip(measures, mean.tolist(), strict=True))
        return figures, pixels_to_image(sheet.cpu()), torch.cat(codes)

    def save_model(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Write the tokenizer in the released layout."""
        model = on_meta(lambda: VisionTokenizer(self.config.model))
        model.load_state_dict(dict(tensors), assign=True)
        save_vision_tokenizer(model.eval(), folder)


def _check_shape(init: str, theirs: VisionTokenizerConfig, ours: VisionTokenizerConfig) -> None:
    """Refuse to start from a tokenizer of another shape; its dropout is free."""
    wanted, there = ours.to_dict(), theirs.to_dict()
    for name in wanted.keys() - {"dropout"}:
        if wanted[name] != there[name]:
            raise EmulusError(
                f"{init} has {name} {there[name]}, this run {wanted[name]}; give --model.{name.replace('_', '-')} "
                f"{there[name]}"
            )


def _window(frames: Tensor, length: int, draw: np.random.Generator) -> Tensor:
    """A random run of ``length`` frames; a shorter clip holds its last frame."""
    start = int(draw.integers(max(len(frames) - length, 0) + 1))
    window = frames[start : start + length]
    return torch.cat([window, window[-1:].expand(length - len(window), -1, -1, -1)])


def train_tokenizer(config: TokenizerTrainConfig) -> Path:
    """Run (or go on with) the training; the folder of the final tokenizer. See :func:`emulus.train.loop.train`."""
    check_run(config.out, config.init)
    check_out(config.out, data_set=config.data)
    return train(config.train, TokenizerObjective(config), config.out)
