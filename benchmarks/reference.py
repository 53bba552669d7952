"""What is timed: models of random weights, and transformers' Emu3 with the same weights drawing as its README says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.models.emu3.modeling_emu3 import Emu3RotaryEmbedding

from benchmarks.harness import require
from emulus.engine import Request
from emulus.engine.runner import Runner
from emulus.engine.step import Feed
from emulus.model import Decoder, DecoderConfig
from emulus.sampling import SamplingParams
from emulus.sequence import Grammar
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import Vocabulary

WORDS, NEGATIVE_WORDS = 16, 48
"""About as many text ids as the README's prompt and its negative prompt have."""

TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.1, "fp8": 0.15, "int4": 0.7}
"""How far logits may be from transformers' float32: at most, in fp32; in the others root mean square, as a part of
the logits' standard deviation. Random Gaussian weights are the worst that 4 bits can be given."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model that is timed.

    Attributes:
        decoder: Random weights.
        grammar: What may follow; its text tokenizer knows single bytes, the rest is filled up to the size.
    """

    decoder: Decoder
    grammar: Grammar

    @property
    def visual(self) -> tuple[int, int]:
        """The ids of cells."""
        return self.grammar.vocabulary.visual_range

    def request(
        self,
        h: int,
        w: int,
        *,
        drawn: int = 0,
        words: tuple[int, int] = (WORDS, NEGATIVE_WORDS),
        seed: int = 0,
        greedy: bool = False,
    ) -> Request:
        """Ask for a picture, guided by 3, of the likeliest 2,048.

        Args:
            h: Rows of cells.
            w: Cells in a row.
            drawn: How many cells are there already.
            words: Text ids before the picture, and before that of the negative prompt.
            seed: Of words, cells and noise.
            greedy: Whether the likeliest id is taken.
        """
        vocabulary = self.grammar.vocabulary
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(vocabulary.visual_size, (drawn,), generator=generator)
        opening = self.grammar.open_media(h=h, w=w, codes=codes)
        texts = [torch.randint(vocabulary.text_size, (count,), generator=generator).tolist() for count in words]
        prompt, null = ([vocabulary.bos, *text, *opening] for text in texts)
        params = SamplingParams(seed=seed, temperature=0.0 if greedy else 1.0)
        return Request(prompt_ids=prompt, null_ids=null, params=params)

    def cells(self, h: int, w: int, *, seed: int = 0) -> list[int]:
        """The ids of a whole picture of random codes, as they follow IMG."""
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(self.grammar.vocabulary.visual_size, (h * w,), generator=generator)
        opening = self.grammar.open_media(h=h, w=w)
        return self.grammar.open_media(h=h, w=w, codes=codes)[len(opening) :]


def make_subject(
    config: Callable[[Vocabulary], DecoderConfig], vocabulary: Vocabulary, *, device: str = "cpu", bf16: bool = False
) -> Subject:
    """Draw a model, in place and on its device: no second copy of the weights is needed.

    Args:
        config: Its shape, given the vocabulary.
        vocabulary: Its ids.
        device: Where it shall lie.
        bf16: Whether weights are bfloat16 from the beginning.
    """
    with torch.device("meta"):
        decoder = Decoder(config(vocabulary))
    decoder = decoder.to(torch.bfloat16 if bf16 else torch.float32).to_empty(device=device)
    # On the device: a CPU takes a minute to draw 8 B numbers, and the bus some seconds more to bring them.
    decoder.reset_parameters(torch.Generator(device).manual_seed(0))
    return Subject(decoder=decoder.eval(), grammar=Grammar(vocabulary, _text(vocabulary.text_size)))


def small_vocabulary(size: int, visual_size: int) -> Vocabulary:
    """Emulus's own order of ids, of so many in all."""
    specials = Vocabulary.native(text_size=256, visual_size=1).size - 257
    return Vocabulary.native(text_size=size - specials - visual_size, visual_size=visual_size)


def _text(size: int) -> TextTokenizer:
    """Single bytes, then pieces that no text has: only the number of ids matters here."""
    rare = [b"\0" + number.to_bytes(3, "big") for number in range(size - 256)]
    return TextTokenizer.from_pieces([*(bytes([byte]) for byte in range(256)), *rare])


