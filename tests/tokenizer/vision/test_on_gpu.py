"""What the vision tokenizer does on a GPU, as far as a CPU can show it: choices, batches, recordings, settings."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emulus.errors import EmulusError
from emulus.kernels.gpu import vision as kernels
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig, on_gpu
from emulus.tokenizer.vision.blocks import heavy_convolutions
from scripts.built import ARCHITECTURES, SHARED_MEMORY, building, some, usage
from tests.kernels.test_gpu import interpret, needs_triton

# Too narrow for bands, so that all layers are those of a GPU.
CONFIG = VisionTokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(1,), codebook_size=64)


@pytest.fixture
def model() -> VisionTokenizer:
    torch.manual_seed(0)
    model = VisionTokenizer(CONFIG)
    model.quantize.embedding.weight.data.normal_()
    return model.eval()


@needs_triton
def test_right_in_the_interpreter() -> None:
    interpret("gpu/test_vision.py")


@needs_triton
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name == "sm_90" else pytest.mark.slow) for name in ARCHITECTURES],
)
def test_norms_are_built(architecture: str, tmp_path: Path) -> None:
    """For the released tokenizer's coarsest and finest maps; batches and sides are no new variant."""
    with building(architecture, tmp_path) as launches:
        for batch, sides in ((1, (90, 90)), (3, (91, 89)), (2, (360, 23))):
            kernels.group_norm(some(batch, 1024, *sides), nn.GroupNorm(32, 1024, device="meta"), silu=True)
        coarse = some(1, 256, 90, 90)
        norm = nn.GroupNorm(32, 256, device="meta")
        kernels.group_norm(some(1, 256, 720, 720), norm, steering=(coarse, coarse), silu=True)
    assert len({launch.kernel.hash for launch in launches}) == 4
    for launch in (*launches[:2], *launches[-2:]):
        needs = usage(launch.kernel)
        assert (needs.stack, needs.spills) == (0, 0), launch
        assert needs.shared <= SHARED_MEMORY[architecture]
        # Values on their way while others are summed, 16 bytes a copy.
        assert "cp.async.cg.shared.global" in launch.kernel.asm["ptx"]


def _plain_norm(x: Tensor, norm: nn.GroupNorm, steering: Any = None, *, silu: bool) -> Tensor:
    """What the kernels compute, in PyTorch."""
    y = F.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
    if steering is not None:
        times, plus = (F.interpolate(each.float(), size=x.shape[-2:], mode="nearest") for each in steering)
        y = y * times + plus
    return (F.silu(y) if silu else y).to(x.dtype)


