"""How much a step computes, and how much a device could: their share is the model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Literal

import torch

from emulus.model.config import DecoderConfig

Precision = Literal["fp32", "bf16", "fp8"]

_TERA = 1e12
_SIDE = 1024
_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """What a data sheet promises.

    Attributes:
        bf16: Dense (not "with sparsity") bfloat16 operations a second, sums in float32.
        fp8: The same for 8-bit floats; 0 where the device has none.
        memory: Bytes.
    """

    bf16: float
    fp8: float
    memory: int


def _accelerator(bf16: float, fp8: float, gigabytes: int) -> Accelerator:
    return Accelerator(bf16=bf16 * _TERA, fp8=fp8 * _TERA, memory=gigabytes * 10**9)


# Sources: NVIDIA's data sheets of A100, H100, H200, L4, L40S, HGX B200 and GB200 (half of what they give "with
# sparsity"), the Ada, Ampere GA102 and Blackwell RTX white papers (sums in float32), AMD's data sheet of MI300X.
PEAKS: Mapping[str, Accelerator] = MappingProxyType(
    {
        "A100": _accelerator(312, 0, 80),
        "H100 PCIe": _accelerator(756, 1513, 80),
        "H100 NVL": _accelerator(835, 1671, 94),
        "H100 SXM": _accelerator(989, 1979, 80),
        "H200 NVL": _accelerator(835, 1671, 141),
        "H200": _accelerator(989, 1979, 141),
        "GH200": _accelerator(989, 1979, 96),
        "B200": _accelerator(2250, 4500, 180),
        "GB200": _accelerator(2500, 5000, 186),
        "L4": _accelerator(121, 242, 24),
        "L40S": _accelerator(362, 733, 48),
        "RTX 3090": _accelerator(71, 0, 24),
        "RTX 4090": _accelerator(165, 330, 24),
        "RTX 5090": _accelerator(209, 419, 32),
        "MI300X": _accelerator(1307, 2615, 192),
    }
)
"""Accelerators by name."""


def decoder_flops(config: DecoderConfig, document_lengths: Sequence[int], supervised: int) -> float:
    """Floating-point operations of training on one row: one forward pass and a backward pass of twice as many.

    A product of matrices counts 2 for each parameter and token; the embedding is looked up and counts nothing.
    Attention counts what its causal half needs, of each document by itself: 4 for each pair of tokens, each query head
    and each of its dimensions. The head counts for supervised positions only. What is computed a second time to save
    memory does not count, so the share of the peak is a model's (MFU), not the hardware's.

    Args:
        config: The decoder's shape.
        document_lengths: Of the documents in the row.
        supervised: Positions whose next id is learnt.

    Source: Chowdhery et al. 2022 (arXiv:2204.02311), appendix B; with the causal half instead of the whole square.
    """
    queries = config.num_attention_heads * config.head_width
    pairs = sum(length * (length + 1) / 2 for length in document_lengths)
    tokens = sum(document_lengths)
    blocks = 2.0 * block_matrices(config) * tokens + 4.0 * queries * pairs
    head = 2.0 * config.hidden_size * config.vocab_size * supervised
    return 3 * (config.num_hidden_layers * blocks + head)


def block_matrices(config: DecoderConfig) -> int:
    """Parameters of the matrices of one block."""
    hidden, width = config.hidden_size, config.head_width
    attention = 2 * hidden * width * (config.num_attention_heads + config.num_key_value_heads)
    return attention + 3 * hidden * config.intermediate_size


def accelerator_called(name: str) -> Accelerator | None:
    """The accelerator of a name as the driver gives it (``NVIDIA H100 80GB HBM3``), if it is known."""
    words = name.replace("-", " ").split()
    if "Laptop" in words:
        return None
    for known in sorted(PEAKS, key=len, reverse=True):
        if all(word in words for word in known.split()):
            return PEAKS[known]
    # The driver does not say SXM but the kind of memory.
    return PEAKS["H100 SXM"] if "H100" in words else None


def peak_flops(device: torch.device, precision: Precision) -> float:
    """The most operations a second that a device can do.

    Args:
        device: Where a model is trained.
        precision: Of the products.

    Returns:
        The data sheet's figure for a known GPU in ``bf16`` or ``fp8``; otherwise what a product of matrices
        reaches here in a tenth of a second (8-bit products are then taken for bfloat16 ones).
    """
    if device.type == "cuda" and precision != "fp32":
        known = accelerator_called(torch.cuda.get_device_name(device))
        if known is not None:
            return (known.fp8 or known.bf16) if precision == "fp8" else known.bf16
    return _measured(device, torch.float32 if precision == "fp32" else torch.bfloat16)


@cache
def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The best of several products, for about a tenth of a second after the first."""
    side = _SIDE if device.type == "cpu" else 8 * _SIDE
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    best, count, end = float("inf"), 0, 0.0
    while count < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The first one includes what is set up once.
        if count:
            best = min(best, time.perf_counter() - start)
        else:
            end = time.perf_counter() + _SECONDS
        count += 1
    return 2 * side**3 / best
