"""config -> what a run will take: parameters, tokens, memory, time. Nothing is allocated; all of it is arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from emulus.data.mixture import Mixture, parse_part
from emulus.data.tokens import SETTINGS
from emulus.model.config import SIZES, DecoderConfig, sized
from emulus.parallel.config import ParallelConfig
from emulus.parallel.processes import settle
from emulus.train.config import TrainConfig
from emulus.train.flops import PEAKS, block_matrices, decoder_flops
from emulus.train.pretrain import PretrainConfig, shape_of

SHARE_OF_PEAK = 0.4
COUNTS = (1, 8, 64, 256)
SHOWN = ("A100", "H100 SXM", "H200", "B200")
ASSUMED_VOCABULARY = 4096
"""Ids of a model whose vocabulary is made with its tokens, until there are any."""

_LOGITS = 2**30  # bytes of the loss's chunks of logits on a GPU, at most
_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many numbers each part of a decoder holds; a head that is the embedding counts there."""

    embedding: int
    block: int
    blocks: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.blocks + self.head


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a process needs; see :func:`memory_per_process`."""

    weights: float
    gradients: float
    optimizer: float
    average: float
    gathered: float
    activations: float
    work: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(dataclasses.astuple(self))


def count_parameters(shape: DecoderConfig) -> Parameters:
    """Count a decoder's parameters."""
    norms = 2 * shape.hidden_size + 2 * shape.head_width * shape.qk_norm
    block = block_matrices(shape) + norms
    table = shape.vocab_size * shape.hidden_size
    return Parameters(
        embedding=table,
        block=block,
        blocks=shape.num_hidden_layers * block,
        head=shape.hidden_size + (0 if shape.tie_word_embeddings else table),
    )


def memory_per_process(
    shape: DecoderConfig, train: TrainConfig, sizes: ParallelConfig, *, row_tokens: int, bfloat16: bool = True
) -> Memory:
    """Estimate the most memory that a process needs in a step.

    With ``P`` parameters, ``split = shard x context x tensor``, ``n = row_tokens / context`` ids here, ``c`` bytes to
    compute with (2, or 4 without bfloat16), ``L`` blocks, and the widths ``h`` (hidden), ``q`` (all query heads),
    ``f`` (inner) and ``v`` (vocabulary), of which ``q``, ``f`` and ``v`` are divided by ``tensor``:

    - weights ``4 P / split``, and as much for the gradients and for the average if one is kept; AdamW twice that, Muon
      once for the matrices of the blocks;
    - gathered: sharded, the whole embedding and head and two blocks in ``c`` bytes and the head's gradient, which is
      summed over the processes at the end, in 4; not sharded, copies of the blocks' matrices in bfloat16;
    - a block keeps ``b = n (k h + c (4 q + 4 f))``: both norms their input, what they normalised and what is read from
      it (``k`` is 16 where all is in bfloat16, 26 where only products are, 24 in float32), attention four tensors, the
      gated layer four. Activations are ``L b``, or ``L n r h + b`` where blocks are computed again (``r`` bytes of the
      residual stream, 2 or 4), and the angles and the final norm ``n (8 w + k h / 2)``. Context parallel, each block
      also keeps the keys and values of the other processes;
    - work: the greater of what the loss needs, ``n h (c + 4)`` and the logits of a chunk (at most 1 GiB), and what a
      block's backward pass does, ``n (3 c f + 2 r h)``.

    Compiled blocks keep less. The GPU's own share (about 1 GiB), what is lost between blocks of memory, and the weights
    of attention that CPUs keep in bfloat16 (2 bytes for each head and pair of a short document's ids) are not counted.
    Six steps of models of 3 to 25 M parameters on a CPU, without the latter, took up to 16 % less than this, and none
    more.

    Args:
        shape: The decoder.
        train: Optimiser and average.
        sizes: How it is spread; ``replicate`` is settled.
        row_tokens: Ids of a row.
        bfloat16: Whether products are computed in bfloat16 (weights are float32 in any case).
    """
    parameters = count_parameters(shape)
    split = sizes.shard * sizes.context * sizes.tensor
    weights = 4 * parameters.total / split
    muon = shape.num_hidden_layers * block_matrices(shape) if train.optimizer == "muon" else 0
    here = row_tokens / sizes.context
    kept = _kept_by_block(shape, sizes, here, bfloat16)
    residual = shape.hidden_size * here * _residual_bytes(sizes, bfloat16)
    layers = shape.num_hidden_layers
    rest = here * (8 * shape.head_width + _norm_bytes(sizes, bfloat16) * shape.hidden_size / 2)
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=2 * weights - 4 * muon / split,
        average=weights if train.ema_decay else 0.0,
        gathered=_gathered(shape, sizes, bfloat16),
        activations=rest + (layers * residual + kept if sizes.recompute else layers * kept),
        work=_work(shape, sizes, here, bfloat16),
    )


def _is_sharded(sizes: ParallelConfig) -> bool:
    return sizes.replicate * sizes.shard * sizes.context > 1


