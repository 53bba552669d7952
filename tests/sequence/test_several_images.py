"""Several pictures in one prompt: what is generated depends on the request alone, not on its batch."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.engine import Engine, Request
from emulus.model import Decoder, DecoderConfig
from emulus.sampling import SamplingParams
from emulus.sequence import Document, Grammar, Image, Segment, SequenceLayout, Special, Text, Video
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import Vocabulary

TEXT = TextTokenizer.train(["a red apple beside", "the second picture and", "draw both"] * 3, size=280)
NATIVE = Vocabulary.native(text_size=TEXT.size, visual_size=40)
NAMES = NATIVE.to_dict()["special_names"] | {"<|extra_100|>": NATIVE.size}
V = Vocabulary.from_dict(NATIVE.to_dict() | {"special_names": NAMES})
LAYOUTS = {"emu3": SequenceLayout(), "emu3.5": SequenceLayout.emu3_5()}
GRAMMARS = {name: Grammar(V, TEXT, layout) for name, layout in LAYOUTS.items()}


def make_decoder() -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=V.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=400,
        initializer_range=0.2,
    )
    return Decoder(config).eval()


DECODER = make_decoder()


def random_segment(chance: random.Random) -> Segment:
    h, w = chance.randint(1, 4), chance.randint(1, 5)
    codes = torch.tensor([[[chance.randrange(40) for _ in range(w)] for _ in range(h)] for _ in range(2)])
    words = Text(" ".join(chance.choices(["a red apple", "and", "the second", "日本"], k=chance.randint(1, 4))))
    return chance.choice([words, Special("<|extra_100|>"), Image(codes[0]), Image(codes[1]), Video(codes, fps=8)])


def random_request(grammar: Grammar, chance: random.Random, temperature: float) -> tuple[Request, tuple[int, int]]:
    """A prompt with up to four segments before the picture that it leaves open; sometimes guided, sometimes begun."""
    h, w = chance.randint(1, 5), chance.randint(1, 5)
    before = Document(tuple(random_segment(chance) for _ in range(chance.randint(0, 4))))
    begun = torch.tensor([chance.randrange(40) for _ in range(chance.choice([0, 0, h * w // 2]))], dtype=torch.int64)
    opening = grammar.open_media(h=h, w=w, codes=begun)
    null = grammar.build(Document(before.segments[:1]), eos=False) + opening if chance.random() < 0.5 else None
    params = SamplingParams(temperature=temperature, seed=chance.randrange(2**40), top_k=20, guidance_scale=3.0)
    prompt = grammar.build(before, eos=False) + opening
    return Request(prompt_ids=prompt, null_ids=null, params=params), (h, w)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "seeded"])
@settings(deadline=None, max_examples=5)
@given(chance=st.randoms(use_true_random=False), batch_size=st.integers(2, 7))
def test_a_batch_of_unlike_prompts_equals_one_by_one(
    name: str, temperature: float, chance: random.Random, batch_size: int
) -> None:
    grammar = GRAMMARS[name]
    engine = Engine(DECODER, grammar)
    requests, sizes = zip(*(random_request(grammar, chance, temperature) for _ in range(7)), strict=True)
    alone = [engine.generate([request])[0] for request in requests]
    assert engine.generate(requests, batch_size=batch_size) == alone
    for request, result, size in zip(requests, alone, sizes, strict=True):
        parsed = grammar.parse([*request.prompt_ids, *result.ids])
        drawn = parsed.document.segments[-1]
        assert parsed.complete
        assert isinstance(drawn, Image)
        assert tuple(drawn.codes.shape) == size


def test_words_about_several_pictures_in_a_batch() -> None:
    grammar = GRAMMARS["emu3"]
    engine = Engine(DECODER, grammar)
    chance = random.Random(1)
    requests = []
    for seed in range(6):
        pictures = [Image(torch.randint(40, (chance.randint(1, 4), chance.randint(1, 4)))) for _ in range(seed % 3 + 1)]
        prompt = grammar.build(Document((*pictures, Text("the second picture"))), eos=False)
        params = SamplingParams(seed=seed, temperature=seed % 2, max_new_tokens=12)
        requests.append(Request(prompt_ids=prompt, may=frozenset({"text"}), params=params))
    alone = [engine.generate([request])[0] for request in requests]
    assert engine.generate(requests, batch_size=4) == alone
    assert len({result.ids for result in alone}) > 3


def test_every_picture_of_the_prompt_matters_and_is_kept() -> None:
    grammar = GRAMMARS["emu3"]
    first, second = Image(torch.full((2, 2), 3)), Image(torch.full((3, 1), 5))
    other = Image(torch.full((2, 2), 4))
    results = []
    for pictures in ((first, second), (other, second), (first, Image(second.codes + 1)), (second, first)):
        prompt = grammar.build(Document((*pictures, Text("draw both"))), eos=False) + grammar.open_media(h=3, w=4)
        (result,) = Engine(DECODER, grammar).generate(
            [Request(prompt_ids=prompt, params=SamplingParams(temperature=0))]
        )
        segments = grammar.parse([*prompt, *result.ids]).document.segments
        assert segments[:2] == pictures
        results.append(result.ids)
    assert len(set(results)) == 4
