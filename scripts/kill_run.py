"""Kill a training of two processes at random moments, again and again, and compare it with one that was left alone.

    python scripts/kill_run.py --kills 50

A tiny decoder learns on drawings made here, spread over two processes that talk over gloo. One or both are killed
(kill -9) at a random moment of their start, their steps or their saves, and the same training is started again. In the
end every step's loss, the weights, the averaged weights and the optimiser's state must be those of the undisturbed
training, to the bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import PIL.Image
import torch

from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.errors import EmulusError
from emulus.parallel.config import ParallelConfig
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.weights import save_vision_tokenizer
from emulus.train.checkpoint import latest
from emulus.train.config import TrainConfig
from emulus.train.metrics import read_metrics
from emulus.train.pretrain import PretrainConfig, pretrain

PROCESSES = 2
PATIENCE = 20  # seconds in which the process that is left shall end by itself


def draw(folder: Path) -> None:
    """24 coloured blocks with captions, as a data set."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(24):
        name, colour = [("red", (220, 30, 30)), ("green", (30, 180, 60)), ("blue", (40, 60, 230))][number % 3]
        picture = PIL.Image.new("RGB", (16, 16), "white")
        picture.paste(colour, (number % 7, number % 5, number % 7 + 6, number % 5 + 8))
        picture.save(folder / f"{number}.png")
        split = "validation" if number % 8 == 7 else "train"
        rows.append({"file": f"{number}.png", "caption": f"a {name} block", "split": split})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder: Path, steps: int) -> PretrainConfig:
    """Drawings, a vision tokenizer with random weights, their tokens, and what to train on them."""
    draw(folder / "drawings")
    torch.manual_seed(0)
    shape = VisionTokenizerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, attn_resolutions=(), codebook_size=64)
    save_vision_tokenizer(VisionTokenizer(shape), folder / "vision")
    tokenize(
        TokenizeConfig(
            sources=(folder / "drawings",),
            vision=folder / "vision",
            out=folder / "tokens",
            size=16,
            text_size=300,
            splits=("train", "validation"),
            device="cpu",
        )
    )
    loop = TrainConfig(
        steps=steps,
        learning_rate=3e-3,
        warmup_steps=2,
        ema_decay=0.9,
        save_every=3,
        log_every=steps,
        evaluate_every=4,
        precision="fp32",
        device="cpu",
        parallel=ParallelConfig(shard=PROCESSES),
    )
    return PretrainConfig(
        tokens=(str(folder / "tokens"),),
        out=folder / "left-alone",
        context=64,
        row_tokens=96,
        rows_per_step=PROCESSES,
        window=8,
        evaluation_documents=2,
        evaluation_pictures=0,
        train=loop,
    )


