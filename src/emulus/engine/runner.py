"""The decoder written for decoding: a few tokens of many sequences in one flat step.

The same weights and the same arithmetic as :class:`~emulus.model.transformer.Decoder`, which sees whole sequences.
Here a step is a row of tokens, each with a lane (whose keys and values it sees) and a position: nothing is padded,
and one, two or fifty tokens of a sequence are the same call.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from emulus.device import numbers
from emulus.engine.cache import CacheLayout, Lane
from emulus.engine.graphs import Graphs
from emulus.errors import EmulusError
from emulus.kernels import gpu, native
from emulus.kernels.where import Where
from emulus.model.linear import QuantizedLinear, linear
from emulus.model.quantize import is_quantized
from emulus.model.transformer import Block, Decoder, Rotary, rms_norm, rotary, rotate

Weight = Tensor | nn.Module

AT_ONCE = 512
"""Most tokens of one sequence in a step: a picture of 16,000 tokens attends to itself in pieces, not as one square."""

_FEW = 128
"""Up to so many tokens of a sequence the kernels for few tokens attend; more are a prompt, for PyTorch's attention.

A schedule asks for no more of one request (``schedule._MOST_IDS``): what comes out must not depend on the window."""


_PLAIN = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Tokens of one sequence to be computed.

    Attributes:
        lane: Whose keys and values they see, and add to.
        ids: The tokens.
        positions: Where each stands in its sequence; None for one after another from ``lane.length`` on.
        wanted: Which of them are asked for what follows; None for the last.
    """

    lane: Lane
    ids: Sequence[int]
    positions: Sequence[int] | None = None
    wanted: Sequence[int] | None = None

    @property
    def slots(self) -> Sequence[int]:
        """Position of every token."""
        return range(self.lane.length, self.lane.length + len(self.ids)) if self.positions is None else self.positions


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """The weights of one block."""

    device: torch.device
    index: int
    dtype: torch.dtype
    norm: Tensor
    q: Weight
    k: Weight
    v: Weight
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Weight
    mlp_norm: Tensor
    gate: Weight
    up: Weight
    down: Weight


