"""The decoder written for decoding: a few tokens of many sequences in one flat step.

The same weights and the same arithmetic as :class:`~emulus.model.transformer.Decoder`, which sees whole sequences.
Here a step is a row of tokens, each with a lane (whose keys and values it sees) and a position: nothing is padded,
and one, two or fifty tokens of a sequence are the same call.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from emulus.device import int_table, numbers
from emulus.engine.cache import CacheLayout, Lane
from emulus.engine.step import Feed, Span, Step, padded, rows_of
from emulus.errors import EmulusError
from emulus.kernels import gpu, native
from emulus.kernels.graphs import Graphs
from emulus.kernels.where import Where
from emulus.model.attention import attend
from emulus.model.linear import Packed, QuantizedLinear, kernel_for, linear
from emulus.model.quantize import is_quantized
from emulus.model.transformer import Block, Decoder, Rotary, rms_norm, rotary, rotate

Weight = Tensor | nn.Module

AT_ONCE = 512
"""Most tokens of one sequence in a step: a picture of 16,000 tokens attends to itself in pieces, not as one square."""

_FEW = 128
"""Up to so many tokens of a sequence the kernels for few tokens attend; more are a prompt, for PyTorch's attention.

A schedule asks for no more of one request (``schedule._MOST_IDS``): what comes out must not depend on the window."""


_ROWS = 6
"""Kinds of numbers that a step of few tokens is told by, at most."""

_PLAIN = {torch.float32, torch.bfloat16, torch.float16}


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
    fused: _Fused | None = None


@dataclass(frozen=True, kw_only=True)
class _Fused:
    """A block's weights as the GPU's kernels take several at once."""

    qkv: tuple[Tensor | Packed, ...]
    mlp: tuple[Tensor | Packed, ...]
    o: Callable[..., Tensor]
    down: Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class _Context:
    """What every layer of one device knows of a step: addresses for kernels, or spans for plain PyTorch."""

    table: Rotary
    where: Where | None = None
    spans: tuple[Span, ...] = ()


class Runner:
    """Computes hidden states of new tokens, and keeps their keys and values."""

    _angles: tuple[Tensor, Tensor] | None = None
    _nothing: Tensor
    _scratch: Lane

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
        compute = weakref.WeakMethod(self._compute_table)
        self._graphs = Graphs(
            lambda *tensors: compute()(*tensors),  # type: ignore[misc]
            device=self.device,
            most=_ROWS if record else 0,
        )
        self._table = _table(self._layers) if self._kernels is native else None
        # The table holds addresses, so what lies there must stay, whatever becomes of the decoder.
        self._decoder = weakref.ref(decoder)
        self._kept = _storages(decoder)
        self.layout = CacheLayout.of(decoder.config, devices, _cache_dtype(decoder, self._kernels, kv_dtype))
        if self._kernels is gpu:
            self._layers = tuple(replace(layer, fused=_fused(layer)) for layer in self._layers)
            self._prepare_recording()

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
        self, feeds: Sequence[Feed], *, chosen: Int64[Tensor, " ids"] | None = None, firsts: Sequence[int] = ()
    ) -> Float[Tensor, "wanted hidden"]:
        """Compute tokens, each seeing its lane up to itself, and keep their keys and values.

        The lanes' lengths stay as they are: whoever calls knows which tokens are there for good.

        Args:
            feeds: Tokens of distinct lanes.
            chosen: Ids that only the device knows yet, at most one for each feed.
            firsts: Index into ``chosen`` of each feed's first token, which replaces the id in the feed.

        Returns:
            What the head reads, of the wanted tokens in order; float32 on a CPU.

        Raises:
            EmulusError: A token would stand beyond its lane.
        """
        step = Step.of(feeds, firsts)
        if self._kernels is None or step.longest > _FEW:
            x = self._through(self._ids(step, chosen), _Contexts(self, step))
        elif self._kernels is native:
            _, *rest = (numbers(row, self.device) for row in step.table(self.device))
            x = self._compute(self._ids(step, chosen), *rest)
        else:
            parts = [self._recorded(part, chosen) for part in step.parts(gpu.FEW)]
            x = parts[0] if len(parts) == 1 else torch.cat(parts)
        wanted = rows_of(x, step.wanted).to(self.device, _activations(self._norm))
        return self._rms_norm(wanted, self._norm)

    def rotary(self, position: Int64[Tensor, " tokens"]) -> Rotary:
        """The angles of these positions."""
        return rotary(position[None], self.config.head_width, self.config.rope_theta)

    def _prepare_recording(self) -> None:
        """Make what recorded steps read beside weights and lanes, which stays where it is in memory."""
        with torch.inference_mode():
            every = torch.arange(self.config.max_position_embeddings, device=self.device)
            cos, sin = self.rotary(every)
            self._angles = cos[0, 0], sin[0, 0]
            self._nothing = torch.zeros(gpu.FEW, dtype=torch.int64, device=self.device)
        # Tokens that fill a step up are of this lane, which nobody reads.
        self._scratch = self.new_lane(1)

    def _cos_sin(self, position: Int64[Tensor, " tokens"]) -> tuple[Tensor, Tensor]:
        if self._angles is not None:
            cos, sin = self._angles
            return cos[position], sin[position]
        table = self.rotary(position)
        return table.cos[0, 0], table.sin[0, 0]

    def _ids(self, step: Step, chosen: Tensor | None) -> Tensor:
        device = self._embedding.device
        ids = numbers(step.ids, device)
        if chosen is not None:
            holes = [place for place, source in enumerate(step.sources) if source >= 0]
            ids[numbers(holes, device)] = rows_of(chosen, [step.sources[hole] for hole in holes]).to(device)
        return ids

    def _recorded(self, step: Step, chosen: Tensor | None) -> Tensor:
        """A step of few tokens on a GPU: one copy of all numbers to the device, and one launch of what is recorded."""
        count = len(step.ids)
        table = [*step.table(self.device), step.sources]
        if not step.wanted:
            # A piece of a prompt: of these there are too many sizes to record each.
            return self._compute_table(int_table(table, self.device), chosen)
        nobody = [0, 0, self._scratch.memory[self.device].data_ptr(), self._scratch.capacity, *[0] * (len(table) - 5)]
        table = padded(table, [*nobody, -1])
        # Of few lengths, too.
        known = self._nothing if chosen is None else F.pad(chosen, (0, -len(chosen) % gpu.FEW))
        return self._graphs(int_table(table, self.device), known)[:count]

    def _compute_table(self, table: Int64[Tensor, "rows tokens"], chosen: Tensor | None) -> Tensor:
        """A step of few tokens as a function of tensors alone: the rows of :meth:`Step.table`, then its sources."""
        table = table.to(self.device, non_blocking=True)
        ids, *rest, sources = table
        if chosen is not None:
            ids = torch.where(sources < 0, ids, chosen[sources.clamp_min(0)])
        return self._compute(ids, *rest)

    def _compute(
        self, ids: Tensor, position: Tensor, base: Tensor, capacity: Tensor, ready: Tensor | None = None
    ) -> Tensor:
        """A step of few tokens on one device; which lanes they are of is told by addresses."""
        where = Where(
            base=base,
            capacity=capacity,
            position=position,
            dtype=self.layout.dtype,
            kv_heads=self.layout.kv_heads,
            head_dim=self.layout.head_dim,
            ready=ready,
        )
        cos, sin = self._cos_sin(position)
        if self._table is None:
            return self._through(
                ids, {ids.device: _Context(where=where, table=Rotary(cos[None, None], sin[None, None]))}
            )
        config = self.config
        return native.blocks(
            F.embedding(ids, self._embedding).float(),
            self._table,
            heads=config.num_attention_heads,
            inner=config.intermediate_size,
            eps=config.rms_norm_eps,
            cos=cos,
            sin=sin,
            where=where,
        )

    def _through(self, ids: Tensor, steps: Mapping[torch.device, _Context]) -> Tensor:
        x = F.embedding(ids, self._embedding)
        for layer in self._layers:
            x = self._block(x.to(layer.device, layer.dtype), layer, steps[layer.device])
        return x

    @torch.inference_mode()
    def logits(self, hidden: Float[Tensor, "n hidden"], ranges: Sequence[tuple[int, int]]) -> Float[Tensor, "n ids"]:
        """float32 logits of these ids only: where cells are drawn, text's part of the head is not read."""
        if self._kernels is gpu and len(hidden) > gpu.FEW:
            # What comes out for a token must not depend on how many others there are.
            return torch.cat([self.logits(part, ranges) for part in hidden.split(gpu.FEW)])
        parts = [linear(hidden, self._head, rows).float() for rows in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _block(self, x: Tensor, layer: _Layer, step: _Context) -> Tensor:
        if layer.fused is not None and step.where is not None and len(x) <= gpu.FEW:
            return self._fused_block(x, layer, layer.fused, step.table, step.where)
        x = x + linear(self._attention(self._rms_norm(x, layer.norm), layer, step), layer.o)
        hidden = self._rms_norm(x, layer.mlp_norm)
        gate, up = linear(hidden, layer.gate), linear(hidden, layer.up)
        product = F.silu(gate) * up if self._kernels is None else self._kernels.silu_mul(gate, up)
        return x + linear(product, layer.down)

    def _fused_block(self, x: Tensor, layer: _Layer, fused: _Fused, table: Rotary, where: Where) -> Tensor:
        """The same to the bit in few launches; each reads its weights once."""
        heads, kv_heads, eps = (
            self.config.num_attention_heads,
            self.config.num_key_value_heads,
            self.config.rms_norm_eps,
        )
        joined = gpu.linear_group(gpu.rms_norm(x, layer.norm, eps), fused.qkv)
        q, k, v = joined.view(len(x), -1, self.config.head_width).split((heads, kv_heads, kv_heads), dim=1)
        cos, sin = (part[0, 0] for part in table)
        q = gpu.rotate_and_store(
            q, k, v, cos, sin, where, layer.index, q_norm=layer.q_norm, k_norm=layer.k_norm, eps=eps
        )
        x = fused.o(gpu.attend(q, where, layer.index), add=x)
        return fused.down(gpu.gated(gpu.rms_norm(x, layer.mlp_norm, eps), *fused.mlp), add=x)

    def _attention(self, hidden: Tensor, layer: _Layer, step: _Context) -> Tensor:
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


class _Contexts(dict[torch.device, _Context]):
    """A step as each device sees it, where plain PyTorch computes it; made when it is first asked for."""

    def __init__(self, runner: Runner, step: Step) -> None:
        super().__init__()
        self._runner = runner
        self._step = step

    def __missing__(self, device: torch.device) -> _Context:
        position = numbers(self._step.positions, device)
        self[device] = _Context(table=self._runner.rotary(position), spans=tuple(self._step.spans(position)))
        return self[device]


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


def _fused(layer: _Layer) -> _Fused | None:
    """What the GPU's kernels take of a block at once; None where its weights are not of one kind."""
    q, k, v, o, gate, up, down = map(_packed, (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down))
    kinds = [{_kind(each) for each in several} for several in ((q, k, v), (gate, up))]
    ends = [kernel for kernel in (kernel_for(gpu, o), kernel_for(gpu, down)) if kernel is not None]
    if layer.dtype != torch.bfloat16 or any(len(kind) > 1 for kind in kinds) or len(ends) < 2:
        return None
    return _Fused(qkv=(q, k, v), mlp=(gate, up), o=ends[0], down=ends[1])


def _packed(weight: Weight) -> Tensor | Packed:
    if isinstance(weight, QuantizedLinear):
        return weight.packed()
    assert isinstance(weight, Tensor), "a plain matrix, or a quantised one"
    return weight


def _kind(weight: Tensor | Packed) -> tuple[torch.dtype, bool]:
    return (weight.dtype, True) if isinstance(weight, Tensor) else (weight.q.dtype, weight.low is None)


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


def _attend(q: Tensor, k: Tensor, v: Tensor, layer: _Layer, step: _Context) -> Tensor:
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
        queries = q[None, :, span.tokens]
        seen = (
            _masked(queries, keys, values, span)
            if span.row is None or not _has_unmasked(q)
            else attend(queries, keys, values, span.row)
        )
        parts.append(seen[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)


def _has_unmasked(q: Tensor) -> bool:
    """Whether there are kernels that need no mask for these queries; on a GPU they are many times faster."""
    return q.is_cuda


def _masked(queries: Tensor, keys: Tensor, values: Tensor, span: Span) -> Tensor:
    mask = torch.arange(span.visible, device=queries.device) <= span.positions[:, None]
    if span.lane.ready is not None:
        mask = mask & span.lane.ready[queries.device][: span.visible].bool()
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
