"""A small grammar of our own, and one with the released vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulus.sequence import Grammar
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import Vocabulary

CODEBOOK = 50
ACTIONS = 12


@pytest.fixture(scope="session")
def grammar() -> Grammar:
    """Our own vocabulary with bytes for text, 50 visual and 12 action codes, Emu3's layout."""
    text = TextTokenizer.train(["a red apple", "Question: how many?\nAnswer: 2"] * 3, size=300)
    vocabulary = Vocabulary.native(text_size=text.size, visual_size=CODEBOOK, action_size=ACTIONS)
    return Grammar(vocabulary, text, max_cells=5000)


@pytest.fixture(scope="session")
def released(official: Path) -> Grammar:
    """The released vocabulary and text tokenizer."""
    return Grammar(Vocabulary.emu3(), TextTokenizer.from_file(official / "emu3.tiktoken"))
