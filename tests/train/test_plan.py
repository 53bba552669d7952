"""The plan counts what a model has and keeps, and says what is missing instead of failing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emulus.data.records import Record, ShardLine, Span, add_to_manifest, shard_name, write_shard
from emulus.data.tokens import SETTINGS
from emulus.errors import EmulusError
from emulus.files import write_json
from emulus.model import Decoder, DecoderConfig, sized
from emulus.model.short import MOST_QUERIES
from emulus.parallel.config import ParallelConfig
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import Vocabulary
from emulus.train.config import TrainConfig
from emulus.train.plan import count_parameters, describe_plan, memory_per_process
from emulus.train.pretrain import PretrainConfig

ALONE = ParallelConfig(replicate=1)


def config_of(tmp_path: Path, tokens: Sequence[str] = ("nowhere",), **fields: Any) -> PretrainConfig:
    return PretrainConfig(tokens=tuple(tokens), out=tmp_path / "run", **fields)


@pytest.mark.parametrize("size", ["tiny", "emoji-25m", "emu3-8b", "emu3.5-34b"])
def test_parameters_are_those_of_the_model(size: str) -> None:
    for tied in (False, True):
        shape = sized(size, **({} if size.startswith("emu3") else {"vocab_size": 500}), tie_word_embeddings=tied)
        with torch.device("meta"):
            model = Decoder(shape)
        counted = count_parameters(shape)
        assert counted.total == sum(parameter.numel() for parameter in model.parameters())
        assert counted.blocks == sum(parameter.numel() for parameter in model.model.layers.parameters())


def kept_by(model: Decoder, lengths: tuple[int, ...], precision: str) -> int:
    """Bytes that a forward pass of the blocks keeps, beside parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(1, sum(lengths), dtype=torch.int64)
    low = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), low:
        model.hidden(ids, document_lengths=lengths).sum()
    return sum(storage.nbytes() for storage in storages.values())


LENGTHS = (300, 212)


def kept_by_short_attention(shape: DecoderConfig, lengths: tuple[int, ...]) -> int:
    """Bytes that a block's attention in bfloat16 on a CPU keeps beyond what the plan says.

    A number for each head, query and key that is computed, in pieces of queries; but no copies of the keys and values
    for each of the heads that share them.
    """
    pairs = 0
    for length in lengths:
        for last in range(MOST_QUERIES, length + MOST_QUERIES, MOST_QUERIES):
            queries = min(length, last) - (last - MOST_QUERIES)
            pairs += queries * min(length, last)
    copies = 2 * (shape.num_attention_heads - shape.num_key_value_heads) * shape.head_width * sum(lengths)
    return 2 * (shape.num_attention_heads * pairs - copies)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_activations_are_those_kept(precision: str, recompute: bool) -> None:
    # Sharded weights make everything bfloat16, where a process alone has a residual stream in float32.
    sizes = ParallelConfig(replicate=1, shard=2 if precision == "bf16" else 1, recompute=recompute)
    kept, planned = [], []
    for layers in (2, 10):
        shape = sized("emoji-3m", vocab_size=100, attention_dropout=0.0, num_hidden_layers=layers)
        model = Decoder(shape).train()
        if precision == "bf16":
            model.bfloat16()
        for block in model.model.blocks:
            block.recompute = recompute
        kept.append(kept_by(model, LENGTHS, precision))
        memory = memory_per_process(shape, TrainConfig(), sizes, row_tokens=512, bfloat16=precision != "fp32")
        copies = precision == "autocast" and not recompute
        planned.append(memory.activations + (memory.gathered if copies else 0))
        if precision != "fp32" and not recompute:
            # The plan knows no lengths of documents, so it leaves these out.
            planned[-1] += layers * kept_by_short_attention(shape, LENGTHS)
    # What eight blocks more keep.
    assert kept[1] - kept[0] == pytest.approx(planned[1] - planned[0], rel=1e-6 if recompute else 0.03)