def start(config: PretrainConfig) -> list[ForkServerProcess]:
    """The training's processes, as torchrun would start them (but from one that has done the imports)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["emulus.train.pretrain", "emulus.train.loop", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=run_rank, args=(config, rank, port)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    return processes


def run_rank(config: PretrainConfig, rank: int, port: int) -> None:
    """One process's work; what it says goes to a file."""
    config.out.mkdir(parents=True, exist_ok=True)
    log = os.open(config.out / f"said-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    try:
        pretrain(config)
    except EmulusError as error:
        print(error, file=sys.stderr)
        sys.exit(error.status)


def timed(config: PretrainConfig) -> float:
    """Train undisturbed; how many seconds that took.

    Raises:
        SystemExit: It failed.
    """
    begun = time.monotonic()
    if any(statuses := finish(start(config))):
        sys.exit(f"ended with {statuses} though nobody killed it; see {config.out}")
    return time.monotonic() - begun


def finish(processes: Sequence[ForkServerProcess], seconds: float | None = None) -> list[int | None]:
    """Wait for them; their exit statuses, ``None`` for one that does not end in time and is killed."""
    end = None if seconds is None else time.monotonic() + seconds
    for process in processes:
        process.join(None if end is None else max(0.0, end - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return statuses


def steps_done(run: Path) -> list[tuple[int, float]]:
    """Every training step in the figures, and its loss."""
    if not (run / "metrics.jsonl").exists():
        return []
    return [(line["step"], line["loss"]) for line in read_metrics(run) if line["kind"] == "train"]


def evaluations(run: Path) -> list[dict[str, object]]:
    """All evaluations in the figures."""
    return [line for line in read_metrics(run) if line["kind"] == "evaluation"]


def differences(run: Path, alone: Path) -> list[str]:
    """What is not the same to the bit in two finished runs."""
    found = [] if steps_done(run) == steps_done(alone) else ["the losses"]
    found += [] if evaluations(run) == evaluations(alone) else ["the evaluations"]
    mine, other = latest(run / "checkpoints"), latest(alone / "checkpoints")
    if mine is None or other is None or mine.name != other.name:
        return [*found, "the last checkpoint"]
    names = {path.relative_to(root) for root in (mine, other) for path in root.rglob("*") if path.is_file()}
    # trainer.json also says how fast the steps were.
    names.discard(Path("trainer.json"))
    pairs = {name: (mine / name, other / name) for name in sorted(names)}
    return found + [
        str(name)
        for name, pair in pairs.items()
        if not all(path.exists() for path in pair) or pair[0].read_bytes() != pair[1].read_bytes()
    ]


def disturb(config: PretrainConfig, draw: random.Random, span: tuple[float, float]) -> str | None:
    """One life of a training that is killed after a random time; what was seen, or ``None`` if it ended before."""
    checkpoints, before = config.out / "checkpoints", steps_done(config.out)
    processes = start(config)
    delay, doomed = draw.uniform(*span), draw.choice([processes, processes[:1], processes[1:]])
    time.sleep(delay)
    if not any(process.is_alive() for process in processes):
        statuses = finish(processes)
        if any(statuses):
            sys.exit(f"ended with {statuses} though nobody killed it; see {config.out}")
        return None
    for process in doomed:
        process.kill()
    ended = None not in finish(processes, PATIENCE)
    unfinished = len(list(checkpoints.glob(".step-*"))) if checkpoints.is_dir() else 0
    whole, done = latest(checkpoints), steps_done(config.out)
    kept = int(whole.name.removeprefix("step-")) if whole else 0
    reached = max(done[-1][0], kept) if done else kept
    who = "both" if doomed is processes else f"process {processes.index(doomed[0])}"
    left = f", {unfinished} half-written" if unfinished else ""
    if not ended and done != before:
        sys.exit(f"{who} after {delay:.2f} s at step {reached}: the other did not end; see {config.out}")
    # While they look for each other there is no connection whose end could be seen; torchrun ends the others then.
    left += "" if ended else ", the other was waiting for it to start"
    return f"{who} after {delay:.2f} s at step {reached}; checkpoint of step {kept}{left}; {reached - kept} steps lost"


def kill_run(folder: Path, kills: int, seed: int, steps: int) -> bool:
    """Do it; whether all runs ended with the same bits as the one that was left alone."""
    config = prepare(folder, steps)
    warm = dataclasses.replace(config, out=folder / "warm", train=dataclasses.replace(config.train, steps=1))
    # The second start finds everything loaded, and nothing left to do.
    timed(warm)
    starting, taken = timed(warm), timed(config)
    print(f"undisturbed: {steps} steps in {taken:.1f} s, of which starting takes about {starting:.1f} s", flush=True)
    draw = random.Random(seed)
    # Some are killed while they start, most in their first steps and saves.
    span = (0.5 * starting, starting + 0.3 * max(taken - starting, 1.0))
    counts, runs = 0, 0
    same = True
    while counts < kills:
        runs += 1
        disturbed = dataclasses.replace(config, out=folder / f"killed-{runs}")
        while counts < kills:
            seen = disturb(disturbed, draw, span)
            if seen is None:
                break
            counts += 1
            print(f"kill {counts}: {seen}", flush=True)
        timed(disturbed)
        wrong = differences(disturbed.out, config.out)
        same &= not wrong
        print(f"run {runs} finished: {'DIFFERENT: ' + ', '.join(wrong) if wrong else 'the same bits'}", flush=True)
    print(f"{counts} kills, {runs} runs: {'all the same bits as the undisturbed run' if same else 'NOT THE SAME'}")
    return same


def main() -> None:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="how many")
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="keep everything there (by default it is deleted)")
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="kill-run-"))
    try:
        same = kill_run(folder, options.kills, options.seed, options.steps)
    finally:
        if options.out is None:
            shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
