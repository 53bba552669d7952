"""Products, norms, attention and choice for few tokens on the CPU: one small C++ library, built at first use.

What is computed for one token is the same, to the last bit, whatever stands beside it in a step and however many
threads there are. Nothing here follows gradients. Outputs are new tensors.

Everything takes float32 activations whose last axis is contiguous; a misfit raises ``ValueError``.
"""

from __future__ import annotations

import ctypes
import os
import threading
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from emulus.errors import EmulusError
from emulus.kernels import build
from emulus.kernels.where import Where
from emulus.log import logger

MOST_HEAD_DIM = 256
"""Widest head that attention takes."""

BLOCK_NUMBERS = 5 + 7 * 7
"""Numbers that :func:`blocks` takes of a block."""

Numbers = tuple[int, ...]

_INTERFACE = 3
_GROUP = 64
_BFLOAT16 = {torch.float32: 0, torch.bfloat16: 1}

# Argument types: p address, i 64-bit integer, n int, f float.
_TYPES = {"p": c_void_p, "i": c_int64, "n": c_int, "f": c_float}
_SIGNATURES = {
    "emulus_linear": "piiipnipn",
    "emulus_linear_int8": "piiippipn",
    "emulus_linear_int4": "piiipppinipn",
    "emulus_rms_norm": "piiipnfp",
    "emulus_silu_mul": "pipiiip",
    "emulus_rotate_and_store": "ppppiipppppniiip",
    "emulus_attend": "piiippppniiipn",
    "emulus_choose": "pipiiiffippipn",
    "emulus_blocks": "pipiiiippppppniifn",
}

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_tried = False


def available() -> bool:
    """Whether the kernels can be used; the first call builds (or finds) and loads them.

    ``EMULUS_NATIVE=0`` switches them off. Where they cannot be built or do not work, one line says so.
    """
    if not _tried:
        _start()
    return _library is not None


def load(path: Path) -> ctypes.CDLL:
    """Load a library and try it on a small product.

    Raises:
        EmulusError: It is not a library, or not the right one, or computes something else.
    """
    try:
        library = ctypes.CDLL(str(path))
        if library.emulus_interface() != _INTERFACE:
            raise EmulusError(f"{path.name} is of another version")
        for name, letters in _SIGNATURES.items():
            getattr(library, name).argtypes = [_TYPES[letter] for letter in letters]
    except (OSError, AttributeError) as error:
        raise EmulusError(f"{path.name} cannot be loaded ({error})") from error
    x = torch.arange(2 * 21, dtype=torch.float32, device="cpu").view(2, 21) % 5
    weight = torch.arange(5 * 21, dtype=torch.float32, device="cpu").view(5, 21) % 7
    if not torch.equal(_linear(library, x, weight), (x[:, None] * weight).sum(-1)):
        raise EmulusError(f"{path.name} computes wrong products")
    return library