@dataclass(frozen=True, kw_only=True)
class _Span:
    """The tokens of one lane in a step."""

    lane: Lane
    tokens: slice
    positions: Tensor
    visible: int


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What every layer of one device needs to know of a step: addresses for kernels, or spans for plain PyTorch."""

    table: Rotary
    where: Where | None = None
    spans: tuple[_Span, ...] = ()


class Runner:
    """Computes hidden states of new tokens, and keeps their keys and values."""

    def __init__(self, decoder: Decoder, *, kv_dtype: torch.dtype | None = None, record: bool = True) -> None:
        """Look at a decoder; nothing is copied, so that weights changed in place are seen as they are then.

        Args:
            decoder: Whose weights. If they are put elsewhere (:meth:`stale`), make another runner.
            kv_dtype: Of keys and values: float32, bfloat16, float16, or float8_e4m3fn (only on GPUs with Triton, for
                long videos); by default what is fast and loses nothing beside the weights.
            record: Whether a GPU's steps are recorded and replayed, which pays when there are many of a kind.

        Raises:
            EmulusError: Keys and values cannot be of that type here.
        """
        self.config = decoder.config
        self._embedding = decoder.model.embed_tokens.weight
        self._norm = decoder.model.norm.weight
        self._head = _weight(decoder.lm_head)
        self._layers = tuple(_layers(decoder))
        devices = [layer.device for layer in self._layers]
        together = {*devices, self._embedding.device, self._norm.device} == {self.device}
        self._kernels = _kernels(self._norm, decoder.config.head_width) if together else None
        # Not the method itself: a runner that refers to itself would keep the weights until the next collection.
        compute = weakref.WeakMethod(self._compute)
        self._graphs = Graphs(lambda *tensors: compute()(*tensors), most=64 if record else 0)  # type: ignore[misc]
        self._table = _table(self._layers) if self._kernels is native else None
        # The table holds addresses, so what lies there must stay, whatever becomes of the decoder.
        self._decoder = weakref.ref(decoder)
        self._kept = _storages(decoder)
        self.layout = CacheLayout.of(decoder.config, devices, _cache_dtype(decoder, self._kernels, kv_dtype))

    @property
    def device(self) -> torch.device:
        """Where hidden states come out, and the head is."""
        return self._norm.device

    @property
    def steady(self) -> bool:
        """Whether what comes out for a token is the same to the bit, whatever is computed in the same step."""
        return self._table is not None and bool(_numbers(self._head))

    @property
    def stale(self) -> bool:
        """Whether the decoder's weights lie elsewhere by now (it was moved, cast, or other tensors were put in)."""
        decoder = self._decoder()
        return decoder is None or [each.data_ptr() for each in _storages(decoder)] != [
            each.data_ptr() for each in self._kept
        ]

    def new_lane(self, capacity: int) -> Lane:
        """Room for one sequence of at most ``capacity`` tokens.

        Raises:
            EmulusError: There is not enough memory for it.
        """
        return Lane(self.layout, capacity)

    @torch.inference_mode()
    def forward(
        self, feeds: Sequence[Feed], *, chosen: Int64[Tensor, " holes"] | None = None, holes: Sequence[int] = ()
    ) -> Float[Tensor, "wanted hidden"]:
        """Compute tokens, each seeing its lane up to itself, and keep their keys and values.

        The lanes' lengths stay as they are: whoever calls knows which tokens are there for good.

        Args:
            feeds: Tokens of distinct lanes.
            chosen: Ids that only the device knows yet.
            holes: Where those stand, counted over all feeds; what the feeds say there is not looked at.

        Returns:
            What the head reads, of the wanted tokens in order; float32 on a CPU.

        Raises:
            EmulusError: A token would stand beyond its lane.
        """
        step = _Flat.of(feeds)
        device = self._embedding.device
        ids = numbers(step.ids, device)
        if chosen is not None:
            ids[numbers(holes, device)] = chosen.to(device)
        if self._kernels is None or step.most > _FEW:
            x = self._through(ids, _Steps(self, step))
        else:
            x = self._graphs(ids, numbers(step.positions, device), *_addresses(step, device))
        wanted = x[numbers(step.wanted, x.device)].to(self.device, _activations(self._norm))
        return self._rms_norm(wanted, self._norm)

    def rotary(self, position: Int64[Tensor, " tokens"]) -> Rotary:
        """The angles of these positions."""
        return rotary(position[None], self.config.head_width, self.config.rope_theta)

    def _compute(self, ids: Tensor, position: Tensor, base: Tensor, capacity: Tensor, ready: Tensor | None) -> Tensor:
        """A step of few tokens on one device, as a function of tensors alone."""
        where = Where(
            base=base,
            capacity=capacity,
            position=position,
            dtype=self.layout.dtype,
            kv_heads=self.layout.kv_heads,
            head_dim=self.layout.head_dim,
            ready=ready,
        )
        table = self.rotary(position)
        if self._table is None:
            return self._through(ids, {ids.device: _Step(where=where, table=table)})
        config = self.config
        return native.blocks(
            F.embedding(ids, self._embedding).float(),
            self._table,
            heads=config.num_attention_heads,
            inner=config.intermediate_size,
            eps=config.rms_norm_eps,
            cos=table.cos[0, 0],
            sin=table.sin[0, 0],
            where=where,
        )

    def _through(self, ids: Tensor, steps: Mapping[torch.device, _Step]) -> Tensor:
        x = F.embedding(ids, self._embedding)
        for layer in self._layers:
            x = self._block(x.to(layer.device, layer.dtype), layer, steps[layer.device])
        return x

    @torch.inference_mode()
    def logits(self, hidden: Float[Tensor, "n hidden"], ranges: Sequence[tuple[int, int]]) -> Float[Tensor, "n ids"]:
        """float32 logits of these ids only: where cells are drawn, text's part of the head is not read."""
        parts = [linear(hidden, self._head, rows).float() for rows in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _block(self, x: Tensor, layer: _Layer, step: _Step) -> Tensor:
        x = x + linear(self._attention(self._rms_norm(x, layer.norm), layer, step), layer.o)
        hidden = self._rms_norm(x, layer.mlp_norm)
        gate, up = linear(hidden, layer.gate), linear(hidden, layer.up)
        product = F.silu(gate) * up if self._kernels is None else self._kernels.silu_mul(gate, up)
        return x + linear(product, layer.down)

    def _attention(self, hidden: Tensor, layer: _Layer, step: _Step) -> Tensor:
        width = self.config.head_width
        q = linear(hidden, layer.q).view(len(hidden), -1, width)
        k = linear(hidden, layer.k).view(len(hidden), -1, width)
        v = linear(hidden, layer.v).view(len(hidden), -1, width)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._rms_norm(q, layer.q_norm), self._rms_norm(k, layer.k_norm)
        if step.where is None or self._kernels is None:
            return _attend(q, k, v, layer, step)
        cos, sin = (part[0, 0] for part in step.table)
        q = self._kernels.rotate_and_store(q, k, v, cos, sin, step.where, layer.index)
        return self._kernels.attend(q, step.where, layer.index)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        eps = self.config.rms_norm_eps
        if self._kernels is None:
            return rms_norm(x, weight, eps).to(x.dtype)
        return self._kernels.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps).view_as(x)


