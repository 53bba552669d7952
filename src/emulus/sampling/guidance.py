"""Classifier-free guidance on next-token logits."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def apply_guidance(
    cond: Float[Tensor, "batch vocab"], uncond: Float[Tensor, "batch vocab"], scale: float
) -> Float[Tensor, "batch vocab"]:
    """Push the next-token logits away from the unconditional ones.

    ``scale`` 1 returns ``cond``; the released sampler draws images at 3.

    The released sampler guides log-probabilities over the whole vocabulary and only then keeps the legal ids.
    A row's logits and log-probabilities differ by one constant, so the guided values of both ways differ by
    one constant per row, and softmax, top-k, top-p and argmax over the legal ids do not see it. The legal
    slice of the raw logits is therefore all that is needed, and exact.

    Args:
        cond: Logits given the prompt, or any slice of them.
        uncond: Logits given the negative or empty prompt, row for row, of the same ids.
        scale: Guidance strength, at least 0.

    Returns:
        Guided logits in float32: bfloat16 would round away differences that the scale multiplies.

    Source: Ho & Salimans 2022 (arXiv:2207.12598), on log-softmax as in Emu3's released sampler.
    """
    if scale == 1:
        return cond.float()
    base = uncond.float()
    return base + scale * (cond.float() - base)