def linear(x: Float[Tensor, "n in"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "n out"]:
    """Multiply by float32 or bfloat16 weights: ``x @ weight.T``.

    Args:
        x: Activations.
        weight: Contiguous; a slice of a matrix's rows is.
    """
    return _linear(_loaded(), x, weight)


def _linear(library: ctypes.CDLL, x: Tensor, weight: Tensor) -> Tensor:
    n, width = x.shape
    rows = weight.shape[0]
    _check_rows(x, "x")
    if weight.shape[1] != width or not weight.is_contiguous() or not weight.is_cpu:
        raise ValueError(f"x {tuple(x.shape)} needs a contiguous weight (out, {width}), got {_describe(weight)}")
    result = _new(n, rows)
    _done(
        library.emulus_linear(
            x.data_ptr(), n, x.stride(0), width, weight.data_ptr(), _bfloat16(weight.dtype), rows, result.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return result


def linear_int8(
    x: Float[Tensor, "n in"], q: Int8[Tensor, "out in"], scale: Float[Tensor, "out 1"]
) -> Float[Tensor, "n out"]:
    """Multiply by weights ``scale * q``.

    Args:
        x: Activations.
        q: Whole numbers.
        scale: float32, one for each row of weights.
    """
    n, width = x.shape
    rows = q.shape[0]
    _check_rows(x, "x")
    if q.shape[1] != width or scale.shape != (rows, 1):
        raise ValueError(f"x {tuple(x.shape)}, q {tuple(q.shape)} and scale {tuple(scale.shape)} do not fit")
    _check_whole(q, torch.int8, "q")
    _check_whole(scale, torch.float32, "scale")
    result = _new(n, rows)
    _done(
        _loaded().emulus_linear_int8(
            x.data_ptr(), n, x.stride(0), width, q.data_ptr(), scale.data_ptr(), rows, result.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return result


def linear_int4(
    x: Float[Tensor, "n in"],
    q: UInt8[Tensor, "out bytes"],
    scale: Float[Tensor, "out groups"],
    low: Float[Tensor, "out groups"],
    *,
    rounded: bool = False,
) -> Float[Tensor, "n out"]:
    """Multiply by weights ``low + scale * q``, of which 64 neighbours share the two.

    Args:
        x: Activations.
        q: Two inputs in a byte, the first in its low half; whole groups, 32 bytes each.
        scale: bfloat16.
        low: bfloat16.
        rounded: Round each token's activations to 8 bits, 64 neighbours at a scale. 1.6 to 2 times as fast;
            moves a product by 0.6 % of its size, where 4-bit weights have moved it by 9 % (normal numbers).
    """
    n, width = x.shape
    rows, groups = scale.shape
    _check_rows(x, "x")
    if q.shape != (rows, groups * _GROUP // 2) or low.shape != scale.shape or -(-width // _GROUP) != groups:
        shapes = f"q {tuple(q.shape)}, scale {tuple(scale.shape)} and low {tuple(low.shape)}"
        raise ValueError(f"x {tuple(x.shape)}, {shapes} do not fit")
    _check_whole(q, torch.uint8, "q")
    _check_whole(scale, torch.bfloat16, "scale")
    _check_whole(low, torch.bfloat16, "low")
    result = _new(n, rows)
    _done(
        _loaded().emulus_linear_int4(
            x.data_ptr(), n, x.stride(0), width, q.data_ptr(), scale.data_ptr(), low.data_ptr(), groups,
            rounded, rows, result.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    return result


def rms_norm(x: Float[Tensor, "n size"], weight: Float[Tensor, " size"], eps: float) -> Float[Tensor, "n size"]:
    """Scale each row to unit mean square, then by the weight.

    Args:
        x: Activations.
        weight: float32 or bfloat16.
        eps: Added to the mean square.
    """
    n, size = x.shape
    _check_rows(x, "x")
    if weight.shape != (size,) or not weight.is_contiguous() or not weight.is_cpu:
        raise ValueError(f"x {tuple(x.shape)} needs a contiguous weight ({size},), got {_describe(weight)}")
    result = _new(n, size)
    _loaded().emulus_rms_norm(
        x.data_ptr(), n, x.stride(0), size, weight.data_ptr(), _bfloat16(weight.dtype), eps, result.data_ptr()
    )
    return result


def silu_mul(gate: Float[Tensor, "n size"], up: Float[Tensor, "n size"]) -> Float[Tensor, "n size"]:
    """Give ``gate * sigmoid(gate) * up``.

    Args:
        gate: What passes through SiLU; may be some columns of a wider tensor, as may the other.
        up: What it is multiplied by.
    """
    n, size = gate.shape
    _check_rows(gate, "gate")
    _check_rows(up, "up")
    if up.shape != gate.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} do not fit")
    result = _new(n, size)
    _loaded().emulus_silu_mul(gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), n, size, result.data_ptr())
    return result


def rotate_and_store(
    q: Float[Tensor, "n heads d"],
    k: Float[Tensor, "n kv_heads d"],
    v: Float[Tensor, "n kv_heads d"],
    cos: Float[Tensor, "n d"],
    sin: Float[Tensor, "n d"],
    where: Where,
    layer: int,
) -> Float[Tensor, "n heads d"]:
    """Turn queries and keys by their positions' angles, and write keys and values into the lanes.

    Args:
        q: Queries. Heads and their width are contiguous; the tokens may lie apart, as in a part of a wider tensor.
        k: Keys, likewise.
        v: Values, likewise.
        cos: Cosines of the pairs ``(i, i + d / 2)``, so each stands twice.
        sin: Sines.
        where: The tokens' lanes and slots.
        layer: Number of the layer.

    Returns:
        The turned queries.
    """
    n, heads, width = q.shape
    _check_where(where, n, width)
    shape = (n, where.kv_heads, width)
    if k.shape != shape or v.shape != shape or cos.shape != (n, width) or sin.shape != (n, width):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, cos, sin))
        raise ValueError(f"q, k, v, cos and sin of shapes {shapes} do not fit {where.kv_heads} key/value heads")
    _check_heads(q, "q")
    _check_heads(k, "k")
    _check_heads(v, "v")
    _check_whole(cos, torch.float32, "cos")
    _check_whole(sin, torch.float32, "sin")
    result = _new(n, heads, width)
    strides = (c_int64 * 3)(q.stride(0), k.stride(0), v.stride(0))
    _loaded().emulus_rotate_and_store(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), strides, n, heads, cos.data_ptr(), sin.data_ptr(),
        where.base.data_ptr(), where.capacity.data_ptr(), where.position.data_ptr(), _bfloat16(where.dtype),
        where.kv_heads, width, layer, result.data_ptr(),
    )  # fmt: skip
    return result


def attend(q: Float[Tensor, "n heads d"], where: Where, layer: int) -> Float[Tensor, "n hidden"]:
    """Let each token attend to the slots of its lane up to its own.

    Args:
        q: Turned queries; several may share a key/value head.
        where: The tokens' lanes and slots; their keys and values of this layer are written.
        layer: Number of the layer.
    """
    n, heads, width = q.shape
    _check_where(where, n, width)
    _check_heads(q, "q")
    if heads % where.kv_heads:
        raise ValueError(f"{heads} heads cannot share {where.kv_heads} key/value heads evenly")
    result = _new(n, heads * width)
    ready = 0 if where.ready is None else where.ready.data_ptr()
    _done(
        _loaded().emulus_attend(
            q.data_ptr(), q.stride(0), n, heads, where.base.data_ptr(), where.capacity.data_ptr(),
            where.position.data_ptr(), ready, _bfloat16(where.dtype), where.kv_heads, width, layer, result.data_ptr(),
            torch.get_num_threads(),
        )
    )  # fmt: skip
    return result


def matrix(
    data: Tensor, scale: Tensor | None = None, low: Tensor | None = None, *, width: int, rounded: bool = False
) -> Numbers:
    """Describe a matrix for :func:`blocks`: what :func:`linear`, :func:`linear_int8` or :func:`linear_int4` takes.

    Args:
        data: Weights, or the whole numbers of quantised ones.
        scale: Of quantised ones.
        low: Of weights in 4 bits.
        width: How many inputs.
        rounded: As for :func:`linear_int4`.

    Returns:
        What :func:`blocks` needs to know of it; nothing where it cannot be multiplied with.
    """
    fits = data.is_cpu and all(part is None or part.is_contiguous() for part in (data, scale, low))
    kinds = {
        (torch.float32, None, None): 0,
        (torch.bfloat16, None, None): 1,
        (torch.int8, torch.float32, None): 2,
        (torch.uint8, torch.bfloat16, torch.bfloat16): 4 if rounded else 3,
    }
    types = tuple(None if part is None else part.dtype for part in (data, scale, low))
    if not fits or types not in kinds:
        return ()
    addresses = (0 if part is None else part.data_ptr() for part in (data, scale, low))
    return (kinds[types], *addresses, data.shape[0], width, 0 if low is None else low.shape[1])


def blocks(
    x: Float[Tensor, "n hidden"],
    table: Int[Tensor, "layers numbers"],
    *,
    heads: int,
    inner: int,
    eps: float,
    cos: Float[Tensor, "n d"],
    sin: Float[Tensor, "n d"],
    where: Where,
) -> Float[Tensor, "n hidden"]:
    """Compute all blocks of a decoder in one call: what the functions above give one by one, to the bit.

    Args:
        x: What goes into the first block.
        table: Of each block: addresses of its norm, its MLP's norm, and the norms of queries and keys (0 for none);
            1 if they are bfloat16; and :func:`matrix` of its projections (q, k, v, o, gate, up, down).
        heads: Of queries.
        inner: Width within the MLP.
        eps: Of the norms.
        cos: As for :func:`rotate_and_store`.
        sin: Likewise.
        where: The tokens' lanes and slots.
    """
    n, hidden = x.shape
    width = where.head_dim
    _check_where(where, n, width)
    _check_rows(x, "x")
    if table.shape[1] != BLOCK_NUMBERS or heads % where.kv_heads or cos.shape != (n, width) or sin.shape != (n, width):
        raise ValueError(f"a table {tuple(table.shape)}, {heads} heads and cos {tuple(cos.shape)} do not fit")
    for each, dtype, name in ((table, torch.int64, "table"), (cos, torch.float32, "cos"), (sin, torch.float32, "sin")):
        _check_whole(each, dtype, name)
    result = x.contiguous().clone()
    ready = 0 if where.ready is None else where.ready.data_ptr()
    _done(
        _loaded().emulus_blocks(
            table.data_ptr(), len(table), result.data_ptr(), n, hidden, inner, heads, cos.data_ptr(), sin.data_ptr(),
            where.base.data_ptr(), where.capacity.data_ptr(), where.position.data_ptr(), ready,
            _bfloat16(where.dtype), where.kv_heads, width, eps, torch.get_num_threads(),
        )
    )  # fmt: skip
    return result


def choose(
    cond: Float[Tensor, "n ids"],
    null: Float[Tensor, "n ids"] | None,
    *,
    scale: float,
    temperature: float,
    k: int,
    seeds: Int[Tensor, " n"],
    positions: Int[Tensor, " n"],
    first_id: int,
) -> Int[Tensor, " n"]:
    """Draw a column of each row, as :func:`emulus.sampling.sample` does without top-p.

    Guidance, temperature, top-k (with what ties with the last), then the largest of logits plus noise.

    Args:
        cond: Logits given the prompt.
        null: Logits without it; ``None`` for no guidance.
        scale: Strength of guidance; 1 is none.
        temperature: 0 takes the largest logit, the first of equals.
        k: How many columns to keep; 0 keeps all.
        seeds: int64, each row's seed.
        positions: int64, where each row's id will stand.
        first_id: The id of column 0; the others follow.

    Returns:
        Columns, int64.
    """
    n, ids = cond.shape
    _check_rows(cond, "cond")
    if null is not None and scale != 1:
        _check_rows(null, "null")
        if null.shape != cond.shape:
            raise ValueError(f"cond {tuple(cond.shape)} and null {tuple(null.shape)} do not fit")
    else:
        null = None
    if ids == 0 or seeds.shape != (n,) or positions.shape != (n,):
        shapes = f"seeds {tuple(seeds.shape)} and positions {tuple(positions.shape)}"
        raise ValueError(f"cond {tuple(cond.shape)}, {shapes} do not fit")
    if not temperature >= 0 or k < 0:
        raise ValueError(f"temperature {temperature} and k {k} must not be negative")
    _check_whole(seeds, torch.int64, "seeds")
    _check_whole(positions, torch.int64, "positions")
    result = torch.empty(n, dtype=torch.int64, device="cpu")
    _done(
        _loaded().emulus_choose(
            cond.data_ptr(), cond.stride(0), 0 if null is None else null.data_ptr(),
            0 if null is None else null.stride(0), n, ids, scale, temperature, k, seeds.data_ptr(),
            positions.data_ptr(), first_id, result.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    return result


def _new(*shape: int) -> Tensor:
    """Room for results, whatever type and device others have made the default."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _start() -> None:
    global _library, _tried
    with _lock:
        if _tried:
            return
        if os.environ.get("EMULUS_NATIVE") != "0":
            try:
                _library = load(build.library(load))
            except Exception as error:  # whatever is odd about this machine: the kernels are never required
                logger.warning("the fast CPU kernels are off, plain PyTorch is used: %s", error)
        _tried = True


def _loaded() -> ctypes.CDLL:
    if _library is None and not available():
        raise RuntimeError("the native kernels are not available; ask available() first")
    assert _library is not None
    return _library


def _done(status: int) -> None:
    if status:
        raise MemoryError("not enough memory for a kernel's intermediate results")


def _bfloat16(dtype: torch.dtype) -> int:
    code = _BFLOAT16.get(dtype)
    if code is None:
        raise ValueError(f"only float32 and bfloat16 are known to the native kernels, got {dtype}")
    return code


def _check_rows(x: Tensor, name: str) -> None:
    if x.dtype is not torch.float32 or x.stride(1) != 1 or not x.is_cpu:
        raise ValueError(f"{name} must be float32 on the CPU, its last axis contiguous, got {_describe(x)}")


def _check_heads(x: Tensor, name: str) -> None:
    _, stride, last = x.stride()
    if x.dtype is not torch.float32 or last != 1 or stride != x.shape[2] or not x.is_cpu:
        raise ValueError(f"{name} must be float32 on the CPU, its last two axes contiguous, got {_describe(x)}")


def _check_whole(x: Tensor, dtype: torch.dtype, name: str) -> None:
    if x.dtype is not dtype or not x.is_contiguous() or not x.is_cpu:
        raise ValueError(f"{name} must be {dtype} on the CPU and contiguous, got {_describe(x)}")


def _check_where(where: Where, n: int, width: int) -> None:
    if where.head_dim != width or width % 2 or not 0 < width <= MOST_HEAD_DIM:
        raise ValueError(f"heads of {width} do not fit lanes of {where.head_dim}, or are odd or above {MOST_HEAD_DIM}")
    if where.position.shape != (n,) or where.base.shape != (n,) or where.capacity.shape != (n,):
        raise ValueError(f"{n} tokens, but {where.position.shape[0]} positions")


def _describe(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}"
