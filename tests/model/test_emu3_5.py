"""Emu3.5 as a second preset: its decoder's size and maths, and its sequences, through the same parts as Emu3's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from emulus.engine import Engine, Request
from emulus.model import Decoder, DecoderConfig, load_decoder, save_decoder, sized
from emulus.sampling import SamplingParams
from emulus.sequence import Document, Grammar, Image, SequenceLayout, Special, Text
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import EMU3_5_MARKS, Vocabulary

CODES = 40
TEXT = TextTokenizer.train(["a red apple", "You are a helpful assistant. USER: ASSISTANT:"] * 3, size=290)


def small_vocabulary() -> Vocabulary:
    """Emu3.5's ids with few text and visual ids."""
    values = Vocabulary.emu3_5().to_dict()
    shift = values["text_size"] - TEXT.size
    tables = {
        table: {name: id - shift for name, id in values[table].items()} for table in ("specials", "special_names")
    }
    sizes = {"text_size": TEXT.size, "visual_start": values["visual_start"] - shift, "visual_size": CODES}
    return Vocabulary.from_dict(values | tables | sizes)


V = small_vocabulary()
GRAMMAR = Grammar(V, TEXT, SequenceLayout.emu3_5())


def small_decoder(context: int = 256) -> Decoder:
    """Emu3.5 but for its size: heads wider than the hidden state over their number, every norm's scale its own."""
    torch.manual_seed(0)
    preset = sized("emu3.5-34b")
    model = Decoder(
        DecoderConfig(
            vocab_size=V.size,
            hidden_size=40,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=context,
            initializer_range=0.2,
            rms_norm_eps=preset.rms_norm_eps,
            rope_theta=preset.rope_theta,
            attention_dropout=preset.attention_dropout,
            qk_norm=preset.qk_norm,
            pad_token_id=V.pad,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.3, 2)  # norm and rotation commute where all scales are one
    return model.eval()


DECODER = small_decoder()


def picture(h: int, w: int, seed: int = 0, codes: int = CODES) -> Image:
    return Image(torch.randint(codes, (h, w), generator=torch.Generator().manual_seed(seed)))


def mark(name: str) -> Special:
    return Special(EMU3_5_MARKS[name])


STORY = Document(
    (
        Text("You are a helpful assistant for story task. USER: Tell a story."),
        picture(2, 3),
        Text(" ASSISTANT: "),
        mark("bss"),
        *(mark("bog"), Text("two scenes"), mark("eog")),
        *(Text("At first"), mark("boc"), Text("a red apple"), mark("eoc"), picture(3, 2, 1)),
        *(Text("and then"), picture(1, 4, 2), picture(4, 1, 3)),
        mark("ess"),
    )
)


def as_released_text(document: Document, vocabulary: Vocabulary) -> str:
    """The string that the released scripts write for a document."""

    def block(image: Image) -> str:
        h, w = image.codes.shape
        rows = ("".join(f"<|visual token {code:06d}|>" for code in row) for row in image.codes.tolist())
        return f"<|image start|>{h}*{w}<|image token|>{'<|extra_200|>'.join(rows)}<|image end|>"

    texts = {Text: lambda s: s.text, Special: lambda s: s.name, Image: block}
    return "<|extra_203|>" + "".join(texts[type(s)](s) for s in document.segments) + "<|extra_204|>"


# the released size


def test_its_size_counted_by_hand() -> None:
    hidden, inner, layers, heads, kv_heads, width = 5120, 25_600, 64, 64, 8, 128
    attention = hidden * width * (heads + kv_heads + kv_heads + heads) + width + width
    block = attention + 3 * hidden * inner + hidden + hidden
    total = 282_926 * hidden + layers * block + hidden + hidden * 282_926
    assert (total, round(total / 1e9, 1)) == (34_103_460_864, 34.1)
    with torch.device("meta"):
        model = Decoder(sized("emu3.5-34b"))
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    attention_63 = "model.layers.63.self_attn."
    assert shapes[attention_63 + "q_proj.weight"] == (8192, 5120)
    assert shapes[attention_63 + "k_proj.weight"] == (1024, 5120)
    assert shapes[attention_63 + "o_proj.weight"] == (5120, 8192)
    assert shapes[attention_63 + "q_norm.weight"] == shapes[attention_63 + "k_norm.weight"] == (128,)
    assert model.config.vocab_size == Vocabulary.emu3_5().size
    assert model.config.pad_token_id == Vocabulary.emu3_5().pad
    assert model.config.max_position_embeddings == 32_768


# the decoder


def test_logits_of_qwen3_from_which_it_was_grown() -> None:
    transformers = pytest.importorskip("transformers")
    c = DECODER.config
    config = transformers.Qwen3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )
    reference = transformers.Qwen3ForCausalLM(config).eval()
    reference.load_state_dict(DECODER.state_dict(), strict=True)
    ids = torch.randint(V.size, (2, 60))
    with torch.no_grad():
        ours = DECODER(ids)
        assert (ours - reference(ids).logits).abs().max() < 1e-4
        assert ours.std() > 0.5


