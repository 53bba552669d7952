"""Damaged files of every kind are read or refused in one line; ``scripts.fuzz`` tries as many as one likes."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from emulus.errors import EmulusError
from emulus.log import logger
from scripts import fuzz
from scripts.fuzz_kinds import KINDS, Kind
from scripts.fuzz_mutations import damaged

INPUTS = {"image": 150, "clip": 60, "source": 60, "tokens": 12, "run": 8, "model": 25, "recipe": 60, "text": 60}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    level = logger.level
    logger.setLevel("ERROR")
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    fuzz.prepare(tmp_path, [name])
    found = list(fuzz.run_inputs(KINDS[name], tmp_path / name, range(INPUTS[name])))
    assert [finding for _, _, finding in found if finding] == []
    outcomes = Counter(outcome for _, outcome, _ in found)
    assert outcomes["read"] > 0, "the damage is so great that nothing is read: the readers are hardly tried"


def sample_of(folder: Path) -> Path:
    sample = folder / "samples/0"
    sample.mkdir(parents=True)
    (sample / "a.json").write_text('{"a": 1}')
    return sample


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (EmulusError("a.json is wrong; fix it"), "refused"),
        (EmulusError(""), "unclear message"),
        (KeyError("a"), "KeyError"),
        (RecursionError(), "RecursionError"),
    ],
)
def test_what_is_wrong_is_found(error: Exception, outcome: str, tmp_path: Path) -> None:
    sample = sample_of(tmp_path)

    def read(folder: Path, name: str) -> Iterator[object]:
        assert (folder / name).is_file()
        raise error
        yield

    kind = Kind("broken", lambda folder: None, read)
    (tmp_path / "work").mkdir()
    found, finding = fuzz.attempt(kind, sample, 3, tmp_path / "work", keep=tmp_path / "kept")
    assert found == outcome
    assert (finding is None) == (outcome == "refused")
    assert bool(list((tmp_path / "kept").glob("*"))) == outcome.endswith("Error")
    assert list((tmp_path / "work").iterdir()) == []
    assert (sample / "a.json").read_text() == '{"a": 1}', "the sample itself is not damaged"


def test_errors_of_single_items_are_judged_too(tmp_path: Path) -> None:
    kind = Kind("items", lambda folder: None, lambda folder, name: [1, EmulusError(" "), 2])
    (tmp_path / "work").mkdir()
    assert fuzz.attempt(kind, sample_of(tmp_path), 0, tmp_path / "work")[0] == "unclear message"


def test_a_hang_and_a_crash_are_found_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys, json, time, os\n"
        "first = int(sys.argv[sys.argv.index('--first') + 1])\n"
        "count = int(sys.argv[sys.argv.index('--inputs') + 1])\n"
        "for number in range(first, first + count):\n"
        "    print(json.dumps({'begun': number}), flush=True)\n"
        "    if number == 2: time.sleep(600)\n"
        "    if number == 4: os.abort()\n"
        "    print(json.dumps({'outcome': 'read', 'finding': None}), flush=True)\n"
    )
    monkeypatch.setattr(fuzz, "WORKER", (sys.executable, str(worker)))
    tally = fuzz.Tally()
    fuzz.watch("image", tmp_path, range(7), tally, 2.0, None)
    assert tally.counts == {"read": 5, "hang": 1, "crash": 1}
    assert [(finding["outcome"], finding["number"]) for finding in tally.findings] == [("hang", 2), ("crash", 4)]


def test_damage_is_a_function_of_the_number() -> None:
    content = json.dumps({"a": [1, {"b": "c"}], "d": 1.5}).encode()
    made = [damaged(content, "a.json", Random(number), [b"other"]) for number in range(300)]
    assert made == [damaged(content, "a.json", Random(number), [b"other"]) for number in range(300)]
    assert len(set(made)) > 200
    valid = 0
    for each in made:
        try:
            valid += isinstance(json.loads(each), dict)
        except (ValueError, RecursionError):
            continue
    assert valid > 60, "much of the damage must leave JSON that can be parsed"
