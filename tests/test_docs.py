"""Every command and every line of Python in the README and the docs, run as written.

They run in a folder where ``checkpoints/emoji`` and ``BAAI/Emu3-Gen`` and its like are tiny models, and
``data/emoji`` a few squares; training, evaluation and long answers get flags that make them short.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from emulus.cli import VERBS, main
from emulus.commands.demo import DemoOptions, show
from emulus.pipeline import Emulus

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

SHORT = {
    "tokenizer-train": ["--train.steps", "1", "--pictures-per-batch", "2", "--evaluation-items", "1"],
    "tokenize": ["--views", "1", "--text-size", "300"],
    "pretrain": ["--train.steps", "1", "--rows-per-step", "1", "--evaluation-documents", "2", "--size", "tiny"],
    "evaluate": shlex.split(
        "--pictures 2 --clips 1 --training-items 2 --choice-groups 0 --rank-groups 0 --files 1 --answers 2 --drawings 2"
        " --various 0 --continuations 1 --animations 1 --sweeps 2 --show.reconstructions 1 --show.reconstructed-clips 1"
        " --show.pictures 1 --show.clips 1 --show.continuations 1 --show.captions 1"
    ),
    "scaling": shlex.split(
        "--sizes tiny emoji-3m emoji-6m --token-counts 1280 2560 3840 --held-out-size emoji-10m --held-out-tokens 3840"
        " --base.row-tokens 1280 --base.rows-per-step 1 --base.evaluation-documents 2 --draws 10"
    ),
    "demo": ["--steps-share", "0"],
    "describe": ["--max-new-tokens", "4"],
    "ask": ["--max-new-tokens", "4"],
}
NEEDS_A_NETWORK = {"data"}


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the page's blocks of code, in order."""
    return re.findall(r"```(bash|python)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.startswith("emulus ")]


@pytest.fixture
def workplace(tiny: Emulus, shapes: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert published.parent == tmp_path
    tiny.save(tmp_path / "checkpoints/emoji")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/emoji").symlink_to(shapes)
    (tmp_path / "docs").symlink_to(REPOSITORY / "docs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block(workplace: Path) -> None:
    """In reading order, README first: a page may use what an earlier one made."""
    languages = set()
    for page in PAGES:
        for language, block in blocks(page):
            languages.add(language)
            if language == "python":
                exec(compile(block, page.name, "exec"), {})
            for words in commands(block):
                run(words)
    assert languages == {"bash", "python"}


def run(words: list[str]) -> None:
    assert words[0] in VERBS
    if words[0] in NEEDS_A_NETWORK:
        with pytest.raises(SystemExit) as end:
            main([*words, "--help"])
        assert end.value.code == 0
    else:
        assert main([*words, *SHORT.get(words[0], [])]) == 0, words


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_two_commands() -> None:
    """The README's two commands are the Makefile's, and CI runs the second."""
    makefile = (REPOSITORY / "Makefile").read_text()
    for command in ("demo", "test"):
        assert f"make {command} " in (REPOSITORY / "README.md").read_text()
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE)
    assert "make test" in (REPOSITORY / ".ci/run").read_text()


def test_demo(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The main job from end to end, on few items: trains, measures, shows, and ends with the page's path."""
    assert main(["demo", "--steps-share", "0.001"]) == 0
    first, last = capsys.readouterr().out.strip().splitlines()
    assert last == f"the report: {first}"
    text = Path(first).read_text(encoding="utf-8")
    for done in ("Pictures drawn", "Clips drawn", "Clips continued", "Captions written", "Questions answered"):
        assert done in text
    assert "Trained from nothing just now" in text
    assert text.count("<img") > 10


def test_the_first_page_of_the_demo(workplace: Path) -> None:
    """It is there with all five tasks before anything is trained."""
    options = DemoOptions(model=Path("checkpoints/emoji"), data=Path("data/emoji"), out=workplace / "out")
    page = workplace / "out/report.html"
    sections = show(options, page)
    assert [section.title for section in sections] == [
        "Pictures drawn from names",
        "Clips drawn from names",
        "Clips continued from their first half",
        "Captions written",
        "Questions answered",
        "Reconstructions",
    ]
    assert page.read_text(encoding="utf-8").count("<img") > 10


def test_pictures_of_the_readme_are_there() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for picture in re.findall(r'<img src="([^"]+)"', text):
        assert (REPOSITORY / picture).exists(), picture
