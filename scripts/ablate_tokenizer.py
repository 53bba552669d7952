"""What is each part of the vision tokenizer's training worth?

    python scripts/ablate_tokenizer.py --data data/emoji --steps 600
    python scripts/ablate_tokenizer.py --data data/emoji --steps 600 --init checkpoints/emoji

Trains a recipe's tokenizer several times with the same seed and steps, each time with one part of the training added,
taken away or set otherwise, and measures all on the same held-out pictures and clips. From scratch the shape may vary
too; from a trained tokenizer (--init) the small differences between losses show, as everything coarse is learnt.

One JSON object per case as soon as it is done, then a Markdown table. A case that is done is not trained again, so more
cases can be asked for later, with the same --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from emulus.config import merge
from emulus.data.media_dataset import MediaDataset, to_pixels, whole_codes
from emulus.data.source import Kind, open_source
from emulus.errors import EmulusError, did_you_mean
from emulus.log import set_up_logging
from emulus.recipes import recipe
from emulus.tokenizer.vision.metrics import codebook_usage, psnr, ssim
from emulus.tokenizer.vision.perceptual import PerceptualDistance, available
from emulus.tokenizer.vision.weights import load_vision_tokenizer
from emulus.train.tokenizer import TokenizerTrainConfig, train_tokenizer

Changes = Mapping[str, Any]

PERCEPTUAL: Changes = {"reconstruction": {"perceptual": 0.05}}
ADVERSARIAL: Changes = {**PERCEPTUAL, "adversarial": {"weight": 0.02, "start_share": 0.1, "lecam": 0.0}}
EVERYTHING: Changes = {**PERCEPTUAL, "adversarial": {"weight": 0.02, "start_share": 0.1, "lecam": 0.01}}

LOSSES: dict[str, Changes] = {
    "l2": {},
    "l1": {"reconstruction": {"l2": 0.0, "l1": 0.3}},
    "+motion": {"reconstruction": {"motion": 2.0}},
    "+perceptual": PERCEPTUAL,
    "+perceptual-vgg": {"reconstruction": {"perceptual": 0.05, "backbone": "vgg"}},
    "+adversarial": ADVERSARIAL,
    "+lecam": EVERYTHING,
    "all-perceptual": {"adversarial": EVERYTHING["adversarial"]},
    "commitment-0.05": {"codebook": {"commitment": 0.05}},
    "commitment-0.25": {"codebook": {"commitment": 0.25}},
    "no-revival": {"revive_share": 0.0},
}
"""What each case changes; ``+adversarial`` and ``+lecam`` are beside ``+perceptual``."""

FROZEN: dict[str, Changes] = {
    f"frozen{name}": {**changes, "freeze_encoder": True}
    for name, changes in {"+perceptual": PERCEPTUAL, "+lecam": EVERYTHING}.items()
}
"""What can be won with the codes as they are; from a trained tokenizer only."""

SHAPES: dict[str, Changes] = {f"codebook-{size}": {"model": {"codebook_size": size}} for size in (1024, 4096, 32768)}
SHAPES |= {f"embed-{width}": {"model": {"embed_dim": width, "z_channels": width}} for width in (4, 8, 16)}
"""From scratch only."""

PLAIN: Changes = {
    "reconstruction": {"l2": 1.0, "l1": 0.0, "motion": 0.0, "perceptual": 0.0},
    "adversarial": {"weight": 0.0},
}
"""What every case begins with, whatever the recipe says."""


def base_config(options: argparse.Namespace) -> TokenizerTrainConfig:
    """What all cases share."""
    chosen = recipe(options.recipe).tokenizer
    if chosen is None:
        raise EmulusError(f"{options.recipe} trains no vision tokenizer; name another --recipe")
    rate = options.learning_rate or chosen.train.learning_rate
    loop = dataclasses.replace(
        chosen.train,
        steps=options.steps,
        seed=options.seed,
        learning_rate=rate,
        warmup_steps=min(chosen.train.warmup_steps, options.steps // 10),
        evaluate_every=0,
        save_every=options.steps,
        keep=1,
    )
    shape = load_vision_tokenizer(Path(options.init)).config if options.init else chosen.model
    config = dataclasses.replace(
        # The run's own evaluation is not looked at.
        chosen,
        data=options.data,
        train=loop,
        init=options.init,
        model=shape,
        evaluation_items=1,
    )
    return merge(config, PLAIN, "PLAIN")


def held_out(config: TokenizerTrainConfig, kind: Kind, count: int) -> list[torch.Tensor]:
    """Validation items as pixels, spread over the split: ``(1, 3, H, W)`` pictures or ``(1, T, 3, H, W)`` clips."""
    items = open_source(config.data).select(split="validation", kind=kind)
    if not items or not count:
        return []
    items = items[:: max(len(items) // count, 1)][:count]
    longest = config.clip_frames if kind == "video" else None
    data = MediaDataset(items, size=config.size, fps=config.fps or None, max_frames=longest)
    frames = (whole_codes(data[index], config.model.temporal_factor) for index in range(len(data)))
    return [to_pixels(each if kind == "image" else each[None]) for each in frames]


@torch.inference_mode()
def measure(folder: Path, samples: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, float]:
    """Mean quality of the reconstructions by kind, and the use of the codebook over all."""
    model = load_vision_tokenizer(folder)
    measures = {"psnr": psnr, "ssim": ssim}
    if available():
        measures |= {f"stlpips_{name}": PerceptualDistance.load(name) for name in ("alex", "vgg")}
    figures: dict[str, float] = {}
    codes: list[torch.Tensor] = []
    for kind, batch in samples.items():
        scores = []
        for pixels in batch:
            chosen = model.encode(pixels)
            codes.append(chosen.flatten())
            pair = [each.clamp(-1, 1).flatten(0, -4) for each in (model.decode(chosen), pixels)]
            scores.append(torch.stack([measured(*pair).mean() for measured in measures.values()]))
        if scores:
            means = torch.stack(scores).mean(0).tolist()
            figures |= {f"{kind}_{name}": round(value, 4) for name, value in zip(measures, means, strict=True)}
    usage = codebook_usage(torch.cat(codes), model.config.codebook_size)
    return figures | {name: round(usage[name], 4) for name in ("usage", "perplexity")}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a row per case."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def chosen_cases(options: argparse.Namespace) -> dict[str, Changes]:
    """The cases asked for, or all that the start allows."""
    allowed = LOSSES | (FROZEN if options.init else SHAPES)
    for name in options.cases:
        if name not in LOSSES | FROZEN | SHAPES:
            raise EmulusError(f"there is no case {name!r}{did_you_mean(name, LOSSES | FROZEN | SHAPES)}")
        if name not in allowed:
            raise EmulusError(f"case {name!r} goes {'without' if options.init else 'only with'} --init")
    return {name: allowed[name] for name in options.cases or allowed}


def main() -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="a data set with validation items")
    parser.add_argument("--recipe", default="emoji-64", help="whose tokenizer is varied")
    parser.add_argument("--init", default="", help="a vision tokenizer to start all cases from")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate-tokenizer"), help="a run for each case")
    parser.add_argument("--cases", nargs="*", default=[], help=f"of {', '.join(LOSSES | FROZEN | SHAPES)}")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning-rate", type=float, default=0.0, help="peak; by default the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=256, help="held-out ones that are measured")
    parser.add_argument("--clips", type=int, default=24)
    options = parser.parse_args()
    set_up_logging()
    try:
        config, cases = base_config(options), chosen_cases(options)
        samples = {
            "picture": held_out(config, "image", options.pictures),
            "clip": held_out(config, "video", options.clips),
        }
        rows = []
        for name, changes in cases.items():
            begun = time.process_time()
            changed = merge(dataclasses.replace(config, out=options.out / name), changes, name)
            folder = train_tokenizer(changed)
            seconds = round(time.process_time() - begun, 1)
            rows.append({"case": name, **measure(folder, samples), "steps": options.steps, "cpu_seconds": seconds})
            print(json.dumps(rows[-1]), flush=True)
        print("\n" + table(rows))
    except EmulusError as error:
        parser.exit(error.status, f"{error}\n")


if __name__ == "__main__":
    main()
