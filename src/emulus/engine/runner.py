"""The decoder written for decoding: a few tokens of many sequences in one flat step.

The same weights and the same arithmetic as :class:`~emulus.model.transformer.Decoder`, which sees whole sequences.
Here a step is a row of tokens, each with a lane (whose keys and values it sees) and a position: nothing is padded,
and one, two or fifty tokens of a sequence are the same call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from emulus.engine.cache import CacheLayout, Lane
from emulus.errors import EmulusError
from emulus.kernels import native
from emulus.kernels.where import Where
from emulus.model.linear import linear
from emulus.model.transformer import Block, Decoder, Rotary, rms_norm, rotary, rotate

Weight = Tensor | nn.Module

AT_ONCE = 512
"""Most tokens of one sequence in a step: a picture of 16,000 tokens attends to itself in pieces, not as one square."""

_FEW = 32
"""Up to so many tokens of a sequence the kernels for few tokens attend; more are a prompt, and PyTorch's are better."""


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
    """What every layer of one device needs to know of a step."""

    kernels: ModuleType | None
    where: Where
    spans: tuple[_Span, ...]
    table: Rotary


class Runner:
    """Computes hidden states of new tokens, and keeps their keys and values."""

    def __init__(self, decoder: Decoder) -> None:
        """Look at a decoder; nothing is copied, so that later changes of its weights are seen.

        Args:
            decoder: Whose weights.
        """
        self.config = decoder.config
        self._embedding = decoder.model.embed_tokens.weight
        self._norm = decoder.model.norm.weight
        self._head = _weight(decoder.lm_head)
        self._layers = tuple(_layers(decoder))
        devices = [layer.device for layer in self._layers]
        self.layout = CacheLayout.of(decoder.config, devices, _cache_dtype(self._layers[0]))

    @property
    def device(self) -> torch.device:
        """Where hidden states come out, and the head is."""
        return self._norm.device

    def new_lane(self, capacity: int) -> Lane:
        """Room for one sequence of at most ``capacity`` tokens.

        Raises:
            EmulusError: There is not enough memory for it.
        """
        return Lane(self.layout, capacity)

    @torch.inference_mode()
    def forward(self, feeds: Sequence[Feed]) -> Float[Tensor, "wanted hidden"]:
        """Compute tokens, each seeing its lane up to itself, and keep their keys and values.

        The lanes' lengths stay as they are: whoever calls knows which tokens are there for good.

        Args:
            feeds: Tokens of distinct lanes.

        Returns:
            What the head reads, of the wanted tokens in order; float32 on a CPU.

        Raises:
            EmulusError: A token would stand beyond its lane.
        """
        steps = _Steps(self, feeds)
        x = F.embedding(steps.ids.to(self._embedding.device), self._embedding)
        for layer in self._layers:
            x = x.to(layer.device, layer.dtype)
            x = self._block(x, layer, steps.on(layer.device))
        wanted = x[steps.wanted.to(x.device)].to(self.device, _activations(self._norm))
        return _rms_norm(wanted, self._norm, self.config.rms_norm_eps, _kernels(self.device, self.config.head_width))

    @torch.inference_mode()
    def logits(self, hidden: Float[Tensor, "n hidden"], ranges: Sequence[tuple[int, int]]) -> Float[Tensor, "n ids"]:
        """float32 logits of these ids only: where cells are drawn, text's part of the head is not read."""
        parts = [linear(hidden, self._head, rows).float() for rows in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _block(self, x: Tensor, layer: _Layer, step: _Step) -> Tensor:
        eps, kernels = self.config.rms_norm_eps, step.kernels
        hidden = _rms_norm(x, layer.norm, eps, kernels)
        x = x + linear(self._attention(hidden, layer, step), layer.o)
        hidden = _rms_norm(x, layer.mlp_norm, eps, kernels)
        gate, up = linear(hidden, layer.gate), linear(hidden, layer.up)
        product = F.silu(gate) * up if kernels is None else kernels.silu_mul(gate, up)
        return x + linear(product, layer.down)

    def _attention(self, hidden: Tensor, layer: _Layer, step: _Step) -> Tensor:
        width, eps = self.config.head_width, self.config.rms_norm_eps
        q = linear(hidden, layer.q).view(len(hidden), -1, width)
        k = linear(hidden, layer.k).view(len(hidden), -1, width)
        v = linear(hidden, layer.v).view(len(hidden), -1, width)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = _rms_norm(q.reshape(-1, width), layer.q_norm, eps, step.kernels).view_as(q)
            k = _rms_norm(k.reshape(-1, width), layer.k_norm, eps, step.kernels).view_as(k)
        if step.kernels is None:
            return _attend(q, k, v, layer, step)
        cos, sin = (part[0, 0] for part in step.table)
        q = step.kernels.rotate_and_store(q, k, v, cos, sin, step.where, layer.index)
        return step.kernels.attend(q, step.where, layer.index)


class _Steps:
    """A step's tokens laid out flat, and what each device needs to know of them, made when it is first asked for."""

    def __init__(self, runner: Runner, feeds: Sequence[Feed]) -> None:
        self._runner = runner
        self._feeds = feeds
        self._positions = [slot for feed in feeds for slot in _checked(feed)]
        self._steps: dict[torch.device, _Step] = {}
        self.ids = torch.tensor([id for feed in feeds for id in feed.ids])
        self.wanted = torch.tensor(list(_wanted(feeds)), dtype=torch.int64)

    def on(self, device: torch.device) -> _Step:
        """The step as seen on one device."""
        if device not in self._steps:
            self._steps[device] = self._make(device)
        return self._steps[device]

    def _make(self, device: torch.device) -> _Step:
        layout, config = self._runner.layout, self._runner.config
        positions = torch.tensor(self._positions, device=device)
        few = max(len(feed.ids) for feed in self._feeds) <= _FEW
        kernels = _kernels(device, config.head_width) if few else None
        return _Step(
            kernels=kernels,
            where=self._where(device, positions),
            spans=() if kernels else tuple(self._spans(positions)),
            table=rotary(positions[None], layout.head_dim, config.rope_theta),
        )

    def _where(self, device: torch.device, positions: Tensor) -> Where:
        layout, feeds = self._runner.layout, self._feeds

        def each_token(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(
                [n for n, feed in zip(numbers, feeds, strict=True) for _ in feed.ids], dtype=torch.int64, device=device
            )

        watched = [feed.lane.ready for feed in feeds]
        return Where(
            base=each_token([feed.lane.memory[device].data_ptr() for feed in feeds]),
            capacity=each_token([feed.lane.capacity for feed in feeds]),
            position=positions,
            dtype=layout.dtype,
            kv_heads=layout.kv_heads,
            head_dim=layout.head_dim,
            ready=each_token([ready[device].data_ptr() if ready else 0 for ready in watched]) if any(watched) else None,
        )

    def _spans(self, positions: Tensor) -> Iterator[_Span]:
        start = 0
        for feed in self._feeds:
            tokens = slice(start, start + len(feed.ids))
            yield _Span(lane=feed.lane, tokens=tokens, positions=positions[tokens], visible=max(feed.slots) + 1)
            start = tokens.stop


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


def _weight(module: nn.Module) -> Weight:
    """What :func:`linear` multiplies with: a plain matrix, or the quantised layer itself."""
    return module.weight if isinstance(module, nn.Linear) else module


def _activations(weight: Tensor) -> torch.dtype:
    """Type to compute in beside this weight: on a CPU float32, which costs nothing there, whatever the weights are."""
    return torch.float32 if weight.device.type == "cpu" else weight.dtype


def _cache_dtype(layer: _Layer) -> torch.dtype:
    """Of keys and values: bfloat16 where the weights are and a kernel reads it as fast as it lies there."""
    if layer.device.type == "cpu":
        return torch.bfloat16 if layer.norm.dtype == torch.bfloat16 and native.available() else torch.float32
    return layer.norm.dtype


def _kernels(device: torch.device, head_dim: int) -> ModuleType | None:
    """Kernels for few tokens on this device, if there are."""
    fits = device.type == "cpu" and head_dim % 2 == 0 and head_dim <= native.MOST_HEAD_DIM
    return native if fits and native.available() else None


def _rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: ModuleType | None) -> Tensor:
    return rms_norm(x, weight, eps).to(x.dtype) if kernels is None else kernels.rms_norm(x, weight, eps)


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
