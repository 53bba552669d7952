"""What fewer bits cost the committed model on held-out items: ``python -m benchmarks.quantization --json``.

The ratio of a case is bits per id in float32 divided by those of its kind, so just below 1; its conditions say them by
modality, and how far logits are from those in float32. The spread is over quarters of the documents. A case takes about
a minute of one core; ``--documents 100`` looks quickly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import emulus
from benchmarks.harness import Case, Options, conditions, main
from emulus.data.source import even, open_source
from emulus.data.tokens import TokenizedItem
from emulus.evaluate.held_out import encode_examples
from emulus.model import Decoder, sized
from emulus.model.calibrate import calibrate_decoder
from emulus.model.quantize import check_kind, dequantize_decoder, quantize_decoder
from emulus.sequence import Grammar, caption_first, caption_last, modalities
from emulus.tokenizer.vocabulary import Vocabulary

Ids = list[int]
Kind = Literal["bf16", "int8", "int4", "fp8"]

HOME = Path(__file__).parents[1]
SETTINGS = {
    "documents": (404, "held-out items"),
    "calibration": (128, "training items to calibrate on"),
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured.

    Attributes:
        decoder: In float32.
        vocabulary: Of its ids.
        held_out: Documents that it was not trained on, half of them with the caption first.
        training: Documents of what it was trained on.
    """

    decoder: Decoder
    vocabulary: Vocabulary
    held_out: list[Ids]
    training: list[Ids]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a decoder makes of documents.

    Attributes:
        bits: Of each scored id, by modality; one tensor a document.
        error: Root mean square of what logits are off by, as a part of that of the logits themselves. Both without
            their mean over the ids, which changes no probability.
    """

    bits: dict[str, list[Tensor]]
    error: float

    def per_id(self, names: Sequence[str] = ("visual", "text"), quarter: int | None = None) -> float:
        """Mean bits of the ids of some modalities, of all documents or of every fourth."""
        chosen = slice(None) if quarter is None else slice(quarter, None, 4)
        return float(torch.cat([bits for name in names for bits in self.bits[name][chosen]]).mean())


@cache
def subject(documents: int, calibration: int, toy: bool) -> Subject:
    """The committed model with items of the committed data, or a toy of random weights and ids."""
    if toy:
        return _toy()
    model = emulus.load(HOME / "checkpoints/emoji", device="cpu", dtype="float32")
    source = open_source(HOME / "data/emoji")
    grammar = model.grammar
    held_out = encode_examples(model, even(list(source.select(split="validation")), documents))
    training = encode_examples(model, even(list(source.select(split="train")), calibration))
    return Subject(
        # It is stored in int8.
        decoder=dequantize_decoder(model.decoder),
        vocabulary=grammar.vocabulary,
        held_out=_documents(grammar, [example.tokenized for example in held_out]),
        training=_documents(grammar, [example.tokenized for example in training]),
    )


def _documents(grammar: Grammar, items: Sequence[TokenizedItem]) -> list[Ids]:
    """Each item once: with its captions in turn, first and last in turn."""
    documents = []
    for number, item in enumerate(items):
        caption = item.captions[number // 2 % len(item.captions)] if item.captions else ""
        document = caption_last(item.media, caption) if number % 2 else caption_first(caption, item.media)
        documents.append(grammar.build(document))
    return documents


def _toy() -> Subject:
    vocabulary = Vocabulary.native(text_size=40, visual_size=60)
    torch.manual_seed(0)
    shape = sized("tiny", vocab_size=vocabulary.size, hidden_size=64, num_hidden_layers=2, initializer_range=0.1)
    documents = [torch.randint(vocabulary.size, (30,)).tolist() for _ in range(16)]
    decoder = Decoder(shape).eval()
    return Subject(decoder=decoder, vocabulary=vocabulary, held_out=documents[:8], training=documents[8:])


@torch.inference_mode()
def scores(decoder: Decoder, about: Subject) -> Scores:
    """Score the held-out documents with a decoder, and compare its logits with the subject's."""
    bits: dict[str, list[Tensor]] = {"visual": [], "text": []}
    off = size = 0.0
    for document in about.held_out:
        ids = torch.tensor(document)
        logits, exact = (_centred(each(ids[None])[0, :-1].double()) for each in (decoder, about.decoder))
        off, size = off + float((logits - exact).square().sum()), size + float(exact.square().sum())
        of_each = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0] / -math.log(2)
        for name, mask in modalities(np.array(document), about.vocabulary).items():
            bits[name].append(of_each[torch.from_numpy(mask[1:])])
    return Scores(bits=bits, error=math.sqrt(off / size))


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


@cache
def baseline(documents: int, calibration: int, toy: bool) -> Scores:
    """The subject's own scores."""
    about = subject(documents, calibration, toy)
    return scores(about.decoder, about)


def measure(kind: Kind, calibrated: bool, options: Options) -> Case:
    """Compare a kind with float32.

    Args:
        kind: How many bits.
        calibrated: Whether the weights are rounded by what inputs are like.
        options: How it is run.
    """
    sizes = (options.settings["documents"], options.settings["calibration"], options.toy)
    about, exact = subject(*sizes), baseline(*sizes)
    ours = scores(_decoder(about, kind, calibrated), about)
    quarters = [exact.per_id(quarter=quarter) / ours.per_id(quarter=quarter) for quarter in range(4)]
    return Case(
        case=f"{kind}-calibrated" if calibrated else kind,
        ratio=exact.per_id() / ours.per_id(),
        spread=(min(quarters), max(quarters)),
        conditions={
            "logits_relative_error": ours.error,
            **{f"{name}_bits": round(ours.per_id([name]), 4) for name in ours.bits},
            **{f"{name}_bits_more": round(ours.per_id([name]) - exact.per_id([name]), 4) for name in ours.bits},
            "documents": len(about.held_out),
            "ids": sum(map(len, about.held_out)),
            "calibration_ids": sum(map(len, about.training)) if calibrated else 0,
            **conditions(options),
        },
    )


def _decoder(about: Subject, kind: Kind, calibrated: bool) -> Decoder:
    if kind == "bf16":
        return _bfloat16(about.decoder)
    if calibrated:
        return calibrate_decoder(about.decoder, about.training, check_kind(kind))
    return quantize_decoder(about.decoder, check_kind(kind))


def _bfloat16(decoder: Decoder) -> Decoder:
    copy = Decoder(decoder.config).to(torch.bfloat16).eval()
    copy.load_state_dict(decoder.state_dict())
    return copy


CASES: dict[str, Callable[[Options], Case]] = {
    "bf16": partial(measure, "bf16", False),
    **{kind: partial(measure, kind, False) for kind in ("int8", "int4", "fp8")},
    **{f"{kind}-calibrated": partial(measure, kind, True) for kind in ("int8", "int4", "fp8")},
}

if __name__ == "__main__":
    raise SystemExit(main(CASES, settings=SETTINGS))
