"""Configs as YAML and flags."""

from __future__ import annotations

from pathlib import Path

import pytest

from emulus.config import from_flags, merge, read_yaml, to_dict, write_yaml
from emulus.errors import EmulusError
from emulus.recipes import RECIPES, recipe
from emulus.train.config import TrainConfig


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        (name, stage)
        for name in RECIPES
        for stage in ("tokenizer", "tokens", "decoder")
        if getattr(recipe(name), stage) is not None
    ],
)
def test_a_saved_config_can_be_fed_back(name: str, stage: str, tmp_path: Path) -> None:
    config = getattr(recipe(name), stage)
    write_yaml(tmp_path / "config.yaml", config)
    assert merge(config, read_yaml(tmp_path / "config.yaml"), "config") == config
    other = getattr(recipe(next(other for other in RECIPES if other != name)), stage)
    assert merge(other, read_yaml(tmp_path / "config.yaml"), "config") == config


def test_flags_win_over_the_file_and_the_file_over_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps: 7\nlearning_rate: 1e-4\n")
    config = from_flags(TrainConfig(seed=3), ["--config", str(path), "--steps", "9"], program="test")
    assert (config.steps, config.learning_rate, config.seed) == (9, 1e-4, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 7", "did you mean 'steps'"),
        ("steps: many", "must be a whole number, got the text 'many'"),
        ("steps: true", "must be a whole number, got the boolean True"),
        ("schedule: linear", "cosine, wsd"),
        ("[1, 2]", "holds a list, not fields"),
        ("steps: -1", "must be at least 1"),
        ("a: [", "not valid YAML"),
    ],
)
def test_wrong_files_get_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(EmulusError, match=message) as caught:
        from_flags(TrainConfig(), ["--config", str(path)], program="test")
    assert "\n" not in str(caught.value)


def test_a_missing_file() -> None:
    with pytest.raises(EmulusError, match=r"nowhere\.yaml is missing"):
        from_flags(TrainConfig(), ["--config", "nowhere.yaml"], program="test")
    with pytest.raises(EmulusError, match="needs a file"):
        from_flags(TrainConfig(), ["--config"], program="test")


def test_plain_values() -> None:
    assert to_dict(recipe("demo-tiny").tokenizer)["model"]["ch_mult"] == [1, 2, 2]


@pytest.mark.parametrize(
    "text",
    [
        "steps: 2001-01-01T99:99:99Z", "steps: !!bool x", "steps: !!int ''", "steps: !!timestamp x", "[" * 3000,
        "steps: " + "9" * 5000, "steps: [[[]]]", "steps: {a: 1}", "steps: .nan", "learning_rate: .inf", "seed: null",
        "? [a]\n: b", "1: 2", "é" * 100_000, "steps: &a [*a]", "x" * 2**19, "steps: \x07", "!!python/name:os.system x",
        "stepz" * 9999 + ": 1", "schedule: " + "x" * 99_999, "steps: 1e400", "steps: 7.0", "steps: '7'",
    ],
)  # fmt: skip
def test_hostile_files_get_one_short_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(EmulusError, match=r"mine\.yaml") as caught:
        from_flags(TrainConfig(), ["--config", str(path)], program="test")
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("place", ["/dev/zero", "."])
def test_what_is_no_file(place: str) -> None:
    with pytest.raises(EmulusError, match="it is not a regular file"):
        read_yaml(Path(place))


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("steps: 7 # é".encode("latin-1"))
    with pytest.raises(EmulusError, match="is not UTF-8 text; save the file as UTF-8"):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xef\xbb\xbfsteps: 7")
    assert read_yaml(tmp_path / "b.yaml") == {"steps": 7}