def test_every_norm_takes_the_kernels(model: VisionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels' stand-in in all of them pictures stay the same, and no norm takes the plain way."""
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    codes = model.encode(pixels)
    latents, painted = model.latents(pixels).detach(), model.decode(codes)
    seen: list[bool] = []

    def norm(x: Tensor, norm: nn.GroupNorm, steering: Any = None, *, silu: bool) -> Tensor:
        seen.append(silu)
        return _plain_norm(x, norm, steering, silu=silu)

    monkeypatch.setattr(on_gpu, "usable", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(on_gpu, "group_norm", norm)
    with torch.inference_mode():
        torch.testing.assert_close(model.latents(pixels), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.decode(codes), painted, atol=1e-5, rtol=1e-4)
    norms = sum(isinstance(module, nn.GroupNorm) for module in model.modules())
    assert len(seen) == norms
    # All but attention's have SiLU behind.
    assert seen.count(False) == sum("attn" in name and name.endswith("norm") for name, _ in model.named_modules())


def test_the_kernels_are_for_short_types_on_gpus_only() -> None:
    card = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    with torch.inference_mode():
        assert not on_gpu.usable(card)  # type: ignore[arg-type]
        assert not on_gpu.usable(torch.zeros(1, dtype=torch.bfloat16))
    assert not on_gpu.usable(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16))  # type: ignore[arg-type]


def test_weights_are_laid_out_once(model: VisionTokenizer) -> None:
    model.to_bfloat16(encoder=True)
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        on_gpu.put_channels_last(heavy_convolutions(model.encoder).values())
    for conv in heavy_convolutions(model.encoder).values():
        assert conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not conv.weight.is_inference()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Recorder:
    """Records by keeping what to call."""

    def __init__(self) -> None:
        self.recorded = 0

    def suits(self, device: torch.device) -> bool:
        return True

    def record(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        output = work().clone()

        def replay() -> None:
            output.copy_(work())

        return replay, output


def test_sizes_that_come_again_are_recorded() -> None:
    recorder = Recorder()
    run = on_gpu.Recordings(recorder)
    for index in range(6):
        x = torch.full((2, 3), float(index))
        assert torch.equal(run("double", lambda x: 2 * x, x), 2 * x)
        assert recorder.recorded == int(index >= on_gpu.CALLS_BEFORE)
    run("double", lambda x: 2 * x, torch.zeros(4, 3))
    assert (len(run), recorder.recorded) == (1, 1)


def test_no_more_than_so_many_sizes_are_recorded() -> None:
    recorder = Recorder()
    run = on_gpu.Recordings(recorder)
    for size in range(1, 2 * on_gpu.MOST_RECORDINGS):
        for name in ("one", "two"):
            for _ in range(on_gpu.CALLS_BEFORE + 2):
                run(name, lambda x: x + 1, torch.zeros(size))
    assert (len(run), recorder.recorded) == (on_gpu.MOST_RECORDINGS, on_gpu.MOST_RECORDINGS)


def test_the_tokenizer_recorded_gives_the_same(model: VisionTokenizer) -> None:
    """Encoding and decoding are functions of their tensor alone, as recordings must be."""
    run = on_gpu.Recordings(Recorder())
    for _ in range(on_gpu.CALLS_BEFORE + 3):
        pixels = torch.rand(2, 3, 16, 24) * 2 - 1
        codes = model.encode(pixels)
        with torch.inference_mode():
            assert torch.equal(run("encode", model._codes_of, pixels), codes)
            assert torch.equal(run("decode", model._pixels_of, codes), model.decode(codes))
    assert len(run) == 2


def test_recordings_go_with_the_weights_they_read(model: VisionTokenizer) -> None:
    first = model._recordings_now()
    with torch.no_grad():
        model.quantize.embedding.weight.mul_(2)
    assert model._recordings_now() is first
    assert copy.deepcopy(model)._recordings is not first
    model.to(torch.float64)
    assert model._recordings is not first


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.decoder.to(torch.bfloat16),
        lambda model: model.to_bfloat16(),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
        lambda model: setattr(model.decoder, "mid", copy.deepcopy(model.decoder.mid)),
        lambda model: model.encoder.time_res_stack[0].norm1.register_buffer("running_mean", torch.zeros(4)),
    ],
    ids=["half", "rounded", "assigned", "replaced", "buffer"],
)
def test_a_part_that_moves_ends_its_recordings(model: VisionTokenizer, change: Callable[[Any], object]) -> None:
    """Memory of the old weights may be another's by then."""
    first, held = model._recordings_now(), [tensor.detach() for tensor in model.state_dict().values()]
    change(model)
    assert model._recordings_now() is not first
    assert model._recordings_now() is model._recordings_now()
    assert held


