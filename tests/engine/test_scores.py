"""Scores against plain forward passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulus.engine.scores import score, score_endings
from emulus.pipeline import Emulus


def test_scores_are_those_of_a_plain_forward_pass(tiny: Emulus) -> None:
    draw = np.random.default_rng(1)
    documents = [draw.integers(0, 300, size=length) for length in (5, 31, 12, 2)]
    masks = [draw.random(len(ids)) < 0.6 for ids in documents]
    for mask in masks:
        mask[0] = False
    found = score(tiny.decoder, documents, masks, row_ids=20)
    for ids, mask, part in zip(documents, masks, found, strict=True):
        with torch.no_grad():
            logs = tiny.decoder(torch.from_numpy(ids)[None])[0].log_softmax(-1)
        expected = [float(logs[place - 1, ids[place]]) for place in np.flatnonzero(mask)]
        assert part == pytest.approx(expected, abs=1e-4)


def test_endings_score_as_whole_documents(tiny: Emulus) -> None:
    draw = np.random.default_rng(2)
    beginning, endings = draw.integers(0, 200, size=9), [draw.integers(0, 200, size=n) for n in (3, 1, 7)]
    documents = [np.concatenate([beginning, ending]) for ending in endings]
    masks = [np.arange(len(ids)) >= 9 for ids in documents]
    whole = score(tiny.decoder, documents, masks, vocab_range=(0, 200))
    found = score_endings(tiny.decoder, beginning, endings, vocab_range=(0, 200))
    assert found == pytest.approx([part.sum() for part in whole], abs=1e-4)


def test_scoring_switches_dropout_off_and_on_again(tiny: Emulus) -> None:
    tiny.decoder.train()
    try:
        ids, mask = [np.arange(20)], [np.arange(20) > 0]
        assert (score(tiny.decoder, ids, mask)[0] == score(tiny.decoder, ids, mask)[0]).all()
        assert tiny.decoder.training
    finally:
        tiny.decoder.eval()
    score(tiny.decoder, ids, mask)
    assert not tiny.decoder.training
