"""Every GPU kernel, built for cards that are not there, computes in registers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from emulus.kernels import gpu
from scripts import build_kernels
from scripts.built import ARCHITECTURES, SHARED_MEMORY, Built, building, instructions, some
from tests.kernels.test_gpu import needs_triton

pytestmark = needs_triton


def check(lines: list[build_kernels.Line]) -> None:
    """Assert that kernels fit and keep what they compute with in registers.

    Newer versions of Triton than the tested one may choose fewer registers (3.8 does for int4 on sm_100).
    """
    import triton

    most = 0 if triton.__version__.startswith("3.6.") else 64
    assert lines
    for line in lines:
        assert line.usage.stack <= most, line
        assert line.usage.spills <= most, line
        assert line.usage.shared <= SHARED_MEMORY[line.architecture], line


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_products_of_two_tokens(architecture: str) -> None:
    check(list(build_kernels.lines(architecture, ["emu3-8b"], ["bfloat16", "int4"], [2], "linear")))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_step(architecture: str) -> None:
    models, kinds, tokens = build_kernels.MODELS, build_kernels.KINDS, build_kernels.TOKENS
    check(list(build_kernels.lines(architecture, list(models), list(kinds), list(tokens), "")))


@pytest.fixture
def hopper(tmp_path: Path) -> list[Built]:
    """Launches so far, built for Hopper."""
    with building("sm_90", tmp_path) as launches:
        yield launches


@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_nothing_is_built_while_serving(hopper: list[Built], kind: str) -> None:
    """A number of tokens is no new variant, unless it takes another size of tile."""
    weight = build_kernels._weight(kind, 64, 1024)
    for n in (1, 2, 5, 8, 9, 16, 17, 37, 48, 64, 128):
        gpu.linear_group(some(n, 1024), [weight, weight])
    gpu.linear_group(_stray(1024), [weight, weight])
    assert len({launch.kernel.hash for launch in hopper}) == 3


def _stray(size: int) -> Tensor:
    """One row whose stride means nothing."""
    return some(1, size).as_strided((1, size), (1, 1))


def test_rows_are_no_new_variant(hopper: list[Built]) -> None:
    for n in (1, 2, 16, 37):
        gpu.rms_norm(some(n, 1024), some(1024), 1e-5)
        gpu.silu_mul(some(n, 1024), some(n, 1024))
    gpu.rms_norm(_stray(1024), some(1024), 1e-5)
    gpu.silu_mul(_stray(1024), _stray(1024))
    assert len({launch.kernel.hash for launch in hopper}) == 2


def test_launches_overlap_on_hopper_alone(tmp_path: Path) -> None:
    for architecture, waits in (("sm_80", 0), ("sm_90", 1)):
        with building(architecture, tmp_path / architecture) as launches:
            gpu.linear(some(2, 1024), some(64, 1024, dtype=torch.bfloat16), add=some(2, 64))
        assert launches[0].kernel.asm["ptx"].count("griddepcontrol.wait") == waits


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_weights_are_fetched_before_the_wait_and_nothing_else_is_touched(hopper: list[Built], kind: str) -> None:
    weight = build_kernels._weight(kind, 64, 1024)
    gpu.gated(some(2, 1024), weight, weight)
    code = [text for _, text in instructions(hopper[0].kernel.asm["cubin"])]
    (wait,) = [i for i, text in enumerate(code) if text.startswith("ACQBULK")]
    fetches = [i for i, text in enumerate(code) if text.startswith("CCTL")]
    touches = [i for i, text in enumerate(code) if text.startswith(("LDG", "STG"))]
    assert fetches
    assert max(fetches) < wait < min(touches)


def test_fp8_where_the_card_does_not_know_it() -> None:
    check(list(build_kernels.lines("sm_80", ["emoji-9m"], ["fp8"], [2], "linear")))
