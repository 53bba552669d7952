"""items -> ids on disk. Every picture, clip and text is encoded once; training never touches pixels.

A tokens folder holds everything that pretraining needs: shards of records (see :mod:`emulus.data.records`) with their
``manifest.jsonl``, the text tokenizer, ``vocabulary.json``, ``vision/`` (the tokenizer that made the codes) and
``tokens.json`` (the settings), which is written last.

The work is a list of units, one shard each, that follows from the sources and the settings alone. A shard without its
line in the manifest does not exist, so what is missing is known at once, and it does not matter who makes it
(:mod:`emulus.data.workers`).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, cast

from emulus.config import to_dict
from emulus.data.encoder import Unit, as_asked
from emulus.data.item import KINDS, Item, Kind, Split
from emulus.data.records import ShardLine, add_to_manifest, lengths_path, only_run, read_manifest
from emulus.data.source import even, open_source
from emulus.data.tokenize_config import TokenizeConfig
from emulus.data.tokens import SETTINGS, Tokens, vision_digest
from emulus.data.workers import finished
from emulus.device import pick_device
from emulus.errors import EmulusError
from emulus.files import read_json, write_json
from emulus.hub import EMU3_VISION, fetch
from emulus.layouts import inspect_folder, read_text
from emulus.log import logger, progress_bar
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.weights import load_vision_tokenizer_from, save_vision_tokenizer
from emulus.tokenizer.vocabulary import Vocabulary

MAKING = "making.json"
_UNITS_OF: dict[Kind, float] = {"image": 1, "video": 1 / 8, "text": 8}
"""How many times ``shard_items`` a shard of a kind has: about as many ids each."""
_TRAINING_TEXTS, _TRAINING_LETTERS = 20_000, 4096
"""Of how many texts, and of how much of each, a text vocabulary is made beside the captions."""
_TEMPORARY = re.compile(r"\..+\.[0-9]+\.tmp(\..+)?")
"""What :mod:`emulus.files` calls a file or folder that is not whole yet."""
_NAMED = 3
"""How many skipped items the log names; the manifest names all."""

# What changes neither the plan nor what ids mean; that of tokenizers and sources is told by their contents. A run
# that was out of memory goes on with another batch, or on another device.
_FREE = ("sources", "out", "vision", "vocabulary", "batch", "workers", "readers", "engine", "device")


@dataclass(frozen=True, kw_only=True)
class _Words:
    """A text tokenizer and a vocabulary that exist already."""

    text: TextTokenizer
    vocabulary: Vocabulary


def tokenize(config: TokenizeConfig) -> Path:
    """Encode data sets, going on where an earlier call with the same settings was stopped.

    Any number of processes make the same bytes. Whatever stops them, no more than the shards that are being made are
    lost. An item that cannot be read or written is left out, counted and named in the manifest.

    Args:
        config: What, with what, to where.

    Returns:
        ``config.out``.

    Raises:
        EmulusError: The folder holds tokens made with other settings or is being written by another run, an input is
            missing or damaged, or a source vanished meanwhile.
    """
    words, vision = _tokenizers(config)
    _check_size(config, vision.config)
    items = _open(config.sources)
    settings = _settings(config, items, words, vision)
    units = plan(config, items)
    if _holds(config.out, settings) and not _missing(config.out, units):
        logger.info(f"{config.out} is complete")
        return config.out
    with only_run(config.out):
        _holds(config.out, settings)  # another run may have ended meanwhile
        _write(config, settings, items, units, words, vision)
    return config.out


def _write(
    config: TokenizeConfig,
    settings: dict[str, Any],
    items: Sequence[Item],
    units: Sequence[Unit],
    words: _Words | None,
    vision: VisionTokenizer,
) -> None:
    """Make what is missing in the folder, which nobody else writes to."""
    write_json(config.out / MAKING, settings)
    (config.out / SETTINGS).unlink(missing_ok=True)
    if not (config.out / "vocabulary.json").exists():
        save_vision_tokenizer(vision, config.out / "vision")
        words = words or _train(config, items, vision.config.codebook_size)
        words.text.save(config.out)
        words.vocabulary.save(config.out / "vocabulary.json")
    _make(config, _missing(config.out, units), len(units), vision)
    names = {unit.name for unit in units}
    rows = _count(config, [line for line in read_manifest(config.out) if line.name in names])
    write_json(config.out / SETTINGS, {**settings, "sources": to_dict(config)["sources"], "rows": rows})
    (config.out / MAKING).unlink()


def plan(config: TokenizeConfig, items: Sequence[Item]) -> list[Unit]:
    """Divide the work into units of one split and kind each, in the order of the items.

    Args:
        config: Which splits, and how large a shard is.
        items: Of all sources.
    """
    units = []
    for split in cast("tuple[Split, ...]", config.splits):
        for kind in KINDS:
            chosen = [item for item in items if (item.split, item.kind) == (split, kind)]
            size = max(int(config.shard_items * _UNITS_OF[kind]), 1)
            units += [
                Unit(split=split, kind=kind, number=number, items=tuple(chosen[start : start + size]))
                for number, start in enumerate(range(0, len(chosen), size))
            ]
    return units


def _open(sources: Sequence[Path]) -> list[Item]:
    items: list[Item] = []
    for path in sources:
        source = open_source(path)
        logger.info(f"{path}: {source.counts()}")
        items += source
    return items


def _make(config: TokenizeConfig, missing: Sequence[Unit], planned: int, vision: VisionTokenizer) -> None:
    """Make what is missing; a shard exists from the moment its line is in the manifest."""
    sizes = {unit.name: len(unit.items) for unit in missing}
    logger.info(f"{config.out}: encoding {sum(sizes.values())} items into {len(missing)} of {planned} shards")
    _remove_temporaries(config.out)
    with (
        _ended_by_sigterm(),
        progress_bar(sum(sizes.values()), what="encoding", unit=" items") as bar,
        closing(finished(config, missing, vision)) as lines,
    ):
        for line in lines:
            add_to_manifest(config.out, line)
            bar.update(sizes[line.name])


def _missing(out: Path, units: Sequence[Unit]) -> list[Unit]:
    """Units whose shard has no line or is not there; what was deleted since is made again."""
    done = {line.name for line in read_manifest(out) if _size(out / line.name) == line.bytes}
    return [unit for unit in units if unit.name not in done]


def _remove_temporaries(out: Path) -> None:
    """What killed runs left; a worker of theirs that still writes finds its file gone, and ends."""
    for folder in (out, out / "vision"):
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process as an exception would, so that it ends its workers too."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield  # whoever set a handler knows better
        return

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _size(shard: Path) -> int:
    return sum(path.stat().st_size for path in (shard, lengths_path(shard)) if path.is_file())


def _count(config: TokenizeConfig, lines: Sequence[ShardLine]) -> dict[str, int]:
    """Rows by split and kind, told together with what was left out."""
    rows = Counter[str]()
    for line in lines:
        rows[f"{line.split} {line.kind}"] += line.rows
    skipped = [each for line in lines for each in line.skipped]
    if not rows.total():
        first = f"; the first: {skipped[0].id}: {skipped[0].reason}" if skipped else ""
        raise EmulusError(f"none of the items could be encoded{first}; mend the sources and choose another --out")
    tokens = sum(line.tokens for line in lines)
    logger.info(f"{config.out}: {dict(rows)} rows, {tokens:,} ids")
    if skipped:
        named = "; ".join(f"{each.id}: {each.reason}" for each in skipped[:_NAMED])
        more = f"; and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        logger.warning(f"left out {len(skipped)} items, all named in {config.out / 'manifest.jsonl'}: {named}{more}")
    return dict(rows)


# settings


def _settings(
    config: TokenizeConfig, items: Sequence[Item], words: _Words | None, vision: VisionTokenizer
) -> dict[str, Any]:
    """What the ids depend on: the flags, the words and names of the data, and the tokenizers."""
    values = {key: value for key, value in to_dict(config).items() if key not in _FREE}
    if words is not None:
        del values["text_size"]
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(replace(item, stored=b"")).encode())
        # Words are told from others; media go by their names, since telling them apart would mean reading them all.
        digest.update(repr(item.mark if item.kind == "text" else None).encode())
    return {
        **values,
        "data_sha256": digest.hexdigest(),
        "vocabulary_sha256": "" if words is None else _words_digest(words),
        "vision_sha256": vision_digest(vision),
    }


def _words_digest(words: _Words) -> str:
    digest = hashlib.sha256(json.dumps(words.vocabulary.to_dict(), sort_keys=True).encode())
    for piece in words.text.pieces:
        digest.update(len(piece).to_bytes(4, "little") + piece)
    return digest.hexdigest()


def _holds(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder was finished with these settings; False if it was begun, or does not exist.

    Raises:
        EmulusError: It was made with others.
    """
    for name in (SETTINGS, MAKING):
        if (out / name).exists():
            made = read_json(out / name)
            # Folders of before there was this limit have none.
            made = {"max_ids": 0, **made} if isinstance(made, dict) else {}
            changed = [key for key in settings if made.get(key) != settings[key]]
            if changed:
                raise EmulusError(
                    f"{out} holds tokens made with other settings ({', '.join(changed)}); delete it or choose another "
                    "--out"
                )
            return name == SETTINGS
    if (out / "checkpoints").exists():
        raise EmulusError(f"{out} is a training run's folder; choose another --out")
    return False


