"""tensors of many processes <-> a folder of safetensors files, one per process, that any number of them can read.

The work is that of ``torch.distributed.checkpoint``. What is added: the tensors are copied to host memory first, files
are written without holding the interpreter's lock, and nothing is read before the parts are known to be all there
(left to itself, it fills what it finds and leaves the rest as it was).
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from emulus.errors import EmulusError
from emulus.files import fsync
from emulus.train.slab import Slab
from emulus.weights import Stored, read_tensor

Shapes = dict[str, tuple[torch.Size, torch.dtype]]
"""What a folder shall hold: the shape and type of each whole tensor."""

# Said at every save and load of a single process, where there is nothing to warn of.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class HostCopy:
    """This process's parts of tensors, copied to host memory that is kept from one copy to the next."""

    def __init__(self) -> None:
        self.items: list[WriteItem] = []
        self._slab = Slab({})

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        """The copies, by name."""
        return self._slab.buffers

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors as they are now."""
        items, parts = [], {}
        for name, tensor in tensors.items():
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            chunk = _chunk(tensor)
            assert chunk.sizes == local.shape, f"the part of {name} is not one block"
            # Empty parts begin where another process's part may begin, and would be taken for it.
            if local.numel() == 0 and tensor.numel() > 0:
                continue
            parts[name] = local
            items.append(_item(name, chunk, tensor))
        if not self._slab.fits(parts):
            self._slab = Slab({})  # the memory is given back before more is taken
            self._slab = Slab(parts)
        for name, local in parts.items():
            self.buffers[name].copy_(local, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self.items = items

    def write(self, folder: Path, group: dist.ProcessGroup | None) -> Shapes:
        """Write what was copied.

        Args:
            folder: Exists already, and all processes of the group see it.
            group: Those who took copies at the same moment; ``None`` for one process.

        Returns:
            What the folder holds now, of all processes.

        Raises:
            OSError: As the system says, of the first process that could not write; all processes get it.
            EmulusError: As above, where the system said nothing.
        """
        writer, planner = _Writer(str(folder), save_distributed=True), _Planner(self.items, self.buffers)
        try:
            planned = save({}, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
        except CheckpointException as error:
            raise error.failures[min(error.failures)][0] from None
        return {
            name: (entry.size, entry.properties.dtype)
            for name, entry in planned.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }


class WholeTensors(Mapping[str, Tensor]):
    """Tensors of a folder put together from their parts, each when it is asked for."""

    def __init__(self, table: Metadata, shapes: Shapes, prefix: str) -> None:
        """Choose tensors.

        Args:
            table: What :func:`read_table` returned.
            shapes: What it was given.
            prefix: Tensors whose names start with it are here, under names without it.
        """
        self.table, self.shapes, self.prefix = table, shapes, prefix

    def __getitem__(self, name: str) -> Tensor:
        full = self.prefix + name
        shape, dtype = self.shapes[full]
        whole = torch.empty(shape, dtype=dtype)
        for chunk in _chunks(self.table, full):
            file = Path(self.table.storage_data[MetadataIndex(full, chunk.offsets)].relative_path)
            whole[_place(chunk)] = read_tensor(Stored(file=file, name=full, shape=tuple(chunk.sizes)))
        return whole

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.shapes if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def read_table(folder: Path, shapes: Shapes) -> Metadata:
    """Where the parts lie, from the files' headers.

    Args:
        folder: What :meth:`HostCopy.write` wrote.
        shapes: What it shall hold; anything else in it is of no interest.

    Raises:
        EmulusError: A file is damaged, or the parts do not make up the tensors.
    """
    try:
        table = HuggingFaceStorageReader(str(folder)).read_metadata()
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise EmulusError(f"a file of {folder} cannot be read: {error}") from None
    for name, (shape, dtype) in shapes.items():
        chunks = _chunks(table, name)
        if not covered(tuple(shape), [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]):
            raise EmulusError(f"{folder} does not hold all of {name}")
        if any(table.storage_data[MetadataIndex(name, chunk.offsets)].dtype != dtype for chunk in chunks):
            raise EmulusError(f"{folder} does not hold {name} as {dtype}")
    return table


def fill(tensors: Mapping[str, Tensor], folder: Path, table: Metadata) -> None:
    """Read this process's parts into the tensors. Other processes need not take part.

    Args:
        tensors: Of the shapes and types that ``table`` was checked for.
        folder: Where they lie.
        table: What :func:`read_table` returned, here or on another process.

    Raises:
        EmulusError: A file cannot be read.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        load(dict(tensors), storage_reader=_Reader(folder, table), planner=planner, no_dist=True)
    except CheckpointException as error:
        raise EmulusError(f"a file of {folder} cannot be read: {error.failures[0][0]}") from None


