"""The benchmarks of decoding at toy size: every case runs, and its checks find what is wrong."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import decode, gpu, reference
from benchmarks.harness import Options, Unequal, main
from benchmarks.reference import Subject
from emulus.engine import Engine
from emulus.errors import EmulusError
from emulus.model import Decoder, DecoderConfig
from emulus.sequence.grammar import Grammar

ROWS, COLUMNS = 2, 4


@pytest.fixture(scope="module")
def model() -> Subject:
    return decode.subject("small", True)


@pytest.fixture(scope="module")
def another(model: Subject) -> Decoder:
    """Of the same shape."""
    torch.manual_seed(1)
    return Decoder(model.decoder.config).eval()


@pytest.fixture(scope="module")
def slightly_off(model: Subject) -> Decoder:
    """The same but for one matrix."""
    decoder = copy.deepcopy(model.decoder)
    with torch.no_grad():
        decoder.model.layers[0].mlp.up_proj.weight.add_(1e-3)
    return decoder


@pytest.mark.parametrize("name", decode.CASES)
def test_every_case(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(decode.CASES, ["--json", "--toy", "--pairs", "1", "--only", name], settings=decode.SETTINGS) == 0
    cases = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    weights = {"draw-small": 4, "draw-truevocab": 3}
    assert len({found["case"] for found in cases}) == len(cases) == weights.get(name, 1)
    for found in cases:
        about = found["conditions"]
        assert found["case"].startswith(name)
        assert found["ratio"] > 0
        assert found["spread"][0] <= found["ratio"] <= found["spread"][1]
        assert about["baseline_s"] > 0
        assert about["ours_s"] > 0
        if name.startswith("draw"):
            assert about["logits_relative_error"] <= reference.TOLERANCE[about["weights"]]
            assert about["logits_std"] > 0.1
            assert about["tokens"] == ROWS * (COLUMNS + 1) + 3
        if name.startswith("jacobi"):
            assert not about["lossy"]
            assert about["same_ids"] == 1
            assert found["ratio"] >= 1
        if name.startswith("zipar"):
            assert about["lossy"]


@pytest.mark.parametrize("name", gpu.CASES)
def test_every_gpu_case(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--json", "--toy", "--pairs", "1", "--only", name, "--whole", "1"]
    assert main(gpu.CASES, arguments, settings=gpu.SETTINGS) == 0
    found = json.loads(capsys.readouterr().out)
    about = found["conditions"]
    assert found["case"] == name
    assert found["ratio"] > 0
    assert about["clock"] == "wall"
    assert 0 < about["bandwidth_fraction"] < 1
    assert ("whole_picture_s" in about) == (about["in_flight"] == 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu() -> None:
    with pytest.raises(EmulusError, match="--toy"):
        gpu.CASES["batch-1-bf16"](Options())


def test_sizes() -> None:
    shapes = {}
    for name, vocabulary in (("small", 50_000), ("truevocab", 184_622)):
        hidden, inner, layers, heads, kv_heads = decode.SHAPES[name]
        config = DecoderConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
        )
        with torch.device("meta"):
            shapes[name] = sum(each.numel() for each in Decoder(config).parameters())
    assert shapes == {"small": 152_316_672, "truevocab": 100_429_056}
    vocabulary = reference.small_vocabulary(50_000, 32_768)
    assert (vocabulary.size, vocabulary.visual_size) == (50_000, 32_768)


def test_both_have_the_same_weights(model: Subject) -> None:
    theirs = reference.in_transformers(model.decoder, model.grammar.vocabulary).state_dict()
    ours = model.decoder.state_dict()
    assert {name: value.data_ptr() for name, value in theirs.items()} == {
        name: value.data_ptr() for name, value in ours.items()
    }


@pytest.mark.parametrize(("h", "w"), [(1, 3), (2, 4), (5, 3)])
def test_the_released_constraint_is_the_grammar(model: Subject, h: int, w: int) -> None:
    vocabulary = model.grammar.vocabulary
    ids = list(model.request(h, w).prompt_ids)
    follow, state = reference.Follow(vocabulary, h, w), model.grammar.start(ids)
    while not state.done:
        allowed = state.allowed()
        assert follow(0, torch.tensor(ids)) == [id for start, stop in allowed.ranges for id in range(start, stop)]
        ids.append(allowed.ranges[0][0])
        state.advance(ids[-1])
    # The released rule counts on after the end, and there ends a row that is none.
    after = follow(0, torch.tensor(ids))
    assert after == [vocabulary.eol if w == 3 else vocabulary.pad]


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4", "fp8"])
def test_other_weights_are_found(model: Subject, another: Decoder, slightly_off: Decoder, kind: str) -> None:
    theirs = reference.in_transformers(model.decoder, model.grammar.vocabulary)
    asked, cells = model.request(ROWS, COLUMNS), model.cells(ROWS, COLUMNS)
    right = reference.variant(model.decoder, kind)
    found = reference.check_logits(right, kind, theirs, asked, cells, model.visual)
    assert found["logits_max_diff"] > 0
    wrong = slightly_off if kind == "fp32" else another
    with pytest.raises(Unequal, match=f"{kind} logits are not transformers'"):
        reference.check_logits(reference.variant(wrong, kind), kind, theirs, asked, cells, model.visual)


def test_other_ids_are_found(model: Subject, another: Decoder) -> None:
    theirs = reference.in_transformers(model.decoder, model.grammar.vocabulary)
    right, wrong = (Engine(decoder, model.grammar) for decoder in (model.decoder, another))
    decode.check_greedy(right, model, theirs, ROWS, COLUMNS)
    with pytest.raises(Unequal, match="ids are transformers'"):
        decode.check_greedy(wrong, model, theirs, ROWS, COLUMNS)
    request = model.request(ROWS, COLUMNS, greedy=True)
    decode.check_continuation(right, model.decoder, request, 3)
    with pytest.raises(Unequal, match="of whole passes"):
        decode.check_continuation(wrong, model.decoder, request, 3)


def test_a_broken_picture_is_found(model: Subject) -> None:
    engine, request = Engine(model.decoder, model.grammar), model.request(ROWS, COLUMNS)
    (result,) = engine.generate([request])
    decode.check_whole(engine, [request], [result.ids])
    with pytest.raises(Unequal, match="not whole"):
        decode.check_whole(engine, [request], [result.ids[:-1]])


def test_transformers_draws_whole_pictures(model: Subject) -> None:
    theirs, request = reference.in_transformers(model.decoder, model.grammar.vocabulary), model.request(ROWS, COLUMNS)
    grammar: Grammar = model.grammar
    ids = reference.draw(theirs, request, grammar.vocabulary, ROWS, COLUMNS)
    assert grammar.parse([*request.prompt_ids, *ids]).complete
    assert len(reference.draw(theirs, request, grammar.vocabulary, ROWS, COLUMNS, tokens=3)) == 3


def test_held_out_captions() -> None:
    _, _, requests = decode.trained("clip", 3, toy=True)
    assert len({tuple(request.prompt_ids) for request in requests}) == 3
    assert all(request.guided for request in requests)
