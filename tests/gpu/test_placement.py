"""A decoder over a GPU and the CPU computes what one on the CPU does: run with ``pytest -m gpu``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emulus.engine import Engine
from emulus.engine.request import Request
from emulus.engine.runner import Runner
from emulus.engine.step import Feed
from emulus.errors import EmulusError
from emulus.model import Decoder, load_decoder, save_decoder, sized
from emulus.model.quantize import Quantization
from emulus.pipeline import Emulus
from emulus.placement import Placement, footprint, free_memory, plan
from emulus.sampling import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
CONFIG = sized("tiny", vocab_size=97, qk_norm=True)
SPLITS = {
    "offloaded": Placement(first=CPU, layers=(CPU, CPU, GPU, GPU), last=GPU),
    "back and forth": Placement(first=GPU, layers=(CPU, GPU, CPU, GPU), last=CPU),
    "whole": Placement(first=GPU, layers=(GPU,) * 4, last=GPU),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_decoder(Decoder(CONFIG), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SPLITS)
@torch.inference_mode()
def test_the_same_logits(folder: Path, name: str) -> None:
    placement = SPLITS[name]
    plain, split = load_decoder(folder), load_decoder(folder, device=placement)
    assert all(parameter.device == placement(name) for name, parameter in split.named_parameters())
    ids = torch.randint(97, (2, 20))
    expected = plain(ids)
    torch.testing.assert_close(split(ids.cuda()).cpu(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(split(ids).cpu(), expected, atol=1e-4, rtol=0)
    runner = Runner(split)
    lanes = [runner.new_lane(20) for _ in ids]
    for part in (slice(0, 12), slice(12, 13), slice(13, 20)):
        feeds = [
            Feed(lane=lane, ids=row[part].tolist(), wanted=range(len(row[part])))
            for lane, row in zip(lanes, ids, strict=True)
        ]
        logits = runner.logits(runner.forward(feeds), [(0, 97)]).cpu().unflatten(0, (2, -1))
        torch.testing.assert_close(logits, expected[:, part], atol=1e-4, rtol=0)
        for lane in lanes:
            lane.length += len(ids[0][part])


@pytest.mark.parametrize("name", SPLITS)
def test_the_engine_generates(tiny: Emulus, tmp_path: Path, name: str) -> None:
    grammar, decoder = tiny.engine.grammar, tiny.engine.decoder
    save_decoder(decoder, tmp_path)
    split = load_decoder(tmp_path, device=SPLITS[name])
    requests = [
        Request(prompt_ids=(grammar.vocabulary.bos, 5, 6, 7), may=frozenset({"text"}), params=params)
        for params in (SamplingParams(max_new_tokens=9), SamplingParams(max_new_tokens=4), SamplingParams(seed=3))
    ]
    results = Engine(split, grammar).generate(requests)
    assert all(result.ids for result in results)
    assert [Engine(split, grammar).generate([request])[0] for request in requests] == results


@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.inference_mode()
def test_quantised_alike_on_both(folder: Path, kind: Quantization) -> None:
    ids = torch.randint(97, (2, 20))
    cpu, gpu = (load_decoder(folder, device=device, quantize=kind) for device in (CPU, GPU))
    assert all(buffer.device == GPU for buffer in gpu.buffers())
    torch.testing.assert_close(gpu(ids.cuda()).cpu(), cpu(ids), atol=2e-3, rtol=0)


def test_planned_by_what_is_free(folder: Path) -> None:
    assert plan(CONFIG, dtype=torch.float32).devices == (GPU,)
    assert plan(CONFIG, dtype=torch.float32, device="cuda").devices == (GPU,)
    assert 0 < free_memory()[GPU] <= torch.cuda.get_device_properties(0).total_memory
    room = {"cuda:0": footprint(CONFIG, "float32") * 2 // 3, "cpu": 2**30}
    placement = plan(CONFIG, dtype=torch.float32, max_memory=room, kv_tokens=100)
    assert placement.devices == (CPU, GPU)
    before = torch.cuda.memory_allocated()
    split = load_decoder(folder, device=placement)
    assert 0 < torch.cuda.memory_allocated() - before < room["cuda:0"]
    assert {parameter.device for parameter in split.parameters()} == {CPU, GPU}
    with pytest.raises(EmulusError, match="no device 'cuda:99' here"):
        load_decoder(folder, device="cuda:99")
