"""Norms and activations of a few tokens."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from emulus.kernels.gpu import launch

if find_spec("triton") is not None:
    from emulus.kernels.programs import rows as programs


def rms_norm(x: Float[Tensor, "n size"], weight: Float[Tensor, " size"], eps: float) -> Float[Tensor, "n size"]:
    """Scale each row to unit mean square, in float32."""
    n, size = x.shape
    out = torch.empty(n, size, dtype=x.dtype, device=x.device)
    block = launch.power(size)
    launch.run(
        programs.rms_norm,
        (n,),
        *(x, weight, out, size, launch.stride(x), eps),
        BLOCK=block,
        num_warps=min(8, max(1, block // 512)),
    )
    return out


def silu_mul(gate: Float[Tensor, "n size"], up: Float[Tensor, "n size"]) -> Float[Tensor, "n size"]:
    """Compute ``silu(gate) * up``, rounded once."""
    n, size = gate.shape
    out = torch.empty(n, size, dtype=gate.dtype, device=gate.device)
    block = min(1024, launch.power(size))
    grid = (launch.blocks(size, block), n)
    launch.run(programs.silu_mul, grid, gate, up, out, size, launch.stride(gate), launch.stride(up), BLOCK=block)
    return out
