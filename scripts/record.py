"""Put a run's figures behind those that a checkpoint's folder has, and draw the curves of all.

    python scripts/record.py runs/emoji/decoder --model checkpoints/emoji

``metrics.jsonl`` gets every tenth step and every evaluation, counted on from the last step there; ``curves.svg`` shows
decoder and vision tokenizer over all their steps. Twice for the same run is refused: its figures would count twice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emulus.commands.shipped import MODEL
from emulus.errors import EmulusError
from emulus.evaluate.charts import HEIGHT, WIDTH, Chart, draw_chart
from emulus.evaluate.curves import Lines, learning_curves
from emulus.files import write_text
from emulus.train.metrics import METRICS_FILE, read_metrics

EVERY = 10
KEPT = ("step", "kind", "loss", "text", "visual", "grad_norm", "learning_rate", "tokens", "text_bits", "visual_bits")
CURVES_FILE = "curves.svg"
_TITLE = 24
"""Height of a chart's title."""
_COLOURS = ("blue", "orange")
"""Names of what the style gives."""
_STYLE = (
    ".tick{font:12px sans-serif;fill:#57606a}.end{text-anchor:end}.middle{text-anchor:middle}.grid{stroke:#d0d7de}"
    ".line{fill:none;stroke-width:1.8}.c0{stroke:#0969da}.c1{stroke:#bc4c00}.dot{stroke:none}.dot.c0{fill:#0969da}"
    ".dot.c1{fill:#bc4c00}.title{font:bold 13px sans-serif;fill:#24292f}"
)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of the training that went on from the checkpoint")
    parser.add_argument("--model", type=Path, default=MODEL, help="the checkpoint's folder; %(default)s by default")
    options = parser.parse_args()
    try:
        record(options.run, options.model)
    except EmulusError as error:
        raise SystemExit(f"record: {error}") from None
    print(options.model / METRICS_FILE, options.model / CURVES_FILE)


def record(run: Path, model: Path) -> None:
    """Extend the checkpoint's figures by the run's, and draw them.

    Raises:
        EmulusError: The run has no figures, or they are there already.
    """
    known, new = read_metrics(model), brief(read_metrics(run))
    if not new:
        raise EmulusError(f"{run} has no figures; name a training run's folder")
    if _figures(new[0]) in map(_figures, known):
        raise EmulusError(f"{model / METRICS_FILE} has this run's figures already; put back what it was before")
    first = known[-1]["step"] if known else 0
    lines = [*known, *({**line, "step": line["step"] + first} for line in new)]
    picture = drawn([*_charts(lines), *_charts(read_metrics(model / "vision"))])
    write_text(model / METRICS_FILE, "".join(f"{json.dumps(line)}\n" for line in lines))
    write_text(model / CURVES_FILE, picture)


def brief(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every tenth step, with the tokens of all ten, and every evaluation; numbers in six digits."""
    found: list[dict[str, Any]] = []
    tokens, last = 0.0, 0
    for line in lines:
        if line["kind"] == "evaluation":
            found.append(dict(line))
        elif line["kind"] == "train" and line["step"] > last:
            tokens, last = tokens + line.get("tokens", 0.0), line["step"]
            if last % EVERY == 0:
                found.append({**line, "tokens": tokens})
                tokens = 0.0
    return [{name: _short(line[name]) for name in KEPT if name in line} for line in found]


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _figures(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "step"}


def _charts(lines: Lines) -> list[Chart]:
    curves = learning_curves(lines)
    return [] if curves is None else list(curves.charts)


def _title(chart: Chart) -> str:
    """What is shown, and by which colour where there are several."""
    series = dict.fromkeys((line.colour, line.name.partition(",")[0]) for line in chart.lines)
    names = ", ".join(f"{_COLOURS[colour]} {name}" for colour, name in series)
    return f"{chart.title}, {chart.y}: {names if len(series) > 1 else 'line training, points held out'}"


def drawn(charts: Sequence[Chart]) -> str:
    """Charts as one picture, two in a row."""
    parts = []
    for place, chart in enumerate(charts):
        x, y = place % 2 * WIDTH, place // 2 * (HEIGHT + _TITLE)
        parts.append(f'<text class="title" x="{x + 46}" y="{y + 16}">{_title(chart)}</text>')
        inner = draw_chart(chart).replace("<svg ", f'<svg x="{x}" y="{y + 20}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        parts.append(inner)
    height = (len(charts) + 1) // 2 * (HEIGHT + _TITLE)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {height}">'
        f'<rect width="100%" height="100%" fill="#fff"/><style>{_STYLE}</style>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    main()