@dataclass(frozen=True, kw_only=True)
class _Flat:
    """The tokens of all feeds, one after another."""

    feeds: Sequence[Feed]
    ids: list[int]
    positions: list[int]
    wanted: list[int]
    most: int

    @classmethod
    def of(cls, feeds: Sequence[Feed]) -> _Flat:
        return cls(
            feeds=feeds,
            ids=[id for feed in feeds for id in feed.ids],
            positions=[slot for feed in feeds for slot in _checked(feed)],
            wanted=list(_wanted(feeds)),
            most=max(len(feed.ids) for feed in feeds),
        )


class _Steps(dict[torch.device, _Step]):
    """A step as each device sees it, where plain PyTorch computes it; made when it is first asked for."""

    def __init__(self, runner: Runner, flat: _Flat) -> None:
        super().__init__()
        self._runner = runner
        self._flat = flat

    def __missing__(self, device: torch.device) -> _Step:
        position = numbers(self._flat.positions, device)
        self[device] = _Step(table=self._runner.rotary(position), spans=tuple(_spans(self._flat, position)))
        return self[device]


def _spans(flat: _Flat, positions: Tensor) -> Iterator[_Span]:
    start = 0
    for feed in flat.feeds:
        tokens = slice(start, start + len(feed.ids))
        yield _Span(lane=feed.lane, tokens=tokens, positions=positions[tokens], visible=max(feed.slots) + 1)
        start = tokens.stop


