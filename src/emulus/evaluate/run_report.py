"""a training run's folder -> one page that says how it went, also while it goes on."""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emulus.codec import MAX_YAML_BYTES, as_mapping
from emulus.config import read_yaml
from emulus.errors import EmulusError, one_line, shown
from emulus.evaluate.curves import learning_curves, step_curves
from emulus.evaluate.report import Block, Gallery, Listing, Report, Section, Shot, Table, Text, Tile
from emulus.files import read_bytes
from emulus.media import read_image
from emulus.train.checkpoint import complete_checkpoints
from emulus.train.metrics import METRICS_FILE, read_metrics

CONFIG_FILE = "config.yaml"
UNITS = ("tokens", "frames")
# Neighbouring steps that a "last" figure is the mean of.
LAST = 50
MOST_SHEETS = 6
MOST_ROWS = 100
_SHEET = re.compile(r"(?P<name>.+)-(?P<step>\d{8})\.png")

Lines = Sequence[Mapping[str, Any]]


def run_report(run: Path) -> Report:
    """Describe a training run: what it is, how it learns, what went wrong, what it draws.

    Args:
        run: The folder given to a training verb as ``--out``; the run may be under way, stopped or not yet begun.

    Raises:
        EmulusError: It is no run's folder, or its config is damaged.
    """
    config = _config(run)
    damage = Counter[str]()
    lines = read_metrics(run, damage)
    return Report(
        title=f"Training of {one_line(run.resolve().name)}",
        text=f"{one_line(str(run))}, as it was on {time.strftime('%Y-%m-%d at %H:%M')}. Lines are training batches, "
        "averaged over neighbouring steps; points are held-out data.",
        sections=tuple(
            section
            for section in (
                _summary(run, config, lines, damage),
                *_curves(lines),
                _evaluations(lines),
                _sheets(run),
                _events(lines),
            )
            if section.blocks
        ),
    )


def _config(run: Path) -> Mapping[str, Any]:
    """What ``config.yaml`` says; nothing if there is none."""
    path = run / CONFIG_FILE
    if not path.exists() and not (run / METRICS_FILE).exists():
        inside = sorted(file.parent for depth in ("*", "*/*") for file in run.glob(f"{depth}/{METRICS_FILE}"))[:9]
        hint = f": name one of {', '.join(map(str, inside))}" if inside else "; name the --out of a training command"
        raise EmulusError(f"{run} is no training run (it has neither {CONFIG_FILE} nor {METRICS_FILE}){hint}")
    try:
        return as_mapping(read_yaml(path), "it") if path.exists() else {}
    except EmulusError as error:
        raise EmulusError(f"{path} is damaged ({error}); restore it, or move it away to report without it") from None


def _summary(run: Path, config: Mapping[str, Any], lines: Lines, damage: Mapping[str, int]) -> Section:
    train = [line for line in lines if line["kind"] == "train"]
    rows = [("What", _what(config)), ("State", _state(run, config, train))]
    if train:
        rows += _totals(train)
    checkpoints = complete_checkpoints(run / "checkpoints")
    rows.append(("Newest checkpoint", checkpoints[-1].name if checkpoints else "none yet"))
    if any(damage.values()):
        found = f"{damage['lines']:,} lines and {damage['values']:,} single values"
        rows.append(("Damaged", f"{found} of {METRICS_FILE} were left out"))
    blocks: list[Block] = [Table(rows=tuple(rows))]
    path = run / CONFIG_FILE
    if path.exists():
        text = read_bytes(path, most=MAX_YAML_BYTES).decode("utf-8-sig", errors="replace")
        blocks.append(Listing(title=CONFIG_FILE, text=text.rstrip()))
    return Section(title="The run", blocks=tuple(blocks))


def _what(config: Mapping[str, Any]) -> str:
    if "size" in config and "row_tokens" in config:
        size, context = (shown(config.get(name, "?"), quote=False) for name in ("size", "context"))
        return f"a decoder of size {size}, context {context}"
    if "codebook" in config:
        return f"a vision tokenizer, at {shown(config.get('size', '?'), quote=False)} pixels"
    return "a training run"


def _state(run: Path, config: Mapping[str, Any], train: Lines) -> str:
    if not train:
        return "no step has ended yet"
    step, loop = train[-1]["step"], config.get("train")
    steps = loop.get("steps") if isinstance(loop, dict) else None
    written = time.strftime("%Y-%m-%d at %H:%M", time.localtime((run / METRICS_FILE).stat().st_mtime))
    if type(steps) is not int:
        return f"step {step:,} on {written}"
    return f"finished: {step:,} steps" if step >= steps else f"step {step:,} of {steps:,} on {written}"


