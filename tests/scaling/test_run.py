"""A ladder: planned, partly trained, fitted, foretold."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from pathlib import Path

import pytest

from benchmarks.emoji import small_tokens
from emulus.cli import main
from emulus.config import to_dict, write_yaml
from emulus.errors import EmulusError
from emulus.files import only_run, write_json
from emulus.model.config import sized
from emulus.scaling.fit import Law
from emulus.scaling.ladder import Planned, ScalingConfig
from emulus.scaling.rate import counted_parameters, rate_at_width
from emulus.scaling.run import (
    PAGE_FILE,
    SCALING_FILE,
    HeldOut,
    analyse,
    held_out_ids,
    measured,
    plan,
    run_scaling,
)
from emulus.train.config import TrainConfig
from emulus.train.metrics import METRICS_FILE, read_metrics
from emulus.train.pretrain import PretrainConfig

LAWS = {
    "visual": Law(e=2.0, a=33.0, b=400.0, alpha=0.28, beta=0.45),
    "text": Law(e=3.0, a=12.0, b=300.0, alpha=0.2, beta=0.5),
}
HELD = HeldOut(vocabulary=472, counts={"text": 100, "visual": 900})


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_tokens(tmp_path_factory.mktemp("emoji"), pictures=16, clips=2)


@pytest.fixture
def config(tokens: Path, tmp_path: Path) -> ScalingConfig:
    base = PretrainConfig(
        tokens=(str(tokens),),
        out=tmp_path / "unused",
        size="tiny",
        context=256,
        dropout=0.0,
        row_tokens=256,
        rows_per_step=1,
        evaluation_documents=4,
        evaluation_pictures=0,
        train=TrainConfig(
            steps=100, warmup_steps=10, learning_rate=4e-3, ema_decay=0.9, precision="fp32", device="cpu"
        ),
    )
    return ScalingConfig(
        base=base,
        out=tmp_path / "scaling",
        sizes=("tiny", "emoji-3m", "emoji-6m"),
        token_counts=(256, 512, 1024),
        held_out_size="emoji-10m",
        held_out_tokens=2048,
        draws=50,
    )


def pretend(planned: Planned, held: HeldOut, noise: float = 0.0) -> None:
    """Write what a finished run leaves, with the losses of ``LAWS``."""
    run, loop = planned.config.out, planned.config.train
    run.mkdir(parents=True, exist_ok=True)
    write_yaml(run / "config.yaml", planned.config)
    size = counted_parameters(sized(planned.size, vocab_size=held.vocabulary))
    draw = random.Random(run.name)
    bits = {
        f"{name}_bits": law.loss(size, loop.steps * 250) * math.exp(draw.gauss(0, noise)) for name, law in LAWS.items()
    }
    lines = [{"step": step + 1, "kind": "train", "loss": 3.0, "tokens": 250.0} for step in range(loop.steps)]
    lines.append({"step": loop.steps, "kind": "evaluation", **bits})
    (run / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_what_is_planned(config: ScalingConfig) -> None:
    planned = plan(config)
    assert len(planned) == 10
    assert (planned[-1].size, planned[-1].tokens) == ("emoji-10m", 2048)
    assert [run.config.train.steps for run in planned] == [1] * 3 + [2] * 3 + [4] * 3 + [8]
    longest = planned[-1].config.train
    # Those of the base are 10, and a fifth of the run is less.
    assert longest.warmup_steps == 2
    assert longest.learning_rate == pytest.approx(4e-3 * math.sqrt(128 / 320))
    assert {run.config.out.parent for run in planned} == {config.out}
    inside = dataclasses.replace(config, held_out_size="emoji-6m", held_out_tokens=1024)
    assert len(plan(inside)) == 9
    assert plan(inside)[-1].size == "emoji-6m"


def test_the_average_reaches_back_the_same_share(config: ScalingConfig) -> None:
    longer = plan(dataclasses.replace(config, held_out_tokens=256 * 1000))[-1].config.train
    assert (longer.steps, longer.warmup_steps) == (1000, 10)
    assert 1 - longer.ema_decay == pytest.approx((1 - 0.9) / 10)


def test_rates() -> None:
    assert rate_at_width(1e-3, 512, of=128) == pytest.approx(5e-4)
    assert rate_at_width(1e-3, 512, of=128, power=0) == 1e-3
    assert rate_at_width(1e-3, 512, of=128, power=1) == pytest.approx(2.5e-4)


def test_counted_parameters_are_those_that_multiply() -> None:
    from emulus.model import Decoder

    shape = sized("tiny", vocab_size=300)
    whole = sum(parameter.numel() for parameter in Decoder(shape).parameters() if parameter.ndim == 2)
    assert counted_parameters(shape) == whole - 300 * shape.hidden_size


def test_the_law_is_found_and_the_larger_run_foretold(config: ScalingConfig) -> None:
    planned = plan(dataclasses.replace(config, token_counts=(20_000, 40_000, 80_000, 160_000)))
    for each in planned:
        pretend(each, HELD)
    found = analyse(config, planned, HELD)
    assert not found.missing
    assert len(found.fitted) == 12
    for name, law in LAWS.items():
        assert found.foretold[name].fit.law.alpha == pytest.approx(law.alpha, rel=0.05)
        assert found.foretold[name].predicted.value == pytest.approx(found.held_out.losses[name], rel=1e-3)
    # The mean over all ids weighs visual and text ones by their number.
    run = found.held_out
    assert run.losses["all"] == pytest.approx(0.9 * run.losses["visual"] + 0.1 * run.losses["text"])
    assert run.tokens == 250 * planned[-1].config.train.steps


def test_the_intervals_hold_noisy_runs(config: ScalingConfig) -> None:
    planned = plan(dataclasses.replace(config, token_counts=(20_000, 40_000, 80_000, 160_000)))
    for each in planned:
        pretend(each, HELD, noise=0.003)
    found = analyse(config, planned, HELD)
    assert sum(bool(each.inside) for each in found.foretold.values()) >= 2
    for each in found.foretold.values():
        assert 0 < each.predicted.high - each.predicted.low < 0.2 * each.predicted.value


def test_two_runs_missing(config: ScalingConfig) -> None:
    """The fit is of what is there, and what is not there is named."""
    planned = plan(config)
    for each in planned:
        pretend(each, HELD)
    shutil.rmtree(planned[1].config.out)
    (planned[-1].config.out / METRICS_FILE).unlink()
    found = analyse(config, planned, HELD)
    assert found.missing == (planned[1].config.out.name, planned[-1].config.out.name)
    assert len(found.fitted) == 8
    assert found.foretold["visual"].measured is None
    assert found.foretold["visual"].inside is None
    assert found.held_out.tokens == 2048


def test_the_whole_from_the_command_line(
    config: ScalingConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Runs that are finished are left alone, the others are trained, and the page and the figures are written."""
    held, planned = held_out_ids(config.base), plan(config)
    assert held.counts["visual"] > 200
    for each in planned[1:3] + planned[4:]:
        pretend(each, held)
    before = {each.config.out: (each.config.out / METRICS_FILE).stat().st_mtime_ns for each in planned[4:]}
    write_yaml(tmp_path / "ladder.yaml", config)
    words = ["scaling", "demo-tiny", "--config", str(tmp_path / "ladder.yaml")]
    monkeypatch.setattr("emulus.cli.VERBS", {"scaling": ("scaling", "scaling", "")})
    assert main([*words, "--fit-only"]) == 0
    assert "2 runs are missing: tiny-256, tiny-512" in capsys.readouterr().err
    assert main(words) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == config.out / PAGE_FILE
    for each, steps in ((planned[0], 1), (planned[3], 2)):
        assert [line["step"] for line in read_metrics(each.config.out) if line["kind"] == "train"] == [
            *range(1, steps + 1)
        ]
    assert before == {run: (run / METRICS_FILE).stat().st_mtime_ns for run in before}
    text = page.read_text()
    assert text.count("<svg") == 2 * 3
    assert "All runs of the ladder are finished" in text
    figures = json.loads((config.out / SCALING_FILE).read_text())
    assert figures["modalities"].keys() == {"visual", "text", "all"}
    assert figures["missing"] == []
    visual = figures["modalities"]["visual"]
    assert visual["predicted"]["low"] <= visual["predicted"]["value"] <= visual["predicted"]["high"]


