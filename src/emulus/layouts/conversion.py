"""a model's folder -> the same model in another layout."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from emulus.errors import EmulusError
from emulus.files import COMPLETE, new_folder
from emulus.layouts.contents import Contents, Layout, inspect_folder, read_text, with_vision
from emulus.layouts.write import SHARD_BYTES, plan, write_folder
from emulus.log import logger, progress, progress_bar
from emulus.presets import defaults_of
from emulus.shards import dtypes_of, same


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion did.

    Attributes:
        folder: The new folder.
        tensors: How many tensors it has.
        bytes: How much they take.
        checked: Whether every one of them was read back and compared with its source.
    """

    folder: Path
    tensors: int
    bytes: int
    checked: bool


def convert(
    src: Path,
    dst: Path,
    *,
    to: Layout,
    vision: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    check: bool = True,
) -> Converted:
    """Write a model in another layout (see :func:`write_folder` for what each is).

    ``dst`` appears when all of it is written and checked; whatever stops the work before leaves nothing there.

    Args:
        src: A model's folder in any layout.
        dst: The new folder; it must not exist or be empty.
        to: The layout.
        vision: Where the vision tokenizer is, if not in ``src`` (or to put another in its place).
        dtype: Of the decoder's weights; by default what they are.
        max_shard_bytes: Of one weights file.
        check: Read everything back and compare it with its source, bit for bit (after the cast, if there is one).

    Raises:
        EmulusError: ``src`` is no model or is damaged, ``dst`` is not free, the layout cannot express the model, the
            disk is full, or what was written is not what was read.
    """
    dst = dst if dst.name else dst.resolve()
    source = inspect_folder(src)
    if source.quantized is not None:
        raise EmulusError(f"{source.folder} is quantised ({source.quantized}) and is not converted; take the original")
    if vision is not None:
        if source.decoder is None:
            raise EmulusError(f"{source.folder} holds no decoder to add a vision tokenizer to; leave --vision out")
        source = with_vision(source, vision)
    check_free(dst, source.folder)
    if max_shard_bytes < 1:
        raise EmulusError(f"a weights file of at most {max_shard_bytes} bytes holds nothing; give a larger size")
    planned = [it for tensors in plan(source, to, dtype).values() for it in tensors.values()]
    total = sum(it.bytes for it in planned)
    with new_folder(dst) as temporary:
        with progress_bar(total, what="writing", unit="B") as bar:
            write_folder(source, temporary, to, dtype=dtype, max_shard_bytes=max_shard_bytes, moved=bar.update)
        written = inspect_folder(temporary)
        if check:
            _compare(source, written, dtype)
    _say_what_is_lost(source, written)
    # Models have no such marker; the folder was renamed into place whole.
    (dst / COMPLETE).unlink()
    return Converted(folder=dst, tensors=len(planned), bytes=total, checked=check)


def check_free(dst: Path, src: Path) -> None:
    """Refuse to write over what is there.

    Args:
        dst: A folder to be made.
        src: What it is to be made from.

    Raises:
        EmulusError: There is something at ``dst``.
    """
    if dst.resolve() == src.resolve():
        raise EmulusError(f"{dst} is the source itself; choose another folder")
    if dst.is_symlink() or dst.is_file():
        raise EmulusError(f"{dst} is not a folder; choose another place")
    if dst.is_dir() and any(dst.iterdir()):
        raise EmulusError(f"{dst} is not empty and is not overwritten; choose another folder")


def _configs(contents: Contents, like: Contents) -> tuple[object, object]:
    """The configs, without what a layout may lose or add and inference does not need."""
    decoder, vision = contents.decoder, contents.vision
    if decoder is not None and like.decoder is not None:
        decoder = dataclasses.replace(decoder, pad_token_id=like.decoder.pad_token_id)
    if vision is not None and like.vision is not None:
        vision = dataclasses.replace(vision, dropout=like.vision.dropout)
    return decoder, vision


def _say_what_is_lost(source: Contents, written: Contents) -> None:
    """Our own models' presets and sizes have no place in other layouts, which tell them from config and context."""
    before, after = defaults_of(source), defaults_of(written)
    if source.preset not in ("native", written.preset):
        logger.warning("this layout looks like preset %s; load it with preset %s", written.preset, source.preset)
    if source.preset != "native" and (before.height, before.width) != (after.height, after.width):
        drawn, asked = (f"{each.width}x{each.height}" for each in (after, before))
        logger.warning("in this layout pictures are of %s pixels by default; ask for %s", drawn, asked)


def _compare(source: Contents, written: Contents, dtype: torch.dtype | None) -> None:
    """Refuse what is not the source: its configs, tensors, text pieces or vocabulary."""
    if _configs(written, source) != _configs(source, source):
        raise EmulusError("a config was not written as it was read; the disk may be failing: try another one")
    parts = (
        (source.decoder_tensors, written.decoder_tensors, dtype),
        (source.vision_tensors, written.vision_tensors, None),
    )
    for theirs, ours, kind in parts:
        stored, found = dtypes_of(theirs), dtypes_of(ours)
        for name in progress(theirs, what="checking", total=len(theirs)):
            wanted = kind if kind is not None and stored[name].is_floating_point else stored[name]
            if found[name] != wanted or not same(theirs[name], ours[name], wanted):
                raise EmulusError(f"{name} was not written as it was read; the disk may be failing: try another one")
    texts = [read_text(contents) for contents in (source, written)]
    pieces = [list(text.pieces) if text is not None else None for text in texts]
    if source.decoder is not None and (pieces[0] != pieces[1] or source.vocabulary != written.vocabulary):
        raise EmulusError("the vocabulary was not written as it was read; the disk may be failing: try another one")
