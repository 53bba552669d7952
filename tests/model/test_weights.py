"""Decoders on disk: there and back, shards, and every way a file can be wrong."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emulus.errors import EmulusError
from emulus.model import Decoder, DecoderConfig, load_decoder, save_decoder, sized
from emulus.model.weights import expected_shapes, load_decoder_from
from emulus.weights import find_tensors, rename


def tiny(**overrides: object) -> Decoder:
    torch.manual_seed(0)
    return Decoder(sized("tiny", vocab_size=50, num_hidden_layers=2, hidden_size=32, **overrides))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_decoder(tiny(), tmp_path)
    return tmp_path


def edit(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.update({name: tensor for name, tensor in change.items() if tensor is not None})
    kept = {name: tensor for name, tensor in tensors.items() if name not in change or change[name] is not None}
    save_file(kept, folder / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path: Path, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied, qk_norm=tied)
    save_decoder(model, tmp_path)
    again = load_decoder(tmp_path)
    assert not again.training
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied


def test_dtype_at_save_and_at_load(tmp_path: Path) -> None:
    save_decoder(tiny(), tmp_path, torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in load_decoder(tmp_path).parameters()} == {torch.bfloat16}
    model = load_decoder(tmp_path, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, tiny().lm_head.weight.bfloat16().float())


def test_a_loaded_model_trains_without_touching_the_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model = load_decoder(folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    weight_map = {}
    for part, names in enumerate([list(tensors)[::2], list(tensors)[1::2]]):
        file = f"model-{part + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(folder: Path) -> None:
    shard(folder)
    assert torch.equal(load_decoder(folder).lm_head.weight, tiny().lm_head.weight)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(EmulusError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_decoder(folder)


@pytest.mark.parametrize("target", ["../elsewhere.safetensors", "/tmp/x.safetensors", "weights.bin"])
def test_index_may_not_point_elsewhere(folder: Path, target: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": target}}))
    with pytest.raises(EmulusError, match=r"not a \.safetensors file beside it"):
        load_decoder(folder)


def test_differences_are_listed(folder: Path) -> None:
    norms = {f"model.layers.{i}.{n}_layernorm.weight": None for i in (0, 1) for n in ("input", "post_attention")}
    edit(folder, {**norms, "extra": torch.zeros(1), "lm_head.weight": torch.zeros(3, 3)})
    with pytest.raises(EmulusError) as caught:
        load_decoder(folder)
    message = str(caught.value)
    assert "4 missing (model.layers.0.input_layernorm.weight" in message
    assert "and 1 more" in message
    assert "1 unexpected (extra)" in message
    assert "1 mis-shaped (lm_head.weight (3, 3) for (50, 32))" in message
    assert "\n" not in message


@pytest.mark.parametrize("size", [0, 4, 100, 5000])
def test_truncated_file(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(EmulusError, match="damaged or truncated") as caught:
        load_decoder(folder)
    assert "\n" not in str(caught.value)


def test_other_vocabulary(folder: Path) -> None:
    with pytest.raises(EmulusError, match="knows 50 ids but the vocabulary has 51"):
        load_decoder(folder, vocab_size=51)
    assert load_decoder(folder, vocab_size=50).config.vocab_size == 50


def test_pickles_and_missing_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(EmulusError, match=r"holds no model\.safetensors"):
        load_decoder(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(EmulusError, match=r"pytorch_model\.bin, a pickle.*convert it to safetensors"):
        load_decoder(folder)
    (folder / "config.json").write_text('{"vocab_size": 5')
    with pytest.raises(EmulusError, match="not valid JSON"):
        load_decoder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(EmulusError, match=r"config\.json is missing"):
        load_decoder(folder)


def test_a_huge_config_allocates_nothing(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2**23, "intermediate_size": 2**23}))
    with pytest.raises(EmulusError, match="mis-shaped"):
        load_decoder(folder)


def test_from_tensors_under_other_names(folder: Path) -> None:
    save_file(
        {f"other.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
    )
    tensors = rename(find_tensors(folder), lambda name: name.removeprefix("other."))
    model = load_decoder_from(tiny().config, tensors, dtype=None, device="cpu", folder=folder)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in tiny().state_dict().items())
    del tensors["model.norm.weight"]
    with pytest.raises(EmulusError, match=r"1 missing \(model\.norm\.weight\)"):
        load_decoder_from(tiny().config, tensors, dtype=None, device="cpu", folder=folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here(folder: Path) -> None:
    for device in ("cuda", "cuda:1", "nowhere"):
        with pytest.raises(EmulusError, match=f"no device '{device}' here"):
            load_decoder(folder, device=device)
    with pytest.raises(EmulusError, match="no device 'cuda:1' here"):
        load_decoder(folder, device=lambda name: torch.device("cuda:1" if "layers.1" in name else "cpu"))


class Largest(TorchDispatchMode):
    """Remembers the most bytes that one new float32 tensor had; views take no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if any(returned.alias_info is not None for returned in function._schema.returns):
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and not tensor.is_meta:
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8"])
def test_nothing_is_copied_whole_in_float32(tmp_path: Path, quantize: Any) -> None:
    save_decoder(Decoder(sized("tiny", vocab_size=40_000, intermediate_size=20_000, num_hidden_layers=1)), tmp_path)
    with Largest() as largest:
        load_decoder(tmp_path, torch.bfloat16, quantize=quantize)
    assert largest.bytes <= 4 * 2**20 < 128 * 20_000 * 4
    assert (largest.bytes > 0) == (quantize is not None)


# Each load runs in a fork of one process, after a small one for what is imported and mapped at first use: what is
# measured is the load's own.
PEAKS = """
import json, os, re, sys
from pathlib import Path
import torch
from emulus.model import load_decoder

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
small, *cases = json.loads(sys.argv[1])
load_decoder(*small)
for folder, quantize in cases:
    child = os.fork()
    if not child:
        load_decoder(small[0], torch.bfloat16, quantize=quantize)
        before = memory("VmRSS")
        model = load_decoder(folder, torch.bfloat16, quantize=quantize)
        size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        print(json.dumps([size, memory("VmHWM") - before]), flush=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def write_zeros(folder: Path, config: DecoderConfig) -> str:
    folder.mkdir()
    save_file(
        {name: torch.zeros(shape) for name, shape in expected_shapes(config).items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return str(folder)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_peak_is_the_model_as_it_will_be(folder: Path, tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    layers = sized("tiny", vocab_size=500, intermediate_size=2816, num_hidden_layers=5, **wide)
    table = sized("tiny", vocab_size=46_000, intermediate_size=512, num_hidden_layers=1, **wide)
    many = write_zeros(tmp_path / "layers", layers)
    one = write_zeros(tmp_path / "table", dataclasses.replace(table, tie_word_embeddings=True))
    cases = [(many, None), (one, None), (many, "int8")]
    arguments = json.dumps([(str(folder),), *cases])
    run = subprocess.run([sys.executable, "-c", PEAKS, arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    *plain, (small, small_peak) = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(plain) == 2
    for size, peak in plain:
        assert size > 50e6
        assert 0.95 * size < peak < 1.15 * size
    # Quantised, the pieces of one tensor that are in memory at a time are as many MiB, but more of so small a model.
    assert 0.95 * small < small_peak < small + 20e6 < plain[0][0]
