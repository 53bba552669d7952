"""The committed data set: whole, small enough, split as promised."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from emulus.data.emoji import base_of, split_of
from emulus.data.emoji.art import BACKGROUNDS, MAX_FRAMES
from emulus.data.emoji.packages import PACKAGES
from emulus.data.source import Source, open_source
from emulus.media import is_video, read_image, read_video

FOLDER = Path(__file__).parents[2] / "data" / "emoji"
TONES = FOLDER.with_name("emoji-tones")
COUNTS = {"3d": 1852, "flat": 1594, "noto": 1678, "twemoji": 1940, "anim": 734}


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source(FOLDER)


def style_and_code(identity: str) -> tuple[str, str]:
    style, code = identity.split("/")
    return style, code


def test_it_is_complete_and_small(source: Source) -> None:
    assert Counter(style_and_code(item.id)[0] for item in source) == COUNTS
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 16e6


def test_no_emoji_straddles_the_splits(source: Source) -> None:
    splits: dict[str, str] = {}
    for item in source:
        code = style_and_code(item.id)[1]
        assert item.split == split_of(code) == splits.setdefault(base_of(code), item.split)
    shares = Counter(item.split for item in source)
    assert shares["train"] / len(source) == pytest.approx(0.9, abs=0.02)
    assert shares["validation"] / len(source) == pytest.approx(0.05, abs=0.02)
    assert shares["test"] / len(source) == pytest.approx(0.05, abs=0.02)


def test_every_picture_opens(source: Source) -> None:
    for item in source.select(kind="image"):
        assert read_image(item.media).size == (64, 64)


def test_every_clip_opens(source: Source) -> None:
    for item in source.select(kind="video"):
        clip = read_video(item.media)
        assert clip.fps == 8
        assert len(clip.frames) % 4 == 0
        assert 8 <= len(clip.frames) <= MAX_FRAMES
        assert {frame.size for frame in clip.frames} == {(64, 64)}
    assert is_video(source.select(kind="video")[0].media)


def test_captions_are_several_and_the_first_tells_items_apart(source: Source) -> None:
    assert {len(item.captions) for item in source} <= {6, 7}
    assert len({item.captions[0] for item in source}) == len(source)
    assert all(len(set(item.captions)) == len(item.captions) for item in source)
    by_id = {item.id: item for item in source}
    assert by_id["flat/1f34e"].captions[0] == "a flat drawing of a red apple"
    assert by_id["3d/1f34e"].captions[1] == "red apple, 3D render"


def test_questions_are_answered(source: Source) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for item in source:
        for question, answer in item.questions:
            answers[question][answer] += 1
    always = {"which style?": 5, "what group?": 9, "which background colour?": len(BACKGROUNDS)}
    assert {question: len(answers[question]) for question in always} == always
    assert all(answers[question].total() == len(source) for question in (*always, "what is it?"))
    assert set(answers["how many?"]) == {"one", "two", "three", "four"}
    assert {"face", "hand", "heart", "man"} < set(answers["what moves?"])
    assert set(answers) == {*always, "what is it?", "how many?", "what moves?"}


def test_held_out_skin_tones_can_be_asked_for() -> None:
    source = open_source(TONES)
    assert len(source) == 180
    assert sum(file.stat().st_size for file in TONES.rglob("*") if file.is_file()) <= 5e5
    for item in source:
        style, code = style_and_code(item.id)
        assert style in ("3d", "noto")
        assert item.split == split_of(code) == "validation"
        assert f"{dict(item.questions)['which skin tone?']} skin tone" in item.captions[0]
        assert read_image(item.media).size == (64, 64)
    assert set(Counter(dict(item.questions)["which skin tone?"] for item in source).values()) == {36}


def test_columns_say_what_captions_say() -> None:
    rows = [row for name in ("pictures", "clips") for row in pq.read_table(FOLDER / f"{name}.parquet").to_pylist()]
    for row in rows:
        assert row["style"] == row["id"].split("/")[0]
        assert row["label"]
        assert row["group"]
        assert row["background"] in BACKGROUNDS
        assert row["captions"][2].endswith(f" {row['background']} background")


def test_the_notice_names_every_source() -> None:
    notice = (FOLDER / "NOTICE").read_text()
    for package in PACKAGES:
        assert f"{package.name} {package.version}" in notice
        assert package.licence in notice
        assert package.upstream in notice


def test_the_card_counts_what_is_there() -> None:
    text = (FOLDER / "README.md").read_text()
    for style, count in COUNTS.items():
        assert any(line.startswith(f"| {style} |") and line.endswith(f"| {count} |") for line in text.splitlines())
