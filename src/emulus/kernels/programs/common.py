# mypy: ignore-errors
"""What all programs share: types, and whether they are interpreted."""

from __future__ import annotations

import os

import torch
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the programs run on the CPU, element by element, as tests have it where there is no GPU."""

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
}
"""What Triton calls the types that a lane may have."""


def _fix_indices() -> None:
    """Let the interpreter make indices of arrays of one number also with NumPy 2.4 and newer."""
    from triton.runtime import interpreter

    usual = getattr(interpreter, "_patch_lang_tensor", None)
    if usual is None:
        return

    def patched(tensor, *rest):
        usual(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched


if INTERPRETED:
    _fix_indices()