def test_saved_and_loaded(tmp_path: Path) -> None:
    save_decoder(DECODER, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.self_attn.q_norm.weight"].shape == (8,)
    assert stored["model.layers.2.self_attn.k_norm.weight"].shape == (8,)
    again = load_decoder(tmp_path, vocab_size=V.size)
    assert again.config == DECODER.config
    assert again.state_dict().keys() == DECODER.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in DECODER.state_dict().items())
    ids = torch.randint(V.size, (1, 20))
    with torch.no_grad():
        assert torch.equal(again(ids), DECODER(ids))


# its sequences


def test_text_pictures_and_marks_round_trip_as_the_released_string() -> None:
    ids = GRAMMAR.build(STORY)
    assert GRAMMAR.parse(ids).document == STORY
    assert GRAMMAR.parse(ids).complete
    assert ids == TEXT.encode(as_released_text(STORY, V), allow_special=V.special_names)
    assert V.eof not in ids
    assert ids.count(V.eol) == 1 + 2 + 0 + 3


def test_with_the_released_text_vocabulary(official: Path) -> None:
    text = TextTokenizer.from_file(official / "emu3.tiktoken")
    grammar = Grammar(Vocabulary.emu3_5(), text, SequenceLayout.emu3_5())
    document = Document((*STORY.segments, picture(16, 21, 4, codes=131_072)))
    ids = grammar.build(document)
    assert ids == text.encode(
        as_released_text(document, grammar.vocabulary), allow_special=Vocabulary.emu3_5().special_names
    )
    assert grammar.parse(ids).document == document
    assert max(ids) > Vocabulary.emu3().size
    opening = [151_852, *(15 + int(digit) for digit in "16"), 9, *(15 + int(digit) for digit in "21"), 151_851]
    rest = 16 * (21 + 1) + 1  # up to EOI, and EOS
    assert ids[-rest - len(opening) : -rest] == opening


@torch.inference_mode()
def greedy(prompt: list[int], steps: list[Any]) -> list[int]:
    """Generate without a cache: at each step the best of the ids that may come."""
    ids = list(prompt)
    for legal in steps:
        scores: Tensor = DECODER(torch.tensor([ids]))[0, -1]
        ids.append(max(legal, key=lambda id: scores[id].item()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("h", "w"), [(3, 4), (1, 1), (5, 2), (2, 1)])
def test_greedy_drawing_gives_a_picture_of_the_asked_size(h: int, w: int) -> None:
    prompt = GRAMMAR.build(Document(STORY.segments[:5]), eos=False) + GRAMMAR.open_media(h=h, w=w)
    request = Request(prompt_ids=prompt, params=SamplingParams(temperature=0))
    (result,) = Engine(DECODER, GRAMMAR).generate([request])
    parsed = GRAMMAR.parse([*prompt, *result.ids])
    drawn = parsed.document.segments[-1]
    assert parsed.complete
    assert isinstance(drawn, Image)
    assert tuple(drawn.codes.shape) == (h, w)
    # The released rule: position p since IMG ends the picture at h * (w + 1), a row at multiples of w + 1.
    visual = list(range(*V.visual_range))
    last = h * (w + 1)
    steps = [[V.eoi] if p == last else [V.eol] if p % (w + 1) == 0 else visual for p in range(1, last + 1)]
    assert list(result.ids) == [*greedy(prompt, steps), V.eos]


def test_an_answer_of_words_marks_and_pictures_is_generated_whole() -> None:
    prompt = GRAMMAR.build(Document((Text("a red apple"), mark("bss"))), eos=False)
    may = frozenset({"text", "image", "special"})
    params = [SamplingParams(seed=seed, max_new_tokens=40, top_k=0) for seed in range(8)]
    results = Engine(DECODER, GRAMMAR).generate([Request(prompt_ids=prompt, may=may, params=p) for p in params])
    written = [GRAMMAR.parse([*prompt, *result.ids]).document.segments[2:] for result in results]
    kinds = {type(segment) for segments in written for segment in segments}
    assert {Text, Special} <= kinds <= {Text, Special, Image}
