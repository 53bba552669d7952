"""The decoder: Llama-style, with the released checkpoints' parameter names.

Plain PyTorch. How it is spread over devices, compiled or quantised is decided outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emulus.errors import EmulusError
from emulus.model.attention import Row, attend, causal
from emulus.model.config import DecoderConfig
from emulus.model.linear import linear
from emulus.model.loss import Losses, linear_cross_entropy


class RMSNorm(nn.Module):
    """Scale to unit mean square, in float32 whatever comes in."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... size"]) -> Float[Tensor, "... size"]:
        """Normalise the last axis."""
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Float[Tensor, "... size"], weight: Float[Tensor, " size"], eps: float) -> Float[Tensor, "... size"]:
    """Scale to unit mean square in float32, then by ``weight``; the cast back comes in between, as released."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


class Rotary(NamedTuple):
    """Cosines and sines of one call's positions, float32."""

    cos: Float[Tensor, "batch 1 tokens head_dim"]
    sin: Float[Tensor, "batch 1 tokens head_dim"]


class Context(NamedTuple):
    """What the attention of every layer shares in one call."""

    rotary: Rotary
    row: Row | None


def rotary(position_ids: Int[Tensor, "batch tokens"], width: int, theta: float) -> Rotary:
    """Compute the angles of RoPE in the rotate-half layout.

    Args:
        position_ids: Positions, from 0.
        width: Head width, even.
        theta: Base of the wave lengths.

    Source: Su et al. 2021 (arXiv:2104.09864); layout of Llama.
    """
    exponent = torch.arange(0, width, 2, device=position_ids.device).float() / width
    angles = position_ids[:, None, :, None].float() * theta**-exponent
    angles = torch.cat((angles, angles), dim=-1)
    return Rotary(angles.cos(), angles.sin())


