"""Counted operations agree with PyTorch's counter and with what is known of the released size."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from emulus.model import Decoder, sized
from emulus.train.flops import PEAKS, accelerator_called, block_matrices, decoder_flops, peak_flops

LENGTHS = (5, 40, 19)


@pytest.mark.parametrize("size", ["tiny", "emoji-3m"])
def test_agrees_with_the_counter(size: str) -> None:
    config = sized(size, vocab_size=100, attention_dropout=0.0)
    model = Decoder(config)
    counter = FlopCounterMode(display=False)
    # The counter does not know the CPU's fused attention.
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(1, sum(LENGTHS), dtype=torch.int64), document_lengths=LENGTHS).sum().backward()
    # Unfused, the half above the diagonal is computed too.
    queries = config.num_attention_heads * config.head_width
    above = config.num_hidden_layers * 3 * sum(4 * queries * length * (length - 1) // 2 for length in LENGTHS)
    assert decoder_flops(config, LENGTHS, sum(LENGTHS)) == counter.get_total_flops() - above


@pytest.mark.parametrize(("context", "giga"), [(9216, 53.7), (131_072, 149.4)])
def test_of_the_released_size(context: int, giga: float) -> None:
    per_token = decoder_flops(sized("emu3-8b"), (context,), context) / context
    assert per_token / 1e9 == pytest.approx(giga, rel=5e-3)


def test_documents_cost_less_than_one_of_their_length_and_the_head_only_where_it_learns() -> None:
    config = sized("emu3-8b")
    assert decoder_flops(config, (512, 512), 1024) < decoder_flops(config, (1024,), 1024)
    saved = decoder_flops(config, (1024,), 1024) - decoder_flops(config, (1024,), 24)
    assert saved == 6 * 1000 * 4096 * 184_622


def test_matrices_of_a_block() -> None:
    config = sized("emu3-8b")
    with torch.device("meta"):
        model = Decoder(config)
    block = next(iter(model.model.blocks))
    assert block_matrices(config) == sum(weight.numel() for weight in block.parameters() if weight.ndim == 2)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_names_that_drivers_give(name: str, known: str) -> None:
    assert accelerator_called(name) is PEAKS[known]


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla T4", "NVIDIA A10", "H20"])
def test_others_are_not_taken_for_them(name: str) -> None:
    assert accelerator_called(name) is None


def test_peaks_are_dense() -> None:
    for name, peak in PEAKS.items():
        assert peak.fp8 in (0, pytest.approx(2 * peak.bf16, rel=0.02)), name


def test_of_a_cpu_is_measured() -> None:
    cpu = torch.device("cpu")
    found = peak_flops(cpu, "fp32")
    assert 1e9 < found < 1e15
    assert peak_flops(cpu, "fp32") == found
