"""Attention and choice built for cards that are not there: every type of lane, any step, launches that overlap."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from emulus.kernels import gpu
from emulus.kernels.gpu import launch
from emulus.kernels.where import Where
from scripts.built import ARCHITECTURES, SHARED_MEMORY, Built, building, some, usage

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

F32, BF16, F16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn


@pytest.fixture
def built(tmp_path: Path) -> Iterator[list[Built]]:
    """Launches for Hopper."""
    with building("sm_90", tmp_path) as launches:
        yield launches


def lanes(n: int, lane: torch.dtype, width: int, *, ready: bool = False, numbers: Tensor | None = None) -> Where:
    numbers = some(n, dtype=torch.int64) if numbers is None else numbers
    return Where(
        base=numbers,
        capacity=numbers,
        position=numbers,
        dtype=lane,
        kv_heads=8,
        head_dim=width,
        ready=numbers if ready else None,
    )


def rotate(n: int, where: Where, layer: int, q_norm: Tensor | None = None) -> None:
    width = where.head_dim
    q, k, v = some(n, 48, width).split((32, 8, 8), 1)
    angles = some(n, width, dtype=F32)
    gpu.rotate_and_store(q, k, v, angles, angles, where, layer, q_norm=q_norm, k_norm=q_norm, eps=1e-5)


def choose(n: int, k: int, *, first_id: int = 151854, numbers: Tensor | None = None, dtype: torch.dtype = F32) -> None:
    logits, null = some(n, 32768, dtype=dtype), some(n, 32768, dtype=dtype)
    numbers = some(n, dtype=torch.int64) if numbers is None else numbers
    gpu.choose(logits, null, scale=3, temperature=1, k=k, seeds=numbers, positions=numbers, first_id=first_id)


def check_attend(architecture: str, query: torch.dtype, lane: torch.dtype, width: int, ready: bool, path: Path) -> None:
    """Assert that it is built, fits, and keeps what it computes with in registers."""
    with building(architecture, path) as launches:
        gpu.attend(some(2, 32, width, dtype=query), lanes(2, lane, width, ready=ready), 3)
    (attend,) = launches
    needs = usage(attend.kernel)
    assert needs.shared <= SHARED_MEMORY[architecture]
    assert needs.stack == 0


@pytest.mark.parametrize(
    ("query", "lane", "width", "ready"),
    [
        (BF16, BF16, 64, True),
        (BF16, BF16, 128, True),
        (BF16, F32, 128, False),
        (BF16, FP8, 128, True),
        (F16, F16, 128, False),
        (F32, F32, 128, False),
        (F32, BF16, 128, True),
    ],
)
def test_lanes(query: torch.dtype, lane: torch.dtype, width: int, ready: bool, tmp_path: Path) -> None:
    check_attend("sm_90", query, lane, width, ready, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("query", [BF16, F16, F32])
@pytest.mark.parametrize("lane", [BF16, F16, F32, FP8])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("ready", [False, True])
def test_all_lanes(
    architecture: str, query: torch.dtype, lane: torch.dtype, width: int, ready: bool, tmp_path: Path
) -> None:
    if architecture == "sm_80" and lane == FP8:
        pytest.skip("Ampere does not know this type")
    check_attend(architecture, query, lane, width, ready, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("ids", [32768, 184622])
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("guided", [False, True])
def test_choices(architecture: str, ids: int, dtype: torch.dtype, guided: bool, tmp_path: Path) -> None:
    logits, numbers = some(2, ids, dtype=dtype), some(2, dtype=torch.int64)
    with building(architecture, tmp_path) as launches:
        for temperature, k in ((1, 2048), (1, 0), (0, 0)):
            gpu.choose(
                *(logits, logits if guided else None),
                scale=3,
                temperature=temperature,
                k=k,
                seeds=numbers,
                positions=numbers,
                first_id=0,
            )
    assert len(launches) == 6
    for launched in launches:
        assert usage(launched.kernel).stack == 0


def test_one_build_for_any_layer_and_number_of_tokens(built: list[Built]) -> None:
    for n, layer in ((1, 0), (2, 1), (16, 3), (37, 16)):
        # A row in the middle of a packed tensor: its address is a multiple of 8 only.
        numbers = torch.empty(5, n, dtype=torch.int64)[n % 2]
        where = lanes(n, BF16, 128, numbers=numbers)
        rotate(n, where, layer)
        gpu.attend(some(n, 32, 128), where, layer)
    assert len({launch.kernel.hash for launch in built}) == 2


def test_one_build_for_any_k_and_first_id(built: list[Built]) -> None:
    for n, k, first_id in ((1, 1, 0), (2, 2048, 1), (16, 16, 151854), (37, 50, 64)):
        choose(n, k, first_id=first_id, numbers=torch.empty(5, n, dtype=torch.int64)[n % 2])
    assert len({launch.kernel.hash for launch in built}) == 2
    for launched in built:
        assert usage(launched.kernel).stack == 0


def test_they_overlap(built: list[Built], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read or written before the kernel before is done."""
    where = lanes(2, BF16, 128)

    def launch_all() -> None:
        rotate(2, where, 3, some(128))
        gpu.attend(some(2, 32, 128), where, 3)
        choose(2, 2048, dtype=BF16)

    launch_all()
    assert [launched.name for launched in built] == ["rotate_and_store", "attend", "count", "choose"]
    for launched in built:
        code = launched.kernel.asm["ptx"]
        before, after = code[code.index(".entry") :].split("griddepcontrol.wait", 1)
        assert launched.kernel.metadata.launch_pdl
        assert not re.search(r"(ld|st|atom|async).*\.global", before)
        assert "griddepcontrol.launch_dependents" in after
    built.clear()
    monkeypatch.setattr(launch, "PDL", False)
    launch_all()
    for launched in built:
        assert not launched.kernel.metadata.launch_pdl
        assert "griddepcontrol" not in launched.kernel.asm["ptx"]


def test_only_hopper_and_newer_overlap(tmp_path: Path) -> None:
    for architecture, overlaps in (("sm_80", False), ("sm_90", True), ("sm_100", True)):
        with building(architecture, tmp_path) as launches:
            rotate(2, lanes(2, BF16, 128), 3)
        (launched,) = launches
        assert launched.kernel.metadata.launch_pdl == overlaps


def test_sums_are_stored_before_they_are_counted(built: list[Built]) -> None:
    """All warps have stored before one counts; the count releases and acquires for the whole device."""
    gpu.attend(some(2, 32, 128), lanes(2, BF16, 128), 3)
    choose(2, 2048)
    counting = [launched for launched in built if launched.name in ("attend", "choose")]
    assert len(counting) == 2
    for launched in counting:
        # As written; machine code has barriers of its own, which a later compiler may leave out.
        before, _, after = launched.kernel.asm["ttir"].partition("tt.atomic_rmw add, acq_rel, gpu")
        assert after
        assert "barrier" in before[before.rindex("tt.store") :]
        code = launched.kernel.asm["ptx"].partition("atom.global.gpu.acq_rel.add")[2]
        # Read only after all warps know who is last.
        assert code.index("bar.sync") < code.index("ld.global")
