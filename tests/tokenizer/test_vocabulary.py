"""The id table: the released ids, our own order, and tables that must be refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulus.errors import EmulusError
from emulus.tokenizer.vocabulary import EMU3_5_MARKS, ROLES, Vocabulary

NATIVE = Vocabulary.native(text_size=300, visual_size=64, action_size=10)


def test_emu3_has_the_released_ids() -> None:
    v = Vocabulary.emu3()
    assert v.size == 184_622
    assert v.text_range == (0, 151_643)
    assert (v.pad, v.bos, v.eos) == (151_643, 151_849, 151_850)
    assert (v.img, v.boi, v.eoi) == (151_851, 151_852, 151_853)
    assert (v.eol, v.eof) == (151_846, 151_847)
    assert v.visual_range == (151_854, 184_622)
    assert v.special_names["<|im_start|>"] == 151_644
    assert v.special_names["<|im_end|>"] == 151_645
    assert [v.special_names[f"<|extra_{i}|>"] for i in (0, 204)] == [151_646, 151_850]
    assert v.special_names["<|visual token 032767|>"] == 184_621
    assert v.size - v.text_size - v.visual_size == 211


def test_emu3_5_differs_in_the_number_of_visual_ids_alone() -> None:
    v = Vocabulary.emu3_5()
    assert v.size == 282_926
    assert v.visual_range == (151_854, 282_926)
    assert v.to_dict() | {"visual_size": 32_768} == Vocabulary.emu3().to_dict()
    assert {mark: v.special_names[name] for mark, name in EMU3_5_MARKS.items()} == {
        **{"bss": 151_746, "ess": 151_747, "tms": 151_848},
        **{"bog": 151_706, "eog": 151_707, "boc": 151_696, "eoc": 151_697},
    }


def test_marks_are_the_specials_without_a_role() -> None:
    v = Vocabulary.emu3_5()
    assert len(v.marks) == 211 - len(ROLES)
    assert set(v.marks.values()).isdisjoint(v.specials.values())
    assert set(EMU3_5_MARKS.values()) <= set(v.marks)
    assert v.marks["<|im_start|>"] == 151_644
    assert not NATIVE.marks


@pytest.mark.parametrize("v", [Vocabulary.emu3(), Vocabulary.emu3_5()], ids=["emu3", "emu3.5"])
def test_released_names_are_a_bijection_over_all_ids(v: Vocabulary) -> None:
    names = list(v.special_names)
    ids = [v.special_names[name] for name in names]
    assert sorted(ids) == list(range(v.text_size, v.size))
    assert [v.surface(id) for id in ids] == names
    assert len(set(names)) == len(names)


def test_native_is_text_specials_visual_actions_without_gaps() -> None:
    specials = sorted(NATIVE.specials.values())
    assert specials == list(range(300, 310))
    assert NATIVE.visual_range == (310, 374)
    assert NATIVE.action_range == (374, 384)
    assert NATIVE.size == 384
    without = Vocabulary.native(text_size=300, visual_size=64)
    assert without.size == 300 + 8 + 64
    assert without.action_range == (0, 0)
    assert not any(without.is_action(id) for id in range(without.size))


@pytest.mark.parametrize("v", [NATIVE, Vocabulary.emu3(visual_size=64)])
def test_every_id_is_of_one_kind_and_names_are_a_bijection(v: Vocabulary) -> None:
    special = set(v.special_names) - {v.surface(id) for id in range(v.size) if v.is_visual(id) or v.is_action(id)}
    kinds = [(v.is_text(id), v.is_visual(id), v.is_action(id), v.surface(id) in special) for id in range(0, v.size)]
    assert all(sum(kind) == 1 for kind in kinds)
    assert len(v.special_names) == len(list(v.special_names)) == v.size - v.text_size
    for name in v.special_names:
        assert v.surface(v.special_names[name]) == name


@pytest.mark.parametrize(
    "name", ["<|visual token 64|>", "<|visual token 000064|>", "<|visual token 0000001|>", "<|visual token|>", ""]
)
def test_names_outside_the_table_are_not_found(name: str) -> None:
    assert name not in NATIVE.special_names


def test_ids_are_named_for_people() -> None:
    assert NATIVE.surface(NATIVE.boi) == "<|image start|>"
    assert NATIVE.surface(NATIVE.visual_start + 3) == "<|visual token 000003|>"
    assert NATIVE.surface(7) == "text id 7"
    assert NATIVE.surface(-1) == "unknown id -1"


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 50))
def test_dict_and_back(text_size: int, visual_size: int, action_size: int) -> None:
    v = Vocabulary.native(text_size=text_size, visual_size=visual_size, action_size=action_size)
    assert Vocabulary.from_dict(json.loads(json.dumps(v.to_dict()))) == v
    assert pickle.loads(pickle.dumps(v)) == v


def test_save_and_load(tmp_path: Path) -> None:
    Vocabulary.emu3().save(tmp_path / "vocabulary.json")
    assert Vocabulary.load(tmp_path / "vocabulary.json") == Vocabulary.emu3()
    assert Vocabulary.load(tmp_path / "vocabulary.json") != Vocabulary.emu3(visual_size=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_size": 301}, "overlap"),
        ({"visual_start": 309}, "overlap"),
        ({"action_start": 373}, "overlap"),
        ({"action_size": 0}, "specials must be"),
        ({"visual_size": 0}, "whole numbers"),
        ({"visual_size": "64"}, "visual_size must be a whole number"),
        ({"text_size": -1}, "whole numbers"),
        ({"specials": NATIVE.specials | {"eol": NATIVE.eof}}, "share an id"),
        ({"specials": NATIVE.specials | {"eol": 5}}, "name the id of every role"),
        ({"specials": NATIVE.specials | {"eol": []}}, "eol must be a whole number"),
        ({"specials": [1, 2]}, "specials holds a list"),
        ({"specials": {"pad": 300}}, "specials must be"),
        ({"special_names": {"row end": 300}}, "must name the id"),
        ({"special_names": NATIVE.to_dict()["special_names"] | {"plain": 400}}, "must look like"),
        ({"special_names": NATIVE.to_dict()["special_names"] | {"<|visual token 000001|>": 400}}, "must look like"),
        ({"visual_size": 2**24}, "whole numbers below"),
        ({"visual_start": 2**64}, "must be a whole number"),
        ({"text_size": True}, "must be a whole number"),
        ({"special_names": {"<|x|>" * 9999: 3.5}}, "must be a whole number"),
        ({"specials": NATIVE.specials | {"eol" * 9999: 400}}, "specials must be"),
        ({"surprise": 1}, "unknown key 'surprise'"),
    ],
)
def test_a_table_that_does_not_fit_together_is_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(EmulusError, match=says):
        Vocabulary.from_dict(NATIVE.to_dict() | change)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text("[1, 2]")
    with pytest.raises(EmulusError, match=r"vocabulary\.json holds a list"):
        Vocabulary.load(path)


def test_needs_no_torch() -> None:
    code = "import sys, importlib.util as u; s = u.spec_from_file_location('v', sys.argv[1]);"
    code += (
        "m = u.module_from_spec(s); sys.modules['v'] = m; s.loader.exec_module(m); assert 'torch' not in sys.modules"
    )
    module = sys.modules[Vocabulary.__module__].__file__
    assert module is not None
    subprocess.run([sys.executable, "-c", code, module], check=True)
