"""What a run may go on with: settings that changed, checkpoints that are damaged, folders that are taken."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from emulus.data.tokenize import tokenize
from emulus.data.tokenize_config import TokenizeConfig
from emulus.errors import MAX_MESSAGE, EmulusError
from emulus.files import LOCK, only_run
from emulus.pipeline import Emulus
from emulus.train.config import TrainConfig
from emulus.train.metrics import read_metrics
from emulus.train.pretrain import PretrainConfig, pretrain

LOOP = TrainConfig(
    steps=2, learning_rate=3e-3, warmup_steps=1, save_every=1, evaluate_every=0, precision="fp32", device="cpu", keep=9
)


@pytest.fixture(scope="module")
def tokens(tiny: Emulus, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    tiny.save(folder / "model")
    config = TokenizeConfig(sources=(shapes,), vocabulary=str(folder / "model"), out=folder / "tokens", size=16)
    return tokenize(config)


@pytest.fixture(scope="module")
def finished(tokens: Path, tiny: Emulus, tmp_path_factory: pytest.TempPathFactory) -> PretrainConfig:
    config = PretrainConfig(
        tokens=(str(tokens),),
        out=tmp_path_factory.mktemp("run") / "run",
        context=128,
        row_tokens=128,
        window=24,
        evaluation_documents=2,
        evaluation_pictures=0,
        train=LOOP,
        defaults=tiny.defaults,
    )
    pretrain(config)
    return config


@pytest.fixture
def config(finished: PretrainConfig, tmp_path: Path) -> PretrainConfig:
    """A copy of the finished run, to be gone on with for another step."""
    shutil.copytree(finished.out, tmp_path / "run")
    return dataclasses.replace(finished, out=tmp_path / "run", train=dataclasses.replace(LOOP, steps=3))


def with_fields(config: PretrainConfig, changes: dict[str, Any]) -> PretrainConfig:
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        inner = dataclasses.replace(getattr(config, first), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: inner})
    return config


def refused(config: PretrainConfig) -> str:
    """One line; nothing was trained."""
    before = {path: path.stat().st_mtime_ns for path in config.out.rglob("*") if path.name != LOCK}
    with pytest.raises(EmulusError) as caught:
        pretrain(config)
    assert {path: path.stat().st_mtime_ns for path in config.out.rglob("*") if path.name != LOCK} == before
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) <= MAX_MESSAGE
    return text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train.seed": 1}, "train.seed was 0 in this run so far and cannot become 1"),
        ({"window": 25}, "window was 24"),
        ({"row_tokens": 129}, "row_tokens was 128"),
        ({"reading.caption_first": 0.6}, "caption_first was 0.5"),
        ({"reading.null_caption": 0.2}, "null_caption was 0.1"),
        ({"reading.question": 0.2}, "question was 0.3"),
        ({"reading.turns": 2}, "turns was 1"),
        ({"init": "some/model"}, "--init some/model would change nothing; choose another --out"),
    ],
)
def test_what_would_make_it_another_run_is_refused(config: PretrainConfig, changes: dict[str, Any], says: str) -> None:
    text = refused(with_fields(config, changes))
    assert says in text
    assert "another --out" in text
    # Both remedies help: what it was, and a new run.
    if "window" in changes or "train.seed" in changes:
        pretrain(config)
        new = with_fields(config, {**changes, "init": str(config.out), "out": config.out.with_name("new")})
        pretrain(dataclasses.replace(new, train=dataclasses.replace(new.train, steps=1)))


def test_other_settings_are_announced(config: PretrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("emulus").propagate = True
    changes = {"rows_per_step": 1, "reading.visual_weight": 0.7, "train.learning_rate": 1e-3, "codebook_init": True}
    pretrain(with_fields(config, changes))
    for name in ("rows_per_step", "reading.visual_weight", "train.learning_rate", "train.steps"):
        assert any(record.getMessage().startswith(f"{name} was ") for record in caplog.records)
    assert "codebook_init was False when this run began, and True changes nothing now" in caplog.text
    assert "codebook_init: false" in (config.out / "config.yaml").read_text()


def test_the_seed_of_an_older_run_is_known_from_its_config(config: PretrainConfig) -> None:
    for path in config.out.glob("checkpoints/*/trainer.json"):
        values = json.loads(path.read_text())
        del values["seed"]
        values["reading"] = {name: values["reading"][name] for name in OLD_STATE}
        path.write_text(json.dumps(values))
    assert "train.seed was 0" in refused(with_fields(config, {"train.seed": 1}))
    pretrain(config)
    assert [line["step"] for line in read_metrics(config.out) if line["kind"] == "train"] == [1, 2, 3]


OLD_STATE = ("step", "window", "row", "window_size", "row_tokens")


def newest(config: PretrainConfig) -> Path:
    return config.out / "checkpoints/step-00000002"


def damage(**changes: Any) -> Callable[[dict[str, Any]], object]:
    """Change fields of trainer.json; ``reading_row`` is the field ``row`` of ``reading``."""

    def apply(values: dict[str, Any]) -> dict[str, Any]:
        for name, value in changes.items():
            part, _, field = name.partition("_")
            if field and part in values:
                values[part][field] = value
            else:
                values[name] = value
        return values

    return apply


@pytest.mark.parametrize(
    "change",
    [
        damage(step="x"),
        damage(step=True),
        damage(step=2.0),
        damage(step=1_000_000_000),
        damage(step=-2),
        damage(step=10**30),
        damage(reading=5),
        damage(reading_row="0"),
        damage(reading_row=10**6),
        damage(reading_window=2**62),
        damage(reading_window=10**30),
        damage(reading_step=1),
        damage(watch=[]),
        damage(watch_skipped=float("inf")),
        damage(watch_norms=[float("nan")]),
        damage(watch_losses="many"),
        damage(watch_in_a_row=-1),
        damage(fingerprint=7),
        damage(seed="0"),
        damage(more=1),
        lambda values: [values],
        lambda values: {name: values[name] for name in values if name != "watch"},
    ],
)
def test_damaged_trainer_files_are_one_line(config: PretrainConfig, change: Callable[[dict[str, Any]], object]) -> None:
    path = newest(config) / "trainer.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert "step-00000002" in refused(config)


def test_the_checkpoint_before_a_damaged_one_is_gone_on_from(config: PretrainConfig) -> None:
    (newest(config) / "trainer.json").write_text("{}")
    assert "step-00000002 is damaged (trainer.json lacks step, watch, reading" in refused(config)
    shutil.rmtree(newest(config))
    pretrain(config)


@pytest.mark.parametrize("content", [b"", b"[" * 5000, b'{"step": ' + b"9" * 5000, b"\xff", b"{}", None])
@pytest.mark.parametrize("name", ["trainer.json", "trainer/tensors.json", "config.yaml"])
def test_files_that_are_something_else_are_one_line(config: PretrainConfig, name: str, content: bytes | None) -> None:
    path = (config.out if name == "config.yaml" else newest(config)) / name
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    if name == "config.yaml" and content in (b"{}",):
        pretrain(config)
    else:
        assert path.name in refused(config) or "other model" in refused(config)


def test_a_tensor_of_a_long_name_is_cut(config: PretrainConfig) -> None:
    path = newest(config) / "trainer/tensors.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "a" * 10**6: "b" * 10**6, sorted(index)[0]: "é\n" * 10**5}))
    assert "is of another model or other settings" in refused(config)


def test_random_damage_is_one_line_or_harmless(config: PretrainConfig) -> None:
    """Values of trainer.json swapped for others of all types."""
    draw = random.Random(0)
    path = newest(config) / "trainer.json"
    whole = json.loads(path.read_text())
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        2**31,
        2**70,
        1.5,
        float("nan"),
        float("-inf"),
        "",
        "x" * 2000,
        [],
        {},
        [[]],
    ]
    for _ in range(15):
        found = json.loads(json.dumps(whole))
        place = found
        while True:
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not (isinstance(place[key], dict | list) and place[key]) or draw.random() < 0.3:
                break
            place = place[key]
        place[key] = draw.choice(values)
        path.write_text(json.dumps(found))
        with suppress(EmulusError):
            pretrain(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)))


# a run's folder belongs to one run


def test_a_second_run_is_refused_before_it_opens_anything(config: PretrainConfig) -> None:
    with only_run(config.out):
        text = refused(dataclasses.replace(config, tokens=("no/where",)))
    assert text == f"another run is writing to {config.out}; wait until it has ended, or choose another --out"
    pretrain(config)


def test_a_killed_process_holds_nothing(config: PretrainConfig) -> None:
    code = (
        "import sys, time; from pathlib import Path; from emulus.files import only_run\n"
        f"with only_run(Path({str(config.out)!r})): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    assert "another run is writing to" in refused(config)
    process.kill()
    process.communicate()
    pretrain(config)


def test_folders_that_cannot_be_are_refused_at_once(
    config: PretrainConfig, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    model = newest(config) / "model"
    for changes, says in [
        ({"out": file}, "is not a folder"),
        ({"out": file / "run"}, "is not a folder, so"),
        ({"out": tmp_path / ("x" * 300) / "run"}, "too long to be written"),
        ({"out": Path(os.fsdecode(b"run\xff"))}, "is not UTF-8"),
        ({"out": tokens}, "is the tokens folder"),
        ({"out": model}, "holds a model"),
        ({"init": str(config.out)}, "is the init"),
        ({"init": str(model)}, "lies in --out"),
    ]:
        with pytest.raises(EmulusError, match=says):
            pretrain(dataclasses.replace(config, **changes))  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
    pretrain(config)


# what only evaluations and saves need is looked at before the first step


def test_another_vision_tokenizer_beside_the_codes_is_noticed(
    config: PretrainConfig, tokens: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "tokens"
    shutil.copytree(tokens, mine)
    weights = mine / "vision/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-len(content) // 2 :] = bytes(len(content[-len(content) // 2 :]))
    weights.write_bytes(content)
    changed = dataclasses.replace(config, tokens=(str(mine),), out=tmp_path / "new")
    with pytest.raises(EmulusError, match="is not the vision tokenizer that made these codes"):
        pretrain(changed)
    shutil.rmtree(mine / "vision")
    with pytest.raises(EmulusError, match="vision"):
        pretrain(changed)
    assert not (tmp_path / "new").exists()


def test_held_out_documents_that_no_row_can_hold_are_found_before_training(
    config: PretrainConfig, tiny: Emulus, tmp_path: Path
) -> None:
    table = tmp_path / "t.jsonl"
    rows = [{"text": "a b", "split": "train"}, {"text": "a red apple " * 90, "split": "validation"}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = TokenizeConfig(sources=(table,), vocabulary=config.tokens[0], out=tmp_path / "tokens")
    tokenize(mine)
    new = dataclasses.replace(config, tokens=(str(mine.out),), out=tmp_path / "new")
    with pytest.raises(EmulusError, match=r"held out, .* a row holds 128: .* --max-text-ids 126, or .* --max-ids 128"):
        pretrain(new)
    assert not new.out.exists()
    for number, remedy in enumerate(({"max_text_ids": 126}, {"max_ids": 128})):
        again = dataclasses.replace(mine, out=tmp_path / f"again{number}", **remedy)
        pretrain(dataclasses.replace(new, tokens=(str(tokenize(again)),), out=tmp_path / f"new{number}"))
