"""A model small enough to learn while you watch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from emulus.data.tokenize_config import TokenizeConfig
from emulus.presets import GenerationDefaults
from emulus.recipes.emoji import DATA
from emulus.recipes.recipe import Recipe
from emulus.tokenizer.vision import VisionTokenizerConfig
from emulus.train.config import TrainConfig
from emulus.train.pretrain import PretrainConfig
from emulus.train.tokenizer import TokenizerTrainConfig


def demo_tiny(data: Path = DATA, runs: Path = Path("runs/demo-tiny")) -> Recipe:
    """The whole path at 32 pixels in about three minutes on two CPU cores.

    Expected: held-out reconstructions around 15.5 dB, about 6 bits per visual id and falling; colours and blobs.

    Commands: ``emulus demo`` runs it; or ``emulus tokenizer-train demo-tiny``, ``tokenize``, ``pretrain``.
    """
    vision = VisionTokenizerConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), codebook_size=512)
    loop = TrainConfig(
        steps=450,
        learning_rate=2e-3,
        warmup_steps=30,
        weight_decay=0.01,
        ema_decay=0.99,
        evaluate_every=90,
        save_every=150,
    )
    return Recipe(
        tokenizer=TokenizerTrainConfig(
            data=data,
            out=runs / "tokenizer",
            size=32,
            shift=2,
            model=vision,
            train=loop,
            evaluation_items=64,
            clip_frames=8,
        ),
        tokens=TokenizeConfig(
            sources=(data,),
            vision=runs / "tokenizer",
            out=runs / "tokens",
            size=32,
            views=1,
            text_size=1024,
            max_frames=8,
        ),
        decoder=PretrainConfig(
            tokens=(str(runs / "tokens"),),
            out=runs / "decoder",
            size="tiny",
            context=512,
            # About 32 documents.
            row_tokens=1600,
            rows_per_step=2,
            train=dataclasses.replace(loop, steps=240, weight_decay=0.1, evaluate_every=60, save_every=120),
            defaults=GenerationDefaults(height=32, width=32, num_frames=8, fps=8.0, top_k=256),
        ),
    )
