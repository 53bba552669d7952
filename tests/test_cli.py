"""The command line as a user meets it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from emulus.cli import VERBS, main
from emulus.errors import EmulusError
from emulus.media import Clip, read_video, write_video
from emulus.pipeline import Emulus


@pytest.fixture(scope="module")
def model(tiny: Emulus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder)
    return folder


def test_help_does_not_import_torch() -> None:
    code = "import sys; from emulus.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    # The flags' own help ends the process, as is usual; the few verbs without flags come back.
    with contextlib.suppress(SystemExit):
        assert main([verb, "--help"]) == 0
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "did you mean 'pretrain'"),
        (["pretrain", "emoji-46"], "did you mean 'emoji-64'"),
        (["pretrain"], "name a recipe"),
        (["data", "emojy"], "did you mean 'emoji'"),
        (["info", "nowhere/at/all"], "no folder nowhere/at/all"),
        (["info", "emojy"], "'emojy' is neither a folder nor a recipe"),
        (["generate"], "needs a prompt"),
        (["info", __file__], "is no data set"),
        (["pretrain", "demo-tiny", "--config", "."], "cannot be read"),
        (["pretrain", "demo-tiny", "--train.steps", "0"], "steps must be at least 1"),
        (["tokenize", "demo-tiny", "--views", "0"], "views must be at least 1"),
        (["pretrain", "demo-tiny", "--tokens", "nowhere"], "holds no tokens"),
        (["tokenize", "demo-tiny", "--vision", "nowhere"], "no folder nowhere"),
        (["tokenize", "demo-tiny", "--out", "run\udcff"], "is not valid UTF-8"),
        (["tokenize", "data\udcff", "--out", "tokens"], "is not valid UTF-8"),
        (["tokenize", "demo-tiny", "--fps", "inf"], "fps"),
        (["pretrain", "demo-tiny", "--out", "run\udcff"], "is not valid UTF-8"),
        (["pretrain", "demo-tiny", "--out", __file__], "is not a folder"),
        (["tokenizer-train", "demo-tiny", "--out", __file__], "is not a folder"),
        (["scaling", "demo-tiny", "--out", __file__], "is not a folder"),
        (["report", "run\udcff"], "is not valid UTF-8"),
        (["report", ".", "--out", "."], "is a folder; name a file"),
        (["pretrain", "demo-tiny", "--train.steps", "100000000"], "steps must be below"),
        (["pretrain", "demo-tiny", "--train.weight-decay", "inf"], "weight_decay must be finite"),
        (["pretrain", "demo-tiny", "--tokens", "a", "--dry-run", "0"], "--dry-run takes a number of processes"),
        (["pretrain", "demo-tiny", "--tokens", "a", "--dry-run", "-1"], "--dry-run takes a number of processes"),
        (["pretrain", "demo-tiny", "--tokens", "a", "--dry-run", "b"], "--dry-run takes a number of processes"),
        (["pretrain", "demo-tiny", "--dry-run=0"], "--dry-run takes a number of processes"),
    ],
)
def test_user_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert "Traceback" not in error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize("arguments", [["--help"], ["info", "demo-tiny"]])
def test_a_full_output_is_named(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "emulus", *arguments]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert (
        result.stderr
        == "emulus: could not write to standard output (No space left on device); free some space, or redirect it\n"
    )


def test_dry_runs_of_any_number_of_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--dry-run"], ["--dry-run", "2"], ["--dry-run=2"], ["--dry-run", "--train.steps", "3"]):
        assert main(["pretrain", "demo-tiny", *words, "--tokens", str(tmp_path / "none")]) == 0
        assert f"{tmp_path / 'none'}: not there yet" in capsys.readouterr().out


def test_draw_describe_animate_continue(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, clip, longer = tmp_path / "a.png", tmp_path / "a.webp", tmp_path / "b.gif"
    at = ["--model", str(model)]
    assert main(["generate", "a red apple", *at, "--out", str(picture), "--num-images", "2", "--seed", "5"]) == 0
    assert capsys.readouterr().out.split() == [str(picture), str(tmp_path / "a-2.png")]
    assert Image.open(picture).size == (16, 16)
    assert Image.open(picture).tobytes() != Image.open(tmp_path / "a-2.png").tobytes()
    assert main(["describe", str(picture), *at]) == 0
    assert main(["ask", str(picture), "what is it?", *at]) == 0
    assert main(["animate", "a red apple", *at, "--out", str(clip), "--num-frames", "4"]) == 0
    assert len(read_video(clip).frames) == 4
    assert main(["continue", str(clip), *at, "--out", str(longer)]) == 0
    assert len(read_video(longer).frames) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", " "], "prompt is empty"),
        (["generate", "a cat", "--height", "18"], "the nearest is 16"),
        (["generate", "a cat", "--temperature", "-1"], "temperature"),
        (["generate", "a cat " * 200], "longest sequence is 256"),
        (["animate", "a cat", "--num-frames", "6"], "multiple of 4"),
        (["generate", "a cat", "--out", "cat.xyz"], "xyz"),
        (["describe", "nowhere.png"], "nowhere.png"),
        (["continue", "nowhere.webp"], "nowhere.webp"),
        (["generate", "a cat", "--num-images", "0"], "--num-images is 0 but must be"),
        (["generate", "a cat", "--height", "0"], "height is 0 but must be"),
        (["animate", "a cat", "--out", "cat.png"], "cat.png"),
    ],
)
def test_bad_requests(model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--model", str(model)]) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_a_broken_film_says_so(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film = tmp_path / "film.mp4"
    write_video(Clip(tuple(Image.new("RGB", (16, 16), (i * 30, 0, 0)) for i in range(8)), 8.0), film)
    film.write_bytes(film.read_bytes()[:200])
    for verb in ("continue", "describe"):
        assert main([verb, str(film), "--model", str(model)]) == 1
        error = capsys.readouterr().err
        assert "film.mp4 is neither an image nor a clip" in error


def test_a_folder_that_cannot_be_made(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "cat.png"
    assert main(["generate", "a cat", "--model", str(model), "--out", str(out)]) == 1
    assert "is not a folder" in capsys.readouterr().err


def test_info(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(model), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["vocabulary"]["visual"][1] - found["vocabulary"]["visual"][0] == 64
    assert found["tasks"] == ["draw", "animate", "continue", "caption", "answer"]
    assert main(["info", "emoji-64"]) == 0
    about = yaml.safe_load(capsys.readouterr().out)["about"]
    assert about.startswith("Pictures in four styles")
    assert "Commands:" in about
    assert main(["info", "--sizes"]) == 0
    assert "emu3-8b" in capsys.readouterr().out


def test_info_of_published_models(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From small files and headers, in either layout: what it is, what it needs, what it can do."""
    found = {}
    for folder in sorted(published.iterdir()):
        assert main(["info", str(folder), "--json"]) == 0
        found[folder.name] = json.loads(capsys.readouterr().out)
    assert {name: model["layout"] for name, model in found.items() if name.endswith("-hf")} == {
        "Emu3-Chat-hf": "transformers",
        "Emu3-Gen-hf": "transformers",
        "Emu3-Stage1-hf": "transformers",
    }
    assert found["Emu3-Gen"]["tasks"] == ["draw"]
    assert found["Emu3-Chat"]["tasks"] == ["caption", "answer", "chat"]
    assert found["Emu3-Stage1"]["preset"] == "emu3-base"
    gen = found["Emu3-Gen"]
    assert gen["decoder"]["context"] == 9216
    assert gen["decoder"]["parameters"] == found["Emu3-Gen-hf"]["decoder"]["parameters"]
    assert set(gen["decoder"]["memory"]) == {"float32", "bfloat16", "int8", "int4", "fp8"}
    words = gen["vocabulary"]["text"][1]
    assert gen["vocabulary"]["visual"] == [words + 211, words + 211 + 32_768]
    assert gen["vocabulary"]["specials"]["bos <|extra_203|>"] == words + 3 + 203
    assert gen["defaults"]["top_k"] == 2048
    assert "vision" not in gen
    assert found["Emu3-VisionTokenizer"]["vision"]["spatial_factor"] == 8