def covered(shape: Sequence[int], blocks: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether blocks (offsets, sizes) make up an array, each element once."""
    if any(len(offsets) != len(shape) or len(sizes) != len(shape) for offsets, sizes in blocks):
        return False
    if not blocks or sum(math.prod(sizes) for _, sizes in blocks) != math.prod(shape):
        return False
    slices = [[slice(start, start + size) for start, size in zip(*block, strict=True)] for block in blocks]
    if any(edge.start < 0 or edge.stop > size for block in slices for edge, size in zip(block, shape, strict=True)):
        return False
    # Counted on the grid that the edges make, which has no more cells than the array has elements.
    slices = [block for block in slices if all(edge.start < edge.stop for edge in block)]
    axes = [{0, size, *(block[axis].start for block in slices)} for axis, size in enumerate(shape)]
    lines = [{line: place for place, line in enumerate(sorted(axis))} for axis in axes]
    count = np.zeros([len(line) - 1 for line in lines], np.uint32)
    for block in slices:
        # Where a block ends another begins, or the array ends.
        if any(edge.stop not in line for edge, line in zip(block, lines, strict=True)):
            return False
        edges = zip(block, lines, strict=True)
        count[tuple(slice(line[edge.start], line[edge.stop]) for edge, line in edges)] += 1
    return bool((count == 1).all())


def system_error(path: Path, error: SafetensorError) -> OSError | EmulusError:
    """The system's error that the library has wrapped in its own, as when a file could not be written."""
    if number := re.search(r"os error (\d+)", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])), str(path))
    return EmulusError(f"{path}: {error}")


class _Planner(DefaultSavePlanner):
    """Plans to write blocks that were worked out when they were copied."""

    def __init__(self, items: list[WriteItem], buffers: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.items, self.buffers = items, buffers

    def create_local_plan(self) -> SavePlan:
        return SavePlan(self.items)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.buffers[write_item.index.fqn]


class _Writer(HuggingFaceStorageWriter):
    """Writes what its parent writes, straight from the tensors.

    The parent makes one more copy of them all, and holds the interpreter's lock meanwhile: 0.9 ms/MB in which training
    stands still.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert isinstance(planner, _Planner)
        if plan.items:
            path = Path(self.path) / f"{plan.storage_data['shard_index']:05d}.safetensors"
            offsets = {item.index.fqn: {"saved_offsets": list(item.index.offset or ())} for item in plan.items}
            # All that the reader looks at. More entries would come in an order that changes from file to file.
            metadata = {"DCP_SHARDING_INFO": json.dumps(offsets)}
            try:
                save_file({item.index.fqn: planner.resolve_data(item) for item in plan.items}, path, metadata)
            except SafetensorError as error:
                raise system_error(path, error) from None
            fsync(path)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done


class _Reader(HuggingFaceStorageReader):
    """Reads files whose headers were read and checked before."""

    def __init__(self, folder: Path, table: Metadata) -> None:
        super().__init__(str(folder))
        self.table = table

    def read_metadata(self) -> Metadata:
        return self.table


def _chunk(tensor: Tensor) -> ChunkStorageMetadata:
    """Which block of the whole tensor this process holds."""
    if isinstance(tensor, DTensor):
        (chunk,) = tensor.__create_chunk_list__()
        return chunk
    return ChunkStorageMetadata(offsets=torch.Size([0] * tensor.ndim), sizes=tensor.shape)


def _item(name: str, chunk: ChunkStorageMetadata, tensor: Tensor) -> WriteItem:
    """Ask for a block to be written. A block that several processes hold is written by one of them."""
    data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=tensor.dtype), size=tensor.shape)
    return WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)


def _chunks(table: Metadata, name: str) -> list[ChunkStorageMetadata]:
    entry = table.state_dict_metadata.get(name)
    return entry.chunks if isinstance(entry, TensorStorageMetadata) else []


def _place(chunk: ChunkStorageMetadata) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