# tokenizers


def _tokenizers(config: TokenizeConfig) -> tuple[_Words | None, VisionTokenizer]:
    """The words where they are not to be trained, and the vision tokenizer.

    Raises:
        EmulusError: One cannot be had, or they are of different models.
    """
    pick_device(config.device)  # before anything is fetched or written
    if not config.vocabulary:
        if config.vision is None:
            raise EmulusError("which ids there are is not said; name a --vision tokenizer or a --vocabulary")
        return None, _load_vision(config.vision)
    folder = fetch(config.vocabulary)
    words, lent = _of_tokens(folder) if (folder / SETTINGS).exists() else _of_model(folder, config.vocabulary)
    if config.vision is None and lent is None:
        raise EmulusError(f"{config.vocabulary} holds no vision tokenizer; name one with --vision")
    vision = _load_vision(config.vision or cast(Path, lent))
    if vision.config.codebook_size != words.vocabulary.visual_size:
        raise EmulusError(
            f"{config.vision or lent} has {vision.config.codebook_size} codes but the vocabulary of "
            f"{config.vocabulary} {words.vocabulary.visual_size}; take both from the same model"
        )
    return words, vision


def _of_tokens(folder: Path) -> tuple[_Words, Path | None]:
    tokens = Tokens.open(folder)
    return _Words(text=tokens.text, vocabulary=tokens.vocabulary), folder / "vision"


