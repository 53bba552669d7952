"""A folder's path, or a model's name on the Hugging Face hub -> a folder on this disk.

The cache and the transfer are ``huggingface_hub``'s: what other programs fetched is found, and what is fetched here
they find. It is imported only when a name is the hub's; a folder needs neither it nor a network.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from emulus.codec import decode
from emulus.errors import EmulusError, did_you_mean, one_line, shown
from emulus.files import disk_errors, read_config

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

EMU3_VISION = "BAAI/Emu3-VisionTokenizer"

# What a checkpoint is read from, at the top and in vision/; "*" matches "/" too. Pickles and code are never wanted,
# and neither are the older checkpoints that some repositories keep in folders of their own.
_WANTED = ["*.json", "*.safetensors", "*.tiktoken", "*.txt"]
_UNWANTED = ["[!v]*/*", "*/*/*"]

# One slash, and a revision without one unless it is a pull request's (refs/pr/1).
_HUB_NAME = re.compile(r"([^/\\@.~][^/\\@]*/[^/\\@]+)(?:@([^/\\]+|refs/.+))?")

_MOST_NAMED = 20
"""Folders that a message lists."""

_FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger(__name__)


def fetch(source: str | Path, *, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """The folder that a path or a hub's name means, downloaded if it is not here yet.

    What exists is itself, and so is what can only be a path: absolute, without a slash or with several, or beginning
    with ``.`` or ``~``; whether it is there is for its reader to say. A folder ``owner`` that is here makes a path of
    ``owner/name``, too. Any other ``owner/name``, and any ``owner/name@revision``, is a model on the hub. Only files
    that Emulus reads are fetched, never pickles or code. A connection that breaks is taken up where it broke, and after
    a stopped program only the file that it was at is fetched anew. Without a network, or with ``HF_HUB_OFFLINE=1``, the
    cache answers if it holds the whole model.

    Args:
        source: A folder, ``owner/name`` or ``owner/name@revision``.
        revision: A branch, tag or commit hash of the hub's model where ``source`` names none; by default ``main``.
        cache_dir: Where downloads are kept; by default huggingface_hub's own cache (``HF_HUB_CACHE``, ``HF_HOME``).

    Returns:
        A folder. That of a hub's model is named by the commit it is from, and holds every shard of it.

    Raises:
        EmulusError: A folder ``owner`` is here and has no ``name``, the hub has no such model or revision or wants a
            login, it cannot be reached and the cache does not hold all of the model, the transfer broke off, or the
            disk is full.
    """
    text = source.as_posix() if isinstance(source, Path) else source
    if not text:
        raise EmulusError("no model is named; give a folder, or owner/name on the hub")
    name = None if os.path.exists(text) else _HUB_NAME.fullmatch(text)
    if name is None:
        if revision is not None:
            raise EmulusError(f"{text} is a path and has no revision {revision}; leave the revision out")
        return Path(text).expanduser()
    # The released models' own tokenizer is asked for by name, also where others of its owner lie in a folder here.
    if revision is None and not name[2] and text != EMU3_VISION:
        _refuse_missing_folder(text)
    if name[2] and revision not in (None, name[2]):
        raise EmulusError(f"{text} and revision {revision} contradict each other; give one of them")
    folder = _from_hub(name[1], revision or name[2] or "main", cache_dir)
    logger.info("%s@%s is in %s", name[1], folder.name, folder)
    return folder


def _refuse_missing_folder(path: str) -> None:
    """Say what else a folder holds: where the first half of ``owner/name`` is here, hardly anyone means the hub."""
    parent = Path(path).parent
    if parent.is_dir() and os.access(parent, os.R_OK):
        found = sorted(folder.name for folder in parent.iterdir() if folder.is_dir())
        hint = did_you_mean(Path(path).name, found[:_MOST_NAMED]) or "; it holds no folders"
        raise EmulusError(f"there is no folder {path}{hint} (a model on the hub is {path}@main)")


def _from_hub(repository: str, revision: str, cache_dir: Path | None) -> Path:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
    folder: Path | None = None
    lacking: list[str] = []
    try:
        folder, lacking = _cached(repository, revision, cache)
        if folder is not None and not lacking and folder.name == revision:
            return folder  # what a commit's hash names never changes: the hub need not be asked
        info = HfApi().model_info(
            repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except Exception as error:
        if not _is_the_hubs(error):
            raise
        if folder is None or lacking:
            raise EmulusError(_refusal(error, repository, revision, cache, lacking)) from error
        if not isinstance(error, OfflineModeIsEnabled):  # which was the user's wish
            logger.warning("%s: taking %s@%s as the cache has it", _reason(error), repository, revision)
        return folder
    if folder is not None and not lacking and folder.name == info.sha:
        return folder
    return _download(info, repository, revision, cache)


def _snapshot(repository: str, revision: str, cache: Path, **options: Any) -> Path:
    """What is read of a revision, as huggingface_hub keeps it."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repository,
        revision=revision,
        cache_dir=cache,
        allow_patterns=_WANTED,
        ignore_patterns=_UNWANTED,
        **options,
    )
    return Path(folder)


