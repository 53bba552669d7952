"""Layers in bands of rows give what the plain ones give, in less memory."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig, bands, quantizer
from emulus.tokenizer.vision.blocks import AttentionBlock, Downsample, ResnetBlock, Upsample
from emulus.tokenizer.vision.quantizer import Quantizer

WIDE = VisionTokenizerConfig(ch=64, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(1,), codebook_size=64)
SIZES = st.tuples(st.integers(1, 30), st.integers(1, 30))
CHANNELS = st.sampled_from([64, 96, 160])


@pytest.fixture(autouse=True)
def small_bands(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Bands so small that every test's maps take several, and Winograd's form wherever it can be."""
    _shrink(monkeypatch)
    with torch.no_grad():
        yield


def _shrink(patch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "BAND_TILES": 40,
        "TILE_VALUES": 2**17,
        "BAND_VALUES": 2**15,
        "WINOGRAD_TILES": 1,
        "CHUNK": 50,
    }.items():
        patch.setattr(bands, name, value)


@pytest.fixture(scope="module")
def wide() -> VisionTokenizer:
    torch.manual_seed(0)
    model = VisionTokenizer(WIDE)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
    model.quantize.embedding.weight.data.normal_()
    return model.eval()


def plain(layer: nn.Module, *inputs: Tensor | None) -> Tensor:
    """What the layer gives where gradients are wanted."""
    with torch.enable_grad():
        return layer(*inputs).detach()


def image(x: Tensor) -> Tensor:
    """A feature map as a batch of one."""
    return x.permute(2, 0, 1)[None]