def variant(decoder: Decoder, kind: str) -> Decoder:
    """The same decoder with its weights kept as ``fp32``, ``bf16``, ``int8``, ``int4`` or ``fp8``."""
    if kind in ("fp32", "bf16"):
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        same = next(decoder.parameters()).dtype == dtype
        return decoder if same else copy.deepcopy(decoder).to(dtype)
    from emulus.model.quantize import check_kind, quantize_decoder

    return quantize_decoder(decoder, check_kind(kind))


def in_transformers(decoder: Decoder, vocabulary: Vocabulary) -> Any:
    """transformers' Emu3 of the same shape, whose weights are the very same tensors."""
    shape = decoder.config
    config = transformers.Emu3TextConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        max_position_embeddings=shape.max_position_embeddings,
        rms_norm_eps=shape.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        attention_dropout=shape.attention_dropout,
        pad_token_id=vocabulary.pad,
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
    )
    with torch.device("meta"):
        model = transformers.Emu3ForCausalLM(config)
    model.load_state_dict(decoder.state_dict(), assign=True)
    # Not in the file, and so the only thing still without memory.
    rotary: Any = Emu3RotaryEmbedding
    model.model.rotary_emb = rotary(config=config).to(decoder.lm_head.weight.device)
    return model.eval()


class Follow:
    """The released prefix constraint: which ids may come, as a Python list, asked for every id.

    Source: baaivision/Emu3, emu3/mllm/utils_emu3.py.
    """

    def __init__(self, vocabulary: Vocabulary, h: int, w: int) -> None:
        """Say for which picture.

        Args:
            vocabulary: Which id means what.
            h: Rows of cells.
            w: Cells in a row.
        """
        self._vocabulary = vocabulary
        self._height, self._width = torch.tensor(h), torch.tensor(w)
        self._visual = list(range(*vocabulary.visual_range))
        self._start: dict[int, Tensor] = {}

    def __call__(self, batch_id: int, input_ids: Tensor) -> list[int]:
        """The ids that may come next."""
        v = self._vocabulary
        if batch_id not in self._start:
            self._start[batch_id] = torch.nonzero(input_ids == v.img, as_tuple=True)[0][0]
        offset = input_ids.shape[0] - self._start[batch_id]
        height, width = self._height.to(offset.device), self._width.to(offset.device)
        if offset % (width + 1) == 0:
            return [v.eol]
        for after, id in enumerate((v.eof, v.eoi, v.eos), start=1):
            if offset == (width + 1) * height + after:
                return [id]
        return [v.pad] if offset > (width + 1) * height + 3 else self._visual


def draw(
    model: Any,
    request: Request,
    vocabulary: Vocabulary,
    h: int,
    w: int,
    *,
    tokens: int | None = None,
    streamer: Any = None,
) -> list[int]:
    """Draw as the released README does: two passes per id, unbatched guidance, prefix constraint, dynamic cache.

    Args:
        model: Of :func:`in_transformers`.
        request: What is asked; drawn greedily at temperature 0.
        vocabulary: Which id means what.
        h: Rows of cells.
        w: Cells in a row.
        tokens: Stop after so many; the whole picture where not given.
        streamer: Told each id, as ``generate`` does.

    Returns:
        The new ids.
    """
    params, device = request.params, model.device
    prompt, negative = (torch.tensor([ids], device=device) for ids in (request.prompt_ids, request.null_ids))
    sampling: dict[str, Any] = {"do_sample": False}
    if params.temperature:
        sampling = {"do_sample": True, "top_k": params.top_k}
    config = transformers.GenerationConfig(
        use_cache=True,
        eos_token_id=vocabulary.eos,
        pad_token_id=vocabulary.pad,
        max_new_tokens=tokens or h * (w + 1) + 3,
        **sampling,
    )
    guidance: Any = UnbatchedClassifierFreeGuidanceLogitsProcessor
    processors = LogitsProcessorList(
        [
            guidance(params.guidance_scale, model, unconditional_ids=negative),
            PrefixConstrainedLogitsProcessor(Follow(vocabulary, h, w), num_beams=1),
        ]
    )
    whole = model.generate(
        prompt, config, logits_processor=processors, attention_mask=torch.ones_like(prompt), streamer=streamer
    )
    return whole[0, prompt.shape[1] :].tolist()