def _cached(repository: str, revision: str, cache: Path) -> tuple[Path | None, list[str]]:
    """The folder of a revision in the cache, if there is one, and the files it lacks to be a whole model."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = _snapshot(repository, revision, cache, local_files_only=True)
    except IncompleteSnapshotError as error:
        folder = Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return None, []
    try:
        listed = {file.path: file.size for file in get_cached_repo_tree(repository, revision=revision, cache_dir=cache)}
    except CachedRepoTreeNotFoundError:  # fetched by an older huggingface_hub, which kept no listing
        return folder, _lacking(folder, {})
    return folder, _lacking(folder, {name: listed[name] for name in _wanted(listed)})


def _lacking(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """What a folder lacks: of the files that the hub lists, at their sizes, and of those that its own index lists."""
    lacking = {name for name, size in sizes.items() if _size(folder / name) != size}
    needed = {"config.json"}
    for index in folder.rglob("*.safetensors.index.json"):
        here = index.relative_to(folder).parent
        if not index.exists() or (here / index.name).as_posix() in lacking:
            continue
        weight_map = decode(dict[str, str] | None, read_config(index).get("weight_map"), f"{index}: weight_map")
        needed |= {(here / shard).as_posix() for shard in set((weight_map or {}).values())}
    return sorted(lacking | {name for name in needed if _size(folder / name) is None})


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:  # missing, or a link to what was removed
        return None


def _wanted(names: Iterable[str]) -> list[str]:
    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatch(name, pattern) for pattern in patterns)

    return [name for name in names if matches(name, _WANTED) and not matches(name, _UNWANTED)]


class _Bar(tqdm):
    """A progress bar on a terminal, and none elsewhere."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Names of files come from the hub.
        what = one_line(str(kwargs.get("desc") or ""), 60)
        super().__init__(*args, **{**kwargs, "desc": what, "disable": not sys.stderr.isatty(), "leave": False})


def _download(info: ModelInfo, repository: str, revision: str, cache: Path) -> Path:
    _announce(info, repository, cache)
    try:
        # One file at a time: of a file that is not finished when the program is stopped nothing is kept, and a shard
        # is gigabytes.
        folder = _snapshot(repository, revision, cache, max_workers=1, tqdm_class=_Bar)
    except Exception as error:
        network = _is_the_hubs(error)
        if isinstance(error, OSError) and error.errno and not network:
            with disk_errors(cache):
                raise
        # Of a file that is too short, and of what the transfer's compiled part meets, only the bare class is known.
        if not network and not isinstance(error, (OSError, RuntimeError)):
            raise
        raise EmulusError(_breakage(error, repository, revision)) from error
    lacking = _cached(repository, folder.name, cache)[1]
    if lacking:
        first = folder / lacking[0]
        what = f"{repository}@{folder.name} was fetched, but {_listing(lacking)}"
        if first.exists():
            raise EmulusError(f"{what} has another size than on the hub; delete {first.resolve()} and try again")
        raise EmulusError(f"{what} is missing on the hub itself; choose another revision, or tell the model's owner")
    return folder


