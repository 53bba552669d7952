"""What a model, a recipe or a data set is."""

from __future__ import annotations

import dataclasses
import glob
import inspect
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

from emulus.commands.shipped import MODEL, shipped
from emulus.config import to_dict
from emulus.data.source import Source, open_source
from emulus.data.tokens import SETTINGS, Tokens
from emulus.errors import EmulusError, did_you_mean, shown
from emulus.flags import parse_flags
from emulus.hub import fetch
from emulus.layouts import Contents, inspect_folder
from emulus.model import SIZES
from emulus.placement import memory_table
from emulus.presets import defaults_of, tasks_of
from emulus.recipes import RECIPES, recipe
from emulus.shards import dtypes_of
from emulus.tokenizer.vocabulary import Vocabulary
from emulus.weights import Tensors


@dataclass(frozen=True, kw_only=True)
class InfoOptions:
    """Say what a model, a recipe or a data set is. Of a model only small files and headers are read.

    Attributes:
        path: A model's folder in any layout, a training run's, a tokens folder, a name on the hub, a recipe's name, or
            a data set: what there is of each split and kind, and what is left out of it and why.
        check: Of a tokens folder, read every shard and compare its checksum.
        sizes: List the named decoder sizes and the recipes instead.
        json: Print JSON.
    """

    path: Annotated[str, tyro.conf.Positional] = str(MODEL)
    sizes: bool = False
    check: bool = False
    json: bool = False


def info(arguments: Sequence[str]) -> None:
    """``emulus info [PATH | RECIPE] [--json]``."""
    options = parse_flags(InfoOptions, arguments, program="emulus info")
    if options.path == str(MODEL):
        options = dataclasses.replace(options, path=str(shipped(MODEL, "a PATH")))
    if options.sizes:
        found: dict[str, Any] = {"sizes": {name: dict(size) for name, size in SIZES.items()}, "recipes": list(RECIPES)}
    elif options.path in RECIPES:
        about = {"about": f"{inspect.getdoc(RECIPES[options.path])}\n"}
        found = about | to_dict(recipe(options.path))
    elif "/" not in options.path and not Path(options.path).exists():
        raise EmulusError(
            f"{shown(options.path)} is neither a folder nor a recipe{did_you_mean(options.path, RECIPES)}"
        )
    elif (Path(options.path) / SETTINGS).exists():
        found = describe_tokens(Tokens.open(Path(options.path)), check=options.check)
    else:
        found = _describe_folder(options.path)
    print(
        json.dumps(found, indent=1)
        if options.json
        else yaml.dump(found, Dumper=_Dumper, sort_keys=False, allow_unicode=True).rstrip()
    )


def _describe_folder(path: str) -> dict[str, Any]:
    """A model, or what else is there: a data set.

    Raises:
        EmulusError: It is neither.
    """
    if Path(path).is_file() or (glob.has_magic(path) and not Path(path).exists()):
        return describe_source(open_source(path))
    try:
        return describe_contents(inspect_folder(fetch(path)))
    except EmulusError as error:
        # What has parts of a model is a model, though perhaps a damaged one.
        if any((Path(path) / name).exists() for name in ("config.json", "vocabulary.json", "checkpoints")):
            raise
        try:
            return describe_source(open_source(path))
        except EmulusError:
            raise error from None


def describe_source(source: Source) -> dict[str, Any]:
    """A data set in plain values: how many items of each split and kind, and what is left out and why."""
    account = source.account
    found: dict[str, Any] = {"data": str(source.path), **source.counts()}
    for name, lines in (
        ("notes", account.notes),
        ("left_out", list(map(str, account.left_out))),
        ("no_data", list(map(str, account.passed_over))),
    ):
        if lines:
            found[name] = lines
    return found


class _Dumper(yaml.SafeDumper):
    """Text of several lines as it is, not in quotes."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def describe_tokens(tokens: Tokens, *, check: bool) -> dict[str, Any]:
    """A tokens folder in plain values: what there is of each split and kind, and what was left out.

    Args:
        tokens: The folder.
        check: Compare the shards' checksums first.

    Raises:
        EmulusError: A shard is not what was written.
    """
    if check:
        tokens.check()
    found: dict[str, Any] = {"folder": str(tokens.folder), "vocabulary": tokens.vocabulary.size}
    for line in tokens.lines:
        part = found.setdefault(f"{line.split} {line.kind}", {"shards": 0, "rows": 0, "tokens": 0, "left_out": 0})
        part["shards"] += 1
        part["rows"] += line.rows
        part["tokens"] += line.tokens
        part["left_out"] += len(line.skipped)
    return found | ({"checked": "every shard is what was written"} if check else {})


def describe_contents(contents: Contents) -> dict[str, Any]:
    """A model in plain values: what it is, its parts, id ranges, memory, what it can do."""
    found: dict[str, Any] = {"folder": str(contents.folder), "layout": contents.layout}
    if contents.decoder is not None:
        table = memory_table(contents.decoder)
        found["preset"] = contents.preset
        found["decoder"] = {
            "parameters": table["parameters"],
            "quantized": contents.quantized or "no",
            "context": contents.decoder.max_position_embeddings,
            "memory": {
                kind: _size(count)
                for kind, count in table["weights"].items()
                # What is quantised has no other form.
                if contents.quantized in (None, kind)
            },
            "memory_per_token": {kind: _size(count) for kind, count in table["kv_per_token"].items()},
            "on_disk": _on_disk(contents.decoder_tensors),
            "config": contents.decoder.to_dict(),
        }
    if contents.vision is not None:
        vision = contents.vision
        found["vision"] = {
            "parameters": _parameters(contents.vision_tensors),
            "spatial_factor": vision.spatial_factor,
            "temporal_factor": vision.temporal_factor,
            "on_disk": _on_disk(contents.vision_tensors),
            "config": vision.to_dict(),
        }
    if contents.vocabulary is not None:
        found["vocabulary"] = _ids(contents.vocabulary)
    found["text"] = contents.text_file.name if contents.text_file else None
    if contents.decoder is not None:
        found["tasks"] = list(tasks_of(contents))
        found["defaults"] = dataclasses.asdict(defaults_of(contents))
    return found


def _ids(vocabulary: Vocabulary) -> dict[str, Any]:
    """The id table: who owns which ids, the ends of the ranges not included."""
    return {
        "size": vocabulary.size,
        "text": list(vocabulary.text_range),
        "visual": list(vocabulary.visual_range),
        "specials": {f"{role} {vocabulary.surface(id)}": id for role, id in vocabulary.specials.items()},
    }


def _on_disk(tensors: Tensors) -> str:
    """Files and types of tensors, e.g. ``7 files, 31.6 GiB, float32``."""
    kinds: Counter[str] = Counter()
    for name, dtype in dtypes_of(tensors).items():
        kinds[str(dtype).removeprefix("torch.")] += math.prod(tensors[name].shape) * dtype.itemsize
    files = len({stored.file for stored in tensors.values()})
    count = f"{files} file{'s' if files > 1 else ''}"
    return f"{count}, {_size(kinds.total())}, {', '.join(kind for kind, _ in kinds.most_common())}"


def _parameters(tensors: Tensors) -> int:
    """Numbers that are learned: not the counts and running statistics of batch norms."""
    counted = (stored for name, stored in tensors.items() if not name.endswith(_BUFFERS))
    return sum(math.prod(stored.shape) for stored in counted)


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
