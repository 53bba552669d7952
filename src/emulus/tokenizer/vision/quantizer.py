"""latents <-> codes."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from emulus.tokenizer.vision import on_gpu

# Distances in the table of a search, 16 MiB: some latents at a time. A GPU takes 256 MiB, in a few large launches.
SEARCH_TABLE = 2**22
SEARCH_TABLE_GPU = 2**26


class Quantizer(nn.Module):
    """A codebook and the search for its nearest vector, always in float32.

    Half precision flips codes between near neighbours, so the search leaves autocast.
    """

    def __init__(self, codebook_size: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    @torch.no_grad()
    def nearest(self, latents: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
        """Index of the nearest codebook vector (squared distance) for each latent."""
        with on_gpu.exact(latents.device), torch.autocast(latents.device.type, enabled=False):
            codebook = self.embedding.weight.float()
            # |x|^2 is the same for every vector of a row, so it cannot change the choice.
            norms = codebook.square().sum(1)
            table_size = SEARCH_TABLE_GPU if latents.device.type == "cuda" else SEARCH_TABLE
            rows = latents.float().split(max(1, table_size // len(codebook)))
            table = norms.new_empty(len(rows[0]), len(codebook))
            found = [
                torch.addmm(norms, chunk, codebook.T, alpha=-2, out=table[: len(chunk)]).argmin(1) for chunk in rows
            ]
            return torch.cat(found)

    def encode(self, latents: Float[Tensor, "b d t h w"]) -> Int[Tensor, "b t h w"]:
        """Codes of a grid of latents."""
        grid = latents.movedim(1, -1)
        return self.nearest(grid.reshape(-1, grid.shape[-1])).reshape(grid.shape[:-1])

    def decode(self, codes: Int[Tensor, "b t h w"]) -> Float[Tensor, "b d t h w"]:
        """Codebook vectors of a grid of codes."""
        return self.embedding(codes).movedim(-1, 1)