def _residual_bytes(sizes: ParallelConfig, bfloat16: bool) -> int:
    return 2 if bfloat16 and _is_sharded(sizes) else 4


def _norm_bytes(sizes: ParallelConfig, bfloat16: bool) -> int:
    """Bytes kept for the norms of a block, per id and feature."""
    if not bfloat16:
        return 24
    return 16 if _is_sharded(sizes) else 26


def _kept_by_block(shape: DecoderConfig, sizes: ParallelConfig, here: float, bfloat16: bool) -> float:
    size = 2 if bfloat16 else 4
    queries = shape.num_attention_heads * shape.head_width / sizes.tensor
    keys = shape.num_key_value_heads * shape.head_width / sizes.tensor
    inner = shape.intermediate_size / sizes.tensor
    others = 2 * size * keys * here * (sizes.context - 1)
    return here * (_norm_bytes(sizes, bfloat16) * shape.hidden_size + size * 4 * (queries + inner)) + others


def _gathered(shape: DecoderConfig, sizes: ParallelConfig, bfloat16: bool) -> float:
    parameters, size = count_parameters(shape), 2 if bfloat16 else 4
    if _is_sharded(sizes):
        ends = parameters.embedding + parameters.head
        head = shape.vocab_size * shape.hidden_size
        return (size * (ends + 2 * parameters.block) + 4 * head) / sizes.tensor
    return 2 * shape.num_hidden_layers * block_matrices(shape) / sizes.tensor if bfloat16 else 0.0


def _work(shape: DecoderConfig, sizes: ParallelConfig, here: float, bfloat16: bool) -> float:
    size, hidden = 2 if bfloat16 else 4, shape.hidden_size
    logits = min(size * here * shape.vocab_size / sizes.tensor, _LOGITS)
    loss = here * hidden * (size + 4) + logits
    inner = shape.intermediate_size / sizes.tensor
    return max(loss, here * (3 * size * inner + 2 * _residual_bytes(sizes, bfloat16) * hidden))


def describe_plan(config: PretrainConfig, processes: int = 1) -> str:
    """Say what a pretraining run will take, before it is started.

    Args:
        config: The run. Its tokens need not exist yet.
        processes: How many there are; a single one may ask what several would need.

    Returns:
        Lines for a terminal.

    Raises:
        EmulusError: The size is unknown, the processes cannot be shared out as configured, or the tokens that exist
            do not go together.
    """
    parallel = config.train.parallel
    asked = max(parallel.replicate, 1) * parallel.shard * parallel.context * parallel.tensor
    sizes = settle(parallel, asked if processes == 1 else processes)
    missing = [text for text in config.tokens if not (parse_part(text).folder / SETTINGS).exists()]
    mixture = None if missing else Mixture.open(config.tokens)
    shape = _shape(config, mixture)
    lengths = _document_lengths(config, mixture)
    flops = config.rows_per_step * decoder_flops(shape, lengths, sum(lengths))
    return "\n".join(
        [
            *_model_lines(shape, assumed=mixture is None and "vocab_size" not in SIZES[config.size]),
            *_step_lines(config, flops, lengths),
            *_process_lines(config, sizes),
            *_memory_lines(config, shape, sizes),
            *_table_lines(config, shape, sizes, flops),
            *_mixture_lines(config, mixture, missing),
        ]
    )


def _shape(config: PretrainConfig, mixture: Mixture | None) -> DecoderConfig:
    if mixture is not None:
        return shape_of(config, mixture.vocabulary)
    known = SIZES.get(config.size, {}).get("vocab_size")
    return sized(config.size, vocab_size=known or ASSUMED_VOCABULARY, max_position_embeddings=config.context)


def _document_lengths(config: PretrainConfig, mixture: Mixture | None) -> list[int]:
    """A row of documents of the mean length, or of the longest where the tokens do not exist yet."""
    usual = config.context
    if mixture is not None:
        mean = sum(branch.share * branch.tokens / branch.rows for branch in mixture.tree())
        usual = min(max(round(mean), 1), config.context)
    whole, rest = divmod(config.row_tokens, usual)
    return [usual] * whole + ([rest] if rest else [])


def _model_lines(shape: DecoderConfig, *, assumed: bool) -> list[str]:
    parameters = count_parameters(shape)
    vocabulary = f"{shape.vocab_size:,} ids{' (assumed: it is made with the tokens)' if assumed else ''}"
    return [
        f"decoder: {shape.num_hidden_layers} blocks of width {shape.hidden_size:,}, inner width "
        f"{shape.intermediate_size:,}, {shape.num_attention_heads} query and {shape.num_key_value_heads} key heads of "
        f"{shape.head_width}, vocabulary {vocabulary}",
        f"parameters: {_count(parameters.total)} (embedding {_count(parameters.embedding)}, blocks "
        f"{_count(parameters.blocks)}, head {_count(parameters.head)})",
    ]


