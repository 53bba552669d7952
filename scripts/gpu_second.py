"""The shipped model's recipe on a GPU within ten minutes: what ``scripts/second_gpu_run.sh`` runs.

Tokens are made of the repository's data with the shipped vision tokenizer, a short run measures how long a step takes,
and the decoder is trained from nothing for as many steps as fit, so that the learning rate falls to its end. All that
must last lies in one folder, ``runs/gpu`` by default: the same command goes on from the last checkpoint, with the
number of steps that was chosen at first. Pages, figures and an int8 model go to the output folder, as a few files.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emulus.errors import EmulusError
from emulus.train.metrics import read_metrics
from scripts.kill_run import draw

REPOSITORY = Path(__file__).parents[1]
SHIPPED = REPOSITORY / "checkpoints/emoji"
STEPS_FILE = "steps.json"
MIXTURE = {64: {"image": 3, "video": 0.35}, 32: {"image": 2, "video": 0.3}, 16: {"image": 4, "video": 0.2}}
"""Shares of documents by size and kind: the recipe's."""
SKIPPED = 20
"""Steps in which things are compiled and chosen, not counted as usual ones."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained where.

    Attributes:
        run: Folder of everything that a rerun goes on from.
        out: Folder of what is looked at afterwards.
        data: Data set that tokens are made of, and that the model is measured on.
        made: Folder of tokens that were made before; none are made then.
        seconds: What training may take in all.
        toy: Whether everything is tiny and on a CPU.
    """

    run: Path
    out: Path
    data: Path = REPOSITORY / "data/emoji"
    made: Path | None = None
    seconds: float = 330.0
    toy: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the squares that the data are brought to, in pixels."""
        return (16,) if self.toy else tuple(MIXTURE)

    @property
    def device(self) -> str:
        """Where everything is computed."""
        return "cpu" if self.toy else "cuda"

    def tokens(self, size: int) -> Path:
        """Folder of the tokens of one size."""
        return (self.made or self.run) / f"tokens-{size}"

    def encode(self, size: int) -> list[str]:
        """Arguments of ``emulus`` that make the tokens of one size."""
        splits = [] if size == self.sizes[0] else ["--splits", "train"]
        where = ["--out", str(self.tokens(size)), "--device", self.device, "--workers", "1" if self.toy else "4"]
        data = self.run / "drawings" if self.toy else self.data
        how = ["--vocabulary", str(SHIPPED), "--size", str(size), "--max-frames", "16", "--views", "4"]
        return ["tokenize", str(data), *how, *splits, *where]

    def train(self, folder: Path, steps: int) -> list[str]:
        """Arguments of ``emulus`` that train so many steps, or go on to them."""
        parts = [
            f"{self.tokens(size)}:{kind}={share}"
            for size in self.sizes
            for kind, share in MIXTURE[size].items()
            if kind == "image" or not self.toy
        ]
        small = ["--size", "tiny", "--context", "512", "--evaluation-documents", "2"]
        # Eight times the recipe's ids a step, in long rows: a GPU would wait for launches with short ones.
        rows = ["--row-tokens", "512" if self.toy else "24576", "--rows-per-step", "2"]
        every = ["--train.save-every", "500", "--train.evaluate-every", "0", "--train.device", self.device]
        compiled = [] if self.toy else ["--train.parallel.compile"]
        options = [*(small if self.toy else []), *rows, *every, *compiled]
        return ["pretrain", "emoji", "--tokens", *parts, "--out", str(folder), "--train.steps", str(steps), *options]

    def evaluate(self) -> list[str]:
        """Arguments of ``emulus`` that measure the model on held-out items."""
        data = self.run / "drawings" if self.toy else self.data
        what = ["--quick", "--parts", "bits"] if self.toy else ["--quick"]
        where = ["--out", str(self.run / "evaluation"), "--device", self.device]
        return ["evaluate", str(self.run / "decoder"), "--data", str(data), *what, *where]


def measure(plan: Plan) -> int:
    """Choose how many steps fit, from a short run, once; a rerun gives the same number.

    Raises:
        EmulusError: The short run has no figures.
    """
    file = plan.run / STEPS_FILE
    if file.exists():
        return int(json.loads(file.read_text())["steps"])
    count = 2 if plan.toy else 3 * SKIPPED
    _emulus(plan.train(plan.run / "measured", count))
    seconds = [line["seconds"] for line in read_metrics(plan.run / "measured") if line["kind"] == "train"]
    usual = seconds[0 if plan.toy else SKIPPED :]
    if not usual:
        raise EmulusError(f"{plan.run / 'measured'} has no figures; remove it and run this again")
    middle = statistics.median(usual)
    steps = 3 if plan.toy else max(1, int(plan.seconds / middle))
    file.write_text(json.dumps({"steps": steps, "seconds_per_step": middle}))
    return steps


def keep(plan: Plan) -> None:
    """Bring what is to be looked at into the output folder, as a few files."""
    plan.out.mkdir(parents=True, exist_ok=True)
    decoder = plan.run / "decoder"
    _emulus(["report", str(decoder), "--out", str(plan.out / "training.html")])
    (plan.out / "metrics.jsonl").write_bytes((decoder / "metrics.jsonl").read_bytes())
    for name, kept in (("figures.json", "figures.json"), ("report.html", "evaluation.html")):
        if (made := plan.run / "evaluation" / name).exists():
            (plan.out / kept).write_bytes(made.read_bytes())
    small = plan.run / "int8"
    if not small.exists():
        _emulus(["quantize", str(decoder), str(small), "--to", "int8", "--vision-dtype", "bfloat16"])
    with tarfile.open(plan.out / "model.tar", "w") as archive:
        # Without the vision tokenizer, which is the shipped one.
        archive.add(small, arcname="model", filter=lambda member: None if "vision" in member.name else member)


def do(what: str, plan: Plan) -> None:
    """Do one part of the run.

    Args:
        what: ``tokens``, ``measure``, ``train``, ``evaluate`` or ``keep``.
        plan: The run's plan.
    """
    plan.run.mkdir(parents=True, exist_ok=True)
    if what == "tokens":
        if plan.toy and not (plan.run / "drawings").exists():
            draw(plan.run / "drawings")
        for size in plan.sizes if plan.made is None else ():
            _emulus(plan.encode(size))
    elif what == "measure":
        print(f"{measure(plan):,} steps: {(plan.run / STEPS_FILE).read_text()}")
    elif what == "train":
        _emulus(plan.train(plan.run / "decoder", measure(plan)))
    elif what == "evaluate":
        _emulus(plan.evaluate())
    else:
        keep(plan)


PARTS = ("tokens", "measure", "train", "evaluate", "keep")


def _emulus(words: Sequence[str]) -> None:
    from emulus.cli import main

    print("emulus", *words, flush=True)
    if main(list(words)):
        raise EmulusError(f"emulus {words[0]} failed; what it says is above")


def main() -> int:
    """Do the part that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--run", type=Path, required=True, help="folder that a rerun goes on from")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, default=Plan.data, help="data set; %(default)s by default")
    parser.add_argument("--tokens", type=Path, help="folder of tokens-64, tokens-32 and tokens-16 made before")
    parser.add_argument("--seconds", type=float, default=330.0, help="what training may take in all")
    parser.add_argument("--toy", action="store_true", help="everything in tiny, on a CPU")
    given = parser.parse_args()
    try:
        plan = Plan(
            run=given.run, out=given.out, data=given.data, made=given.tokens, seconds=given.seconds, toy=given.toy
        )
        do(given.part, plan)
    except EmulusError as error:
        print(f"{given.part}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
