"""What a request tells on its way: text in whole characters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emulus.engine import Request, TextPiece
from emulus.engine.walk import Walk
from emulus.sequence.document import Document, Text
from emulus.sequence.grammar import Grammar
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import Vocabulary

BYTES = [bytes([byte]) for byte in range(256)]


def streamed(pieces: list[bytes]) -> list[str]:
    """The texts that a request tells, one after another, which is answered in these pieces."""
    known = list(dict.fromkeys([*BYTES, *pieces]))
    tokenizer = TextTokenizer.from_pieces(known)
    ids = [known.index(piece) for piece in pieces]
    grammar = Grammar(Vocabulary.native(text_size=tokenizer.size, visual_size=8), tokenizer)
    prompt = grammar.build(Document((Text("a"),)), eos=False)
    walk = Walk(0, Request(prompt_ids=prompt, may=frozenset({"text"})), grammar, 512)
    events = [event for id in [*ids, grammar.vocabulary.eos] for event in walk.take(id)]
    return [event.text for event in events if isinstance(event, TextPiece)]


texts = st.text(st.sampled_from("aé日🙂的 \ufffd"), max_size=12).map(str.encode) | st.binary(max_size=12)


@given(texts, st.lists(st.integers(1, 5), max_size=12))
def test_streamed_text_is_the_whole_text(data: bytes, lengths: list[int]) -> None:
    """However characters are cut into pieces, and also where bytes are no text."""
    cuts = [0]
    for length in lengths:
        cuts.append(min(cuts[-1] + length, len(data)))
    pieces = [data[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(data)], strict=True) if start < stop]
    assert "".join(streamed(pieces)) == data.decode("utf-8", errors="replace")


def test_characters_are_told_as_soon_as_they_are_whole() -> None:
    data = "的一是不了".encode()
    cuts = [data[:2], *(data[start : start + 3] for start in range(2, len(data) - 1, 3)), data[-1:]]
    assert streamed(cuts) == list("的一是不了")