def test_a_question_about_several_pictures(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the names of the hub; the decoder's folder has no vision tokenizer, and the released one is taken."""
    monkeypatch.chdir(published.parent)
    for name, size in {"a.png": (40, 24), "b.png": (24, 30)}.items():
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / name)
    chat = ["--model", "BAAI/Emu3-Chat", "--max-new-tokens", "2"]
    assert main(["ask", "a.png", "b.png", "which one?", *chat]) == 0
    assert "BAAI/Emu3-Chat holds no vision tokenizer: taking BAAI/Emu3-VisionTokenizer" in capsys.readouterr().err
    assert main(["describe", "a.png", *chat, "--vision", "BAAI/Emu3-Gen-hf"]) == 0
    assert "holds no vision tokenizer" not in capsys.readouterr().err


def test_foreign_and_damaged_models(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A vocabulary from another model, and a weight file cut short."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(model)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    vocabulary = json.loads((copy / "vocabulary.json").read_text())
    (copy / "vocabulary.json").write_text(json.dumps({**vocabulary, "visual_size": 32}))
    assert main(["generate", "a cat", "--model", str(copy)]) == 1
    assert "different models" in capsys.readouterr().err
    (copy / "vocabulary.json").write_text(json.dumps(vocabulary))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["generate", "a cat", "--model", str(copy)]) == 1
    assert "damaged or truncated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "--jsn"], "there is no flag --jsn; did you mean --json? see emulus info --help"),
        (["convert", "a"], "emulus convert needs DST, --to"),
        (["pretrain", "demo-tiny", "--train.stepz", "3"], "did you mean --train.steps? see emulus pretrain --help"),
        (["evaluate", "--quik"], "did you mean --quick? see emulus evaluate --help"),
    ],
)
def test_wrong_flags_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("emulus: ")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("word", ["a\udcff", "\ud800", "b\n\udcff\x1b[2J"])
def test_names_that_are_not_utf8_are_refused_at_the_start(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "demo-tiny", "--out", word]) == 1
    error = capsys.readouterr().err
    assert "is not valid UTF-8; rename" in error
    assert len(error.splitlines()) == 1
    error.encode()