def _announce(info: ModelInfo, repository: str, cache: Path) -> None:
    """Say what is about to be fetched, once it is certain that it is a model and that it fits on the disk."""
    files = {file.rfilename: file for file in info.siblings or []}
    wanted = [files[name] for name in _wanted(files)]
    if not any(file.rfilename.endswith(".safetensors") for file in wanted):
        raise EmulusError(
            f"{repository}@{info.sha} has no .safetensors files, and pickles are not read, since they could run code; "
            "choose a revision that has them, or convert it first"
        )
    store = cache / f"models--{repository.replace('/', '--')}"
    size = 0
    for file in wanted:
        blob = file.lfs.sha256 if file.lfs else str(file.blob_id)
        if (
            not (store / "snapshots" / str(info.sha) / file.rfilename).exists()
            and not (store / "blobs" / blob).exists()
        ):
            size += file.size or 0
    disk = next(folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if size > free:
        raise EmulusError(
            f"{repository} needs {_bytes(size)} more in {cache}, where {_bytes(free)} are free; "
            "free some space, or set HF_HOME to a larger disk"
        )
    logger.info("fetching %s@%s: %s into %s", repository, info.sha, _bytes(size), cache)


def _is_the_hubs(error: Exception) -> bool:
    """Whether an error is the hub's answer or the network's doing, not this disk's or a bug."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if isinstance(error, OSError) and error.errno in _FULL:
        return False
    known = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError, TimeoutError)
    # A page that is not the hub's (that of a hotel's network, say) is no JSON. The HTTP library's own errors have no
    # common base with anything, and which library it is depends on huggingface_hub's version.
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, (*known, json.JSONDecodeError)) or library in ("httpx", "httpx2", "httpcore", "httpcore2")


def _refusal(error: Exception, repository: str, revision: str, cache: Path, lacking: list[str]) -> str:
    """Why the hub was asked in vain for a model that the cache does not hold, and what to do."""
    answer = _answer(error, repository, revision)
    if answer:
        return answer
    remedy = (
        f"run 'hf download {repository} --revision {revision}' where there is a network and give the folder it prints"
    )
    if lacking:
        return (
            f"the cache {cache} holds only a part of {repository}@{revision}, without {_listing(lacking)}, "
            f"and {_reason(error)}; try again with a network, or {remedy}"
        )
    return (
        f"there is no folder {repository} here, the cache {cache} does not hold {repository}@{revision}, "
        f"and {_reason(error)}; {remedy}"
    )


def _breakage(error: Exception, repository: str, revision: str) -> str:
    """Why a transfer ended early, and what to do."""
    return _answer(error, repository, revision) or (
        f"fetching {repository}@{revision} broke off: {_reason(error)}; "
        "run the same command again: finished files are kept"
    )


def _answer(error: Exception, repository: str, revision: str) -> str | None:
    """What the hub's "no" means, and what to do; ``None`` if it is not a "no"."""
    from huggingface_hub import errors

    here = f"there is no folder {repository} here"
    log_in = "log in with 'hf auth login' or set HF_TOKEN"
    match error:
        case errors.LocalEntryNotFoundError() if isinstance(error.__cause__, Exception):
            return _answer(error.__cause__, repository, revision)
        case errors.HFValidationError():
            return f"{here}, and the hub has no such names; give a folder, or owner/name"
        case errors.GatedRepoError():
            return f"{repository} is gated: ask for access on its page on the hub, then {log_in}"
        case errors.RepositoryNotFoundError():
            return (
                f"{here}, and the hub has no model {repository} that may be seen without a login or with yours; "
                f"correct the name, or if it is private {log_in}"
            )
        case errors.RevisionNotFoundError():
            return f"{repository} has no revision {revision}; give one of its branches, tags or full commit hashes"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"the hub refuses {repository} to this login ({error.response.status_code}); {log_in} anew"
    return None


def _reason(error: BaseException) -> str:
    """What is in the way, in a few words."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    match error:
        case LocalEntryNotFoundError() if error.__cause__ is not None:
            return _reason(error.__cause__)
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE keeps it off the network"
        case HfHubHTTPError():
            return f"the hub answers {error.response.status_code}"
    words = str(error).strip() or type(error).__name__
    return f"the connection to the hub fails ({shown(words, quote=False)})"


def _listing(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
