"""tensors on disk -> other files: written piece by piece, so that memory does not grow with the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emulus.errors import EmulusError, shown
from emulus.files import write_file, write_json
from emulus.weights import INDEX, WEIGHTS, Stored, Tensors, read_pieces

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor to be written.

    Attributes:
        stored: Where it lies now.
        shape: What it shall have; as many elements as it has.
        dtype: What it shall be.
    """

    stored: Stored
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """How much it will take."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def dtypes_of(tensors: Tensors) -> dict[str, torch.dtype]:
    """The type of every tensor, from the files' headers.

    Raises:
        EmulusError: A file is damaged, or a type is one that is not read here.
    """
    dtypes: dict[str, torch.dtype] = {}
    for path in dict.fromkeys(stored.file for stored in tensors.values()):
        try:
            with safe_open(path, framework="pt") as file:
                names = {
                    name: str(file.get_slice(stored.name).get_dtype())
                    for name, stored in tensors.items()
                    if stored.file == path
                }
        except (SafetensorError, OSError) as error:
            raise EmulusError(
                f"{path} is damaged or truncated ({shown(error, quote=False)}); restore it from its source"
            ) from None
        for name, kind in names.items():
            if kind not in _DTYPES:
                raise EmulusError(f"{path} holds {name} as {kind}, which is not read; give unquantised weights")
            dtypes[name] = _DTYPES[kind]
    return dtypes


def save_sharded(
    tensors: Mapping[str, Planned], folder: Path, *, most_bytes: int, moved: Callable[[int], object] | None = None
) -> None:
    """Write ``model.safetensors``, or numbered shards of it and their index, each atomically.

    Args:
        tensors: By the names they shall have. Neighbours stay neighbours.
        folder: Where.
        most_bytes: Of one shard; a tensor larger than this has one to itself.
        moved: Told how many bytes were written, again and again.

    Raises:
        EmulusError: A source is damaged, the disk is full or the folder may not be written to.
    """
    shards: list[dict[str, Planned]] = [{}]
    size = 0
    for name, planned in tensors.items():
        if size and size + planned.bytes > most_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = planned
        size += planned.bytes
    if len(shards) == 1:
        _write_shard(shards[0], folder / WEIGHTS, moved)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(shard, folder / file, moved)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(planned.bytes for planned in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def same(stored: Stored, written: Stored, dtype: torch.dtype) -> bool:
    """Whether a written tensor is, bit for bit, what was stored, once cast to ``dtype``."""
    if torch.Size(stored.shape).numel() != torch.Size(written.shape).numel():
        return False
    pairs = zip(read_pieces(stored), read_pieces(written), strict=True)
    return all(torch.equal(_raw(before.to(dtype)), _raw(after)) for (_, before), (_, after) in pairs)


def _write_shard(tensors: Mapping[str, Planned], path: Path, moved: Callable[[int], object] | None) -> None:
    """Write one file. Its format: the header's length in 8 bytes, the header as JSON, the tensors end to end.

    Source: huggingface/safetensors, README.md, "Format".
    """
    # The widest types come first, so that every tensor starts at a multiple of its element's width.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, planned in ordered:
        offsets = [end, end := end + planned.bytes]
        header[name] = {"dtype": _NAMES[planned.dtype], "shape": list(planned.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, planned in ordered:
                for _, piece in read_pieces(planned.stored):
                    count = file.write(_raw(piece.to(planned.dtype)).numpy().data)
                    if moved is not None:
                        moved(count)

    write_file(path, write)


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that not-a-numbers are like themselves and every type is like the others."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
