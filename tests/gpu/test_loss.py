"""The loss's kernel against plain PyTorch.

Run with ``pytest -m gpu`` on a GPU; without one, tests/kernels/test_loss.py runs it in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from emulus.kernels import gpu
from emulus.model import loss
from emulus.model.loss import linear_cross_entropy
from tests.gpu.test_kernels import DEVICE, INTERPRETED  # which also repairs the interpreter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not gpu.available(), reason="needs a GPU and Triton"),
]

CUT = 2 if INTERPRETED else 1
"""The interpreter cuts numbers off where bfloat16 ends, instead of rounding them."""
# Ids: fewer than a block, in the middle of one, whole blocks, and not a multiple of what is read at a time.
WIDTHS = [5, 8192, 10_003]


def rows_of(count: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits as the loss has them, and all of their memory, the places between the rows filled with NaN."""
    torch.manual_seed(0)
    padded = torch.full((count + 1, -(-width // 64) * 64), torch.nan, dtype=dtype, device=DEVICE)
    logits = padded[:count, :width]
    logits.copy_(8 * torch.randn(count, width))
    return logits, padded


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exponentials(width: int, dtype: torch.dtype) -> None:
    from emulus.kernels.gpu.loss import exponentials

    logits, padded = rows_of(3, width, dtype)
    exact = logits.double()
    peak, mass = exponentials(logits)
    assert torch.equal(peak.double(), exact.amax(1))
    exps = (exact - exact.amax(1, keepdim=True)).exp()
    torch.testing.assert_close(mass.double(), exps.sum(1), rtol=2e-6, atol=0)
    rounding = CUT / 256 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits.double(), exps, rtol=rounding, atol=1e-37)
    assert not padded[:3, width:].any()
    assert padded[3].isnan().all(), "written behind the last row"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_losses_and_gradients(dtype: torch.dtype, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to the truth as without the kernel."""
    torch.manual_seed(0)
    n, ids, size = 19, 1003, 32
    hidden, weight = torch.randn(n, size, device=DEVICE), torch.randn(ids, size, device=DEVICE) / 2
    targets, weights = torch.randint(ids, (n,), device=DEVICE), torch.rand(n, device=DEVICE)

    def computed(kernel: bool, dtype: torch.dtype) -> list[Tensor]:
        monkeypatch.setattr(loss, "_has_kernel", lambda logits, sums: kernel)
        given = [tensor.detach().clone().to(dtype).requires_grad_() for tensor in (hidden, weight)]
        losses = linear_cross_entropy(given[0], given[1], targets, weights, z_loss=z_loss)
        losses.total.backward()
        return [losses.tokens.double(), losses.total.detach().double(), *(each.grad.double() for each in given)]  # type: ignore[union-attr]

    exact = [value.double() for value in computed(False, torch.float64)]
    for ours, plain, right in zip(computed(True, dtype), computed(False, dtype), exact, strict=True):
        tolerance = 1e-6 + 1.02 * CUT * ((plain - right).norm() / right.norm()).item()
        assert ((ours - right).norm() / right.norm()).item() < tolerance


def test_what_is_not_a_number_makes_the_loss_none() -> None:
    from emulus.kernels.gpu.loss import exponentials

    logits, _ = rows_of(2, 100, torch.float32)
    logits[1, 50] = torch.nan
    _, mass = exponentials(logits)
    assert mass.isfinite().tolist() == [True, False]
