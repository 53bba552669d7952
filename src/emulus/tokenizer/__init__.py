"""pixels <-> codes, text <-> ids, and the one id space that holds both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emulus.lazy import lazy

if TYPE_CHECKING:
    from emulus.tokenizer.text import TextTokenizer
    from emulus.tokenizer.vocabulary import Vocabulary

__all__ = ["TextTokenizer", "Vocabulary"]
__getattr__ = lazy(__name__, {"TextTokenizer": "text", "Vocabulary": "vocabulary"})
