"""Turn the results of a GPU run into tables: ``python -m scripts.gpu_report out/results.jsonl >> LOG.md``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def report(results: Sequence[Mapping[str, Any]]) -> str:
    """Two Markdown tables: what became of each part, and the figures of each case.

    Args:
        results: Objects of ``results.jsonl``, see :mod:`scripts.gpu_run`.
    """
    rows = [(r["part"], r["status"], f"{r['seconds']:.1f}", r["said"] if not r["cases"] else "") for r in results]
    cases = [row for result in results for found in result["cases"] if (row := _case(found)) is not None]
    machine = [found for result in results for found in result["cases"] if "copy_gb_s" in found and "case" not in found]
    lines = [", ".join(f"{key} {value}" for key, value in found.items()) + "\n" for found in machine]
    lines += [_table(("part", "status", "s", "last line"), rows)]
    if cases:
        lines.append(_table(("case", "time", "floor", "fraction or ratio", "more"), cases))
    return "\n".join(lines)


def _case(found: Mapping[str, Any]) -> tuple[str, ...] | None:
    if "case" not in found:
        return None
    about = found["conditions"]
    low, high = found["spread"]
    ratio = f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"
    if "us" in about:
        return found["case"], f"{about['us']:.1f} µs", f"{about['floor_us']:.1f} µs", ratio, f"{about['gb_s']} GB/s"
    if "ms_per_step" in about:
        floor = about["ms_per_step"] * about["bandwidth_fraction"]
        more = f"{about['ours_s']:.1f} s a picture; baseline {about['baseline_s']:.1f} s; target {about['target_s']}"
        fraction = f"{about['bandwidth_fraction']:.2f} of the copy; {ratio} times faster"
        return found["case"], f"{about['ms_per_step']:.3f} ms", f"{floor:.3f} ms", fraction, more
    time = f"{about['ms']:.3f} ms" if "ms" in about else f"{about['ours_s']:.4g} s"
    keys = ("ours_tokens_per_second", "ours_mfu", "eager_ms", "gaps_us", "kernels_us")
    more = ", ".join(f"{key} {about[key]}" for key in keys if key in about)
    return found["case"], time, "", ratio, more


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def main() -> int:
    """Print the tables of a results file."""
    if len(sys.argv) != 2:
        print("usage: python -m scripts.gpu_report RESULTS.jsonl", file=sys.stderr)
        return 2
    print(report([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
