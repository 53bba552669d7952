"""``emulus report`` writes a page about any run, and says of other folders that they are none."""

from __future__ import annotations

import json
import random
from pathlib import Path

import PIL.Image
import pytest

from emulus.commands.report import report
from emulus.errors import EmulusError
from emulus.evaluate.run_report import MOST_ROWS, run_report
from emulus.media import write_image
from emulus.train.metrics import MetricsLog

DECODER = "size: tiny\ncontext: 64\nrow_tokens: 128\nout: <here>\ntrain:\n  steps: 40\n"


def train(run: Path, start: int, stop: int, *, bare: bool = False) -> None:
    log = MetricsLog(run, resumed_at=start)
    for step in range(start + 1, stop + 1):
        figures = {"loss": 5 / step, "visual": 4 / step, "text": 3 / step, "grad_norm": 1.0, "learning_rate": 1e-3}
        if not bare:
            figures |= {"tokens": 100.0, "seconds": 0.5, "tokens_per_second": 200.0, "mfu": 0.4, "wait": 0.01}
            figures |= {"memory": 1.5, "skipped": float(step >= 12)}
        log.write(step, "train", figures)
        if step % 10 == 0:
            log.write(step, "evaluation", {"visual_bits": 3.0 / step, "text_bits": 2.0 / step})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A decoder's run, interrupted once and not finished."""
    folder = tmp_path / "decoder"
    folder.mkdir()
    (folder / "config.yaml").write_text(DECODER)
    train(folder, 0, 20)
    train(folder, 15, 30)
    MetricsLog(folder, resumed_at=30).note(30, "step 30: loss spike, <9>")
    (folder / "checkpoints" / "step-00000030").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000030" / "COMPLETE").touch()
    (folder / "checkpoints" / "step-00000040").mkdir()
    for step in range(1, 31):
        write_image(PIL.Image.new("RGB", (64, 32), "red"), folder / "evaluations" / f"drawn-{step:08d}.png")
    return folder


def test_page_of_an_unfinished_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report([str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = (run / "report.html").read_text()
    assert "a decoder of size tiny, context 64" in page
    assert "step 30 of 40" in page
    assert "<td>3,000</td>" in page
    assert "<td>0 min 15 s</td>" in page
    assert "step-00000030" in page
    assert "step-00000040" not in page
    for title in ("Visual ids over tokens", "Text ids", "Gradient norm", "Utilisation", "Waiting for data", "Speed"):
        assert f"<b>{title}</b>" in page
    assert "restarted; 5 steps were done again" in page
    assert "Restarts: 2; skipped steps: 1; notes: 1." in page
    assert "loss spike, &lt;9&gt;" in page
    assert "out: &lt;here&gt;" in page
    # Six of thirty sheets, the newest and the first among them.
    assert page.count("data:image/png") == 6
    assert "drawn, step 30" in page
    assert "drawn, step 1<" in page
    assert "http" not in page
    assert "<script" not in page


def test_page_of_a_run_from_before_steps_were_timed(tmp_path: Path) -> None:
    train(tmp_path, 0, 40, bare=True)
    (tmp_path / "config.yaml").write_text("codebook: {}\nsize: 64\ntrain:\n  steps: 40\n")
    report([str(tmp_path), "--out", str(tmp_path / "elsewhere" / "page.html")])
    page = (tmp_path / "elsewhere" / "page.html").read_text()
    assert "a vision tokenizer, at 64 pixels" in page
    assert "finished: 40 steps" in page
    assert "Nothing unusual." in page
    assert "over tokens" not in page


def test_page_of_a_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(DECODER)
    titles = [section.title for section in run_report(tmp_path).sections]
    assert titles == ["The run"]
    report([str(tmp_path)])
    assert "no step has ended yet" in (tmp_path / "report.html").read_text()


def test_a_damaged_sheet_and_many_notes(run: Path) -> None:
    (run / "evaluations" / "drawn-00000030.png").write_bytes(b"no picture")
    log = MetricsLog(run, resumed_at=30)
    for number in range(3 * MOST_ROWS):
        log.note(30, f"note {number}.")
    report([str(run)])
    page = (run / "report.html").read_text()
    assert page.count("data:image/png") == 5
    assert "drawn-00000030.png" in page
    assert f"note {3 * MOST_ROWS - 1}." in page
    assert "note 199." not in page
    assert "The newest 100 of 304." in page


def test_figures_that_are_not_finite_do_not_hurt(tmp_path: Path) -> None:
    lines = [{"step": 1, "kind": "train", "loss": float("nan")}, {"step": 2, "kind": "train", "loss": float("inf")}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report([str(tmp_path)])
    assert "no figures yet" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_damaged_figures_are_left_out_and_counted(run: Path, seed: int) -> None:
    """Any value in place of any other."""
    draw = random.Random(seed)
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    values = ["x", "", None, True, -1, 2**62, 10**30, 1e308, -1e308, float("nan"), float("inf"), [], {}, [[1]]]
    for line in lines:
        if draw.random() < 0.5:
            line[draw.choice(list(line))] = draw.choice(values)
    lines += [{"step": number, "kind": "train", "loss": 1e20} for number in (2**62, 2**62 + 1)]
    path.write_text("\n".join(map(json.dumps, lines)))
    (run / "config.yaml").write_text("size: {a: [1]}\nrow_tokens: 1\ntrain: {steps: x}\ncontext: " + "9" * 30)
    report([str(run)])
    page = (run / "report.html").read_text()
    assert "single values of metrics.jsonl were left out" in page


def test_other_folders_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(EmulusError, match=rf"is no training run .*name one of {run}"):
        report([str(tmp_path)])
    with pytest.raises(EmulusError, match=r"is no training run .*--out of a training command"):
        report([str(tmp_path / "nothing")])
    (run / "config.yaml").write_text("- 1\n")
    with pytest.raises(EmulusError, match=r"config\.yaml is damaged"):
        report([str(run)])
