"""Who holds what: planned over pretend devices, counted against the files, and computed where it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.engine.cache import CacheLayout, Lane
from emulus.engine.runner import Runner
from emulus.engine.step import Feed
from emulus.errors import EmulusError
from emulus.model import Decoder, DecoderConfig, load_decoder, save_decoder, sized
from emulus.placement import (
    KV_TOKENS,
    Kind,
    Placement,
    footprint,
    free_memory,
    kv_bytes_per_token,
    memory_table,
    plan,
)

GIB = 2**30
EMU3 = sized("emu3-8b")
CPU, GPU, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")


def emu3(gibibytes: dict[str, float], **options: Any) -> Placement:
    room = {name: int(size * GIB) for name, size in gibibytes.items()}
    return plan(EMU3, max_memory=room, **{"dtype": torch.bfloat16, **options})


def refusal(gibibytes: dict[str, float], **options: Any) -> str:
    with pytest.raises(EmulusError) as caught:
        emu3(gibibytes, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_emu3_as_published() -> None:
    assert footprint(EMU3, "bfloat16") == 2 * 8_492_011_520
    assert footprint(EMU3, "float32") == 4 * 8_492_011_520
    assert kv_bytes_per_token(EMU3) == 131_072
    assert kv_bytes_per_token(sized("emu3.5-34b")) == 262_144
    assert memory_table(EMU3) == {
        "parameters": 8_492_011_520,
        "weights": {
            "float32": 33_968_046_080,
            "bfloat16": 16_984_023_040,
            # Seven matrices a block: 1 byte each weight and 4 each row; or 1/2 byte each, and 4 for each 64.
            # The head has 1 byte each weight and 4 each row.
            "int8": (eight := 32 * 218_103_808 + 4 * 32 * (4 * 4096 - 4096 + 2 * 1024 + 2 * 14336) + beside_blocks()),
            "int4": 32 * (218_103_808 // 2 + 218_103_808 // 64 * 4) + beside_blocks(),
            "fp8": eight,
        },
        "kv_per_token": {"float32": 262_144, "bfloat16": 131_072},
    }


TABLE = 184_622 * 4096


def beside_blocks() -> int:
    """Bytes of a quantised Emu3's embedding, norms and head."""
    return 2 * (TABLE + 65 * 4096) + TABLE + 4 * 184_622


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4", "fp8"])
def test_footprint_is_what_a_loaded_decoder_takes(tmp_path: Path, kind: Kind, tied: bool) -> None:
    config = sized("tiny", vocab_size=50, num_hidden_layers=2, intermediate_size=100, tie_word_embeddings=tied)
    save_decoder(Decoder(config), tmp_path)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = load_decoder(tmp_path, dtype, quantize=None if kind in ("float32", "bfloat16") else kind)
    tensors = [*model.parameters(), *model.buffers()]
    assert footprint(config, kind) == sum(tensor.nbytes for tensor in tensors)
    layout = CacheLayout.of(config, [CPU] * config.num_hidden_layers, dtype)
    lane = Lane(layout, 7)
    assert 7 * kv_bytes_per_token(config, dtype) == lane.memory[CPU].nbytes == layout.bytes(7)[CPU]


def test_everything_on_one_device_where_it_fits() -> None:
    assert emu3({"cpu": 64}).devices == (CPU,)
    assert emu3({"cuda:0": 24, "cuda:1": 24, "cpu": 64}).devices == (GPU,)
    assert emu3({"cuda:0": 24, "cpu": 64}, device="cpu").devices == (CPU,)
    assert emu3({"cuda:0": 24, "cuda:1": 24}, device="cuda:1").devices == (SECOND,)
    assert emu3({"cuda:0": 24}, device="cuda").devices == (GPU,)
    assert str(emu3({"cpu": 64})) == "all on cpu"


def test_gpus_are_filled_in_order() -> None:
    placement = emu3({"cuda:0": 12, "cuda:1": 12, "cpu": 64})
    assert placement.devices == (GPU, SECOND)
    assert (placement.first, placement.last) == (GPU, SECOND)
    assert placement.layers == (GPU,) * 20 + (SECOND,) * 12
    assert str(placement) == "embedding on cuda:0, layers 0-19 on cuda:0, layers 20-31 on cuda:1, head on cuda:1"


