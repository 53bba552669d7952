"""The builder, on packages of a few emoji that are made here."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emulus.data.emoji import EmojiConfig, build_emoji
from emulus.data.emoji.art import BACKGROUNDS, placed, visible_backgrounds
from emulus.data.emoji.captions import STYLES
from emulus.data.emoji.names import LOCALES
from emulus.data.emoji.packages import (
    CLIPS,
    FLAT,
    NOTO,
    PACKAGES,
    PICTURES_3D,
    TWEMOJI,
    WORDS,
    fetch_packages,
    read_member,
)
from emulus.data.source import open_source
from emulus.errors import EmulusError
from emulus.media import read_image, read_video

pytest.importorskip("resvg_py")

RED, BLUE = (220, 30, 40, 255), (20, 60, 230, 255)


def tarball(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def disc(colour: tuple[int, int, int, int], *, frames: int = 1, duration: int = 42) -> bytes:
    """A WebP of a disc on nothing; in an animation it moves to the right."""
    pictures = []
    for frame in range(frames):
        picture = Image.new("RGBA", (64, 64))
        left = 4 + 24 * frame // frames
        picture.paste(colour, (left, 16, left + 32, 48))
        pictures.append(picture)
    buffer = io.BytesIO()
    more = {"save_all": True, "append_images": pictures[1:], "duration": duration} if frames > 1 else {}
    pictures[0].save(buffer, "WEBP", lossless=True, **more)
    return buffer.getvalue()


def damaged(content: bytes) -> bytes:
    """The same header, other pixels."""
    return content[:-12] + bytes([255]) * 12


def words() -> dict[str, bytes]:
    apple = {"hexcode": "1F34E", "label": "red apple", "tags": ["fruit", "food"], "group": 4}
    arrow = {"hexcode": "2B05-FE0F", "label": "left arrow", "group": 8}
    right = {"hexcode": "27A1-FE0F", "label": "right arrow", "group": 8}
    hand = {"hexcode": "1F44B", "label": "waving hand", "tags": ["hello"], "group": 1}
    hand["skins"] = [{"hexcode": "1F44B-1F3FF", "label": "waving hand: dark skin tone", "group": 1}]
    leg = {"hexcode": "1F9B5", "label": "leg", "tags": ["knee"], "group": 1}
    leg["skins"] = [{"hexcode": "1F9B5-1F3FB", "label": "leg: light skin tone", "group": 1}]
    table = [apple, arrow, right, hand, leg]
    groups = [{"order": number, "message": f"group {number}"} for number in range(10)]
    files = {"package/en/data.json": encoded(table), "package/en/messages.json": encoded({"groups": groups})}
    for locale in LOCALES:
        files[f"package/{locale}/compact.json"] = encoded([{"hexcode": "1F34E", "label": f"{locale} apple"}])
    return files


def icons() -> dict[str, bytes]:
    half = {"body": '<path fill="#1f3ce6" d="M0 0h18v36H0z"/>'}
    icons = {"left": half, "red-apple": {"body": '<circle cx="18" cy="18" r="16" fill="#dc1e28"/>'}}
    aliases = {"right": {"parent": "left", "hFlip": True}}
    chars = {"2b05": "left", "27a1": "right", "1f34e": "red-apple", "1f999": "left"}
    table = {"icons": icons, "aliases": aliases, "width": 36, "height": 36}
    return {"package/icons.json": encoded(table), "package/chars.json": encoded(chars)}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    tarball(folder / WORDS.tarball, words())
    pictures = {
        "package/assets/1f34e.webp": disc(RED),
        "package/assets/2b05-fe0f.webp": disc(BLUE),
        "package/assets/2b05.webp": disc(RED),
        "package/assets/1f44b-1f3ff.webp": disc(RED),
        "package/assets/1f9b5-1f3fb.webp": disc(BLUE),
        "package/assets/e000.webp": b"no emoji, not opened",
        "package/README.md": b"",
    }
    tarball(folder / PICTURES_3D.tarball, pictures)
    for package in (FLAT, NOTO, TWEMOJI):
        tarball(folder / package.tarball, icons())
    for number, package in enumerate(CLIPS):
        moving = {"package/assets/1f44b.webp": disc(RED, frames=72)} if number == 0 else {}
        short = {"package/assets/27a1.webp": disc(BLUE, frames=8)} if number == 1 else {}
        still = {"package/assets/1f34e.webp": disc(RED)} if number == 2 else {}
        tarball(folder / package.tarball, {**moving, **short, **still})
    return folder


@pytest.fixture(scope="module")
def built(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "emoji"
    counts = build_emoji(EmojiConfig(packages=packages, out=out, size=32), report=lambda line: None)
    assert sum(counts.values()) == 2 + 3 * 3 + 2
    return out


def rows(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in pq.read_table(folder / f"{name}.parquet").to_pylist()}


def test_pictures_of_every_style_join_their_words(built: Path) -> None:
    pictures = rows(built, "pictures")
    icon_codes = ("1f34e", "27a1", "2b05")
    expected = {"3d/1f34e", "3d/2b05"} | {f"{s}/{c}" for s in ("flat", "noto", "twemoji") for c in icon_codes}
    assert set(pictures) == expected
    apple = pictures["flat/1f34e"]
    assert apple["label"] == "red apple"
    assert apple["group"] == "group 4"
    assert apple["captions"][0] == "a flat drawing of a red apple"
    assert "flat drawing of a red apple: fruit, food" in apple["captions"]
    assert f"a flat emoji of a red apple on a {apple['background']} background" in apple["captions"]
    assert sum(f"{locale} apple" in caption for locale in LOCALES for caption in apple["captions"]) == 2
    assert len(pictures["noto/2b05"]["captions"]) == 4


def test_pictures_show_the_art_on_the_named_background(built: Path) -> None:
    for row in rows(built, "pictures").values():
        picture = np.asarray(read_image(row["media"]), np.float32)
        assert picture.shape == (32, 32, 3)
        if row["id"].endswith("1f34e"):
            assert np.abs(picture[0, 0] - BACKGROUNDS[row["background"]]).max() < 16
            assert np.abs(picture[16, 12] - RED[:3]).max() < 40


def test_the_first_of_two_spellings_is_taken(built: Path) -> None:
    picture = np.asarray(read_image(rows(built, "pictures")["3d/2b05"]["media"]))
    assert picture[16, 8, 2] > picture[16, 8, 0]


def test_a_mirrored_icon_is_mirrored(built: Path) -> None:
    pictures = rows(built, "pictures")
    for identity, inside, outside in (("noto/2b05", 4, 28), ("noto/27a1", 28, 4)):
        picture = np.asarray(read_image(pictures[identity]["media"]), np.float32)
        assert np.abs(picture[16, inside] - BLUE[:3]).max() < 40
        assert np.abs(picture[16, outside] - BACKGROUNDS[pictures[identity]["background"]]).max() < 40


def test_clips_are_resampled_and_move(built: Path) -> None:
    clips = rows(built, "clips")
    assert set(clips) == {"anim/1f44b", "anim/27a1"}
    assert clips["anim/1f44b"]["captions"][0] == "an animated 3D clip of a waving hand"
    long, short = (read_video(clips[key]["media"]) for key in ("anim/1f44b", "anim/27a1"))
    assert (len(long.frames), len(short.frames)) == (24, 8)
    assert long.fps == short.fps == 8
    # Half of the way after half of the frames: the disc begins at 2 and ends its way at 14 of 32 pixels.
    reds = [np.asarray(frame, np.float32)[16, :, 1] < 100 for frame in long.frames]
    starts = [int(red.argmax()) for red in reds]
    assert starts == sorted(starts)
    assert (starts[0], starts[12]) == (pytest.approx(2, abs=1), pytest.approx(8, abs=1))


def test_skin_tones_are_built_when_asked_for(packages: Path, tmp_path: Path) -> None:
    build_emoji(EmojiConfig(packages=packages, out=tmp_path, size=32, skin_tones=True), report=lambda line: None)
    row = rows(tmp_path, "pictures")["3d/1f44b-1f3ff"]
    assert row["captions"][0] == "a 3D render of a waving hand with dark skin tone"
    assert row["split"] == rows(tmp_path, "clips")["anim/1f44b"]["split"]
    assert "--skin-tones" in (tmp_path / "README.md").read_text()


@pytest.fixture(scope="module")
def versions(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("versions") / "emoji"
    config = EmojiConfig(
        packages=packages, out=out, size=32, skin_tones=True, versions=4, tone_versions=2, clip_versions=2
    )
    build_emoji(config, report=lambda line: None)
    return out


def test_versions_add_to_what_is_trained_on(packages: Path, built: Path, versions: Path, tmp_path: Path) -> None:
    for name, most in (("pictures", 4), ("clips", 2)):
        found = rows(versions, name)
        for identity, row in rows(built, name).items():
            assert found[identity] == row
            more = {key for key in found if key.startswith(f"{identity}+")}
            assert more == {f"{identity}+{number}" for number in range(2, most + 1) if row["split"] == "train"}
    tones = {key for key in rows(versions, "pictures") if "-1f3f" in key}
    assert tones == {"3d/1f44b-1f3ff", "3d/1f44b-1f3ff+2", "3d/1f9b5-1f3fb"}
    assert "--versions 4 --tone-versions 2 --clip-versions 2" in " ".join((versions / "README.md").read_text().split())
    none = EmojiConfig(packages=packages, out=tmp_path, size=32, skin_tones=True, tone_versions=0)
    build_emoji(none, report=lambda line: None)
    assert {key for key in rows(tmp_path, "pictures") if "-1f3f" in key} == {"3d/1f9b5-1f3fb"}


def test_versions_differ_in_background_place_and_words(versions: Path) -> None:
    apples = [row for key, row in rows(versions, "pictures").items() if key.startswith("flat/1f34e")]
    assert [row["id"] for row in apples] == ["flat/1f34e", *(f"flat/1f34e+{number}" for number in (2, 3, 4))]
    assert len({row["background"] for row in apples}) == 4
    shown = []
    for row in apples:
        picture = np.asarray(read_image(row["media"]), np.float32)
        assert np.abs(picture[0, 0] - BACKGROUNDS[row["background"]]).max() < 30
        shown.append(int((np.abs(picture - RED[:3]).max(-1) < 60).sum()))
        assert row["captions"][0] == "a flat drawing of a red apple"
        told = [f"{row['background']} background" in caption for caption in row["captions"]]
        assert sum(told) == (1 if row is apples[0] else 4)
        assert {"question": "which background colour?", "answer": row["background"]} in row["questions"]
        assert sum(f"{locale} apple" in caption for locale in LOCALES for caption in row["captions"]) == 2
    assert all(0.4 * shown[0] < area <= shown[0] for area in shown)
    ground = f"{apples[1]['background']} background: a flat drawing"
    assert {f"fruit, food, {ground}", f"food, fruit, {ground}"} & set(apples[1]["captions"])
    said = {caption for row in apples for caption in row["captions"]}
    assert all(any(f"{locale} apple" in caption for caption in said) for locale in LOCALES)


def test_a_version_of_a_clip_stays_in_its_place(versions: Path) -> None:
    found = rows(versions, "clips")
    for identity in (key for key in found if key.endswith("+2")):
        frames = np.stack([np.asarray(frame, np.float32) for frame in read_video(found[identity]["media"]).frames])
        discs = np.abs(frames - frames[0, 0, 0]).max(-1) > 60
        rows_of_disc = [np.flatnonzero(disc.any(1)) for disc in discs]
        assert np.ptp([lines[0] for lines in rows_of_disc]) <= 1
        assert np.ptp([len(lines) for lines in rows_of_disc]) <= 1


@given(
    st.floats(0.5, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
    st.tuples(st.integers(8, 40), st.integers(8, 40)),
)
@settings(max_examples=30, deadline=None)
def test_placed_art_is_whole(scale: float, across: float, down: float, mirrored: bool, size: tuple[int, int]) -> None:
    drawn = Image.effect_noise(size, 90).convert("RGBA")
    found = placed(drawn, scale=scale, across=across, down=down, mirrored=mirrored)
    assert found.size == tuple(round(side / scale) for side in size)
    left, top, right, bottom = found.getbbox() or (0, 0, 0, 0)
    assert (right - left, bottom - top) == size
    inside = found.crop((left, top, right, bottom))
    if mirrored:
        inside = inside.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert inside.tobytes() == drawn.tobytes()


def test_held_out_tones_alone(packages: Path, tmp_path: Path) -> None:
    config = EmojiConfig(packages=packages, out=tmp_path, size=32, held_out_tones=True)
    build_emoji(config, report=lambda line: None)
    assert {path.name for path in tmp_path.iterdir()} == {"NOTICE", "README.md", "pictures.parquet"}
    (row,) = rows(tmp_path, "pictures").values()
    assert (row["id"], row["split"]) == ("3d/1f9b5-1f3fb", "validation")
    assert {"question": "which skin tone?", "answer": "light"} in row["questions"]
    assert TWEMOJI.name not in (tmp_path / "NOTICE").read_text()


def test_the_same_build_gives_the_same_bytes(packages: Path, built: Path, tmp_path: Path) -> None:
    build_emoji(EmojiConfig(packages=packages, out=tmp_path, size=32), report=lambda line: None)
    for file in built.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_what_is_built_can_be_opened(built: Path) -> None:
    source = open_source(built)
    assert len(source) == 13
    assert {item.kind for item in source} == {"image", "video"}
    questions = {item.id: dict(item.questions) for item in source}
    assert questions["flat/1f34e"]["what is it?"] == "red apple"
    assert questions["anim/1f44b"]["which style?"] == "animated 3D"
    for package in PACKAGES:
        assert f"{package.name} {package.version}" in (built / "NOTICE").read_text()


def test_the_background_is_one_that_shows_the_art() -> None:
    names = list(BACKGROUNDS)
    for number, name in enumerate(names):
        art = Image.new("RGBA", (8, 8), (*BACKGROUNDS[name], 255))
        assert name not in visible_backgrounds(art, number)
        assert visible_backgrounds(Image.new("RGBA", (8, 8)), number) == names[number:] + names[:number]
    assert visible_backgrounds(Image.new("RGBA", (8, 8), RED), 3 + 8 * 1000)[0] == names[3]


def test_styles_speak_the_same_languages() -> None:
    assert all(set(style.locales) == set(LOCALES) for style in STYLES.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 8}, "--size 8 is out of range; choose 16 to 256"),
        ({"quality": 101}, "--quality 101 is out of range"),
        ({"clip_quality": -1}, "--clip-quality -1 is out of range"),
        ({"versions": 0}, "versions must be at least 1"),
        ({"clip_versions": 0}, "versions must be at least 1"),
        ({"tone_versions": -1}, "versions must be at least 0"),
    ],
)
def test_configurations_out_of_range_are_refused(tmp_path: Path, change: dict[str, int], message: str) -> None:
    with pytest.raises(EmulusError, match=message):
        build_emoji(EmojiConfig(packages=tmp_path, out=tmp_path, **change))  # type: ignore[arg-type]


def test_without_npm_the_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmulusError, match="npm is not installed") as caught:
        fetch_packages(tmp_path / "packages")
    assert all(f"{package.name}@{package.version}" in str(caught.value) for package in PACKAGES)
    assert "\n" not in str(caught.value)


@pytest.fixture
def failing_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    program = tmp_path / "npm"
    program.write_text("#!/bin/sh\necho 'the network is down' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path / "packages"


def test_a_failed_fetch_says_why_and_leaves_nothing(failing_npm: Path) -> None:
    with pytest.raises(EmulusError, match=r"could not fetch emojibase-data@17\.0\.0 \(the network is down\)"):
        fetch_packages(failing_npm, report=lambda line: None)
    assert list(failing_npm.iterdir()) == []


def test_a_fetched_package_lies_where_it_is_looked_for(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An npm that "fetches" from a folder: its last argument is where it puts the tarball.
    program = tmp_path / "npm"
    program.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{packages}"/emojibase-data-17.0.0.tgz "$last"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    folder = tmp_path / "fetched"
    folder.mkdir()
    for package in PACKAGES[1:]:
        (folder / package.tarball).touch()
    lines: list[str] = []
    fetch_packages(folder, report=lines.append)
    assert lines == ["fetching emojibase-data 17.0.0"]
    assert (folder / WORDS.tarball).read_bytes() == (packages / WORDS.tarball).read_bytes()
    assert {file.name for file in folder.iterdir()} == {package.tarball for package in PACKAGES}


def test_broken_packages_are_named(packages: Path, tmp_path: Path) -> None:
    whole = (packages / FLAT.tarball).read_bytes()
    cut = tmp_path / "cut.tgz"
    for content in (whole[: len(whole) // 2], b"no tarball at all", b""):
        cut.write_bytes(content)
        with pytest.raises(EmulusError, match=r"cut\.tgz is cut or no tarball"):
            read_member(cut, "package/chars.json")
    with pytest.raises(EmulusError, match=r"none\.tgz is missing"):
        read_member(tmp_path / "none.tgz", "package/chars.json")
    with pytest.raises(EmulusError, match=r"has no package/other\.json"):
        read_member(packages / FLAT.tarball, "package/other.json")


def test_a_member_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("package/icons.json")
    member.size = 1 << 40
    bomb = tmp_path / "bomb.tgz"
    with tarfile.open(bomb, "w:gz") as archive:
        archive.addfile(member)
    with pytest.raises(EmulusError, match=r"bomb\.tgz holds more than expected"):
        read_member(bomb, "package/icons.json")


def test_a_package_of_another_shape_is_refused(packages: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packages"
    folder.mkdir()
    for package in PACKAGES:
        (folder / package.tarball).symlink_to(packages / package.tarball)
    config = EmojiConfig(packages=folder, out=tmp_path / "out", size=16)
    for package, files, message in (
        (NOTO, {**icons(), "package/chars.json": encoded({"1f34e": "gone"})}, "not an Iconify set"),
        (PICTURES_3D, {"package/assets/1f34e.webp": b"text"}, "1f34e.webp is no picture"),
        (PICTURES_3D, {"package/assets/1f34e.webp": disc(RED)[:40]}, "1f34e.webp is no picture"),
        (PICTURES_3D, {"package/assets/1f34e.webp": damaged(disc(RED))}, "1f34e is corrupt"),
        (CLIPS[0], {"package/assets/1f44b.webp": damaged(disc(RED, frames=9))}, "1f44b is corrupt"),
        (
            WORDS,
            {**words(), "package/en/data.json": encoded([{"label": "?"}])},
            "is not emojibase-data 17.0.0",
        ),
    ):
        path = folder / package.tarball
        path.unlink()
        tarball(path, files)
        with pytest.raises(EmulusError, match=message):
            build_emoji(config, report=lambda line: None)
        path.unlink()
        path.symlink_to(packages / package.tarball)
