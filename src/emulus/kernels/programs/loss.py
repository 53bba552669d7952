# mypy: ignore-errors
"""What the loss does to its logits between the products."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponentials(logits, peak, mass, width, stride, BLOCK: tl.constexpr):
    """One row a program, read twice and written once: its largest number first, then the exponentials and their sum.

    The last block of a row is read and written up to where the next row starts: that, unlike the width, is a multiple
    of what goes at a time, without which each number would go by itself. The blocks before it need no masks.
    """
    row = logits + tl.program_id(0).to(tl.int64) * stride
    i = tl.arange(0, BLOCK)
    whole = width // BLOCK * BLOCK
    end = row + whole + i
    last = tl.load(end, mask=whole + i < stride, other=0.0).to(tl.float32)
    last = tl.where(whole + i < width, last, float("-inf"))
    highest = last
    for start in range(0, whole, BLOCK):
        highest = tl.maximum(highest, tl.load(row + start + i).to(tl.float32))
    top = tl.max(highest, 0)
    exps = tl.exp(last - top)
    tl.store(end, exps.to(logits.dtype.element_ty), mask=whole + i < stride)
    total = exps
    for start in range(0, whole, BLOCK):
        exps = tl.exp(tl.load(row + start + i).to(tl.float32) - top)
        total += exps
        tl.store(row + start + i, exps.to(logits.dtype.element_ty))
    tl.store(peak + tl.program_id(0), top)
    tl.store(mass + tl.program_id(0), tl.sum(total, 0))
