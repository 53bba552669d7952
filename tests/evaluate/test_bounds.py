"""Bits of whole pictures and captions, by hand and in files."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from emulus.data.source import open_source
from emulus.data.tokens import TokenizedItem
from emulus.evaluate.bounds import bounds
from emulus.evaluate.held_out import Example, encode_examples
from emulus.evaluate.likelihood import likelihood
from emulus.pipeline import Emulus
from emulus.sequence import Image


@pytest.fixture(scope="module")
def examples(model: Emulus, data: Path) -> list[Example]:
    return encode_examples(model, [item for item in open_source(data) if item.split == "validation"])


def test_bits_of_pictures_and_captions(model: Emulus, examples: list[Example]) -> None:
    held_out = [example.tokenized for example in examples]
    known = [
        TokenizedItem(id=str(n), captions=(f"word {n}",), media=Image(torch.full((8, 8), n % 64))) for n in range(9)
    ]
    found = likelihood(model.decoder, model.grammar, held_out, known)
    result = bounds(model.vision, examples, known, found, files=3)
    pictures, captions, files = result.pictures, result.captions, result.files
    assert pictures is not None
    assert captions is not None
    assert files is not None
    codes = [item.media.codes.flatten() for item in held_out if isinstance(item.media, Image)]
    # Codes of 64 kinds take 6 bits each.
    assert (pictures.count, pictures.ids, pictures.plain) == (8, 64, 64 * 6)
    both = b"".join(each.numpy().astype("<u2").tobytes() for each in codes)
    assert pictures.gzip == 8 * len(zlib.compress(both, 9)) / 8
    part = next(
        each for each in found.parts if (each.modality, each.kind, each.order) == ("visual", "picture", "caption last")
    )
    assert pictures.model == pytest.approx(part.bits.model * 64)
    # A caption of a picture is taken in turn: its first, its second ...
    words = [item.captions[n % len(item.captions)] for n, item in enumerate(held_out) if isinstance(item.media, Image)]
    assert captions.plain == pytest.approx(8 * np.mean([len(text) + 1 for text in words]))
    assert captions.count == 8
    assert files.count == 3
    assert 0 < files.as_good <= files.lossless


def test_what_is_known_already_takes_few_bits(model: Emulus, examples: list[Example]) -> None:
    held_out = [example.tokenized for example in examples]
    found = likelihood(model.decoder, model.grammar, held_out, held_out)
    known = bounds(model.vision, examples, held_out, found, files=1).pictures
    strange = [TokenizedItem(id="s", captions=("s",), media=Image(torch.zeros(8, 8, dtype=torch.long)))]
    unknown = bounds(model.vision, examples, strange, found, files=1).pictures
    assert known is not None
    assert unknown is not None
    assert known.xz_told < unknown.xz_told


def test_better_pictures_take_larger_files(model: Emulus, examples: list[Example]) -> None:
    """A file as good as the tokenizer's picture; the untrained tokenizer's is bad, so little is needed."""
    found = likelihood(model.decoder, model.grammar, [each.tokenized for each in examples], [examples[0].tokenized])
    files = bounds(model.vision, examples, [], found).files
    assert files is not None
    assert files.count == 8
    assert files.psnr < 20
    assert files.as_good < files.lossless


def test_no_pictures(model: Emulus, examples: list[Example]) -> None:
    clips = [example for example in examples if not isinstance(example.media, Image)]
    found = likelihood(model.decoder, model.grammar, [each.tokenized for each in clips], [clips[0].tokenized])
    result = bounds(model.vision, clips, [], found)
    assert result.pictures is result.captions is result.files is None