def _totals(train: Lines) -> list[tuple[str, str]]:
    """Sums and the last figures."""
    last = train[-LAST:]
    rows = []
    for unit in UNITS:
        if total := sum(line.get(unit, 0) for line in train):
            rows.append((f"{unit.capitalize()} seen", f"{total:,.0f}"))
    if seconds := sum(line.get("seconds", 0.0) for line in train):
        rows.append(("Time in steps", _duration(seconds)))
    named = {"loss": "Loss", "visual": "Loss of visual ids", "text": "Loss of text ids", "grad_norm": "Gradient norm"}
    for name, title in named.items():
        if values := [line[name] for line in last if name in line]:
            unit = " nats per id" if name in ("visual", "text") else ""
            rows.append((title, f"{statistics.fmean(values):.4g}{unit} (mean of the last {len(values)} steps)"))
    for unit in UNITS:
        if values := [line[f"{unit}_per_second"] for line in last if f"{unit}_per_second" in line]:
            rows.append(
                ("Speed", f"{statistics.median(values):,.0f} {unit}/s (median of the last {len(values)} steps)")
            )
    for name, title in {"mfu": "Utilisation (MFU)", "wait": "Waiting for data"}.items():
        if values := [line[name] for line in train if name in line]:
            rows.append((title, f"{statistics.fmean(values):.1%} of {'the peak' if name == 'mfu' else 'the time'}"))
    if memory := [line["memory"] for line in train if "memory" in line]:
        rows.append(("Memory", f"{max(memory):.1f} GiB at most"))
    return rows


def _curves(lines: Lines) -> list[Section]:
    sections = []
    by_step = learning_curves(lines)
    if by_step is not None:
        by_unit = [curves for unit in UNITS if (curves := learning_curves(lines, unit)) is not None]
        sections.append(Section(title="What it learns", blocks=(by_step, *by_unit)))
    if (steps := step_curves(lines)) is not None:
        sections.append(Section(title="How the steps go", blocks=(steps,)))
    return sections


def _evaluations(lines: Lines) -> Section:
    found = [line for line in lines if line["kind"] == "evaluation"]
    names = sorted({name for line in found for name in line} - {"step", "kind"})
    rows = tuple(
        (f"{line['step']:,}", *(f"{line[name]:.4g}" if name in line else "" for name in names)) for line in found
    )
    blocks: list[Block] = [Table(head=("Step", *names), rows=rows[-MOST_ROWS:])] if rows else []
    return Section(title="Held-out figures", text=_newest(len(rows)), blocks=tuple(blocks))


def _sheets(run: Path) -> Section:
    """Sheets of ``evaluations/``: of each kind some, evenly spread over the run, the newest first."""
    kinds: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted((run / "evaluations").glob("*.png")):
        if match := _SHEET.fullmatch(path.name):
            kinds.setdefault(match["name"], []).append((int(match["step"]), path))
    tiles = []
    for name, sheets in kinds.items():
        for step, path in _spread(sheets):
            try:
                shots = (Shot(media=read_image(path), wide=True),)
                tiles.append(Tile(shots=shots, text=f"{name}, step {step:,}"))
            except EmulusError as error:
                tiles.append(Tile(shots=(), text=f"{name}, step {step:,}", note=str(error)))
    return Section(
        title="Samples",
        text="Made at evaluations, of held-out items that were chosen before the run.",
        blocks=(Gallery(tiles=tuple(tiles)),) if tiles else (),
    )


def _spread(sheets: Sequence[tuple[int, Path]]) -> list[tuple[int, Path]]:
    count = min(len(sheets), MOST_SHEETS)
    places = {round(place * (len(sheets) - 1) / max(count - 1, 1)) for place in range(count)} | {len(sheets) - 1}
    return [sheets[place] for place in sorted(places, reverse=True)]


def _events(lines: Lines) -> Section:
    rows = []
    skipped = 0
    for line in lines:
        if line["kind"] == "note":
            rows.append((f"{line['step']:,}", str(line.get("text", ""))))
        elif line["kind"] == "restart":
            again = line.get("again", 0)
            rows.append((f"{line['step']:,}", f"restarted{f'; {again:,} steps were done again' if again else ''}"))
        elif line["kind"] == "train":
            skipped = max(skipped, int(line.get("skipped", 0)))
    restarts = sum(line["kind"] == "restart" for line in lines)
    text = f"Restarts: {restarts:,}; skipped steps: {skipped:,}; notes: {len(rows) - restarts:,}. {_newest(len(rows))}"
    blocks: tuple[Block, ...] = (Table(head=("Step", "What"), rows=tuple(rows[-MOST_ROWS:])),)
    if not rows:
        blocks = (Text(text="Nothing unusual."),) if any(line["kind"] == "train" for line in lines) else ()
    return Section(title="What happened", text=text if rows else "", blocks=blocks)


def _newest(rows: int) -> str:
    return f"The newest {MOST_ROWS} of {rows:,}." if rows > MOST_ROWS else ""


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600:,} h {whole // 60 % 60:02d} min" if whole >= 3600 else f"{whole // 60} min {whole % 60} s"