def test_what_does_not_fit_lies_on_the_cpu() -> None:
    placement = emu3({"cuda:0": 12, "cpu": 64})
    assert (placement.first, placement.last) == (CPU, GPU)
    assert placement.layers == (CPU,) * 12 + (GPU,) * 20
    both = emu3({"cuda:0": 6, "cuda:1": 6, "cpu": 64})
    assert both.devices == (CPU, GPU, SECOND)
    # A GPU too small even for the head is left alone.
    assert emu3({"cuda:0": 2, "cpu": 64}).devices == (CPU,)


def test_names_are_placed() -> None:
    placement = Placement(first=CPU, layers=(GPU,) * 11 + (SECOND,), last=torch.device("meta"))
    assert placement("model.embed_tokens.weight") == CPU
    assert placement("model.layers.1.mlp.up_proj.weight") == GPU
    assert placement("model.layers.11.self_attn.q_norm.weight") == SECOND
    assert placement("model.layers.11") == SECOND
    assert placement("model.norm.weight") == placement("lm_head.weight") == torch.device("meta")


def test_a_tied_table_lies_with_the_head() -> None:
    config = sized("tiny", vocab_size=50_000, hidden_size=1024, num_hidden_layers=12, tie_word_embeddings=True)
    room = {"cuda:0": footprint(config, "float32"), "cpu": GIB}
    placement = plan(config, dtype=torch.float32, max_memory=room, kv_tokens=100)
    assert placement.devices == (GPU, CPU)
    assert placement.first == placement.last == GPU


def test_a_tied_table_whose_head_is_quantised_lies_where_it_is_read() -> None:
    config = sized("tiny", vocab_size=50_000, hidden_size=1024, num_hidden_layers=12, tie_word_embeddings=True)
    room = {"cuda:0": footprint(config, "int8") * 2 // 3, "cpu": GIB}
    placement = plan(config, dtype=torch.bfloat16, quantize="int8", max_memory=room, kv_tokens=100)
    assert (placement.first, placement.last) == (CPU, GPU)


def test_refusals_say_what_would_fit() -> None:
    message = refusal({"cpu": 22}, dtype=torch.float32)
    assert message.startswith("the decoder needs 37.1 GiB (31.6 GiB of weights in dtype float32, 4.5 GiB of keys and")
    assert "there is 22.0 GiB on cpu; what fits: dtype bfloat16 (19.1 GiB); or int8 with dtype bfloat16" in message
    message = refusal({"cuda:0": 11, "cpu": 64}, device="cuda")
    assert message.endswith(
        "11.0 GiB on cuda:0; what fits: int4 with dtype bfloat16 (8.7 GiB); "
        "or device auto, over all devices, in dtype bfloat16"
    )
    message = refusal({"cuda:0": 6, "cpu": 8}, device="cuda", quantize="int8")
    assert message.endswith("what fits: device auto, over all devices, in int8 with dtype bfloat16")
    assert refusal({"cpu": 4}).endswith("nothing smaller fits either: int4 with dtype bfloat16 needs 8.7 GiB")
    assert refusal({"cpu": 4}, quantize="int4").endswith("int4 with dtype bfloat16 needs 8.7 GiB")


def test_keys_and_values_need_room() -> None:
    assert emu3({"cpu": 18}, kv_tokens=9216).devices == (CPU,)
    assert "4.0 GiB of keys and values" in refusal({"cpu": 18}, kv_tokens=2**15)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"device": "cuda:1"}, "nothing may lie on cuda:1: memory is granted on cuda:0, cpu only"),
        ({"device": "tpu"}, "'tpu' is no device"),
        ({"max_memory": {"gpu0": 1}}, "'gpu0' is no device"),
        ({"quantize": "int3"}, "unknown quantisation 'int3'"),
    ],
)
def test_wrong_names(options: dict[str, Any], match: str) -> None:
    room = {"cuda:0": GIB, "cpu": GIB}
    config = sized("tiny", vocab_size=50)
    with pytest.raises(EmulusError, match=match):
        plan(config, **{"dtype": torch.float32, "max_memory": room, **options})


