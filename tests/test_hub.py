"""Names become folders: against a real HTTP server that speaks the hub's protocol, each program in a process anew."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

from emulus.errors import EmulusError
from emulus.hub import fetch

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
# A program that fetches what it is told to, line by line, and says what it told its user.
PROGRAM = """
import io, json, os, resource, sys
from pathlib import Path
from emulus.errors import EmulusError
from emulus.hub import fetch
from emulus.log import set_up_logging
if most := os.environ.get("MOST_BYTES"):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(most), int(most)))
for line in sys.stdin:
    source, revision, cache = json.loads(line)
    sys.stderr = io.StringIO()
    set_up_logging()
    folder = error = None
    try:
        folder = str(fetch(source, revision=revision, cache_dir=Path(cache)))
    except EmulusError as refusal:
        error = str(refusal)
    print(json.dumps([folder, error, sys.stderr.getvalue().splitlines()]), flush=True)
"""


def _checkpoint() -> dict[str, bytes]:
    """The files of a repository: a model in two shards, what belongs to it, and what is not for us."""
    weight_map = {"a": SHARDS[0], "b": SHARDS[1]}
    return {
        "config.json": b'{"model_type": "Emu3"}',
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        SHARDS[0]: save({"a": torch.zeros(64, 64)}),
        SHARDS[1]: save({"b": torch.ones(64, 64)}),
        "emu3.tiktoken": b"IQ== 0\n",
        "emu3_vision_tokens.txt": b"<|image token|>\n",
        "vision/config.json": b"{}",
        "README.md": b"# a model",
        "pytorch_model.bin": b"a pickle",
        "modeling_emu3.py": b"raise SystemExit('code of the repository was run')",
        "checkpoint-7/model.safetensors": save({"a": torch.zeros(1)}),
    }


@dataclass
class Hub:
    """What the server holds, does wrong, and was asked.

    Attributes:
        files: Of the only model, ``some/model``, by commit.
        branches: Names of commits.
        cut: Files whose first transfer ends in the middle.
        fail: Paths that are answered with this status and error code.
        sizes: Sizes that the hub lists where they are not the files'.
        asked: Method and path, or path and range of what was sent, in order.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=lambda: {NEW: _checkpoint()})
    branches: dict[str, str] = field(default_factory=lambda: {"main": NEW})
    cut: set[str] = field(default_factory=set)
    fail: dict[str, tuple[int, str]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    @property
    def sent(self) -> list[str]:
        """The files of which something was sent."""
        return sorted(line.removeprefix("GET ") for line in self.asked if line.startswith("GET "))


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else every answer waits 40 ms

        def do_HEAD(self) -> None:
            self._resolve(body=False)

        def do_GET(self) -> None:
            if self.path.startswith("/api/"):
                self._api()
            else:
                self._resolve(body=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _api(self) -> None:
            _, _, kind, *rest = [unquote(part) for part in urlsplit(self.path).path.split("/")]
            if kind != "models":
                return self._error(404, "")  # huggingface_hub asks other things too
            hub.asked.append("API " + "/".join(rest))
            if rest[:2] != ["some", "model"]:
                return self._error(401, "RepoNotFound")
            if "api" in hub.fail:
                return self._error(*hub.fail["api"])
            commit = hub.branches.get(rest[3], rest[3])
            if commit not in hub.files:
                return self._error(404, "RevisionNotFound")
            listed = []
            for name, content in hub.files[commit].items():
                size = hub.sizes.get(name, len(content))
                listed.append({"rfilename": name, "path": name, "type": "file", "size": size, **_oids(content)})
            answer = {"id": "some/model", "sha": commit, "siblings": listed} if rest[2] == "revision" else listed
            return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body=True)

        def _resolve(self, *, body: bool) -> None:
            _, _, _, _, commit, *parts = urlsplit(self.path).path.split("/")
            name = "/".join(parts)
            hub.asked.append(f"{self.command} {name}")
            if name in hub.fail:
                return self._error(*hub.fail[name])
            content = hub.files[commit][name]
            headers = {"ETag": f'"{_oids(content)["oid"]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            if first:
                hub.asked.append(f"RANGE {name} {first}")
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            if body and name in hub.cut:
                hub.cut.remove(name)
                self._send(200, content[: len(content) // 2], headers, body=True, length=len(content))
                self.close_connection = True
                return None
            return self._send(206 if first else 200, content[first:], headers, body=body)

        def _error(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code}, body=False)

        def _send(
            self, status: int, content: bytes, headers: Mapping[str, str], *, body: bool, length: int | None = None
        ) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            if body:
                self.wfile.write(content)

    return Handler


def _oids(content: bytes) -> dict[str, str]:
    oid = hashlib.sha1(content).hexdigest()
    return {"oid": oid, "blobId": oid}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Hub]]:
    """A server's address, and what it says; one for all tests, as programs read the address when they start."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(server: tuple[str, Hub]) -> Hub:
    """A hub with one model."""
    vars(server[1]).update(vars(Hub()))
    return server[1]


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[frozenset[tuple[str, str]], subprocess.Popen[str]]]:
    """Programs that run, by their settings; huggingface_hub reads its settings once."""
    running: dict[frozenset[tuple[str, str]], subprocess.Popen[str]] = {}
    yield running
    for program in running.values():
        program.communicate()


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    Attributes:
        folder: The folder, if any.
        error: Why there is none.
        lines: What was said besides.
    """

    folder: Path
    error: str
    lines: list[str]


@pytest.fixture
def ask(server, hub, programs, tmp_path):
    """Fetch into ``tmp_path/cache``, in a program with these settings."""

    def run(source: str = "some/model", revision: str | None = None, **settings: str) -> Answer:
        url, _ = server
        settings = {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", **settings}
        key = frozenset(settings.items())
        if key not in programs:
            kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
            programs[key] = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                env={**kept, "HF_HOME": str(tmp_path / "home"), **settings},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        program = programs[key]
        assert program.stdin is not None
        assert program.stdout is not None
        hub.asked.clear()
        program.stdin.write(json.dumps([source, revision, str(tmp_path / "cache")]) + "\n")
        program.stdin.flush()
        folder, error, lines = json.loads(program.stdout.readline())
        return Answer(Path(folder or "no folder"), error or "", lines)

    return run


WANTED = sorted(
    name for name in _checkpoint() if not name.endswith((".md", ".bin", ".py")) and not name.startswith("checkpoint-7")
)


def test_a_model_is_fetched_once_and_then_comes_from_the_cache(hub, ask):
    first = ask()
    assert sorted(p.relative_to(first.folder).as_posix() for p in first.folder.rglob("*") if p.is_file()) == WANTED
    assert all((first.folder / name).read_bytes() == _checkpoint()[name] for name in WANTED)
    assert hub.sent == WANTED
    # No bar where there is no terminal: what is about to be fetched, and what came of it.
    fetching, ready = first.lines
    assert fetching == f"fetching some/model@{NEW}: 0.0 MB into {first.folder.parents[2]}"
    assert ready == f"some/model@{NEW} is in {first.folder}"

    again = ask()
    assert again.folder == first.folder
    assert again.lines == [ready]
    assert hub.asked == ["API some/model/revision/main"]

    assert ask(f"some/model@{NEW}").folder == first.folder
    assert hub.asked == []  # a commit never changes
    offline = ask(HF_HUB_OFFLINE="1")
    assert offline.folder == first.folder
    assert offline.lines == [ready]
    assert hub.asked == []


def test_a_moved_branch_fetches_only_what_changed(hub, ask):
    first = ask()
    hub.files[OLD] = {**_checkpoint(), "config.json": b"{ }"}
    hub.branches |= {"main": OLD, "v1": NEW}
    moved = ask()
    assert moved.folder.name == OLD
    assert (moved.folder / "config.json").read_bytes() == b"{ }"
    assert hub.sent == ["config.json"]
    assert ask("some/model@v1").folder == first.folder  # a tag of what is there already
    assert ask("some/model", revision="v1").folder == first.folder
    assert hub.sent == []


def test_a_pinned_commit_is_not_the_branch(hub, ask):
    hub.files[OLD] = {**_checkpoint(), "config.json": b"{}"}
    pinned = ask(f"some/model@{OLD}")
    assert pinned.folder.name == OLD
    assert (pinned.folder / "config.json").read_bytes() == b"{}"


def test_a_cut_transfer_is_taken_up_where_it_was_cut(hub, ask):
    content = hub.files[NEW][SHARDS[0]] = save({"a": torch.rand(6, 2**20)})
    hub.cut = {SHARDS[0]}
    assert (ask().folder / SHARDS[0]).read_bytes() == content
    assert f"RANGE {SHARDS[0]} {10 * 2**20}" in hub.asked  # huggingface_hub keeps every 10 MiB


def test_half_a_model_is_never_given_and_its_rest_is_fetched_later(hub, ask):
    hub.fail[SHARDS[1]] = (404, "EntryNotFound")
    broken = ask()
    assert broken.error == (
        "fetching some/model@main broke off: the hub answers 404; run the same command again: finished files are kept"
    )
    done = hub.sent
    assert SHARDS[0] in done

    offline = ask(HF_HUB_OFFLINE="1")
    assert "holds only a part of some/model@main, without" in offline.error
    assert SHARDS[1] in offline.error
    assert "and HF_HUB_OFFLINE keeps it off the network; try again with a network" in offline.error
    assert "hf download some/model --revision main" in offline.error

    hub.fail.clear()
    assert ask().folder.name == NEW
    assert sorted(hub.sent + done) == WANTED


def test_a_cache_without_a_listing_is_held_against_its_index(hub, ask):
    folder = ask().folder
    shutil.rmtree(folder.parents[1] / "trees")  # as older versions of huggingface_hub leave it
    offline = {"HF_HUB_OFFLINE": "1"}
    assert ask(**offline).folder == folder
    (folder / SHARDS[0]).resolve().unlink()  # a link to nothing is as good as nothing
    assert SHARDS[0] in ask(HF_HUB_OFFLINE="1").error
    (folder / "config.json").unlink()
    assert "config.json" in ask(f"some/model@{NEW}", HF_HUB_OFFLINE="1").error
    assert ask().folder == folder
    assert hub.sent == [SHARDS[0]]  # config.json's bytes were still there


def test_a_truncated_file_in_the_cache_is_named(hub, ask):
    folder = ask().folder
    blob = (folder / SHARDS[0]).resolve()
    os.truncate(blob, 100)
    assert f"without {SHARDS[0]}, and HF_HUB_OFFLINE" in ask(HF_HUB_OFFLINE="1").error
    assert f"{SHARDS[0]} has another size than on the hub; delete {blob} and try again" in ask().error
    blob.unlink()
    assert ask().folder == folder
    assert hub.sent == [SHARDS[0]]


def test_without_a_network_the_cache_answers_and_says_why(hub, ask):
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    missing = ask(**nowhere).error
    assert missing.startswith("there is no folder some/model here, the cache")
    assert "does not hold some/model@main, and the connection to the hub fails (" in missing

    folder = ask().folder
    answer = ask(**nowhere)
    assert answer.folder == folder
    assert answer.lines[0].startswith("the connection to the hub fails (")
    assert answer.lines[0].endswith("): taking some/model@main as the cache has it")

    for status, code in ((503, ""), (401, "RepoNotFound"), (200, "")):  # the last: a page that is no JSON
        hub.fail["api"] = (status, code)
        answer = ask()
        assert answer.folder == folder
        assert len(answer.lines) == 2


@pytest.mark.parametrize(
    ("source", "revision", "fail", "words"),
    [
        ("ckpt/emoji", None, {}, "there is no folder ckpt/emoji here, and the hub has no model ckpt/emoji that"),
        ("ckpt/emoji", None, {}, "if it is private log in with 'hf auth login' or set HF_TOKEN"),
        ("ckpt/my emoji", None, {}, "there is no folder ckpt/my emoji here, and the hub has no such names"),
        ("some/model", "v9", {}, "some/model has no revision v9; give one of its branches"),
        (f"some/model@{OLD}", None, {}, f"some/model has no revision {OLD}"),
        ("some/model", None, {"api": (403, "")}, "the hub refuses some/model to this login (403); log in"),
        ("some/model", None, {"api": (403, "GatedRepo")}, "some/model is gated: ask for access"),
        ("some/model", None, {"config.json": (403, "GatedRepo")}, "some/model is gated: ask for access"),
        ("some/model", None, {"config.json": (403, "")}, "the hub refuses some/model to this login (403)"),
        ("some/model", None, {"api": (500, "")}, "does not hold some/model@main, and the hub answers 500"),
        ("some/model", None, {"api": (200, "")}, "and the connection to the hub fails ("),
    ],
)
def test_every_refusal_is_one_line_with_a_remedy(hub, ask, source, revision, fail, words):
    hub.fail = fail
    assert words in ask(source, revision).error
    assert "config.json" not in hub.sent


def test_what_is_no_model_or_does_not_fit_is_not_fetched(hub, ask):
    hub.sizes[SHARDS[0]] = 10**18
    assert "some/model needs 1000000000.0 GB more in" in ask().error
    hub.files[OLD] = {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}
    assert "has no .safetensors files, and pickles are not read" in ask(f"some/model@{OLD}").error
    assert hub.sent == []


def test_a_shard_that_the_hub_lacks_is_the_owners_matter(hub, ask):
    del hub.files[NEW][SHARDS[1]]
    assert ask().error == (
        f"some/model@{NEW} was fetched, but {SHARDS[1]} is missing on the hub itself; "
        "choose another revision, or tell the model's owner"
    )


def test_what_the_disk_refuses_is_said_of_the_disk(ask, tmp_path):
    assert ask(MOST_BYTES="9000").error.startswith(f"could not write {tmp_path}/cache (File too large)")


def test_a_path_is_itself_and_needs_no_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    paths = ["owner/name", "emoji", "runs/emoji/model", "./emoji", "../a/b", "/no/where", "a\\b/c", "a/b@c/d", "a/b@"]
    assert [fetch(path) for path in paths] == [Path(path) for path in paths]
    assert fetch(Path("owner/name")) == Path("owner/name")
    assert fetch("~/models") == Path.home() / "models"
    program = "import sys; from emulus.hub import fetch; fetch('.'); sys.exit('huggingface_hub' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_folder_that_is_missing_beside_others_is_not_looked_for_on_the_hub(hub, ask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/emoji-64").mkdir(parents=True)
    with pytest.raises(EmulusError, match="no folder runs/emoji-46; did you mean 'emoji-64'"):
        fetch("runs/emoji-46")
    Path("some").mkdir()
    with pytest.raises(EmulusError, match="no folder some/model; it holds no folders"):
        fetch("some/model")
    assert not hub.asked
    assert Path(ask("some/model@main").folder).name == NEW


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        ("", None, "no model is named"),
        (".", "v1", ". is a path and has no revision v1"),
        ("some/model@v1", "v2", "some/model@v1 and revision v2 contradict each other"),
    ],
)
def test_what_cannot_be_meant_is_refused(source, revision, words):
    with pytest.raises(EmulusError, match=words):
        fetch(source, revision=revision)
