"""Emu3 itself, from scratch, on data of your own.

Published (arXiv:2409.18869, section 2.4): the shape; contexts of 5,120 and 131,072 ids; text and pictures first, clips
added then; pictures of about 512 x 512 pixels with their aspect kept, never split when documents are packed; every id
learned, visual ones with weight 0.5; 5e-5 falling to 0 along a cosine in both stages; tensor, context and data
parallelism of degrees that are not said. There is no dropout (the released configuration has 0.1).

Not published, so choices of this project: the data and how it is mixed, ids per step, steps, warm-up, how many
documents begin with their caption, and how the work is shared out. Weight decay, betas and the largest gradient norm
are those of the released fine-tuning script. Nothing here was ever trained to the end.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from emulus.data.loader import ReadingConfig
from emulus.data.tokenize_config import TokenizeConfig
from emulus.parallel.config import ParallelConfig
from emulus.presets import GenerationDefaults
from emulus.recipes.recipe import Recipe
from emulus.train.config import TrainConfig
from emulus.train.pretrain import PretrainConfig

VOCABULARY = "BAAI/Emu3-Stage1"
"""Whose text tokenizer and ids are used; its vision tokenizer is BAAI/Emu3-VisionTokenizer."""

_AREA = 512 * 512
_CONTEXT, _LONG_CONTEXT = 5120, 131_072
_DEFAULTS = GenerationDefaults(height=512, width=512, max_text_tokens=1024, min_pixels=_AREA, max_pixels=_AREA)
_TRAIN = TrainConfig(
    steps=250_000,
    learning_rate=5e-5,
    warmup_steps=2000,
    schedule="cosine",
    final_learning_rate=0.0,
    weight_decay=0.1,
    clip_norm=5.0,
    ema_decay=0.0,
    evaluate_every=5000,
    save_every=500,
    keep_every=10_000,
    # Copies of the model on every eighth of the GPUs, each spread over the eight of one machine.
    parallel=ParallelConfig(shard=8, recompute=True, compile=True),
)


def emu3_8b_stage1(data: Path = Path("data"), runs: Path = Path("runs/emu3-8b")) -> Recipe:
    """Text and pictures at a context of 5,120: 8.5 B parameters, 3.9 M ids a step, 0.98 T ids in all.

    Hardware: 64 GPUs of 80 GB or a power of two more, eight to a machine. By the operations alone three weeks on 64
    H100s at 40 % of their peak; not measured. ``emulus pretrain emu3-8b-stage1 --dry-run 64`` has memory and times.

    The data are yours: ``data/text`` and ``data/pictures``, in any form that ``emulus tokenize`` reads. 40 % of the
    documents are texts, 60 % pictures.

    Commands: ``emulus tokenize emu3-8b-stage1``, then on each machine ``torchrun --nproc-per-node 8 --nnodes 8 ... -m
    emulus pretrain emu3-8b-stage1``. There is no tokenizer to train: the released one is fetched from the hub.
    """
    tokens = runs / "tokens"
    return Recipe(
        tokenizer=None,
        tokens=TokenizeConfig(
            sources=(data / "text", data / "pictures"),
            vocabulary=VOCABULARY,
            out=tokens,
            area=_AREA,
            # A text that is longer becomes several documents, each with BOS and EOS.
            max_text_ids=_CONTEXT - 2,
            max_ids=_CONTEXT,
            views=1,
            workers=8,
        ),
        decoder=PretrainConfig(
            tokens=(f"{tokens}:text=0.4", f"{tokens}:image=0.6"),
            out=runs / "stage1",
            size="emu3-8b",
            context=_CONTEXT,
            # The kernels that take packed documents in one call have no dropout.
            dropout=0.0,
            # Several documents to a row: one of 5,120 would leave a sixth of it empty beside each picture.
            row_tokens=3 * _CONTEXT,
            rows_per_step=256,
            reading=ReadingConfig(visual_weight=0.5),
            evaluation_documents=512,
            # Drawing takes the whole model on one GPU.
            evaluation_pictures=0,
            train=_TRAIN,
            defaults=_DEFAULTS,
        ),
    )


def emu3_8b_stage2(data: Path = Path("data"), runs: Path = Path("runs/emu3-8b")) -> Recipe:
    """Clips added, at a context of 131,072, from stage 1's weights: 4.2 M ids a step, 84 G ids in all.

    Five seconds of 512 x 512 pixels at 24 frames a second are 124,830 ids. Eight GPUs share a row of 131,072.

    Hardware: 64 GPUs of 80 GB or a power of two more, eight to a machine; not measured. ``emulus pretrain
    emu3-8b-stage2 --dry-run 64`` has memory and times.

    The data are yours: ``data/clips`` beside the tokens of stage 1. 38 % of the documents are texts, 60 % pictures,
    2 % clips: one is as long as 29 pictures, so that about half of the ids are theirs.

    Commands: ``emulus tokenize emu3-8b-stage2``, then on each machine ``torchrun --nproc-per-node 8 --nnodes 8 ... -m
    emulus pretrain emu3-8b-stage2``.
    """
    first = emu3_8b_stage1(data, runs)
    clips = runs / "tokens-clips"
    train = dataclasses.replace(
        _TRAIN, steps=20_000, warmup_steps=500, parallel=dataclasses.replace(_TRAIN.parallel, context=8)
    )
    return Recipe(
        tokenizer=None,
        tokens=dataclasses.replace(
            first.tokens, sources=(data / "clips",), out=clips, fps=24.0, max_frames=120, max_ids=_LONG_CONTEXT
        ),
        decoder=dataclasses.replace(
            first.decoder,
            tokens=(f"{runs / 'tokens'}:text=0.38", f"{runs / 'tokens'}:image=0.6", f"{clips}:video=0.02"),
            out=runs / "stage2",
            init=str(first.decoder.out),
            context=_LONG_CONTEXT,
            row_tokens=_LONG_CONTEXT,
            rows_per_step=32,
            train=train,
            defaults=dataclasses.replace(_DEFAULTS, num_frames=48, fps=24.0),
        ),
    )