@torch.inference_mode()
def their_logits(
    model: Any, request: Request, cells: Sequence[int], visual: tuple[int, int]
) -> Float[Tensor, "rows cells ids"]:
    """Logits of transformers where cells are drawn, given the cells before: of the prompt and of the null prompt."""
    places = [index for index, id in enumerate(cells) if visual[0] <= id < visual[1]]
    rows = []
    for prompt in _prompts(request):
        ids = torch.tensor([[*prompt, *cells]], device=model.device)
        hidden = model.model(ids).last_hidden_state[0, [len(prompt) + place - 1 for place in places]]
        rows.append(model.lm_head(hidden)[:, slice(*visual)].float())
    return torch.stack(rows)


@torch.inference_mode()
def our_logits(
    decoder: Decoder, request: Request, cells: Sequence[int], visual: tuple[int, int]
) -> Float[Tensor, "rows cells ids"]:
    """The same by the engine's runner, step by step: both rows at once, a row's end together with its last cell."""
    runner = Runner(decoder)
    prompts = _prompts(request)
    lanes = [runner.new_lane(len(prompt) + len(cells)) for prompt in prompts]
    found = []
    steps: list[Sequence[Sequence[int]]] = [prompts, *([step] * len(prompts) for step in _steps(cells, visual))]
    for feeds in steps:
        hidden = runner.forward([Feed(lane=lane, ids=ids) for lane, ids in zip(lanes, feeds, strict=True)])
        for lane, ids in zip(lanes, feeds, strict=True):
            lane.length += len(ids)
        found.append(runner.logits(hidden, [visual]))
    return torch.stack(found, dim=1)


def check_logits(
    decoder: Decoder,
    kind: str,
    model: Any,
    request: Request,
    cells: Sequence[int],
    visual: tuple[int, int],
    *,
    slack: float = 1.0,
) -> dict[str, float]:
    """See that the engine computes what transformers computes.

    Args:
        decoder: Ours, of the ``kind``.
        kind: ``fp32``, ``bf16``, ``int8``, ``int4`` or ``fp8``.
        model: transformers'.
        request: With the two prompts.
        cells: What follows them.
        visual: The ids to compare.
        slack: How many times :data:`TOLERANCE` is allowed, where theirs is rounded too.

    Returns:
        As :func:`compare`.

    Raises:
        Unequal: They are further apart.
    """
    theirs, ours = (
        logits(which, request, cells, visual) for logits, which in ((their_logits, model), (our_logits, decoder))
    )
    return compare(theirs, ours, kind, slack=slack)


def compare(theirs: Tensor, ours: Tensor, kind: str, *, slack: float = 1.0) -> dict[str, float]:
    """See that logits are nearly the same.

    Returns:
        Largest difference, standard deviation of the logits, and relative error (root mean square).

    Raises:
        Unequal: They are further apart than the kind's :data:`TOLERANCE`, times ``slack``.
    """
    largest, std = float((ours - theirs).abs().max()), float(theirs.std())
    relative = float((ours - theirs).square().mean().sqrt()) / std
    found = largest if kind == "fp32" else relative
    require(
        found <= slack * TOLERANCE[kind],
        f"{kind} logits are not transformers': {largest:.3g} apart at most, {relative:.3g} of their deviation",
    )
    return {"logits_max_diff": largest, "logits_std": std, "logits_relative_error": relative}


def _prompts(request: Request) -> list[Sequence[int]]:
    return [request.prompt_ids, *([] if request.null_ids is None else [request.null_ids])]


def _steps(cells: Sequence[int], visual: tuple[int, int]) -> Iterator[list[int]]:
    """A cell, with whatever is forced after it; not the last, after which no cell is drawn."""
    step: list[int] = []
    for id in cells:
        if step and visual[0] <= id < visual[1]:
            yield step
            step = []
        step.append(id)
