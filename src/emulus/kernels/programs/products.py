# mypy: ignore-errors
"""Products of a few tokens with large matrices.

Many warps share a block of rows, each takes its own columns, and their sums are added at the end: so a few rows keep a
multiprocessor busy, and weights go from memory to registers once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from emulus.kernels.programs.common import INTERPRETED

# The interpreter can neither multiply bfloat16 matrices nor read assembly.
_ASSEMBLY = tl.constexpr(not INTERPRETED)
# How a weight is brought to the type that is multiplied in.
CAST = tl.constexpr(0)
ROUND = tl.constexpr(1)
FP8 = tl.constexpr(2)
_GROUP = tl.constexpr(64)


@triton.jit
def linear(
    x,
    weight,
    scale,
    out,
    n,
    outs,
    ins,
    x_stride,
    weight_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
):
    """Rows of ``weight`` times ``TOKENS`` tokens; a row's scale, if any, is multiplied at the end."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    # Rows past the end are read as the last one and not stored: no load of weights needs a mask.
    row_at = (tl.minimum(rows, outs - 1).to(tl.int64) * weight_stride)[None, :, None]
    token_at = (tokens * x_stride)[None, None, :]
    here = (tokens < n)[None, None, :]
    inner = tl.arange(0, PARTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.zeros((PARTS, ROWS, TOKENS), tl.float32)
    for start in range(0, ins, PARTS * WIDTH):
        columns = start + inner
        if EVEN:
            w = tl.load(weight + row_at + columns[:, None, :])
            part = tl.load(x + token_at + columns[:, :, None], mask=here, other=0.0)
        else:
            w = tl.load(weight + row_at + columns[:, None, :], mask=(columns < ins)[:, None, :], other=0.0)
            part = tl.load(x + token_at + columns[:, :, None], mask=here & (columns < ins)[:, :, None], other=0.0)
        if KIND == ROUND:
            w = w.to(tl.bfloat16)
        elif KIND == FP8:
            # By this detour every step has an instruction of full speed.
            w = w.to(tl.float16).to(tl.float32)
        total = tl.dot(w.to(DOT), part.to(DOT), total)
    sums = tl.sum(total, 0)
    if SCALED:
        sums *= tl.load(scale + rows, mask=rows < outs, other=0.0)[:, None]
    at = tokens.to(tl.int64)[None, :] * outs + rows[:, None]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(tokens < n)[None, :] & (rows < outs)[:, None])


@triton.jit
def _from_int4(words, scale, low, NUMBER: tl.constexpr):
    """Give the weights that stand as nibble ``NUMBER`` of 16-bit words, as bfloat16."""
    if _ASSEMBLY:
        # The last digits of 128 + q are q. Two words lie in a register; by itself the compiler takes them apart.
        raised = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t, c; shr.u32 t, $1, {4 * NUMBER}; mov.b32 c, 0x43004300; "
            "lop3.b32 $0, t, 0x000F000F, c, 0xEA; }",
            "=r,r",
            [words],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
        # The difference is exact; product and sum are rounded once, together.
        weights = tl.fma(raised - 128.0, scale, low)
    else:
        q = ((words >> (4 * NUMBER)) & 15).to(tl.float32)
        weights = (q * scale.to(tl.float32) + low.to(tl.float32)).to(tl.bfloat16)
    return weights


@triton.jit
def linear_int4(
    x,
    q,
    scale,
    low,
    out,
    n,
    outs,
    groups,
    q_stride,
    scale_stride,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
):
    """Like :func:`linear`; ``q`` and ``x`` are read as words of four inputs, one of which is multiplied at a time."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.minimum(rows, outs - 1).to(tl.int64)
    token_at = (tokens * (groups * (_GROUP // 4)))[None, None, :]
    here = (tokens < n)[None, None, :]
    total = tl.zeros((PARTS, ROWS, TOKENS), tl.float32)
    for start in range(0, groups, PARTS):
        group = start + tl.arange(0, PARTS)
        inner = group[:, None] * (_GROUP // 4) + tl.arange(0, _GROUP // 4)[None, :]
        words_at = q + (row * q_stride)[None, :, None] + inner[:, None, :]
        ends_at = (row * scale_stride)[None, :] + group[:, None]
        if EVEN:
            words = tl.load(words_at)
            steps, least = tl.load(scale + ends_at), tl.load(low + ends_at)
            fours = tl.load(x + token_at + inner[:, :, None], mask=here, other=0)
        else:
            inside = (group < groups)[:, None]
            words = tl.load(words_at, mask=inside[:, :, None], other=0)
            steps = tl.load(scale + ends_at, mask=inside, other=0.0)
            least = tl.load(low + ends_at, mask=inside, other=0.0)
            fours = tl.load(x + token_at + inner[:, :, None], mask=here & inside[:, :, None], other=0)
        for number in tl.static_range(4):
            part = (fours >> (16 * number)).to(tl.int16).to(tl.bfloat16, bitcast=True)
            w = _from_int4(words, steps[:, :, None], least[:, :, None], number)
            total = tl.dot(w.to(DOT), part.to(DOT), total)
    sums = tl.sum(total, 0)
    at = tokens.to(tl.int64)[None, :] * outs + rows[:, None]
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=(tokens < n)[None, :] & (rows < outs)[:, None])
