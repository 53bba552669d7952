"""The loss of the head: the plain loss's numbers and gradients, in pieces and over processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emulus.errors import EmulusError
from emulus.model import loss
from emulus.model.loss import Losses, linear_cross_entropy
from tests.ranks import run_ranks
from tests.unwritten import filled


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    weights: Tensor

    def again(self) -> Case:
        """The same numbers without gradients."""
        fresh = (tensor.detach().clone() for tensor in self)
        return Case(*(new.requires_grad_(old.requires_grad) for new, old in zip(fresh, self, strict=True)))


def case(n: int, v: int, d: int, dtype: torch.dtype = torch.float64, *, scale: float = 1.0, seed: int = 0) -> Case:
    source = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, d, generator=source, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=source, dtype=torch.float64).to(dtype).requires_grad_()
    weights = torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, (n,), generator=source)]
    return Case(hidden, weight, torch.randint(v, (n,), generator=source), weights)


def plain(case: Case, z_loss: float = 0.0) -> Losses:
    """As one would write it, with all logits."""
    logits = F.linear(case.hidden, case.weight).to(torch.promote_types(case.hidden.dtype, torch.float32))
    tokens = F.cross_entropy(logits, case.targets, reduction="none")
    total = (case.weights * (tokens + z_loss * logits.logsumexp(1).square())).sum()
    return Losses(total, tokens.detach())


def assert_same(ours: Case, losses: Losses, theirs: Case, expected: Losses, tolerance: float) -> None:
    (losses.total * 3).backward()
    (expected.total * 3).backward()
    pairs = [(losses.tokens, expected.tokens), (losses.total, expected.total)]
    pairs += [(ours.hidden.grad, theirs.hidden.grad), (ours.weight.grad, theirs.weight.grad)]
    for mine, other in pairs:
        assert mine is not None
        assert other is not None
        assert_near(mine, other.detach(), tolerance)


def assert_near(mine: Tensor, other: Tensor, tolerance: float) -> None:
    """Equal but for a part of the largest number, or of 1."""
    largest = float(other.abs().max()) if other.numel() else 0.0
    torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * max(1.0, largest))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    v=st.integers(1, 12),
    d=st.integers(1, 5),
    tokens=st.integers(1, 4),
    rows=st.integers(1, 5),
    block=st.integers(1, 30),
    z_loss=st.sampled_from([0.0, 1e-4, 0.1]),
)
def test_exact_in_any_pieces(n: int, v: int, d: int, tokens: int, rows: int, block: int, z_loss: float) -> None:
    ours = case(n, v, d)
    theirs = ours.again()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "_CPU", loss._Sizes(logits=1 << 20, tokens=tokens, block=block, rows=rows))
        losses = linear_cross_entropy(*ours, z_loss=z_loss)
    assert_same(ours, losses, theirs, plain(theirs, z_loss), 1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_float32(scale: float) -> None:
    ours = case(70, 9000, 16, torch.float32, scale=scale)
    theirs = ours.again()
    assert_same(ours, linear_cross_entropy(*ours), theirs, plain(theirs), 5e-6)


def test_autocast_is_as_near_to_the_truth_as_the_plain_loss() -> None:
    given = case(300, 9000, 64, torch.float32, scale=0.3)
    # Half of the targets are likely, where rounding 1 would leave nothing of the gradient.
    with torch.no_grad():
        given.hidden[::2] += given.weight[given.targets[::2]] * 0.3
    truth, theirs, ours = given.again(), given.again(), given.again()
    plain(truth).total.backward()
    with torch.autocast("cpu", torch.bfloat16):
        expected, losses = plain(theirs), linear_cross_entropy(*ours)
    expected.total.backward()
    losses.total.backward()
    assert losses.tokens.dtype == losses.total.dtype == torch.float32
    torch.testing.assert_close(losses.tokens, expected.tokens, rtol=1e-6, atol=1e-5)
    for name in ("hidden", "weight"):
        true, other, mine = (getattr(each, name).grad for each in (truth, theirs, ours))
        assert mine.dtype == torch.float32
        assert (mine - true).norm() < 1.3 * (other - true).norm() < 0.02 * true.norm()


def test_bfloat16_inputs() -> None:
    ours = case(20, 50, 8, torch.bfloat16)
    theirs = ours.again()
    losses = linear_cross_entropy(*ours)
    assert losses.tokens.dtype == torch.float32
    assert_same(ours, losses, theirs, plain(theirs), 0.03)
    assert ours.weight.grad is not None
    assert ours.weight.grad.dtype == torch.bfloat16


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    ours, theirs = case(9, 7, 4), case(9, 7, 4)
    ours.weight.requires_grad_(False)
    linear_cross_entropy(*ours).total.backward()
    plain(theirs).total.backward()
    assert ours.weight.grad is None
    torch.testing.assert_close(ours.hidden.grad, theirs.hidden.grad)
    with torch.no_grad():
        losses = linear_cross_entropy(*theirs)
    assert not losses.total.requires_grad
    torch.testing.assert_close(losses.tokens, plain(theirs).tokens)


def test_tokens_carry_no_gradient() -> None:
    assert not linear_cross_entropy(*case(9, 7, 4)).tokens.requires_grad


def test_no_weight_no_contribution() -> None:
    ours = case(30, 11, 4)
    linear_cross_entropy(*ours, z_loss=0.1).total.backward()
    assert ours.hidden.grad is not None
    silent = ours.weights == 0
    assert silent.any()
    assert not ours.hidden.grad[silent].any()
    assert ours.hidden.grad[~silent].any(1).all()
    rest = Case(
        ours.hidden.detach()[~silent], ours.weight.detach().requires_grad_(), *(each[~silent] for each in ours[2:])
    )
    linear_cross_entropy(*rest, z_loss=0.1).total.backward()
    torch.testing.assert_close(ours.weight.grad, rest.weight.grad)


def test_no_tokens() -> None:
    ours = case(0, 7, 4)
    losses = linear_cross_entropy(*ours)
    losses.total.backward()
    assert losses.total == 0
    assert ours.weight.grad is not None
    assert ours.weight.grad.shape == (7, 4)
    assert not ours.weight.grad.any()


@pytest.mark.parametrize("target", [-1, 7, -100])
def test_a_target_that_is_no_id(target: int) -> None:
    ours = case(5, 7, 4)
    ours.targets[3] = target
    with pytest.raises(EmulusError, match=f"target {target} .*another vocabulary"):
        linear_cross_entropy(*ours)


def test_a_head_without_rows() -> None:
    ours = case(5, 7, 4)
    with pytest.raises(EmulusError, match="use fewer"):
        linear_cross_entropy(ours.hidden, ours.weight[:0], ours.targets, ours.weights)


def test_backward_only_once() -> None:
    losses = linear_cross_entropy(*case(5, 7, 4))
    (losses.total * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        losses.total.backward()


def test_same_bits_again() -> None:
    first = case(600, 3000, 16, torch.float32)
    second = first.again()
    totals = []
    for each in (first, second):
        losses = linear_cross_entropy(*each)
        losses.total.backward()
        totals.append(losses.total)
    assert torch.equal(*totals)
    for name in ("hidden", "weight"):
        assert torch.equal(getattr(first, name).grad, getattr(second, name).grad)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.untyped_storage().nbytes() // each.itemsize)
        return out


def test_all_logits_never_exist() -> None:
    ours = case(4096, 6000, 4, torch.float32)
    with Largest() as largest:
        linear_cross_entropy(*ours).total.backward()
    assert 6000 < largest.numbers < 4096 * 6000 / 4


def pieces(ours: Case, z_loss: float, sizes: list[int]) -> list[Any]:
    """On one of two processes: losses and gradients with the head's rows dealt out."""
    rank = dist.get_rank()
    first = sum(sizes[:rank])
    weight = ours.weight.detach()[first : first + sizes[rank]].clone().requires_grad_()
    hidden = ours.hidden.detach().clone().requires_grad_()
    # By these sizes the processes would take different numbers of tokens at a time.
    loss._CPU = loss._Sizes(logits=20 * sizes[0] * weight.itemsize, tokens=99, block=64, rows=4)
    losses = linear_cross_entropy(
        hidden, weight, ours.targets, ours.weights, z_loss=z_loss, group=dist.group.WORLD, first_id=first
    )
    (losses.total * 3).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    found = [tensor.tolist() for tensor in (losses.total.detach(), losses.tokens, hidden.grad, weight.grad)]
    ours.targets[4] = 999
    with pytest.raises(EmulusError, match="target 999"):
        linear_cross_entropy(hidden, weight, ours.targets, ours.weights, group=dist.group.WORLD, first_id=first)
    return found


