"""Is one model for everything worse than one model for each thing?

    python scripts/single_task.py --tokens runs/emoji-64/tokens --steps 2000

Trains a decoder on the whole mixture, then one of the same size for each task alone: drawing, animating, captioning,
answering. Each of those sees as many ids of its task as the first one did, with the same rows, learning rate and
schedule, so that only the company differs. All are measured on the same held-out documents of each task: bits per
visual id where the words come first, bits per text id where they come last. One JSON object per task.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from emulus.data.loader import CAPTION_LAST, QUESTION, Documents, Mixture, Planner, Reader, ReadingConfig
from emulus.recipes import recipe
from emulus.sequence.packing import pack
from emulus.train.pretrain import PretrainConfig, PretrainObjective, pretrain

PLACES = 4096  # of the endless line of documents, by which a task's share of the ids is counted


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to learn.

    Attributes:
        kind: Records that can teach it, as :func:`emulus.data.mixture.parse_part` writes it; empty for all.
        reading: What makes every document one of this task.
        figure: By which of a pretraining evaluation's figures it is judged.
    """

    kind: str
    reading: ReadingConfig
    figure: str


def tasks_of(reading: ReadingConfig) -> dict[str, Task]:
    """The four tasks, with whatever else the mixture's own reading says."""
    draw = dataclasses.replace(reading, caption_first=1.0, question=0.0)
    describe = dataclasses.replace(reading, caption_first=0.0, question=0.0)
    return {
        "drawing": Task(kind=":image", reading=draw, figure="visual_bits"),
        "animating": Task(kind=":video", reading=draw, figure="visual_bits"),
        "captioning": Task(kind="", reading=describe, figure="text_bits"),
        "answering": Task(kind="", reading=dataclasses.replace(reading, question=1.0), figure="text_bits"),
    }


def shares(config: PretrainConfig) -> dict[str, float]:
    """Which share of the mixture's ids belongs to which task."""
    mixture = Mixture.open(config.tokens)
    planner = Planner(
        mixture, config.reading, seed=config.train.seed, row_tokens=config.row_tokens, window=config.window
    )
    documents = planner.documents(np.arange(PLACES))
    clips = np.zeros(PLACES, bool)
    for number, source in enumerate(mixture.sources):
        here = documents.source == number
        shards = np.searchsorted(source.starts, documents.record[here], side="right") - 1
        clips[here] = np.array([line.kind == "video" for line in source.lines])[shards]
    names = np.select(
        [documents.task == QUESTION, documents.task == CAPTION_LAST, clips],
        ["answering", "captioning", "animating"],
        "drawing",
    )
    total = documents.lengths.sum()
    return {name: float(documents.lengths[names == name].sum() / total) for name in np.unique(names)}


def held_out_documents(config: PretrainConfig) -> tuple[Mixture, Documents]:
    """The validation split, and as many documents of it as are asked for, made as the config's reading says."""
    held = Mixture.open(config.tokens).of_split("validation")
    count = config.evaluation_documents
    planner = Planner(held, config.reading, seed=0, row_tokens=config.row_tokens, window=count)
    return held, planner.documents(np.arange(count))


def measure(config: PretrainConfig, model: Path, task: Task) -> float:
    """Bits per id of a task's held-out documents."""
    asked = dataclasses.replace(
        config,
        tokens=tuple(f"{part}{task.kind}" for part in config.tokens),
        reading=task.reading,
        init=str(model),
        out=model / "nowhere",
        evaluation_pictures=0,
    )
    objective = PretrainObjective(asked)
    held, documents = held_out_documents(asked)
    reader = Reader(held, task.reading)
    # A run's own evaluation has documents of both orders and no questions.
    objective.held_out = [reader.row(documents, row) for row in pack(documents.lengths.tolist(), asked.row_tokens)]
    with torch.no_grad():
        return objective.evaluate(objective.model.eval()).metrics[task.figure]


def single_task(config: PretrainConfig, names: Sequence[str]) -> list[dict[str, float | str]]:
    """Train everything and measure it.

    Args:
        config: Of the model that learns all; ``out`` holds the runs of all.
        names: Which tasks.

    Returns:
        For each task its name, its share of the ids, the steps, both models' bits and their ratio (below 1: the
        model for everything is better).
    """
    everything = pretrain(dataclasses.replace(config, out=config.out / "everything"))
    part_of = shares(config)
    rows: list[dict[str, float | str]] = []
    for name in names:
        task = tasks_of(config.reading)[name]
        steps = max(round(config.train.steps * part_of[name]), 1)
        alone = dataclasses.replace(
            config,
            tokens=tuple(f"{part}{task.kind}" for part in config.tokens),
            out=config.out / name,
            reading=task.reading,
            train=dataclasses.replace(
                config.train, steps=steps, warmup_steps=min(config.train.warmup_steps, steps // 10)
            ),
        )
        single, shared = measure(config, pretrain(alone), task), measure(config, everything, task)
        rows.append(
            {
                "task": name,
                "share": part_of[name],
                "steps": steps,
                "alone": single,
                "together": shared,
                "ratio": shared / single,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="emoji-64", help="whose decoder is trained")
    parser.add_argument("--tokens", help="another tokens folder than the recipe's")
    parser.add_argument("--size", help="another size than the recipe's")
    parser.add_argument("--steps", type=int, default=2000, help="of the model that learns everything")
    parser.add_argument("--documents", type=int, default=400, help="held-out documents of each task")
    parser.add_argument("--out", type=Path, default=Path("runs/single-task"))
    parser.add_argument("--tasks", nargs="*", default=list(tasks_of(ReadingConfig())))
    options = parser.parse_args()
    decoder = recipe(options.recipe).decoder
    config = dataclasses.replace(
        decoder,
        tokens=(options.tokens,) if options.tokens else decoder.tokens,
        out=options.out,
        size=options.size or decoder.size,
        evaluation_documents=options.documents,
        evaluation_pictures=0,
        train=dataclasses.replace(decoder.train, steps=options.steps, evaluate_every=0),
    )
    single_task(config, options.tasks)


if __name__ == "__main__":
    main()
