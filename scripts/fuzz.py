"""Damage small real files at random and read them: the result is a value or one clear line, never anything else.

    python -m scripts.fuzz --inputs 20000 --workers 2
    python -m scripts.fuzz --kinds image clip --inputs 500 --first 120 --keep found

Every input is a function of its kind and number, so a finding can be made again. Each worker is a process of its own
that is killed and counted as a hang when one input takes longer than ``--patience``. Prints a table; exit status 1 if
anything was found.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emulus.errors import EmulusError, one_line
from emulus.log import logger
from scripts.fuzz_kinds import KINDS, Kind
from scripts.fuzz_mutations import damaged

HOME = Path(__file__).parents[1]
WORKER = (sys.executable, "-m", "scripts.fuzz")
MOST_MEMORY = 4 * 2**30
"""Bytes by which reading one file may raise a process's highest memory: a clip's frames may take 3 GiB
(``Limits.max_clip_pixels``)."""


@dataclass
class Tally:
    """What became of the inputs of one kind.

    Attributes:
        counts: Inputs by outcome: ``read``, ``refused``, or what is wrong.
        findings: What was wrong, with what makes it again.
    """

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)

    def add(self, outcome: str, finding: dict[str, Any] | None = None) -> None:
        """Count one input."""
        self.counts[outcome] += 1
        if finding is not None:
            self.findings.append({"outcome": outcome, **finding})


def attempt(
    kind: Kind, sample: Path, number: int, folder: Path, keep: Path | None = None
) -> tuple[str, dict[str, Any] | None]:
    """Damage one file of a sample and read it.

    Args:
        kind: What is read, and how.
        sample: A whole sample, which is left as it is.
        number: Chooses the file and the damage.
        folder: An empty place for the damaged copy.
        keep: Where damaged files of findings are kept.

    Returns:
        The outcome, and what was found if something is wrong.
    """
    luck = random.Random(f"{kind.name} {number}")
    names = sorted(path.relative_to(sample).as_posix() for path in sample.rglob("*") if path.is_file())
    names = [name for name in names if kind.takes(name)]
    name = luck.choice(names)
    content = damaged(
        (sample / name).read_bytes(), name, luck, others=[(sample / other).read_bytes() for other in names[:4]]
    )
    copy = folder / str(number)
    shutil.copytree(sample, copy, copy_function=os.link)
    (copy / name).unlink()
    (copy / name).write_bytes(content)
    said: list[str] = []
    try:
        said = [str(each) for each in kind.read(copy, name) if isinstance(each, EmulusError)]
        outcome = "refused" if said else "read"
    except EmulusError as error:
        outcome, said = "refused", [str(error)]
    except (Exception, RecursionError, MemoryError) as error:
        place = next(
            (frame for frame in reversed(traceback.extract_tb(error.__traceback__)) if "emulus" in frame.filename), None
        )
        where = f"{Path(place.filename).name}:{place.lineno}" if place else ""
        about = {"error": f"{type(error).__name__} at {where}: {str(error)[:200]}"}
        return f"{type(error).__name__}", _finding(kind, sample, number, name, copy, keep, about)
    finally:
        if keep is None:
            shutil.rmtree(copy, ignore_errors=True)
    unclear = next((line for line in said if not is_clear(line)), None)
    shutil.rmtree(copy, ignore_errors=True)
    if unclear is not None:
        return "unclear message", {
            "kind": kind.name,
            "number": number,
            "sample": sample.name,
            "file": name,
            "error": unclear[:300],
        }
    return outcome, None


def is_clear(line: str) -> bool:
    """Whether a message is one line of bounded length that a terminal shows as it is."""
    return len(line.splitlines()) == 1 and line == one_line(line)


def _finding(
    kind: Kind, sample: Path, number: int, name: str, copy: Path, keep: Path | None, about: dict[str, Any]
) -> dict[str, Any]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        kept = keep / f"{kind.name}-{number}-{Path(name).name}"
        shutil.copyfile(copy / name, kept)
        shutil.rmtree(copy, ignore_errors=True)
    return {"kind": kind.name, "number": number, "sample": sample.name, "file": name, **about}


def run_inputs(
    kind: Kind, samples: Path, numbers: Sequence[int], keep: Path | None = None
) -> Iterator[tuple[int, str, dict[str, Any] | None]]:
    """Try inputs one after another, in this process.

    Args:
        kind: What is read.
        samples: Holds the folder of each sample of this kind.
        numbers: Of the inputs.
        keep: See :func:`attempt`.

    Yields:
        Number, outcome and finding of each.
    """
    chosen = sorted(path for path in samples.iterdir() if path.is_dir())
    with tempfile.TemporaryDirectory(dir=samples.parent) as place:
        for number in numbers:
            before = _peak_memory()
            outcome, finding = attempt(kind, chosen[number % len(chosen)], number, Path(place), keep)
            grown = _peak_memory() - before
            if finding is None and grown > MOST_MEMORY:
                outcome, finding = "memory", {"kind": kind.name, "number": number, "error": f"{grown:,} bytes more"}
            yield number, outcome, finding


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare(folder: Path, kinds: Sequence[str]) -> None:
    """Make the samples of some kinds, each in a folder ``KIND/NUMBER``."""
    for name in kinds:
        (folder / name).mkdir(parents=True)
        KINDS[name].make(folder / name)


# Workers: one process for each kind at a time, watched from outside.


def _work(name: str, samples: Path, first: int, last: int, keep: Path | None) -> None:
    """Try inputs and report each on stdout as a line of JSON, with a line before it is begun."""
    logger.disabled = True
    out, sys.stdout = sys.stdout, sys.stderr
    for number in range(first, last):
        print(json.dumps({"begun": number}), file=out, flush=True)
        for _, outcome, finding in run_inputs(KINDS[name], samples, [number], keep):
            print(json.dumps({"outcome": outcome, "finding": finding}), file=out, flush=True)


def watch(name: str, samples: Path, numbers: range, tally: Tally, patience: float, keep: Path | None) -> None:
    """Have a process try inputs; kill it when one takes too long, and go on with the next in another."""
    first = numbers.start
    while first < numbers.stop:
        command = [*WORKER, "--work", name, "--samples", str(samples), "--first", str(first)]
        command += ["--inputs", str(numbers.stop - first), *(["--keep", str(keep)] if keep else [])]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HOME), str(HOME / "src")]),
        }
        worker = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=HOME
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_feed, args=(worker, lines), daemon=True).start()
        begun = first - 1
        outcome: str | None = None
        while outcome is None:
            try:
                line = lines.get(timeout=patience if begun >= first else 120)
            except queue.Empty:
                outcome = "hang"
                break
            if line is None:
                outcome = "crash" if worker.wait() else "finished"
                break
            said = json.loads(line)
            if "begun" in said:
                begun = said["begun"]
            else:
                tally.add(said["outcome"], said["finding"])
        worker.kill()
        if outcome == "finished":
            return
        tally.add(outcome, {"kind": name, "number": begun, "error": f"exit status {worker.wait()}"})
        first = begun + 1


def _feed(worker: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.put(line)
    lines.put(None)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=1000, help="inputs in all, shared out over the kinds")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), help="what is read")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds that one input may take")
    parser.add_argument("--keep", type=Path, help="folder for the damaged files of findings")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _work(options.work, options.samples, options.first, options.first + options.inputs, options.keep)
        return 0
    share = -(-options.inputs // sum(KINDS[name].share for name in options.kinds))
    tallies = {name: Tally() for name in options.kinds}
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place), options.kinds)
        jobs: queue.Queue[str] = queue.Queue()
        for name in options.kinds:
            jobs.put(name)

        def work() -> None:
            while True:
                try:
                    name = jobs.get_nowait()
                except queue.Empty:
                    return
                numbers = range(options.first, options.first + share * KINDS[name].share)
                started = time.monotonic()
                watch(name, Path(place) / name, numbers, tallies[name], options.patience, options.keep)
                print(f"{name}: {dict(tallies[name].counts)} in {time.monotonic() - started:.0f} s", flush=True)

        threads = [threading.Thread(target=work) for _ in range(options.workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    findings = [finding for tally in tallies.values() for finding in tally.findings]
    for finding in findings:
        print(json.dumps(finding))
    print(f"{sum(sum(tally.counts.values()) for tally in tallies.values()):,} inputs, {len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