def test_the_memory_of_this_machine() -> None:
    free = free_memory()
    assert 2**26 < free[CPU] < 2**50
    config = sized("tiny", vocab_size=50)
    assert len(plan(config, dtype=torch.float32).devices) == 1
    assert plan(config, dtype=torch.float32, device="cpu").devices == (CPU,)
    huge = sized("emu3.5-34b", num_hidden_layers=4096, intermediate_size=2**20)
    with pytest.raises(EmulusError, match="nothing smaller fits either"):
        plan(huge, dtype=torch.float32, device="cpu")


@settings(deadline=None, max_examples=60)
@given(
    rooms=st.lists(st.floats(0, 30), min_size=0, max_size=3),
    cpu=st.floats(0, 60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    quantize=st.sampled_from([None, "int8", "int4"]),
)
def test_no_device_is_given_more_than_it_has(rooms: list[float], cpu: float, dtype: torch.dtype, quantize: Any) -> None:
    room = {**{f"cuda:{index}": int(size * GIB) for index, size in enumerate(rooms)}, "cpu": int(cpu * GIB)}
    table = TABLE * dtype.itemsize
    head = table if quantize is None else TABLE
    block = {None: 218_103_808 * dtype.itemsize, "int8": 218_103_808, "int4": 218_103_808 // 2}[quantize]
    try:
        placement = plan(EMU3, dtype=dtype, quantize=quantize, max_memory=room)
    except EmulusError:
        # All together they are short; what may stay unused on each is room for work and less than the largest part.
        needed = table + head + 32 * block + KV_TOKENS * kv_bytes_per_token(EMU3, dtype)
        assert sum(room.values()) < 1.2 * needed + len(room) * (GIB + table)
        return
    kv = KV_TOKENS * kv_bytes_per_token(EMU3, dtype) // 32
    for device in placement.devices:
        held = table * (placement.first == device) + head * (placement.last == device)
        held += (block + kv) * placement.layers.count(device)
        assert held < room[str(device)]


def split(config: DecoderConfig, *, first: int) -> Decoder:
    """A decoder whose embedding and first layers hold numbers, and whose other layers are without memory."""
    model = Decoder(config).eval()
    for layer in list(model.model.blocks)[first:]:
        layer.to("meta")
    model.model.norm.to("meta")
    model.lm_head.to("meta")
    return model


def test_everything_moves_to_where_the_layer_is() -> None:
    model = split(sized("tiny", vocab_size=50, num_hidden_layers=3, qk_norm=True), first=1)
    ids = torch.randint(50, (2, 6))
    assert model(ids).device.type == "meta"
    assert model(ids[:1], document_lengths=[2, 4]).shape == (1, 6, 50)
    logits = model(ids, vocab_range=(3, 7), last_only=True)
    assert logits.device.type == "meta"
    assert logits.shape == (2, 1, 4)


def test_decoding_moves_to_where_the_layer_is() -> None:
    runner = Runner(split(sized("tiny", vocab_size=50, num_hidden_layers=3, qk_norm=True), first=1))
    lane, longer = runner.new_lane(9), runner.new_lane(12)
    meta = torch.device("meta")
    assert [lane.layer(CPU, 0).shape[0], lane.memory[meta].shape[0]] == [2, 2]
    assert set(runner.layout.bytes(9)) == {CPU, meta}
    hidden = runner.forward([Feed(lane=lane, ids=[1, 2, 3], wanted=[0, 2])])
    assert hidden.device == runner.device == meta
    assert hidden.shape == (2, runner.config.hidden_size)
    longer.begin_like(lane, 3)
    assert torch.equal(longer.layer(CPU, 0)[:, :, :3], lane.layer(CPU, 0)[:, :, :3])
    assert lane.layer(CPU, 0)[:, :, :3].any()
    assert not longer.layer(CPU, 0)[:, :, 3:].any()
