"""Clips that come frame by frame give what whole clips give, and so do batches in pieces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.blocks import CausalConv3d, Past


def lively(config: VisionTokenizerConfig) -> VisionTokenizer:
    """Batch norms that do something and a codebook as wide as the latents."""
    torch.manual_seed(0)
    model = VisionTokenizer(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    model.quantize.embedding.weight.data.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def small() -> VisionTokenizer:
    return lively(VisionTokenizerConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), codebook_size=64))


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_streams_are_the_whole_clip(factor: int) -> None:
    model = lively(
        VisionTokenizerConfig(
            ch=32,
            ch_mult=(1, 1),
            num_res_blocks=1,
            attn_resolutions=(),
            codebook_size=64,
            temporal_downsample_factor=factor,
        )
    )
    clip = torch.rand(3 * factor, 3, 8, 6) * 2 - 1
    codes = model.encode(clip[None])[0]
    assert torch.equal(torch.stack(list(model.encode_stream(clip))), codes)
    painted = model.decode(codes[None])[0]
    torch.testing.assert_close(torch.stack(list(model.decode_stream(codes))), painted, atol=1e-5, rtol=0)


def test_wide_layers_stream_too() -> None:
    model = lively(VisionTokenizerConfig(ch=64, ch_mult=(1, 1), num_res_blocks=1, codebook_size=64))
    clip = torch.rand(8, 3, 8, 12) * 2 - 1
    codes = model.encode(clip[None])[0]
    assert torch.equal(torch.stack(list(model.encode_stream(clip))), codes)
    painted = model.decode(codes[None])[0]
    torch.testing.assert_close(torch.stack(list(model.decode_stream(codes))), painted, atol=1e-5, rtol=0)


@settings(max_examples=20, deadline=None)
@given(
    kernel=st.sampled_from([((3, 1, 1), 1), ((3, 3, 3), 1), ((4, 3, 3), 2)]),
    pieces=st.lists(st.integers(1, 3), min_size=1, max_size=4),
)
def test_a_causal_convolution_in_pieces(kernel: tuple[tuple[int, int, int], int], pieces: list[int]) -> None:
    size, stride = kernel
    conv = CausalConv3d(2, 3, kernel=size, time_stride=stride)
    x = torch.randn(2, 2, stride * sum(pieces), 3, 4)
    past: Past = {}
    found = [conv(piece, past) for piece in x.split([stride * piece for piece in pieces], dim=2)]
    torch.testing.assert_close(torch.cat(found, dim=2), conv(x), atol=1e-6, rtol=0)


def test_codes_come_as_soon_as_they_can(small: VisionTokenizer) -> None:
    taken = 0

    def frames() -> Iterator[torch.Tensor]:
        nonlocal taken
        while True:
            taken += 1
            yield torch.zeros(3, 4, 4)

    stream = small.encode_stream(frames())
    for number in range(1, 4):
        assert next(stream).shape == (2, 2)
        assert taken == 4 * number
    painted = small.decode_stream(iter([torch.zeros(2, 2, dtype=torch.int64)]))
    assert [frame.shape for frame in painted] == [(3, 4, 4)] * 4


def test_streams_know_nothing_of_each_other(small: VisionTokenizer) -> None:
    clips = torch.rand(2, 8, 3, 4, 4) * 2 - 1
    together = [torch.stack(codes) for codes in zip(*map(small.encode_stream, clips), strict=True)]
    assert torch.equal(torch.stack(together, dim=1), small.encode(clips))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([torch.zeros(3, 4, 4)] * 5, "multiple of 4, got 1"),
        ([torch.zeros(3, 4, 4), torch.zeros(3, 4, 6)], "one shape"),
        ([torch.zeros(3, 5, 4)], "multiples of 2"),
    ],
)
def test_wrong_frames(small: VisionTokenizer, frames: list[torch.Tensor], message: str) -> None:
    with pytest.raises(EmulusError, match=message):
        list(small.encode_stream(frames))


def test_wrong_codes(small: VisionTokenizer) -> None:
    codes = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(EmulusError, match="one shape"):
        list(small.decode_stream([codes, codes[:1]]))
    with pytest.raises(EmulusError, match=r"0\.\.63"):
        list(small.decode_stream([codes + 64]))


def test_batches_in_pieces(small: VisionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = torch.rand(3, 4, 3, 8, 8) * 2 - 1
    whole = [(codes := small.encode(pixels), small.decode(codes)) for pixels in (clips, clips[:, 0])]
    monkeypatch.setattr("emulus.tokenizer.vision.model.PIECE_PIXELS", 128)
    for pixels, (codes, painted) in zip((clips, clips[:, 0]), whole, strict=True):
        assert torch.equal(small.encode(pixels), codes)
        torch.testing.assert_close(small.decode(codes), painted, atol=1e-5, rtol=0)