def raising(error: BaseException) -> Any:
    def command(arguments: object) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b cannot be read or written (No space left on"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 9999), "(File name too long); give it a shorter name"),
        (OSError(errno.EIO, "Input/output error"), "a file cannot be read or written (Input/output error); check"),
        (PermissionError(errno.EACCES, "Permission denied", b"a\xff"), "change its permissions, or name another place"),
        (OSError("no number"), "a file cannot be read or written (no number); check"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 4 bytes"), "not enough memory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"), "is not valid UTF-8"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "is not valid UTF-8"),
        (EmulusError("a\nb\x1b[2J" + "c" * 10**6), "emulus: a b\\x1b[2Jccc"),
        (KeyboardInterrupt(), "emulus: interrupted"),
    ],
)
def test_what_nobody_expected_is_one_line(
    error: BaseException, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emulus.commands.info.info", raising(error))
    assert main(["info"]) in (1, 130)
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert len(said) < 1100


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emulus.commands.info.info", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["info"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
@pytest.mark.parametrize(
    ("redirected", "message"),
    [
        ("> /dev/full", "could not write to standard output (No space left on device)"),
        (">&-", "could not write to standard output (it is closed)"),
    ],
)
@pytest.mark.parametrize("arguments", ["--help", "info --sizes"])
def test_an_output_that_takes_nothing(arguments: str, redirected: str, message: str) -> None:
    command = f"{sys.executable} -m emulus {arguments} {redirected}"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_messages_go_nowhere_if_stderr_is_closed() -> None:
    command = f"{sys.executable} -m emulus info nowhere/at/all 2>&-"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")


def test_letters_that_the_terminal_cannot_show_are_spelt(model: Path) -> None:
    folder = model.with_name("mödel")
    folder.symlink_to(model)
    command = [sys.executable, "-m", "emulus", "info", str(folder)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, check=True, env=environment)
    assert rb"m\xf6del" in result.stdout


def test_info_finds_the_shipped_model_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["info"]) == 0
    assert "decoder" in capsys.readouterr().out


def test_a_source_named_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert main(["tokenize", str(tmp_path), str(tmp_path / "link"), "--out", str(tmp_path / "out")]) == 1
    assert "a source is named twice" in capsys.readouterr().err
