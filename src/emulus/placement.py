"""Which device holds what of a decoder, whether it fits, and how much memory it takes.

A layer computes where it lies: what does not fit on the GPUs lies on the CPU *and is computed there*. No weights travel
while generating, only the hidden states of the current tokens.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from emulus.device import pick_device
from emulus.errors import EmulusError, shown
from emulus.model.config import DecoderConfig
from emulus.model.quantize import HEAD, Quantization, check_kind, kind_of, quantized_bytes
from emulus.model.weights import expected_shapes

Kind = Literal["float32", "bfloat16", "int8", "int4", "fp8"]

KV_TOKENS = 2 * 9216
"""Tokens whose keys and values find room unless asked otherwise: a guided picture of the released size, two rows."""

Room = Mapping[torch.device, int]

_CPU = torch.device("cpu")
_GIB = 2**30
# Of control groups, version 2 and 1: limit, use, statistics and what the reclaimable part is called there.
_CONTROL_GROUPS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where each part of a decoder lies; called with a parameter's name, it gives the device.

    Attributes:
        first: Device of the embedding.
        layers: Device of each block.
        last: Device of the final norm and the head.
    """

    first: torch.device
    layers: tuple[torch.device, ...]
    last: torch.device

    def __call__(self, name: str) -> torch.device:
        """Give the device of the parameter, or of the block, called ``name``."""
        block = re.match(r"model\.layers\.(\d+)(?:\.|$)", name)
        if block:
            return self.layers[int(block[1])]
        return self.first if name.startswith("model.embed_tokens.") else self.last

    def __str__(self) -> str:
        """For people: ``embedding on cpu, layers 0-11 on cpu, layers 12-31 on cuda:0, head on cuda:0``."""
        if len(self.devices) == 1:
            return f"all on {self.last}"
        parts = [f"embedding on {self.first}"]
        for device, run in groupby(enumerate(self.layers), lambda layer: layer[1]):
            indices = [index for index, _ in run]
            parts.append(f"layers {indices[0]}-{indices[-1]} on {device}")
        return ", ".join([*parts, f"head on {self.last}"])

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Every device that holds something, in the order in which a token meets them."""
        return tuple(dict.fromkeys((self.first, *self.layers, self.last)))


def plan(
    config: DecoderConfig,
    *,
    device: str = "auto",
    dtype: torch.dtype,
    quantize: Quantization | None = None,
    max_memory: Mapping[str, int] | None = None,
    kv_tokens: int = KV_TOKENS,
) -> Placement:
    """Find a place for every part of a decoder, before any of it is read.

    Room is left for keys and values and for work. ``auto`` fills the GPUs in order. If they do not hold everything,
    they hold the head and the last layers, and the embedding and the first layers lie on the CPU; without GPUs, all
    does. What else needs memory is loaded before, or kept out of ``max_memory``.

    Args:
        config: The decoder's shape.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; a device that is named holds everything.
        dtype: What is computed in.
        quantize: How many bits projections and head keep.
        max_memory: Bytes that may be taken on each device (``cuda:0``, ``cpu``); others are not used. By default, what
            is free on each.
        kv_tokens: Tokens in flight, over all rows of a batch.

    Raises:
        EmulusError: It does not fit; the message says what would. Or there is no such device.
    """
    wish = _Wish(
        config=config, dtype=dtype, quantize=None if quantize is None else check_kind(quantize), kv_tokens=kv_tokens
    )
    if max_memory is None:
        if device != "auto":
            pick_device(device)
        room: Room = free_memory()
    else:
        room = {_device(name): _bytes(name, size) for name, size in max_memory.items()}
    if device != "auto" and _device(device) not in room:
        raise EmulusError(f"nothing may lie on {device}: memory is granted on {', '.join(map(str, room))} only")
    allowed = room if device == "auto" else {_device(device): room[_device(device)]}
    placement = _place(wish, allowed)
    if placement is None:
        raise EmulusError(_does_not_fit(wish, allowed, room))
    return placement


def free_memory() -> dict[torch.device, int]:
    """Bytes that can be had on every device of this machine: the GPUs in order, then the CPU."""
    free: dict[torch.device, int] = {}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            # What torch has taken from the driver and does not use is as good as free.
            kept = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
            free[torch.device("cuda", index)] = torch.cuda.mem_get_info(index)[0] + kept
    free[_CPU] = min(_free_host_memory())
    return free


def footprint(config: DecoderConfig, kind: Kind) -> int:
    """Bytes of a decoder's weights.

    Args:
        config: Its shape.
        kind: ``float32`` or ``bfloat16`` throughout, or quantised in ``int8``, ``int4`` or ``fp8`` and the rest in
            bfloat16.
    """
    return _types(config, kind).weights


def kv_bytes_per_token(config: DecoderConfig, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_width * dtype.itemsize


def memory_table(config: DecoderConfig) -> dict[str, Any]:
    """What a decoder takes, in plain values: its parameters, and bytes of weights and of keys and values."""
    kinds: tuple[Kind, ...] = get_args(Kind)
    whole = _types(config, "float32")
    return {
        "parameters": whole.weights // whole.dtype.itemsize,
        "weights": {kind: footprint(config, kind) for kind in kinds},
        "kv_per_token": {
            "float32": kv_bytes_per_token(config, torch.float32),
            "bfloat16": kv_bytes_per_token(config, torch.bfloat16),
        },
    }


@dataclass(frozen=True, kw_only=True)
class _Wish:
    """A decoder in the types it is wanted in, and what that takes."""

    config: DecoderConfig
    dtype: torch.dtype
    quantize: Quantization | None
    kv_tokens: int = 0

    @property
    def weights(self) -> int:
        embedding, block, head = _weight_bytes(self.config, self.dtype, self.quantize)
        return embedding + self.config.num_hidden_layers * block + head

    @property
    def kv(self) -> int:
        return self.kv_tokens * kv_bytes_per_token(self.config, self.dtype)

    @property
    def work(self) -> int:
        """Left free on every device for what is computed on the way, which grows with the model."""
        return min(_GIB, self.weights // 8)

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.work

    @property
    def parts(self) -> list[int]:
        """Bytes of the embedding, of each block with its keys and values, and of the head."""
        embedding, block, head = _weight_bytes(self.config, self.dtype, self.quantize)
        layers = self.config.num_hidden_layers
        blocks = [block + self.kv // layers] * layers
        return [0, *blocks, embedding + head] if self.shares_table else [embedding, *blocks, head]

    @property
    def shares_table(self) -> bool:
        """Whether embedding and head are one tensor. It lies with the head, which reads all of it at every step."""
        return self.config.tie_word_embeddings and self.quantize is None

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.quantize} with dtype {name}" if self.quantize else f"dtype {name}"


def _types(config: DecoderConfig, kind: Kind) -> _Wish:
    if kind == "float32" or kind == "bfloat16":
        return _Wish(config=config, dtype=torch.float32 if kind == "float32" else torch.bfloat16, quantize=None)
    return _Wish(config=config, dtype=torch.bfloat16, quantize=check_kind(kind))


@cache
def _weight_bytes(config: DecoderConfig, dtype: torch.dtype, quantize: Quantization | None) -> tuple[int, int, int]:
    """Bytes of the embedding, of one block, and of the final norm and head."""
    embedding, block, head = 0, 0, 0
    shapes = expected_shapes(replace(config, num_hidden_layers=1))
    if quantize is not None and config.tie_word_embeddings:
        # A quantised head is a matrix of its own.
        shapes[HEAD] = shapes["model.embed_tokens.weight"]
    for name, shape in shapes.items():
        bits = None if quantize is None else kind_of(name, quantize)
        size = torch.Size(shape).numel() * dtype.itemsize if bits is None else quantized_bytes(shape, bits)
        if name.startswith("model.layers."):
            block += size
        elif name.startswith("model.embed_tokens."):
            embedding += size
        else:
            head += size
    return embedding, block, head


def _place(wish: _Wish, room: Room) -> Placement | None:
    """Where the parts lie, or ``None`` if there is no room for them."""
    parts = wish.parts
    gpus = [(device, free - wish.work) for device, free in room.items() if device.type != "cpu"]
    places = _fill(parts, gpus)
    if len(places) < len(parts):
        # From the end, so that the head, which is read at every step, lies on a GPU.
        places = _fill(parts[::-1], gpus[::-1])[::-1]
        rest = len(parts) - len(places)
        if sum(parts[:rest]) + wish.work > room.get(_CPU, 0):
            return None
        places = [_CPU] * rest + places
    first = places[-1] if wish.shares_table else places[0]
    return Placement(first=first, layers=tuple(places[1:-1]), last=places[-1])


def _fill(parts: Sequence[int], room: Sequence[tuple[torch.device, int]]) -> list[torch.device]:
    """The places of as many parts as fit, in order, each device filled before the next."""
    places: list[torch.device] = []
    for device, free in room:
        for size in parts[len(places) :]:
            if size > free:
                break
            free -= size
            places.append(device)
    return places


def _does_not_fit(wish: _Wish, allowed: Room, room: Room) -> str:
    """Say in one line what is needed, what there is, and what would fit."""
    free = ", ".join(f"{_gib(size)} on {device}" for device, size in allowed.items())
    needed = (
        f"the decoder needs {_gib(wish.total)} ({_gib(wish.weights)} of weights in {wish}, {_gib(wish.kv)} of keys and "
        f"values, {_gib(wish.work)} for work) but there is {free}"
    )
    fitting = [f"{smaller} ({_gib(smaller.total)})" for smaller in _smaller(wish) if _place(smaller, allowed)]
    if len(room) > len(allowed):
        everywhere = [wish] if _place(wish, room) else [smaller for smaller in _smaller(wish) if _place(smaller, room)]
        fitting += [f"device auto, over all devices, in {types}" for types in everywhere[:1]]
    if fitting:
        return f"{needed}; what fits: {'; or '.join(fitting)}"
    least = [wish, *_smaller(wish)][-1]
    return f"{needed}; nothing smaller fits either: {least} needs {_gib(least.total)}"


def _smaller(wish: _Wish) -> Iterator[_Wish]:
    """The same decoder in ever smaller types."""
    half = replace(wish, dtype=torch.bfloat16) if wish.dtype.itemsize > 2 else wish
    for kind in (wish.quantize, "int8", "int4"):
        smaller = replace(half, quantize=None if kind is None else check_kind(kind))
        if smaller.weights < wish.weights:
            yield smaller


def _device(name: str) -> torch.device:
    """The device called ``name``, always with a GPU's number."""
    if not isinstance(name, str) or not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise EmulusError(f"{shown(name)} is no device that can be planned for; choose auto, cpu, cuda or cuda:N")
    if name != "cuda":
        return torch.device(name)
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def _bytes(name: str, size: object) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise EmulusError(f"max_memory of {name} must be a whole number of bytes, got {shown(size)}")
    return size


def _free_host_memory() -> Iterator[int]:
    """Everything that bounds what this process can still take of the host's memory."""
    # Where nothing is known, nothing is refused.
    yield sys.maxsize
    try:
        meminfo = Path("/proc/meminfo").read_text()
        yield int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
            yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit, used, statistics, reclaimable in _CONTROL_GROUPS:
        group = Path("/sys/fs/cgroup")
        try:
            counts = dict(line.split() for line in (group / statistics).read_text().splitlines())
            yield int((group / limit).read_text()) - int((group / used).read_text()) + int(counts[reclaimable])
        except (OSError, KeyError, ValueError):
            continue  # no such group, or no limit ("max")


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB" if size >= _GIB / 10 else f"{size / 2**20:.1f} MiB"
