"""pixels <-> codes. Emu3's vision tokenizer: encoder, codebook, decoder, and how it is trained and measured."""

from emulus.tokenizer.vision.config import VisionTokenizerConfig
from emulus.tokenizer.vision.model import VisionTokenizer

__all__ = ["VisionTokenizer", "VisionTokenizerConfig"]