def _step_lines(config: PretrainConfig, flops: float, lengths: Sequence[int]) -> list[str]:
    tokens, steps = config.row_tokens * config.rows_per_step, config.train.steps
    return [
        f"step: {config.rows_per_step:,} rows of up to {config.row_tokens:,} ids, {_count(tokens)} tokens at most; "
        f"documents of up to {config.context:,} ids",
        f"run: {steps:,} steps, {_count(tokens * steps)} tokens, {flops * steps:.3g} floating-point operations "
        f"({flops / tokens / 1e9:.4g} G a token, in documents of {lengths[0]:,} ids)",
    ]


def _process_lines(config: PretrainConfig, sizes: ParallelConfig) -> list[str]:
    copies = sizes.replicate * sizes.shard
    lines = [
        f"processes: {copies * sizes.context * sizes.tensor:,} = replicate {sizes.replicate:,} x shard "
        f"{sizes.shard:,} x context {sizes.context:,} x tensor {sizes.tensor:,}"
    ]
    if config.rows_per_step % copies:
        lines.append(
            f"  {config.rows_per_step:,} rows cannot be dealt out evenly to {copies:,}, and the run would be refused; "
            "make --rows-per-step a multiple"
        )
    return lines


def _memory_lines(config: PretrainConfig, shape: DecoderConfig, sizes: ParallelConfig) -> list[str]:
    memory = _memory(config, shape, sizes)
    names = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": f"{'Muon and AdamW' if config.train.optimizer == 'muon' else 'AdamW'} state",
        "average": "averaged weights",
        "gathered": "weights and gradients gathered to compute with",
        "activations": f"activations{', blocks computed again' if sizes.recompute else ''}",
        "work": "loss, or the backward pass of a block",
    }
    arithmetic = "float32" if config.train.precision == "fp32" else "bfloat16"
    values = dataclasses.asdict(memory)
    return [
        f"memory of each process (float32 weights, {arithmetic} arithmetic): about {_size(memory.total)}",
        *(f"  {_size(values[name]):>12}  {text}" for name, text in names.items() if values[name]),
    ]


def _memory(config: PretrainConfig, shape: DecoderConfig, sizes: ParallelConfig) -> Memory:
    bfloat16 = config.train.precision != "fp32"
    return memory_per_process(shape, config.train, sizes, row_tokens=config.row_tokens, bfloat16=bfloat16)


def _table_lines(config: PretrainConfig, shape: DecoderConfig, sizes: ParallelConfig, flops: float) -> list[str]:
    """Memory and time on several numbers of GPUs that share one copy of the model."""
    lines = [_columns("GPUs, all of them sharing one copy", [f"{count:,}" for count in COUNTS])]
    for recompute, text in ((False, "memory of each, activations kept"), (True, "blocks computed again")):
        lines.append(_columns(text, [_memory_on(config, shape, sizes, count, recompute) for count in COUNTS]))
    most = config.rows_per_step * sizes.context * sizes.tensor
    for name in SHOWN:
        peak = PEAKS[name].bf16
        if config.train.parallel.float8 and PEAKS[name].fp8:
            peak = PEAKS[name].fp8
        seconds = config.train.steps * flops / (SHARE_OF_PEAK * peak)
        times = [_duration(seconds / count) if count <= most else "-" for count in COUNTS]
        lines.append(_columns(f"time on {name} ({PEAKS[name].memory / 1e9:.0f} GB, {peak / 1e12:,.0f} TFLOP/s)", times))
    note = f"times are at {SHARE_OF_PEAK:.0%} of the peak, without evaluations and checkpoints"
    if most < max(COUNTS):
        note += f"; more than {most:,} GPUs would have no row to work on"
    return [*lines, note]


def _memory_on(config: PretrainConfig, shape: DecoderConfig, sizes: ParallelConfig, count: int, recompute: bool) -> str:
    shared = sizes.context * sizes.tensor
    if count % shared:
        return "-"
    spread = dataclasses.replace(sizes, replicate=1, shard=count // shared, recompute=recompute)
    return _size(_memory(config, shape, spread).total)


def _mixture_lines(config: PretrainConfig, mixture: Mixture | None, missing: Sequence[str]) -> list[str]:
    if mixture is None:
        parts = [f"  {text}{': not there yet' if text in missing else ''}" for text in config.tokens]
        return ["mixture: tokens are missing; make them with emulus tokenize", *parts]
    longest = mixture.longest()
    fits = "" if longest.tokens <= config.context else f", which the context of {config.context:,} cannot hold"
    tree = mixture.tree()
    width = max(len(branch.name) for branch in tree)
    return [
        f"mixture: {sum(branch.rows for branch in tree):,} records, the longest document has {longest.tokens:,} ids "
        f"({longest.name}){fits}",
        *(
            f"  {branch.share:6.1%}  {branch.name:<{width}}  {branch.rows:,} records, {_count(branch.tokens)} tokens"
            for branch in tree
        ),
    ]


def _columns(name: str, cells: Sequence[str]) -> str:
    return f"  {name:<38}" + "".join(f"{cell:>12}" for cell in cells)


def _count(number: float) -> str:
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:,.4g} {letter}"
    return f"{number:,.0f}"


def _size(count: float) -> str:
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.1f} days"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"