def _addresses(flat: _Flat, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each token: address of its lane, slots of its lane, address of what is ready of it."""

    def each_token(values: Sequence[int]) -> Tensor:
        return numbers([n for n, feed in zip(values, flat.feeds, strict=True) for _ in feed.ids], device)

    lanes = [feed.lane for feed in flat.feeds]
    base = each_token([lane.memory[device].data_ptr() for lane in lanes])
    capacity = each_token([lane.capacity for lane in lanes])
    if not any(lane.ready for lane in lanes):
        return base, capacity, None
    return base, capacity, each_token([lane.ready[device].data_ptr() if lane.ready else 0 for lane in lanes])


def _storages(decoder: Decoder) -> list[Tensor]:
    """Every tensor of a decoder, as it lies in memory now."""
    return [each.detach() for each in (*decoder.parameters(), *decoder.buffers())]


def _layers(decoder: Decoder) -> Iterator[_Layer]:
    seen: list[torch.device] = []
    for block in decoder.model.blocks:
        yield _layer(block, seen.count(block.device))
        seen.append(block.device)


def _layer(block: Block, index: int) -> _Layer:
    attention, mlp = block.self_attn, block.mlp
    return _Layer(
        device=block.device,
        index=index,
        dtype=_activations(block.input_layernorm.weight),
        norm=block.input_layernorm.weight,
        q=_weight(attention.q_proj),
        k=_weight(attention.k_proj),
        v=_weight(attention.v_proj),
        q_norm=attention.q_norm.weight if attention.q_norm else None,
        k_norm=attention.k_norm.weight if attention.k_norm else None,
        o=_weight(attention.o_proj),
        mlp_norm=block.post_attention_layernorm.weight,
        gate=_weight(mlp.gate_proj),
        up=_weight(mlp.up_proj),
        down=_weight(mlp.down_proj),
    )


def _table(layers: Sequence[_Layer]) -> Tensor | None:
    """What the native kernels need to compute all blocks in one call; None where they cannot."""
    rows = [_row(layer) for layer in layers]
    whole = all(len(row) == native.BLOCK_NUMBERS for row in rows)
    return torch.tensor(rows, dtype=torch.int64, device="cpu") if whole else None


def _row(layer: _Layer) -> list[int]:
    norms = [layer.norm, layer.mlp_norm, layer.q_norm, layer.k_norm]
    if {norm.dtype for norm in norms if norm is not None} not in ({torch.float32}, {torch.bfloat16}):
        return []
    row = [0 if norm is None else norm.data_ptr() for norm in norms]
    row.append(int(layer.norm.dtype == torch.bfloat16))
    for weight in (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down):
        row += _numbers(weight)
    return row


def _numbers(weight: Weight) -> native.Numbers:
    if isinstance(weight, QuantizedLinear):
        return native.matrix(*weight.packed(), width=weight.in_features, rounded=True)
    assert isinstance(weight, Tensor), "a plain matrix, or a quantised one"
    return native.matrix(weight, width=weight.shape[1])


def _weight(module: nn.Module) -> Weight:
    """What :func:`linear` multiplies with: a plain matrix, or the quantised layer itself."""
    return module.weight if isinstance(module, nn.Linear) else module


def _activations(weight: Tensor) -> torch.dtype:
    """Type to compute in beside this weight: on a CPU float32, which costs nothing there, whatever the weights are."""
    return torch.float32 if weight.device.type == "cpu" else weight.dtype


def _cache_dtype(decoder: Decoder, kernels: ModuleType | None, wanted: torch.dtype | None) -> torch.dtype:
    """Of keys and values: the weights' own; on a CPU bfloat16 where a kernel reads it as it lies there, else float32.

    Where weights have few bits, keys and values need no more than bfloat16 has.
    """
    norm = decoder.model.norm.weight
    if wanted is not None:
        known = {gpu: {*_PLAIN, torch.float8_e4m3fn}, native: {torch.float32, torch.bfloat16}, None: _PLAIN}[kernels]
        if wanted not in known:
            raise EmulusError(f"keys and values cannot be {wanted} on {norm.device} here; leave kv_dtype away")
        return wanted
    if norm.device.type != "cpu":
        return norm.dtype
    short = norm.dtype == torch.bfloat16 or is_quantized(decoder)
    return torch.bfloat16 if short and kernels is not None else torch.float32


def _kernels(norm: Tensor, head_dim: int) -> ModuleType | None:
    """Kernels for few tokens where this norm is and for what it is, if there are."""
    if norm.is_cuda:
        return gpu if gpu.available() else None
    fits = norm.dtype in (torch.float32, torch.bfloat16) and head_dim % 2 == 0 and head_dim <= native.MOST_HEAD_DIM
    return native if norm.is_cpu and fits and native.available() else None


def _checked(feed: Feed) -> Sequence[int]:
    slots = feed.slots
    if max(slots) >= feed.lane.capacity:
        raise EmulusError(
            f"a sequence of {max(slots) + 1} tokens does not fit a key/value cache of {feed.lane.capacity}"
        )
    return slots


def _wanted(feeds: Sequence[Feed]) -> Iterator[int]:
    """Places, among all tokens of a step, of those that are asked for what follows."""
    start = 0
    for feed in feeds:
        for index in [len(feed.ids) - 1] if feed.wanted is None else feed.wanted:
            yield start + index
        start += len(feed.ids)


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: _Layer, step: _Step) -> Tensor:
    """Attention in plain PyTorch, lane by lane."""
    heads_first = [part.transpose(0, 1)[None] for part in (q, k)]
    q, k = (rotate(part, step.table)[0] for part in heads_first)
    v = v.transpose(0, 1)
    parts = []
    for span in step.spans:
        memory = span.lane.layer(layer.device, layer.index)
        memory[0, :, span.positions] = k[:, span.tokens].to(memory.dtype)
        memory[1, :, span.positions] = v[:, span.tokens].to(memory.dtype)
        keys, values = (part[None, :, : span.visible].to(q.dtype) for part in memory)
        mask = torch.arange(span.visible, device=q.device) <= span.positions[:, None]
        if span.lane.ready is not None:
            mask = mask & span.lane.ready[layer.device][: span.visible].bool()
        seen = F.scaled_dot_product_attention(q[None, :, span.tokens], keys, values, attn_mask=mask, enable_gqa=True)
        parts.append(seen[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)