def test_runs_of_other_settings_are_not_fitted(config: ScalingConfig) -> None:
    planned = plan(config)[0]
    pretend(planned, HELD)
    for change in ({"learning_rate": 1e-3}, {"seed": 5}):
        other = dataclasses.replace(planned.config, train=dataclasses.replace(planned.config.train, **change))
        with pytest.raises(EmulusError, match=f"another train.{next(iter(change))}"):
            measured(dataclasses.replace(planned, config=other), HELD)
    # How it is computed is another matter.
    free = dataclasses.replace(planned.config.train, log_every=3, device="auto", save_every=7)
    assert measured(dataclasses.replace(planned, config=dataclasses.replace(planned.config, train=free)), HELD)


def test_an_unfinished_run_is_not_fitted(config: ScalingConfig) -> None:
    planned = plan(config)[-1]
    pretend(planned, HELD)
    lines = read_metrics(planned.config.out)
    early = [{**line, "step": 5} if line["kind"] == "evaluation" else line for line in lines]
    (planned.config.out / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in early))
    assert measured(planned, HELD) is None


def test_nothing_to_fit(config: ScalingConfig) -> None:
    with pytest.raises(EmulusError, match="no finished run smaller than emoji-10m"):
        run_scaling(dataclasses.replace(config, fit_only=True))
    planned = plan(config)
    for each in planned[:3]:
        pretend(each, HELD)
    with pytest.raises(EmulusError, match="3 runs cannot give five constants"):
        analyse(config, planned, HELD)
    with pytest.raises(EmulusError, match="unknown decoder size 'emoji-4m'"):
        dataclasses.replace(config, sizes=("emoji-4m",))
    with pytest.raises(EmulusError, match="level"):
        dataclasses.replace(config, level=1.0)


def test_a_damaged_config_is_told(config: ScalingConfig) -> None:
    planned = plan(config)[0]
    pretend(planned, HELD)
    write_json(planned.config.out / "config.yaml", [to_dict(planned.config)])
    with pytest.raises(EmulusError, match="was trained with another"):
        measured(planned, HELD)


def test_a_ladder_belongs_to_one_process(config: ScalingConfig, tokens: Path) -> None:
    with only_run(config.out), pytest.raises(EmulusError, match="another run is writing to"):
        run_scaling(config)
    with pytest.raises(EmulusError, match="is the tokens folder"):
        run_scaling(dataclasses.replace(config, out=tokens))


@pytest.mark.parametrize("value", ["x", float("nan"), None, [1.0]])
def test_damaged_figures_of_a_finished_run_are_not_fitted(config: ScalingConfig, value: object) -> None:
    planned = plan(config)[0]
    run = planned.config.out
    run.mkdir(parents=True)
    steps = planned.config.train.steps
    lines = [
        {"step": steps, "kind": "train", "tokens": 9},
        {"step": steps, "kind": "evaluation", "visual_bits": value, "other_bits": 1.0},
    ]
    (run / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if value == value and not isinstance(value, float):
        assert measured(planned, HELD) is None
    else:
        with pytest.raises(EmulusError, match="no finite losses"):
            measured(planned, HELD)
