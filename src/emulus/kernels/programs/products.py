# mypy: ignore-errors
"""Products of a few tokens with large matrices.

Many warps share a block of rows, each takes its own columns, and their sums are added at the end: so a few rows keep a
multiprocessor busy, and weights go from memory to registers once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from emulus.kernels.programs.common import INTERPRETED
from emulus.kernels.programs.rows import silu_times

# The interpreter can neither multiply bfloat16 matrices nor read assembly.
_ASSEMBLY = tl.constexpr(not INTERPRETED)
# How a weight is brought to the type that is multiplied in.
CAST = tl.constexpr(0)
ROUND = tl.constexpr(1)
FP8 = tl.constexpr(2)
FP8_BITS = tl.constexpr(3)
_GROUP = tl.constexpr(64)
# Lines of 128 bytes that are fetched of each row ahead: at least the first two rounds of a loop.
_LINES = tl.constexpr(16)


@triton.jit
def _place(program, outs, ROWS: tl.constexpr, GATED: tl.constexpr):
    """Rows of the result that a program computes, and which row of the matrices, one below another, each takes.

    Rows past the end take the last one and are not stored: no load of weights needs a mask. If ``GATED``, rows of two
    matrices take turns.
    """
    total = outs[0]
    for i in tl.static_range(1, len(outs)):
        total += outs[i]
    rows = program * ROWS + tl.arange(0, ROWS)
    taken = tl.minimum(rows, total - 1)
    if GATED:
        taken = taken // 2 + taken % 2 * outs[0]
    return rows, taken, total


@triton.jit
def _row_at(matrices, strides, outs, row):
    """Where rows of matrices that lie one below another begin."""
    at = matrices[0] + row.to(tl.int64) * strides[0]
    first = outs[0]
    for i in tl.static_range(1, len(matrices)):
        at = tl.where(row >= first, matrices[i] + (row - first).to(tl.int64) * strides[i], at)
        first += outs[i]
    return at


@triton.jit
def _fetch(row_at, columns, LINES: tl.constexpr):
    """Begin to bring the first ``LINES`` times 128 bytes of rows of ``columns`` numbers to the L2 cache.

    Weights are no other kernel's output, so the memory need not idle until the kernel before has ended.
    """
    per_line: tl.constexpr = 1024 // row_at.dtype.element_ty.primitive_bitwidth
    at = row_at[:, None] + tl.minimum(tl.arange(0, LINES) * per_line, columns - 1)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _read(tokens, n, TOKENS: tl.constexpr):
    """Which tokens to read: where there are few, no other; else the last one stands for those past the end.

    Masks cost registers and instructions, but few tokens are often fewer than ``TOKENS``.
    """
    if TOKENS > 8:  # noqa: SIM108
        here = tl.full((TOKENS,), 1, tl.int1)
    else:
        here = tokens < n
    return here


@triton.jit
def _finish(sums, out, add, n, total, tokens, rows, GATED: tl.constexpr):
    """Round the products as they would be if they stood alone, do what comes after them, and store."""
    typed = out.dtype.element_ty
    if GATED:
        pairs = tl.reshape(sums, (sums.shape[0] // 2, 2, sums.shape[1]))
        gate, up = tl.split(tl.permute(pairs, (0, 2, 1)))
        sums = silu_times(gate.to(typed).to(tl.float32), up.to(typed).to(tl.float32))
        total = total // 2
        rows = tl.program_id(1) * sums.shape[0] + tl.arange(0, sums.shape[0])
    at = tokens.to(tl.int64)[None, :] * total + rows[:, None]
    inside = (tokens < n)[None, :] & (rows < total)[:, None]
    if add is not None:
        sums = sums.to(typed).to(tl.float32) + tl.load(add + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(typed), mask=inside)


@triton.jit
def _from_fp8(codes):
    """Give the floats (e4m3fn) that stand in bytes, exactly; GPUs before compute capability 8.9 know no such type."""
    if _ASSEMBLY:
        # The digits moved to where bfloat16 has them are short of 2 ** 120 alone. Four bytes lie in a register.
        weights = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d, m, z; mov.b32 m, 0x7B807B80; mov.b32 z, 0x80008000; "
            "prmt.b32 a, 0, $2, 0x5140; prmt.b32 b, 0, $2, 0x7160; "
            "shr.u32 c, a, 4; shr.u32 d, b, 4; and.b32 c, c, 0x07F007F0; and.b32 d, d, 0x07F007F0; "
            "lop3.b32 a, a, z, c, 0xEA; lop3.b32 b, b, z, d, 0xEA; "
            "fma.rn.bf16x2 $0, a, m, z; fma.rn.bf16x2 $1, b, m, z; }",
            "=r,=r,r",
            [codes],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        wide = codes.to(tl.int16)
        halves = ((wide & 0x7F) << 7) | ((wide << 8) & -0x8000)
        weights = halves.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return weights


@triton.jit(do_not_specialize=["n"])
def linear(
    x,
    weights,
    scales,
    add,
    out,
    n,
    outs,
    ins,
    x_stride,
    strides,
    scale_strides,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Rows of ``weights`` times ``TOKENS`` tokens; a row's scale, if any, is multiplied at the end."""
    rows, row, total = _place(tl.program_id(1), outs, ROWS, GATED)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row_at = _row_at(weights, strides, outs, row)
    if PDL:
        _fetch(row_at, ins, _LINES)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row_at = row_at[None, :, None]
    token_at = (tl.minimum(tokens, n - 1) * x_stride)[None, None, :]
    here = _read(tokens, n, TOKENS)[None, None, :]
    inner = tl.arange(0, PARTS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    sums = tl.zeros((PARTS, ROWS, TOKENS), tl.float32)
    for start in range(0, ins, PARTS * WIDTH):
        columns = start + inner
        if EVEN:
            w = tl.load(row_at + columns[:, None, :])
            part = tl.load(x + token_at + columns[:, :, None], mask=here, other=0.0)
        else:
            w = tl.load(row_at + columns[:, None, :], mask=(columns < ins)[:, None, :], other=0.0)
            part = tl.load(x + token_at + columns[:, :, None], mask=here & (columns < ins)[:, :, None], other=0.0)
        if KIND == ROUND:
            w = w.to(tl.bfloat16)
        elif KIND == FP8:
            # By this detour every step has an instruction of full speed.
            w = w.to(tl.float16).to(tl.float32)
        elif KIND == FP8_BITS:
            w = _from_fp8(w)
        sums = tl.dot(w.to(DOT), part.to(DOT), sums)
    product = tl.sum(sums, 0)
    if scales is not None:
        product *= tl.load(_row_at(scales, scale_strides, outs, row))[:, None]
    _finish(product, out, add, n, total, tokens, rows, GATED)


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


@triton.jit(do_not_specialize=["n"])
def linear_int4(
    x,
    weights,
    scales,
    lows,
    add,
    out,
    n,
    outs,
    groups,
    strides,
    scale_strides,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    EVEN: tl.constexpr,
    DOT: tl.constexpr,
    PDL: tl.constexpr = False,
):
    """Like :func:`linear`; weights and ``x`` are read as words of four inputs, one of which is multiplied at a time."""
    rows, row, total = _place(tl.program_id(1), outs, ROWS, GATED)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row_at = _row_at(weights, strides, outs, row)
    scale_at, low_at = _row_at(scales, scale_strides, outs, row), _row_at(lows, scale_strides, outs, row)
    if PDL:
        _fetch(row_at, groups * (_GROUP // 4), _LINES)
        _fetch(scale_at, groups, 1)
        _fetch(low_at, groups, 1)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row_at, scale_at, low_at = row_at[None, :, None], scale_at[None, :], low_at[None, :]
    token_at = (tl.minimum(tokens, n - 1) * (groups * (_GROUP // 4)))[None, None, :]
    here = _read(tokens, n, TOKENS)[None, None, :]
    sums = tl.zeros((PARTS, ROWS, TOKENS), tl.float32)
    for start in range(0, groups, PARTS):
        group = start + tl.arange(0, PARTS)
        inner = group[:, None] * (_GROUP // 4) + tl.arange(0, _GROUP // 4)[None, :]
        if EVEN:
            words = tl.load(row_at + inner[:, None, :])
            steps, least = tl.load(scale_at + group[:, None]), tl.load(low_at + group[:, None])
            fours = tl.load(x + token_at + inner[:, :, None], mask=here, other=0)
        else:
            inside = (group < groups)[:, None]
            words = tl.load(row_at + inner[:, None, :], mask=inside[:, :, None], other=0)
            steps = tl.load(scale_at + group[:, None], mask=inside, other=0.0)
            least = tl.load(low_at + group[:, None], mask=inside, other=0.0)
            fours = tl.load(x + token_at + inner[:, :, None], mask=here & inside[:, :, None], other=0)
        for number in tl.static_range(4):
            part = (fours >> (16 * number)).to(tl.int16).to(tl.bfloat16, bitcast=True)
            w = _from_int4(words, steps[:, :, None], least[:, :, None], number)
            sums = tl.dot(w.to(DOT), part.to(DOT), sums)
    _finish(tl.sum(sums, 0), out, add, n, total, tokens, rows, GATED)
