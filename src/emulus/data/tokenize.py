"""items -> ids on disk. Every picture, clip and text is encoded once; training never touches pixels.

A tokens folder holds everything that pretraining needs: shards of records (see :mod:`emulus.data.records`) with their
``manifest.jsonl``, the text tokenizer, ``vocabulary.json``, ``vision/`` (the tokenizer that made the codes) and
``tokens.json`` (the settings), which is written last.

The work is a list of units, one shard each, that follows from the sources and the settings alone. A shard without its
line in the manifest does not exist, so what is missing is known at once, and it does not matter who makes it
(:mod:`emulus.data.workers`). The line says what the shard was made from (:mod:`emulus.data.origin`), so a shard whose
media, texts or words changed since is missing, too.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

from emulus.codec import as_mapping
from emulus.config import to_dict
from emulus.data.encoder import Unit, as_asked, run_ahead
from emulus.data.item import KINDS, Item, Kind, Split
from emulus.data.origin import files_digest, origin_of, see, words_digest
from emulus.data.records import MANIFEST, ShardLine, add_to_manifest, lengths_path, read_manifest
from emulus.data.source import even, open_source
from emulus.data.sources.walk import check_holds_no_data
from emulus.data.tokenize_config import TokenizeConfig
from emulus.data.tokens import MAKING, SETTINGS, MadeWith, Tokens, text_digest, vision_digest
from emulus.data.workers import finished
from emulus.device import pick_device
from emulus.errors import EmulusError
from emulus.files import check_not_running, check_out, check_path, disk_errors, only_run, read_json, write_json
from emulus.hub import EMU3_VISION, fetch
from emulus.layouts import inspect_folder, read_text
from emulus.log import logger, progress_bar
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vision import VisionTokenizer, VisionTokenizerConfig
from emulus.tokenizer.vision.weights import load_vision_tokenizer_from, save_vision_tokenizer
from emulus.tokenizer.vocabulary import Vocabulary

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


class _Shards(NamedTuple):
    """What a folder has of the units, compared with what they are made from now."""

    missing: list[Unit]
    """Never made, deleted, or made from something else."""
    touched: list[ShardLine]
    """Lines of shards whose files have other times, but the same content: as they should be."""
    changed: int
    """How many of the missing were made, from something else."""
    unknown: int
    """How many do not say what they were made from."""


def tokenize(config: TokenizeConfig) -> Path:
    """Encode data sets, going on where an earlier call with the same settings was stopped.

    Any number of processes make the same bytes. Whatever stops them, no more than the shards that are being made are
    lost. An item that cannot be read or written is left out, counted and named in the manifest. Shards whose media,
    texts or words have changed since they were made are made again, those of copied or touched files are not.

    Args:
        config: What, with what, to where.

    Returns:
        ``config.out``.

    Raises:
        EmulusError: The folder holds tokens made with other settings or is being written by another run, an input is
            missing or damaged, or a source vanished meanwhile.
    """
    _check_out(config)
    words, vision = _tokenizers(config)
    _check_size(config, vision.config)
    items = _open(config.sources)
    settings = _settings(config, items, words, vision)
    units = plan(config, items)
    if _holds(config, settings, items):
        found = _compare(config, units)
        if not found.missing:
            _warn_of_unknown(config.out, found)
            with suppress(EmulusError):  # it may be read-only
                _note_touched(config.out, found.touched)
            logger.info(f"{config.out} is complete")
            return config.out
    with only_run(config.out):
        _holds(config, settings, items)  # another run may have ended meanwhile
        making = config.out / MAKING
        if making.exists() and _changed(making, settings, items):
            _clear(config.out)
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
    settings = {**settings, "text_sha256": _text_digest_of(config.out)}
    write_json(config.out / MAKING, settings)
    with disk_errors(config.out):
        (config.out / SETTINGS).unlink(missing_ok=True)
    settings["text_sha256"] = _write_tokenizers(config, settings, items, words, vision)
    write_json(config.out / MAKING, settings)
    found = _compare(config, units)
    for line in found.touched:
        add_to_manifest(config.out, line)
    _warn_of_unknown(config.out, found)
    if found.changed:
        logger.info(f"{config.out}: what {found.changed} shards were made from has changed; encoding them again")
    _make(config, found.missing, len(units), vision)
    names = {unit.name for unit in units}
    rows = _count(config, [line for line in read_manifest(config.out) if line.name in names])
    write_json(config.out / SETTINGS, {**settings, "sources": to_dict(config)["sources"], "rows": rows})
    (config.out / MAKING).unlink()


def _text_digest_of(out: Path) -> str:
    """What an earlier call noted of the text tokenizer that is there; empty if it did not, or there is none."""
    notes = [out / name for name in (MAKING, SETTINGS) if (out / name).exists()]
    return MadeWith.read(notes[0]).text_sha256 if notes and _vocabulary_of(out).exists() else ""


def _write_tokenizers(
    config: TokenizeConfig,
    settings: Mapping[str, Any],
    items: Sequence[Item],
    words: _Words | None,
    vision: VisionTokenizer,
) -> str:
    """Put the tokenizers into the folder if they are not there; the digest of the text tokenizer and vocabulary.

    Raises:
        EmulusError: Those that shards were made with are not there any more, and cannot be made again.
    """
    out, named = config.out, _vocabulary_of(config.out)
    if not named.exists():
        save_vision_tokenizer(vision, out / "vision")
        words = words or _train(config, items, vision.config.codebook_size)
        words.text.save(out)
        words.vocabulary.save(named)
        return text_digest(words.text, words.vocabulary)
    if not _has_vision(out, settings["vision_sha256"]):
        logger.warning(f"{out / 'vision'} was not the vision tokenizer of these tokens; written again")
        save_vision_tokenizer(vision, out / "vision")
    found = text_digest(TextTokenizer.from_file(out), Vocabulary.load(named))
    if found != (settings["text_sha256"] or found) or (words and found != settings["vocabulary_sha256"]):
        raise EmulusError(
            f"{out}: the text tokenizer or the vocabulary is not the one that its shards were made with; restore both, "
            "or choose another --out"
        )
    return found


def _vocabulary_of(out: Path) -> Path:
    """Where a tokens folder has its vocabulary, which is the last of its tokenizers to be written."""
    return out / "vocabulary.json"


def _has_vision(out: Path, sha256: str) -> bool:
    try:
        return vision_digest(_load_vision(out / "vision")) == sha256
    except EmulusError:
        return False


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


def _compare(config: TokenizeConfig, units: Sequence[Unit]) -> _Shards:
    """Units whose shard has no line, is not there, or was made from something else than is there now."""
    out = config.out
    lines = {line.name: line for line in read_manifest(out) if _size(out / line.name) == line.bytes}
    found = _Shards([unit for unit in units if unit.name not in lines], [], 0, 0)
    made = [unit for unit in units if unit.name in lines]

    def compared(unit: Unit) -> ShardLine | bool:
        return _compared(unit, lines[unit.name])

    changed = 0
    for unit, result in zip(
        made, run_ahead(compared, made, threads=config.readers, ahead=4 * config.readers), strict=True
    ):
        if isinstance(result, ShardLine):
            found.touched.append(result)
        elif not result:
            found.missing.append(unit)
            changed += 1
    unknown = sum(line.origin is None for line in lines.values())
    # In the order of the plan, whatever the reason.
    missing = {unit.name for unit in found.missing}
    return found._replace(missing=[unit for unit in units if unit.name in missing], changed=changed, unknown=unknown)


def _warn_of_unknown(out: Path, found: _Shards) -> None:
    if found.unknown:
        logger.warning(
            f"{out}: an older version of Emulus made {found.unknown} shards and did not note from what; whether their "
            "media have changed since cannot be told"
        )


def _compared(unit: Unit, line: ShardLine) -> ShardLine | bool:
    """Whether a shard was made from what is there now; a new line for it where only times differ."""
    old = line.origin
    if old is None:
        return True
    if words_digest(unit.items) != old.words:
        return False
    if old.content and files_digest(unit.items, linked=old.linked) == old.files:
        return True
    new = origin_of(unit.items, map(see, unit.items))
    return replace(line, origin=new) if new.content == old.content else False


def _note_touched(out: Path, lines: Sequence[ShardLine]) -> None:
    """Note the new times, so that next time the content need not be read."""
    if lines:
        with only_run(out):
            for line in lines:
                add_to_manifest(out, line)


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
        raise EmulusError(f"none of the items could be encoded{first}; fix the sources and run the same command again")
    tokens = sum(line.tokens for line in lines)
    logger.info(f"{config.out}: {dict(rows)} rows, {tokens:,} ids")
    if skipped:
        named = "; ".join(f"{each.id}: {each.reason}" for each in skipped[:_NAMED])
        more = f"; and {len(skipped) - _NAMED} more" if len(skipped) > _NAMED else ""
        logger.warning(f"left out {len(skipped)} items, all named in {config.out / 'manifest.jsonl'}: {named}{more}")
    return dict(rows)


# settings


def _check_out(config: TokenizeConfig) -> None:
    """Refuse, before anything is computed, a folder that is read, or another run writes to."""
    check_out(config.out, vision_tokenizer=config.vision, vocabulary=config.vocabulary)
    for source in config.sources:
        check_path(source, "a source")
        check_out(config.out, source=source)
        # What is written must not be found by the pattern next time.
        if (config.out.absolute() / MANIFEST).match(str(source.absolute())):
            raise EmulusError(f"--out {config.out} is where the source {source} looks for files; choose another --out")
    check_holds_no_data(config.out)
    check_not_running(config.out)


def _settings(
    config: TokenizeConfig, items: Sequence[Item], words: _Words | None, vision: VisionTokenizer
) -> dict[str, Any]:
    """What all shards depend on: the flags, the names of the data, and the tokenizers."""
    values = {key: value for key, value in to_dict(config).items() if key not in _FREE}
    if words is not None:
        del values["text_size"]
    return {
        **values,
        "names_sha256": _digest((item.id, item.kind, item.split) for item in items),
        "words_sha256": _training_digest(items) if words is None else "",
        "vocabulary_sha256": "" if words is None else text_digest(words.text, words.vocabulary),
        "vision_sha256": vision_digest(vision),
    }


def _training_digest(items: Sequence[Item]) -> str:
    """Of all that a text tokenizer is trained on."""
    return _digest(
        (item.captions, [tuple(pair) for pair in item.questions], item.mark if item.kind == "text" else None)
        for item in items
        if item.split == "train"
    )


def _digest(values: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(repr(value).encode("utf-8", "backslashreplace") + b"\n")
    return digest.hexdigest()


def _data_digest(items: Sequence[Item]) -> str:
    """What older versions noted of all items together, to the letter."""
    digest = hashlib.sha256()
    for item in items:
        questions = tuple(f"Question(question={question!r}, answer={answer!r})" for question, answer in item.questions)
        listed = f"({', '.join(questions)}{',' if len(questions) == 1 else ''})"
        digest.update(
            f"Item(id={item.id!r}, kind={item.kind!r}, captions={item.captions!r}, split={item.split!r}, stored=b'', "
            f"fps={item.fps!r}, score={item.score!r}, source={item.source!r}, questions={listed})".encode()
        )
        digest.update(repr(item.mark if item.kind == "text" else None).encode())
    return digest.hexdigest()


_NAMED_SETTINGS = {
    "names_sha256": "the items' names",
    "words_sha256": "the words that the text tokenizer was trained on",
    "vocabulary_sha256": "the text tokenizer or vocabulary",
    "vision_sha256": "the vision tokenizer",
    "data_sha256": "the data",
}


def _holds(config: TokenizeConfig, settings: Mapping[str, Any], items: Sequence[Item]) -> bool:
    """Whether the folder was finished with these settings; False if it was begun, or does not exist.

    Raises:
        EmulusError: It has rows that were made with others, or is the folder of something else.
    """
    out = config.out
    for name in (SETTINGS, MAKING):
        if (out / name).exists():
            changed = _changed(out / name, settings, items)
            if changed and not (name == MAKING and _is_empty(out)):
                raise EmulusError(
                    f"{out} holds tokens made with other settings ({', '.join(changed)}); delete it or choose another "
                    "--out"
                )
            return name == SETTINGS and not changed
    if (out / "checkpoints").exists():
        raise EmulusError(f"{out} is a training run's folder; choose another --out")
    for name in ("config.json", "vocabulary.json", "vision", MANIFEST):
        if (out / name).exists():
            raise EmulusError(f"{out} is not a tokens folder (it has {name}, but no {SETTINGS}); choose another --out")
    return False


def _changed(path: Path, settings: Mapping[str, Any], items: Sequence[Item]) -> list[str]:
    """Settings that were others in an earlier call, by name."""
    made = as_mapping(read_json(path), str(path))
    # What older versions had no setting for was as it is by default now.
    made = {each.name: to_dict(each.default) for each in fields(TokenizeConfig) if each.default is not MISSING} | made
    changed = [key for key in settings if made.get(key) != settings[key]]
    if "data_sha256" in made and "names_sha256" not in made:
        changed = [key for key in changed if key not in ("names_sha256", "words_sha256")]
        changed += ["data_sha256"] if made["data_sha256"] != _data_digest(items) else []
    return [_NAMED_SETTINGS.get(key, key) for key in changed]


def _is_empty(out: Path) -> bool:
    """Whether no shard has a row, so that nothing is lost if all is begun anew."""
    return not any(line.rows for line in read_manifest(out))


def _clear(out: Path) -> None:
    """Forget what an earlier call with perhaps other settings began, of which there is no row."""
    with disk_errors(out):
        for line in read_manifest(out):
            for path in (out / line.name, lengths_path(out / line.name)):
                path.unlink(missing_ok=True)
        # The settings stay until the new ones take their place: without them the folder could not be begun anew.
        for path in (out / MANIFEST, _vocabulary_of(out)):
            path.unlink(missing_ok=True)


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
