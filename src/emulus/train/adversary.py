"""A discriminator that learns beside what it judges."""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from emulus.device import autocast
from emulus.tokenizer.vision.discriminator import AdversarialConfig, Discriminator, Verdicts, views_of
from emulus.tokenizer.vision.losses import chosen_frames
from emulus.train.config import TrainConfig
from emulus.train.optimizer import clip_, make_optimizer, total_norm
from emulus.train.schedule import learning_rate


class Adversary:
    """The discriminator, its optimiser and what it has seen in this step.

    All that it changes is in :meth:`tensors`, so a resumed run computes the same bits.
    """

    def __init__(self, config: AdversarialConfig, train: TrainConfig, channels: int, device: torch.device) -> None:
        """Draw its weights from the global generator.

        Args:
            config: Its settings.
            train: Those of the loop: length and shape of the schedule, precision.
            channels: Of the pixels.
            device: Where they lie.
        """
        self.config, self.device = config, device
        # Little memory of old gradients, as the tokenizer that it judges is another one at every step.
        self.train = dataclasses.replace(
            train, optimizer="adamw", learning_rate=config.learning_rate, beta1=0.5, beta2=0.9, weight_decay=0.0
        )
        self.discriminator = Discriminator(channels, config).to(device)
        self.parameters = list(self.discriminator.parameters())
        self.optimizer = make_optimizer(self.discriminator.named_parameters(), self.train)
        # Usually gradients only pass through it, to what it judges.
        self.discriminator.requires_grad_(False)
        self.verdicts = Verdicts(config.lecam, device)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forget(self) -> None:
        """Begin a step."""
        self._seen.clear()

    def judge(self, painted: Float[Tensor, "*frames c h w"], pixels: Float[Tensor, "*frames c h w"]) -> Tensor:
        """The tokenizer's term for a batch of pictures or clips, which are remembered for :meth:`learn`."""
        some = chosen_frames(pixels, self.config.frames)
        views, real = views_of(painted.float())[some], views_of(pixels)[some]
        self._seen.append((views.detach(), real))
        return self.verdicts.tokenizer_loss(self.discriminator(views))

    def learn(self, step: int) -> dict[str, float]:
        """One step of the discriminator's optimiser on what was judged in this step; figures for the log."""
        if not self._seen:
            return {}
        painted, real = (torch.cat(views) for views in zip(*self._seen, strict=True))
        self.discriminator.requires_grad_(True)
        with autocast(self.device, self.train.precision):
            verdicts = self.discriminator(torch.cat([real, painted])).chunk(2)
            loss = self.verdicts.discriminator_loss(*verdicts)
        loss.backward()
        norm = total_norm(self.parameters)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, step)
        if math.isfinite(float(norm)):
            clip_(self.parameters, norm, 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.discriminator.requires_grad_(False)
        real_share, painted_share = (float((each > 0).float().mean()) for each in verdicts)
        return {
            "discriminator_loss": float(loss.detach()),
            "real_taken_for_real": real_share,
            "painted_taken_for_real": painted_share,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Weights, the optimiser's state and the running means; loaded in place."""
        names = {id(parameter): name for name, parameter in self.discriminator.named_parameters()}
        tensors = {f"discriminator.{name}": tensor for name, tensor in self.discriminator.state_dict().items()}
        for parameter, state in self.optimizer.state.items():
            tensors |= {f"optimizer.{names[id(parameter)]}.{key}": value for key, value in state.items()}
        return tensors | {f"verdicts.{name}": mean for name, mean in self.verdicts.state().items()}