@settings(max_examples=25, deadline=None)
@given(size=SIZES, inputs=CHANNELS, outputs=st.sampled_from([3, 64, 160]), normed=st.booleans(), added=st.booleans())
def test_convolution(size: tuple[int, int], inputs: int, outputs: int, normed: bool, added: bool) -> None:
    x, conv = torch.randn(*size, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
    affine = bands.Affine(scale=torch.randn(inputs), shift=torch.randn(inputs)) if normed else None
    rest = torch.randn(*size, outputs)
    expected = conv(image(F.silu(x * affine.scale + affine.shift) if affine else x))
    found = bands.convolve(x, conv, affine=affine, add=bands.rows_of(rest) if added else None)
    torch.testing.assert_close(image(found), expected + (image(rest) if added else 0), atol=2e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(size=SIZES, channels=CHANNELS)
def test_convolution_over_its_own_input(size: tuple[int, int], channels: int) -> None:
    x, conv = torch.randn(*size, channels), nn.Conv2d(channels, channels, 3, padding=1)
    expected = conv(image(x))
    found = bands.convolve(x, conv, out=x)
    assert found is x
    torch.testing.assert_close(image(found), expected, atol=2e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(size=SIZES, channels=CHANNELS, batch=st.integers(1, 2))
def test_resizing(size: tuple[int, int], channels: int, batch: int) -> None:
    x = torch.randn(batch, channels, *size)
    up, down = Upsample(channels), Downsample(channels)
    torch.testing.assert_close(up(x), plain(up, x), atol=2e-5, rtol=0)
    even = up(x)
    torch.testing.assert_close(down(even), plain(down, even), atol=2e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    factor=st.sampled_from([1, 2, 4]),
    outputs=st.sampled_from([64, 96]),
    spatial=st.booleans(),
)
def test_blocks(size: tuple[int, int], factor: int, outputs: int, spatial: bool) -> None:
    x = 3 * torch.randn(2, 64, size[0] * factor, size[1] * factor) + 5
    zq = torch.randn(2, 4, *size) if spatial else None
    codes = 4 if spatial else None
    before = x.clone()
    for block in (
        ResnetBlock(64, outputs, code_channels=codes, dropout=0.0),
        AttentionBlock(64, code_channels=codes),
    ):
        torch.testing.assert_close(block(x, zq), plain(block, x, zq), atol=5e-5, rtol=1e-5)
        assert torch.equal(x, before), "the input is its owner's"


def test_group_norm_of_far_values() -> None:
    """A mean a thousand times the deviation: squares alone would have lost it."""
    norm = nn.GroupNorm(32, 64, eps=1e-6)
    x = torch.randn(20, 30, 64) + 1000
    affine = bands.group_norm(norm, x)
    exact = norm.double()(image(x).double()).float()
    out = torch.empty_like(x)
    affine.apply(x, 0, 20, out)
    torch.testing.assert_close(image(out), exact, atol=2e-3, rtol=0)


@pytest.mark.parametrize("places", [1, 49, 130])
def test_attention(places: int) -> None:
    query, key, value = (2 * torch.randn(places, 64) for _ in range(3))
    expected = F.scaled_dot_product_attention(*(each[None, None] for each in (query, key, value)))
    torch.testing.assert_close(bands.Attention(key, value)(query), expected[0, 0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_without_packing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(3, 40, 64).to(dtype), torch.randn(70, 3, 64)
    packed = bands.Product(weight, 70)(x)
    monkeypatch.setattr(bands, "_HAS_ONEDNN", False)
    torch.testing.assert_close(bands.Product(weight, 70)(x), packed, atol=1e-4, rtol=0.01)
    expected = torch.einsum("ngc,gkc->ngk", x.to(dtype).float(), weight.float())
    torch.testing.assert_close(packed.float(), expected, atol=0.1 if dtype == torch.bfloat16 else 1e-4, rtol=0.01)


def test_bfloat16_works_where_onednn_does_not_have_it() -> None:
    """As on processors without AVX-512; oneDNN reads the variable once, so in a process of its own."""
    code = (
        "import torch; from emulus.tokenizer.vision import bands\n"
        "weight, x = torch.randn(3, 40, 64).bfloat16(), torch.randn(70, 3, 64)\n"
        "found = bands.Product(weight, 70)(x).float()\n"
        "expected = torch.einsum('ngc,gkc->ngk', x.bfloat16().float(), weight.float())\n"
        "torch.testing.assert_close(found, expected, atol=0.1, rtol=0.01)"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@settings(max_examples=6, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)), frames=st.sampled_from([0, 4, 8]), batch=st.integers(1, 2)
)
def test_a_whole_tokenizer(wide: VisionTokenizer, size: tuple[int, int], frames: int, batch: int) -> None:
    time = (frames,) if frames else ()
    pixels = torch.rand(batch, *time, 3, *(2 * side for side in size)) * 2 - 1
    codes = wide.encode(pixels)
    with torch.enable_grad():
        latents = wide.latents(pixels).detach()
        # Made in inference mode, codes may not meet gradients.
        known = codes.clone()
        vectors = wide.quantize.decode(known if frames else known[:, None]).detach()
        painted = wide.paint(vectors, is_image=not frames).detach()
    torch.testing.assert_close(wide.latents(pixels), latents, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(wide.decode(codes), painted, atol=1e-4, rtol=1e-5)


def test_gradients_take_the_plain_way(wide: VisionTokenizer) -> None:
    pixels = torch.rand(1, 3, 16, 16)
    with torch.enable_grad():
        wide.paint(wide.latents(pixels), is_image=True).square().mean().backward()
    grads = [weight.grad for name, weight in wide.named_parameters() if not name.startswith("quantize.")]
    wide.zero_grad()
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)
    assert sum(float(grad.abs().sum()) > 0 for grad in grads if grad is not None) > 0.9 * len(grads)


def test_autocast_does_not_round_bands(wide: VisionTokenizer) -> None:
    pixels = torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = wide.latents(pixels)
    torch.testing.assert_close(found, wide.latents(pixels), atol=1e-6, rtol=0)


def test_other_types_take_the_plain_way(wide: VisionTokenizer) -> None:
    pixels = torch.rand(2, 3, 16, 16)
    exact = copy.deepcopy(wide).double()
    assert exact.latents(pixels.double()).dtype == torch.float64
    torch.testing.assert_close(exact.latents(pixels.double()).float(), wide.latents(pixels), atol=2e-5, rtol=1e-5)


def test_an_empty_batch(wide: VisionTokenizer) -> None:
    codes = wide.encode(torch.zeros(0, 3, 16, 24))
    assert codes.shape == (0, 8, 12)
    assert wide.decode(codes).shape == (0, 3, 16, 24)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that anything made."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.layout == torch.strided:
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return result


def test_nothing_is_larger_than_a_feature_map(wide: VisionTokenizer) -> None:
    """No padded, repeated or normalised copy, no map of scales, no table of all places times all places."""
    height, width = 64, 96
    # The upsampled map, which the last level starts from.
    features = height * width * 128 * 4
    codes = torch.randint(64, (1, height // 2, width // 2))
    with Largest() as decoding:
        wide.decode(codes)
    assert decoding.bytes == features
    with Largest() as encoding:
        wide.encode(torch.rand(1, 3, height, width))
    assert encoding.bytes <= features


@pytest.mark.parametrize("shape", [(4,), (1, 8), (2, 4)])
def test_clips_and_batches_take_no_more_than_a_picture(
    wide: VisionTokenizer, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emulus.tokenizer.vision.model.PIECE_PIXELS", 24 * 24)
    monkeypatch.setattr(quantizer, "SEARCH_TABLE", 64)
    pixels = torch.rand(*shape, 3, 24, 24)
    largest = []
    for batch in (pixels.flatten(0, -4)[:1], pixels):
        with Largest() as tracked:
            wide.decode(wide.encode(batch))
        largest.append(tracked.bytes)
    assert largest[0] == largest[1]


def test_the_search_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizer, "SEARCH_TABLE", 4096)
    search = Quantizer(512, 3)
    search.embedding.weight.normal_()
    latents = torch.randn(1000, 3)
    with Largest() as tracked:
        found = search.nearest(latents)
    assert tracked.bytes <= 4096 * 4
    assert torch.equal(found, torch.cdist(latents.double(), search.embedding.weight.double()).argmin(1))