def _of_model(folder: Path, name: str) -> tuple[_Words, Path | None]:
    """The words of a model in any layout, and where its vision tokenizer is."""
    contents = inspect_folder(folder)
    text = read_text(contents)
    if text is None or contents.vocabulary is None:
        raise EmulusError(f"{name} holds no text tokenizer or no vocabulary; name a whole model or a tokens folder")
    if contents.preset == "emu3.5":
        raise EmulusError(f"{name} writes pictures as Emu3.5 does, which shards cannot hold; name another model")
    released = contents.vocabulary.visual_size == VisionTokenizerConfig().codebook_size
    lent = contents.folder if contents.vision else Path(EMU3_VISION) if released else None
    return _Words(text=text, vocabulary=contents.vocabulary), lent


def _load_vision(where: Path) -> VisionTokenizer:
    # On the CPU: the workers put theirs where they compute.
    contents = inspect_folder(fetch(where))
    if contents.vision is None:
        raise EmulusError(f"{where} holds no vision tokenizer; name the folder of one")
    return load_vision_tokenizer_from(contents.vision, contents.vision_tensors, folder=contents.folder)


def _check_size(config: TokenizeConfig, vision: VisionTokenizerConfig) -> None:
    factor = vision.spatial_factor
    if not config.area and config.size % factor:
        raise EmulusError(
            f"size {config.size} is not a multiple of {factor}, the pixels per code of the vision tokenizer; "
            f"take {max(round(config.size / factor), 1) * factor}"
        )
    if 0 < config.area < factor**2:
        raise EmulusError(f"an area of {config.area} pixels is less than one code of {factor}x{factor}; ask for more")


def _train(config: TokenizeConfig, items: Sequence[Item], codebook_size: int) -> _Words:
    """A text tokenizer made of the training words, and the vocabulary of both."""
    text = TextTokenizer.train(_training_words(items), size=config.text_size)
    return _Words(text=text, vocabulary=Vocabulary.native(text_size=text.size, visual_size=codebook_size))


def _training_words(items: Sequence[Item]) -> Iterator[str]:
    training = [item for item in items if item.split == "train"]
    for item in training:
        yield from item.captions
        for pair in item.questions:
            yield from as_asked(pair)
    for item in even([item for item in training if item.kind == "text"], _TRAINING_TEXTS):
        try:
            yield item.text[:_TRAINING_LETTERS]
        except EmulusError:
            continue  # named when it is encoded