def test_memory_is_shared_out() -> None:
    shape = sized("emu3-8b")
    train = TrainConfig(ema_decay=0.999)
    alone, shared = (
        memory_per_process(shape, train, dataclasses.replace(ALONE, shard=shard, context=context), row_tokens=131_072)
        for shard, context in ((1, 1), (8, 4))
    )
    for name in ("weights", "gradients", "optimizer", "average"):
        assert getattr(alone, name) == pytest.approx(32 * getattr(shared, name))
    assert alone.weights == alone.gradients == alone.average == alone.optimizer / 2 == 4 * count_parameters(shape).total
    assert shared.activations < alone.activations / 3
    muon = memory_per_process(shape, dataclasses.replace(train, optimizer="muon"), ALONE, row_tokens=131_072)
    assert 0.55 * alone.optimizer < muon.optimizer < 0.65 * alone.optimizer
    again = memory_per_process(shape, train, dataclasses.replace(ALONE, recompute=True), row_tokens=131_072)
    assert again.activations < alone.activations / 9


def test_the_released_size_is_planned_without_anything(tmp_path: Path) -> None:
    parallel = ParallelConfig(shard=8, context=8, recompute=True)
    config = config_of(
        tmp_path,
        ["runs/pictures:image=0.7", "runs/words:text=0.3"],
        size="emu3-8b",
        context=131_072,
        row_tokens=131_072,
        rows_per_step=64,
        train=TrainConfig(steps=1000, parallel=parallel),
    )
    text = describe_plan(config)
    assert "parameters: 8.492 G" in text
    assert "8.389 M tokens" in text
    assert "149.5 G a token" in text
    assert "64 = replicate 1 x shard 8 x context 8 x tensor 1" in text
    assert "40% of the peak" in text
    # 2.51e22 / 20 operations at 0.4 x 989e12 a second, on 64 GPUs.
    row = re.search(r"H100 SXM.*", text)
    assert row is not None
    assert row[0].split()[-4:-2] == ["13.8", "h"]
    assert "runs/words:text=0.3: not there yet" in text
    assert describe_plan(config, processes=128).count("replicate 2 x shard 8") == 1


def test_more_processes_than_rows_are_named(tmp_path: Path) -> None:
    text = describe_plan(config_of(tmp_path, size="emoji-3m", rows_per_step=6), processes=4)
    assert "6 rows cannot be dealt out evenly to 4" in text
    assert "more than 6 GPUs would have no row" in text
    assert "assumed" in text


@pytest.mark.parametrize(
    ("fields", "processes", "message"),
    [
        ({"size": "emoji-4m"}, 1, "did you mean"),
        ({"train": TrainConfig(parallel=ParallelConfig(shard=3))}, 4, "4 processes cannot be shared out"),
        ({"tokens": ("a=x",)}, 1, "'x' is not a weight"),
    ],
)
def test_what_cannot_be_planned_is_named(tmp_path: Path, fields: dict[str, Any], processes: int, message: str) -> None:
    with pytest.raises(EmulusError, match=message):
        describe_plan(config_of(tmp_path, **fields), processes)


def test_the_mixture_is_shown(tmp_path: Path) -> None:
    text = TextTokenizer.train(["a red apple", "ein roter Apfel"], size=270)
    vocabulary = Vocabulary.native(text_size=text.size, visual_size=64)
    for name, lengths in {"short": (10,) * 30, "long": (100, 300)}.items():
        folder = tmp_path / name
        folder.mkdir()
        text.save(folder)
        vocabulary.save(folder / "vocabulary.json")
        records = [
            Record(id=f"{name} {n}", kind="text", ids=np.ones(length, np.uint32), spans=(Span("text", 0, length),))
            for n, length in enumerate(lengths)
        ]
        shard = shard_name("train", "text", 0)
        figures = write_shard(folder / shard, records)
        add_to_manifest(folder, ShardLine(name=shard, **dataclasses.asdict(figures)))
        write_json(folder / SETTINGS, {})
    parts = [f"{tmp_path / 'short'}=3", f"{tmp_path / 'long'}:text=1"]
    shown = describe_plan(config_of(tmp_path, parts, context=256))
    assert f"vocabulary {vocabulary.size:,} ids\n" in shown
    assert re.search(r"75\.0%  \S+short +30 records, 300 tokens", shown)
    assert re.search(r"25\.0%  \S+long:text +2 records, 400 tokens", shown)
    assert "302 ids (long 1" in shown
    assert "which the context of 256 cannot hold" in shown
    # The mean of the documents that are drawn: 0.75 x 10 + 0.25 x 200.
    assert "in documents of 58 ids" in shown
    with pytest.raises(EmulusError, match="sum to zero"):
        describe_plan(config_of(tmp_path, [f"{tmp_path / 'short'}=0"]))
