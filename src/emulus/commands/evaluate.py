"""Measuring a model from the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from emulus.commands.out import check_out
from emulus.commands.shipped import MODEL
from emulus.config import from_flags
from emulus.evaluate.evaluate import FIGURES_FILE, REPORT_FILE, EvaluateConfig
from emulus.evaluate.evaluate import evaluate as run_evaluate
from emulus.recipes.emoji import DATA


def evaluate(arguments: Sequence[str]) -> None:
    """``emulus evaluate [MODEL] [--config FILE] [flags] [--json]``: prints the report's path, or the figures."""
    as_json = "--json" in arguments
    words = [word for word in arguments if word != "--json"]
    model = Path(words.pop(0)) if words and not words[0].startswith("-") else MODEL
    default = EvaluateConfig(model=model, data=DATA, out=Path("runs/evaluation") / "-".join(model.parts[-2:]))
    config = from_flags(default, words, program="emulus evaluate [MODEL] [--json]")
    for name in (REPORT_FILE, FIGURES_FILE):
        check_out(config.out / name, "file")
    figures = run_evaluate(config)
    print(json.dumps(figures, indent=1) if as_json else config.out / REPORT_FILE)
