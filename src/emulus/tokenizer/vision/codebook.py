"""Learning a codebook from scratch without collapse.

The plain recipe (random codebook, gradient steps) ends with about 1 % of the codes in use. Three measures keep all of
them: the codebook starts as a sample of real latents, each code follows the running mean of the latents that chose
it, and a code that nobody chooses moves to a latent of the current batch. The result is what the released format
holds: a table and a nearest-neighbour search.

Sources: VQ-VAE's exponential averages (arXiv:1711.00937, appendix A), SoundStream's replacement of dead codes
(arXiv:2107.03312).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from emulus.tokenizer.vision.quantizer import Quantizer

# A new code counts as chosen this often (1 is a fair share): it has a while to find latents before it is called dead.
PROBATION = 0.5


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """How the codebook learns.

    Attributes:
        decay: Weight of the past in the running means, per step.
        dead_share: A code is dead when it is chosen less often than this share of a fair one.
        commitment: Weight of the pull of latents towards their codes (beta in VQ-VAE).
    """

    decay: float = 0.98
    dead_share: float = 0.1
    commitment: float = 0.25


class CodebookTrainer:
    """Running statistics of a codebook under training. All arithmetic is in float32."""

    def __init__(self, quantizer: Quantizer, config: CodebookConfig) -> None:
        self.config = config
        # The codebook moves by averages, not by gradients.
        self.weight = quantizer.embedding.weight.requires_grad_(False)
        self.counts = torch.full((self.weight.shape[0],), PROBATION, device=self.weight.device)
        self.sums = PROBATION * self.weight.detach()
        self.started = torch.zeros((), dtype=torch.bool)

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the codebook itself, which is a weight of the model; loaded in place."""
        return {"counts": self.counts, "sums": self.sums, "started": self.started}

    @torch.no_grad()
    def start(self, latents: Float[Tensor, "n d"]) -> None:
        """Place every code on a latent of the first batch (with a little noise, as there may be fewer of them)."""
        if bool(self.started):
            return
        flat = latents.float()
        chosen = flat[torch.randint(len(flat), (self.weight.shape[0],), device=flat.device)]
        chosen = chosen + 0.01 * flat.std(0) * torch.randn_like(chosen)
        self.weight.copy_(chosen)
        self.sums.copy_(PROBATION * chosen)
        self.started.fill_(True)

    def adopt(self) -> None:
        """Go on from the codebook as it is, each code as if it had been in average use."""
        self.counts.fill_(1.0)
        self.sums.copy_(self.weight.detach())
        self.started.fill_(True)

    @torch.no_grad()
    def update(self, latents: Float[Tensor, "n d"], codes: Int[Tensor, " n"], *, revive: bool) -> int:
        """Move codes to the running mean of their latents, and dead codes to latents of this batch.

        Args:
            latents: The batch's latents.
            codes: The code each of them chose.
            revive: Whether to move dead codes; off near the end, so that codes keep their meaning.

        Returns:
            How many codes were moved as dead.
        """
        flat, size = latents.float(), self.weight.shape[0]
        decay = self.config.decay
        counts = torch.bincount(codes, minlength=size).float()
        sums = torch.zeros_like(self.sums).index_add_(0, codes, flat)
        # Counts and sums are divided by each other, so they are kept per fair share: 1 is a code of average use.
        fair = len(flat) / size
        self.counts.lerp_(counts / fair, 1 - decay)
        self.sums.lerp_(sums / fair, 1 - decay)
        used = self.counts > 1e-6
        self.weight[used] = self.sums[used] / self.counts[used, None]
        dead = (self.counts < self.config.dead_share).nonzero()[:, 0]
        if not revive or not len(dead):
            return 0
        # Badly served latents are likelier to get a code of their own, as in k-means++: most latents of a plain
        # background have one already.
        error = (flat - self.weight[codes]).square().sum(1) + 1e-12
        fresh = flat[torch.multinomial(error, len(dead), replacement=len(dead) > len(flat))]
        self.weight[dead] = fresh
        self.counts[dead] = PROBATION
        self.sums[dead] = PROBATION * fresh
        return len(dead)

    def commitment(self, latents: Tensor, vectors: Tensor) -> Tensor:
        """The pull of latents towards the codebook vectors they chose."""
        return self.config.commitment * F.mse_loss(latents, vectors.detach())