@pytest.mark.parametrize(("dtype", "far", "tolerance"), [(torch.float32, False, 1e-6), (torch.float64, True, 1e-12)])
def test_two_processes_share_the_head(dtype: torch.dtype, far: bool, tolerance: float) -> None:
    given = case(40, 21, 8, dtype)
    with torch.no_grad():
        if far:
            # All that the second process has is as good as impossible, and some targets are there.
            given.hidden[:, 0] = 20.0
            given.weight[:, 0] = 10.0
            given.weight[13:, 0] = -10.0
    theirs = given.again()
    expected = plain(theirs, 0.01)
    (expected.total * 3).backward()
    assert theirs.hidden.grad is not None
    assert theirs.weight.grad is not None
    plain_tensors = Case(*(tensor.detach() for tensor in given))
    for rank, found in enumerate(run_ranks(2, pieces, plain_tensors, 0.01, [13, 8])):
        rows = theirs.weight.grad[:13] if rank == 0 else theirs.weight.grad[13:]
        for mine, other in zip(found, (*expected, theirs.hidden.grad, rows), strict=True):
            assert_near(torch.tensor(mine, dtype=other.dtype), other.detach(), tolerance)


@pytest.mark.parametrize("ids", [9, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_given_no_memory_that_was_not_written(ids: int, dtype: torch.dtype) -> None:
    """Between the rows of a view, too: bfloat16 products on some processors read there, and 0 * NaN is NaN."""
    ours = case(30, ids, 8, torch.float32)
    with filled(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = linear_cross_entropy(*ours)
    losses.total.backward()
    assert ours.hidden.grad is not None
    assert ours.hidden.grad.isfinite().all()
