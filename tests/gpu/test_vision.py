"""The vision tokenizer on a GPU: its norms against plain PyTorch, and all of it against the CPU.

Run with ``pytest -m gpu`` on a GPU; without one, tests/tokenizer/vision/test_on_gpu.py runs the norms in Triton's
interpreter.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emulus.errors import EmulusError
from emulus.kernels import gpu
from emulus.kernels.gpu import vision
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig, on_gpu
from tests.gpu.test_kernels import DEVICE, INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not gpu.available(), reason="needs a GPU and Triton"),
]
card = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")

# Half a step of the type, and what float32 sums about a mean of 15 standard deviations leave; the interpreter cuts
# bfloat16 off instead of rounding.
TOLERANCE = {torch.bfloat16: (2 if INTERPRETED else 1.05) * 2**-8, torch.float16: 1.05 * 2**-11, torch.float32: 2**-16}
"""How far a value may be from float64's, as a part of the larger of it and 1."""


def norm_of(channels: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(32, channels, eps=1e-6, device=DEVICE)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def exact(x: Tensor, norm: nn.GroupNorm, steering: tuple[Tensor, Tensor] | None, *, silu: bool) -> Tensor:
    y = F.group_norm(x.double(), norm.num_groups, norm.weight.double(), norm.bias.double(), norm.eps)
    if steering is not None:
        times, plus = (F.interpolate(each.double(), size=x.shape[-2:], mode="nearest") for each in steering)
        y = y * times + plus
    return F.silu(y) if silu else y


def check(found: Tensor, expected: Tensor) -> None:
    assert ((found.double() - expected).abs() / expected.abs().clamp(min=1)).max() < TOLERANCE[found.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "shape", [(2, 64, 12, 10), (1, 96, 7, 5), (1, 32, 2, 2), (2, 32, 3, 8, 6), (1, 256, 40, 24), (1, 1024, 5, 3)]
)
@torch.inference_mode()
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Means far from 0 cost no digits, and silu and steering come with it."""
    torch.manual_seed(0)
    norm = norm_of(shape[1])
    x = (2 * torch.randn(shape, device=DEVICE) + 30).to(dtype)
    for silu in (False, True):
        found = vision.group_norm(x, norm, silu=silu)
        assert (found.shape, found.dtype) == (x.shape, dtype)
        assert found.is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
        check(found, exact(x, norm, None, silu=silu))


@pytest.mark.parametrize("factor", [(1, 1), (2, 2), (4, 3)])
@torch.inference_mode()
def test_steered_norms(factor: tuple[int, int]) -> None:
    torch.manual_seed(0)
    norm = norm_of(64)
    coarse = torch.randn(2, 2, 64, 3, 5, device=DEVICE)
    steering = (coarse[0], coarse[1].bfloat16())
    x = torch.randn(2, 64, 3 * factor[0], 5 * factor[1], device=DEVICE).bfloat16()
    check(vision.group_norm(x, norm, steering=steering, silu=True), exact(x, norm, steering, silu=True))


@torch.inference_mode()
def test_a_sample_knows_nothing_of_its_neighbours() -> None:
    norm = norm_of(64)
    x = torch.randn(3, 64, 24, 20, device=DEVICE).bfloat16()
    assert torch.equal(vision.group_norm(x, norm)[1:2], vision.group_norm(x[1:2], norm))


@torch.inference_mode()
def test_no_samples_are_normalised_too() -> None:
    for shape in ((0, 64, 6, 4), (2, 64, 0, 4)):
        assert vision.group_norm(torch.empty(shape, device=DEVICE).bfloat16(), norm_of(64)).shape == shape


@pytest.fixture
def cpu() -> VisionTokenizer:
    torch.manual_seed(0)
    config = VisionTokenizerConfig(ch=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(1,), codebook_size=64)
    model = VisionTokenizer(config)
    model.quantize.embedding.weight.data.normal_()
    return model.eval()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().float() - expected).std() / expected.std())


@card
def test_float32_is_that_of_the_cpu_whatever_the_settings(cpu: VisionTokenizer) -> None:
    cuda = copy.deepcopy(cpu).cuda()
    pixels = torch.rand(4, 3, 48, 32) * 2 - 1
    codes = cpu.encode(pixels)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        with torch.inference_mode():
            torch.testing.assert_close(cuda.latents(pixels.cuda()).cpu(), cpu.latents(pixels), atol=1e-4, rtol=1e-4)
        assert (cuda.encode(pixels.cuda()).cpu() == codes).float().mean() > 0.995
        torch.testing.assert_close(cuda.decode(codes).cpu(), cpu.decode(codes), atol=1e-4, rtol=1e-4)
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@card
def test_bfloat16_with_and_without_the_kernels(cpu: VisionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = copy.deepcopy(cpu).to_bfloat16(encoder=True).cuda()
    pixels = torch.rand(4, 3, 48, 32) * 2 - 1
    codes = cpu.encode(pixels)
    painted = cpu.decode(codes)
    assert (cuda.encode(pixels.cuda()).cpu() == codes).float().mean() > 0.9
    assert relative(cuda.decode(codes), painted) < 0.03
    with torch.inference_mode():
        assert cuda.decoder.frames(*(torch.zeros(1, 4, 8, 8, device="cuda"),) * 2).is_contiguous(
            memory_format=torch.channels_last
        )
    monkeypatch.setattr(on_gpu, "usable", lambda x: False)
    cuda._recordings = on_gpu.Recordings()
    assert relative(cuda.decode(codes), painted) < 0.03


@card
@pytest.mark.parametrize("short", [False, True])
def test_recorded_is_eager(cpu: VisionTokenizer, short: bool) -> None:
    cuda = (cpu.to_bfloat16(encoder=True) if short else cpu).cuda()
    for _ in range(on_gpu.CALLS_BEFORE + 3):
        for count in (1, 3):
            pixels = torch.rand(count, 3, 48, 32, device="cuda") * 2 - 1
            with torch.inference_mode(), on_gpu.exact(pixels.device):
                codes = cuda._codes_of(pixels)
                painted = cuda._pixels_of(codes)
            assert torch.equal(cuda.encode(pixels), codes)
            torch.testing.assert_close(cuda.decode(codes), painted, atol=0, rtol=0)
    assert len(cuda._recordings) == 4
    assert sum(len(graphs) for graphs in cuda._recordings._graphs.values()) == 4


@card
def test_a_recording_does_not_outlive_its_weights(cpu: VisionTokenizer) -> None:
    cuda = cpu.cuda()
    codes = torch.randint(64, (1, 24, 16), device="cuda")
    for _ in range(on_gpu.CALLS_BEFORE + 2):
        before = cuda.decode(codes)
    half = {name: 0.5 * value for name, value in cuda.decoder.state_dict().items()}
    cuda.decoder.load_state_dict(half, assign=True)
    with torch.inference_mode(), on_gpu.exact(codes.device):
        painted = cuda._pixels_of(codes)
    assert not torch.equal(painted, before)
    for _ in range(on_gpu.CALLS_BEFORE + 2):
        torch.testing.assert_close(cuda.decode(codes), painted, atol=0, rtol=0)


@card
def test_many_pictures_go_in_batches(cpu: VisionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = cpu.cuda()
    pixels = torch.rand(5, 3, 48, 32, device="cuda") * 2 - 1
    codes = cuda.encode(pixels)
    monkeypatch.setattr(on_gpu, "PIECE_PIXELS", 2 * 48 * 32)
    assert (cuda.encode(pixels) == codes).float().mean() > 0.995
    torch.testing.assert_close(cuda.decode(codes)[4:], cuda.decode(codes[4:]), atol=1e-4, rtol=1e-4)


@card
def test_streams_and_foreign_codes(cpu: VisionTokenizer) -> None:
    cuda = cpu.cuda()
    clip = torch.rand(8, 3, 32, 32, device="cuda") * 2 - 1
    codes = cuda.encode(clip[None])[0]
    assert (torch.stack(list(cuda.encode_stream(clip))) == codes).float().mean() > 0.995
    frames = torch.stack(list(cuda.decode_stream(codes)))
    torch.testing.assert_close(frames, cuda.decode(codes[None])[0], atol=1e-4, rtol=1e-4)
    codes[0, 0, 0] = 64
    for wrong in (codes, codes.cpu()):
        with pytest.raises(EmulusError, match=r"0\.\.63"):
            cuda.decode(wrong[None])
        with pytest.raises(EmulusError, match=r"0\.\.63"):
            list(cuda.decode_stream(wrong))
