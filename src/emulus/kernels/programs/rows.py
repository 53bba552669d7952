# mypy: ignore-errors
"""Norms and activations: what happens to the rows of activations between the products."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, weight, out, size, x_stride, eps, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    """One row a program; the cast back comes before the weight, as released."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    wide = tl.load(x + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / size + eps)
    scaled = wide.to(out.dtype.element_ty).to(tl.float32) * tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(out + row * size + columns, scaled.to(out.dtype.element_ty), mask=inside)


@triton.jit
def silu_times(gate, up):
    """``silu(gate) * up`` of float32 values."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def silu_mul(gate, up, out, size, gate_stride, up_stride, BLOCK: tl.constexpr, PDL: tl.constexpr = False):
    """Part of a row a program."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    a = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, silu_times(a, b).to(out.dtype.element_ty), mask=inside)
