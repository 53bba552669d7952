"""Emulus: one transformer, one next-token loss, one sequence of text, pictures, clips and actions.

``emulus.load(folder)`` gives an :class:`emulus.pipeline.Emulus`. Importing the package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emulus.errors import EmulusError
from emulus.threads import set_library_defaults

if TYPE_CHECKING:
    from emulus.loading import load
    from emulus.pipeline import Emulus

# Before torch is imported: OpenMP reads its settings when torch loads it.
set_library_defaults()

__version__ = "0.1.0"
__all__ = ["Emulus", "EmulusError", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Emulus", "load"):
        from emulus import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'emulus' has no attribute {name!r}")
