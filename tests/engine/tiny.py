"""A small grammar, decoders with strong opinions, and requests of every kind, for the engine's tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from emulus.engine import Request
from emulus.model import Decoder, DecoderConfig
from emulus.sampling import SamplingParams, gumbel, top_k, top_p
from emulus.sequence.document import Document, Image, Text, Video
from emulus.sequence.grammar import Grammar
from emulus.sequence.templates import animate, caption, continue_video, draw
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import Vocabulary

WORDS = ["a red apple", "an animation of a café", "ein blauer Ball", "日本"]


def make_grammar() -> Grammar:
    text = TextTokenizer.train(WORDS * 3, size=280)
    return Grammar(Vocabulary.native(text_size=text.size, visual_size=40), text)


GRAMMAR = make_grammar()


def make_decoder(context: int = 256, seed: int = 0, strength: float = 0.2, **changes: int) -> Decoder:
    """An untrained decoder whose weights are large enough for its choices to depend on the prompt."""
    torch.manual_seed(seed)
    config = DecoderConfig(
        vocab_size=GRAMMAR.vocabulary.size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        **{"num_attention_heads": 4, "num_key_value_heads": 2, **changes},
        max_position_embeddings=context,
        initializer_range=strength,
    )
    return Decoder(config).eval()


DECODER = make_decoder()


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(GRAMMAR.vocabulary.visual_size, shape, generator=torch.Generator().manual_seed(seed))


def parameters(seed: int = 0, **changes: float) -> SamplingParams:
    return SamplingParams(**{"top_k": 20, "seed": seed, "max_new_tokens": 60, **changes})


def requests_of_every_kind(seed: int = 0, **changes: float) -> list[Request]:
    """Pictures and clips drawn and continued, captions, free documents: guided and not, of many lengths."""
    params = [parameters(seed + n, **changes) for n in range(6)]
    clip = Video(random_codes(1, 2, 3), fps=8)
    prompts = [
        draw(GRAMMAR, "a red apple", 3, 2),
        draw(GRAMMAR, "日本", 1, 4),
        animate(GRAMMAR, "an animation of a café", 2, 2, 3, 8),
        continue_video(GRAMMAR, "ein Ball", clip, 3),
        caption(GRAMMAR, Image(random_codes(2, 3))),
    ]
    requests = [
        Request(prompt_ids=prompt.ids, null_ids=prompt.null_ids, may=prompt.may, params=p)
        for prompt, p in zip(prompts, params, strict=False)
    ]
    free = frozenset({"text", "image", "video"})
    return [
        *requests,
        Request(prompt_ids=prompts[0].ids, params=params[0]),
        Request(prompt_ids=prompts[4].ids, may=prompts[4].may, params=params[4]),
        Request(prompt_ids=GRAMMAR.build(Document((Text("a"),)), eos=False), may=free, params=params[5]),
    ]


@torch.inference_mode()
def naive(request: Request, length: int) -> list[int]:
    """Generate by the released sampler's order: no cache, no batch, whole head, guidance on log-softmax, then mask.

    Stops after ``length`` ids; the limit on new ids is not played out here.
    """
    params = request.params
    state = GRAMMAR.start(request.prompt_ids, may=request.may, max_cells=params.max_new_tokens)
    new: list[int] = []
    while not state.done and len(new) < length:
        scores = next_scores(request.prompt_ids, new)
        if request.null_ids is not None:
            unguided = next_scores(request.null_ids, new)
            scores = unguided + params.guidance_scale * (scores - unguided)
        legal = torch.full_like(scores, -math.inf)
        for start, stop in state.allowed().ranges:
            legal[:, start:stop] = scores[:, start:stop]
        if params.temperature > 0:
            ids = torch.arange(legal.shape[-1])[None]
            position = torch.tensor([len(request.prompt_ids) + len(new)])
            legal = top_p(top_k(legal / params.temperature, params.top_k), params.top_p)
            legal = legal + gumbel(torch.tensor([params.seed]), position, ids)
        new.append(int(legal.argmax()))
        state.advance(new[-1])
    return new


def next_scores(prompt: Sequence[int], new: Sequence[int]) -> Tensor:
    return DECODER(torch.tensor([[*prompt, *new]]))[:, -1].log_softmax(-1)
