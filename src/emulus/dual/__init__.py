"""pictures and texts -> vectors: which text goes with which picture, learnt from the project's own training data."""

from emulus.dual.model import DualConfig, DualEncoder

__all__ = ["DualConfig", "DualEncoder"]
