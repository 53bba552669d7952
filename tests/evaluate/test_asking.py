"""What is asked in one go is answered as the pipeline answers it."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from emulus.engine.scores import score
from emulus.evaluate.asking import Shown
from emulus.pipeline import Emulus
from emulus.sequence import Image as Codes
from emulus.sequence import Video, templates

QUESTIONS = (None, "what is it?", "which style?")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size=(16, 16, 3), dtype=np.uint8))


def test_answers_are_the_pipelines(model: Emulus) -> None:
    told = set()
    for seed in range(3):
        shown = picture(seed)
        media = model.encode(shown)
        found = Shown(model, media, QUESTIONS).write()
        assert found == {
            None: model.describe(shown),
            **{question: model.answer(shown, question) for question in QUESTIONS if question},
        }
        told |= set(found.values())
    assert len(told) > 3


def test_clips_and_single_questions(model: Emulus) -> None:
    clip = Video(torch.from_numpy(np.random.default_rng(1).integers(0, 64, size=(2, 4, 4))), fps=8.0)
    alone = [Shown(model, clip, [question]).write()[question] for question in QUESTIONS]
    assert list(Shown(model, clip, QUESTIONS).write().values()) == alone


def test_the_likeliest_answer(model: Emulus) -> None:
    media = Codes(torch.from_numpy(np.random.default_rng(2).integers(0, 64, size=(8, 8))))
    answers = ["flat", "round", "a red disc", "blue"]
    documents = [np.array(model.grammar.build(templates.question_answer(media, "which style?", a))) for a in answers]
    prompt = templates.answer(model.grammar, media, "which style?").ids
    scored = score(model.decoder, documents, [np.arange(len(ids)) >= len(prompt) for ids in documents])
    expected = answers[int(np.argmax([part.sum() for part in scored]))]
    shown = Shown(model, media, QUESTIONS)
    assert shown.likeliest("which style?", answers) == expected
    assert shown.likeliest("which style?", answers[:1]) == "flat"
