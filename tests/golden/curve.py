"""The losses of the ladder's smallest model over its first steps, on a few emoji.

``tests/train/test_golden_curve.py`` runs the same and compares. After a change that is meant to change them (the order
of the data, how weights begin, the optimiser), write them anew and say so in the commit::

    python -m tests.golden.curve
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

from benchmarks.emoji import small_tokens
from emulus.train.config import TrainConfig
from emulus.train.metrics import read_metrics
from emulus.train.pretrain import PretrainConfig, pretrain

GOLDEN = Path(__file__).parent / "curve.json"
STEPS = 24
FIGURES = ("loss", "visual", "text", "grad_norm", "tokens")
HELD_OUT = ("visual_bits", "text_bits")


def curve(folder: Path) -> dict[str, list[float]]:
    """Train in ``folder`` and give the figures of every step, and those of held-out documents after the last.

    Float32 on one thread; about 1,000 ids a step.
    """
    config = PretrainConfig(
        tokens=(str(small_tokens(folder)),),
        out=folder / "run",
        size="emoji-3m",
        context=256,
        dropout=0.0,
        row_tokens=512,
        rows_per_step=2,
        evaluation_documents=12,
        evaluation_pictures=0,
        train=TrainConfig(
            steps=STEPS,
            learning_rate=2e-3,
            warmup_steps=4,
            ema_decay=0.9,
            evaluate_every=0,
            precision="fp32",
            device="cpu",
        ),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pretrain(config)
    finally:
        torch.set_num_threads(before)
    lines = read_metrics(config.out)
    train = [line for line in lines if line["kind"] == "train"]
    (held_out,) = (line for line in lines if line["kind"] == "evaluation")
    return {name: [line[name] for line in train] for name in FIGURES} | {name: [held_out[name]] for name in HELD_OUT}


def main() -> None:
    """Write the golden file."""
    with tempfile.TemporaryDirectory() as folder:
        figures = curve(Path(folder))
    found = {"torch": torch.__version__, **figures}
    GOLDEN.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}\n")


if __name__ == "__main__":
    main()