@pytest.mark.parametrize(("count", "pixels", "sizes"), [(5, 400, [2, 2, 1]), (2, 2000, [1, 1]), (3, 100, [3])])
def test_batches_are_bounded_by_pixels(
    monkeypatch: pytest.MonkeyPatch, count: int, pixels: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(on_gpu, "PIECE_PIXELS", 1000)
    plain, recorded = [], []

    def of(seen: list[int]) -> Callable[[Tensor], Tensor]:
        return lambda x: (seen.append(len(x)), x + 1)[1]

    x = torch.arange(count)
    assert torch.equal(on_gpu.in_batches(of(plain), x, pixels=pixels, recorded=of(recorded)), x + 1)
    # What is larger than a batch is never recorded.
    assert (plain if pixels > 1000 else recorded) == sizes
    assert not (recorded if pixels > 1000 else plain)


@pytest.fixture
def settings() -> Iterator[tuple[Any, ...]]:
    """Those of float32 products, TF32 before and after."""
    settings = on_gpu._settings()
    before = [each.fp32_precision for each in settings]
    for each in settings:
        each.fp32_precision = "tf32"
    yield settings
    for each, value in zip(settings, before, strict=True):
        each.fp32_precision = value


def test_no_tf32_inside_and_nothing_changed_outside(settings: tuple[Any, ...]) -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with on_gpu.exact(torch.device("cuda")):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with on_gpu.exact(torch.device("cuda")):
        thread.start()
        assert entered.wait(10)
        assert [each.fp32_precision for each in settings] == ["ieee"] * 3
    # The other one is still inside.
    assert [each.fp32_precision for each in settings] == ["ieee"] * 3
    leave.set()
    thread.join()
    assert [each.fp32_precision for each in settings] == ["tf32"] * 3
    with on_gpu.exact(torch.device("cpu")):
        assert settings[0].fp32_precision == "tf32"


@pytest.mark.parametrize("allowed", [True, False])
def test_the_older_setting_can_be_read_meanwhile(settings: tuple[Any, ...], allowed: bool) -> None:
    """PyTorch raises where it contradicts the settings by operation, in whichever thread asks."""
    usual = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        before = [each.fp32_precision for each in settings]
        with on_gpu.exact(torch.device("cuda")):
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32 is allowed
        assert [each.fp32_precision for each in settings] == before
    finally:
        torch.backends.cudnn.allow_tf32 = usual


def test_settings_that_contradict_each_other_stay_as_they_were(settings: tuple[Any, ...]) -> None:
    settings[0].fp32_precision = "ieee"
    with pytest.raises(RuntimeError, match="mix of the legacy and new"):
        assert torch.backends.cudnn.allow_tf32
    with on_gpu.exact(torch.device("cuda")):
        assert [each.fp32_precision for each in settings] == ["ieee"] * 3
    assert [each.fp32_precision for each in settings] == ["ieee", "tf32", "tf32"]


def test_every_way_in_is_exact(model: VisionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    depth = 0
    seen: set[nn.Module] = set()

    class Exact:
        def __enter__(self) -> None:
            nonlocal depth
            depth += 1

        def __exit__(self, *_: object) -> None:
            nonlocal depth
            depth -= 1

    def check(module: nn.Module, _: object) -> None:
        assert depth > 0
        seen.add(module)

    monkeypatch.setattr(on_gpu, "exact", lambda device: Exact())
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    for conv in convolutions:
        conv.register_forward_pre_hook(check)
    clip = torch.rand(4, 3, 8, 8)
    codes = model.encode(clip[None])
    model.decode(codes)
    model.decode(model.encode(clip))
    list(model.decode_stream(model.encode_stream(clip)))
    assert depth == 0
    assert seen == set(convolutions)


def test_codes_are_looked_at_once(model: VisionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    usual = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (looks.append(self.numel()), usual(self))[1])
    model.decode(torch.zeros(3, 2, 4, 4, dtype=torch.int64))
    assert looks == [2]
    for wrong in (-1, 64):
        codes = torch.zeros(1, 2, 4, 4, dtype=torch.int64)
        codes[0, 1, 2, 3] = wrong
        with pytest.raises(EmulusError, match=r"0\.\.63"):
            model.decode(codes)
        with pytest.raises(EmulusError, match=r"0\.\.63"):
            list(model.decode_stream(codes[0]))