def rotate(
    x: Float[Tensor, "batch heads tokens head_dim"], table: Rotary
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Turn each pair ``(i, i + head_dim / 2)`` by its position's angle, in float32."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * table.cos + turned * table.sin).to(x.dtype)


class Attention(nn.Module):
    """Causal attention with shared key/value heads."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.width = config.head_width
        self.dropout = config.attention_dropout
        queries, keys = config.num_attention_heads * self.width, config.num_key_value_heads * self.width
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        # Emu3 has no norm here; Emu3.5 has one per head.
        self.q_norm = RMSNorm(self.width, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.width, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x: Float[Tensor, "batch tokens hidden"], context: Context
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Mix each token with those before it."""
        batch, tokens, _ = x.shape
        # -1: of matrices that are spread over processes (tensor parallel) only some heads are here.
        q = self.q_proj(x).view(batch, tokens, -1, self.width)
        k = self.k_proj(x).view(batch, tokens, -1, self.width)
        v = self.v_proj(x).view(batch, tokens, -1, self.width)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, context.rotary), rotate(k, context.rotary)
        dropout = self.dropout if self.training else 0.0
        out = causal(q, k, v, dropout) if context.row is None else attend(q, k, v, context.row, dropout=dropout)
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class MLP(nn.Module):
    """SiLU-gated feed-forward layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "batch tokens hidden"]) -> Float[Tensor, "batch tokens hidden"]:
        """Transform each token by itself."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention then MLP, each on a normalised copy and added back."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(config.attention_dropout)
        self.recompute = False

    @property
    def device(self) -> torch.device:
        """Where this block lies, and computes."""
        return self.input_layernorm.weight.device

    def forward(
        self, x: Float[Tensor, "batch tokens hidden"], context: Context
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Add what attention and MLP have to say.

        With ``recompute`` set, the backward pass computes this again instead of keeping what it needs.
        """
        if self.recompute and self.training:
            out: Tensor = checkpoint(self.add, x, context, use_reentrant=False)
            return out
        return self.add(x, context)

    def add(self, x: Float[Tensor, "batch tokens hidden"], context: Context) -> Float[Tensor, "batch tokens hidden"]:
        """What :meth:`forward` computes, and computes again."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), context))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Backbone(nn.Module):
    """Embedding, blocks and final norm; exists as a module of its own for the parameter names ``model.*``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        # padding_idx is not set: the released code starts PAD's row at zero, and PAD is never a training
        # input here.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def blocks(self) -> Iterable[Block]:
        """The layers, as what they are."""
        return cast("Iterable[Block]", self.layers)

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        position_ids: Int[Tensor, "batch tokens"],
        row: Row | None,
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Run every block, each where it lies."""
        context: Context | None = None
        x = self.dropout(self.embed_tokens(input_ids.to(self.embed_tokens.weight.device)))
        for layer in self.blocks:
            if context is None or layer.device != x.device:
                x = x.to(layer.device)
                table = rotary(position_ids.to(layer.device), self.config.head_width, self.config.rope_theta)
                context = Context(table, row)
            x = layer(x, context)
        return self.norm(x.to(self.norm.weight.device))


class Decoder(nn.Module):
    """Predict the next id of every position.

    State-dict names are the released checkpoints' (``model.layers.0.self_attn.q_proj.weight``,
    ``lm_head.weight``).
    """

    def __init__(self, config: DecoderConfig) -> None:
        """Build with fresh weights from N(0, ``initializer_range``).

        Args:
            config: Its shape. Under ``torch.device("meta")`` nothing is allocated.
        """
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights, see :func:`fresh`; nothing happens on the meta device."""
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                return
            with torch.no_grad():
                parameter.copy_(fresh(name, parameter.shape, self.config, generator))

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        *,
        position_ids: Int[Tensor, "batch tokens"] | None = None,
        document_lengths: Sequence[int] | None = None,
        vocab_range: tuple[int, int] | None = None,
        last_only: bool = False,
    ) -> Float[Tensor, "batch positions ids"]:
        """Compute logits.

        Args:
            input_ids: Ids, each below ``config.vocab_size``.
            position_ids: Position of each token in its document; by default counted from 0 (from 0 again in
                each document when packed).
            document_lengths: One row holds these documents end to end, and none sees another (training).
            vocab_range: Only these ids' logits, ``(start, stop)``.
            last_only: Only the last position's logits.

        Returns:
            float32 logits ``(batch, tokens or 1, vocab_size or stop - start)``. Under autocast the product
            itself is in the lower precision.

        Raises:
            EmulusError: The document lengths are not those of the row.
        """
        hidden = self.hidden(input_ids, position_ids=position_ids, document_lengths=document_lengths)
        return self.head(hidden[:, -1:] if last_only else hidden, vocab_range)

    def hidden(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        *,
        position_ids: Int[Tensor, "batch tokens"] | None = None,
        document_lengths: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Compute what the head reads: the last block's output after the final norm.

        Arguments and errors are those of :meth:`forward`.
        """
        batch, tokens = input_ids.shape
        if document_lengths is not None and (batch != 1 or sum(document_lengths) != tokens):
            raise EmulusError(
                f"document_lengths sum to {sum(document_lengths)} but the batch is {batch} x {tokens} ids; "
                "packed documents are one row that they fill"
            )
        if position_ids is None:
            position_ids = default_positions(batch, tokens, document_lengths, input_ids.device)
        row = None if document_lengths is None else Row.whole(document_lengths)
        return self.model(input_ids, position_ids, row)

    def losses(
        self,
        input_ids: Int[Tensor, " here"],
        position_ids: Int[Tensor, " here"],
        row: Row,
        *,
        supervised: Int[Tensor, " n"],
        targets: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
        z_loss: float = 0.0,
    ) -> Losses:
        """Compute the training loss of a packed row, or of the part of it that is here.

        Args:
            input_ids: The ids that are here.
            position_ids: Their places in their documents.
            row: What they may see.
            supervised: Which of them have a target; the others never reach the head.
            targets: The ids that these should predict.
            weights: How much each counts.
            z_loss: Weight of the squared log-partition, which keeps logits small.
        """
        # Only training needs it, and importing it takes longer than drawing a small picture.
        from torch.distributed.tensor import DTensor

        hidden = self.model(input_ids[None], position_ids[None], row)[0].index_select(0, supervised)
        head = self.lm_head.weight
        if not isinstance(head, DTensor):
            return linear_cross_entropy(hidden, head, targets, weights, z_loss=z_loss)
        # Tensor parallel: some rows of the head are here, as many as on the other processes (the last may have fewer).
        mesh = head.device_mesh
        first_id = mesh.get_local_rank() * -(-head.shape[0] // mesh.size())
        return linear_cross_entropy(
            hidden, head.to_local(), targets, weights, z_loss=z_loss, group=mesh.get_group(), first_id=first_id
        )

    def head(
        self, hidden: Float[Tensor, "*rows hidden"], vocab_range: tuple[int, int] | None = None
    ) -> Float[Tensor, "*rows ids"]:
        """Turn hidden states into float32 logits, of all ids or of ``vocab_range`` (start, stop) only."""
        return linear(hidden, self.lm_head, vocab_range).float()


def fresh(
    name: str, shape: torch.Size, config: DecoderConfig, generator: torch.Generator | None = None
) -> Float[Tensor, "..."]:
    """New weights for the parameter called ``name``: N(0, ``initializer_range``); ones for norms, PAD's embedding zero.

    Residual projections are not scaled down by depth, as released. Weights are drawn on the generator's device.
    """
    device = "cpu" if generator is None else generator.device
    if name.endswith("norm.weight"):
        return torch.ones(shape, device=device)
    weight = torch.empty(shape, device=device).normal_(std=config.initializer_range, generator=generator)
    if name == "model.embed_tokens.weight" and config.pad_token_id is not None:
        weight[config.pad_token_id] = 0
    return weight


def default_positions(
    batch: int, tokens: int, document_lengths: Sequence[int] | None, device: torch.device
) -> Int[Tensor, "batch tokens"]:
    """Count positions from 0, and from 0 again in each packed document."""
    lengths = [tokens] if document_lengths is None else document_lengths
    counts = torch.cat([torch.arange(length, device=device) for length in lengths])
    return counts.expand(batch, tokens)
