"""Parameter names: bijections, whatever the shape of the network."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emulus.layouts import names
from emulus.layouts.contents import vision_shapes
from emulus.model import sized
from emulus.model.weights import expected_shapes
from emulus.tokenizer.vision import VisionTokenizerConfig

visions = st.builds(
    VisionTokenizerConfig,
    ch=st.just(32),
    ch_mult=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=4).map(tuple),
    num_res_blocks=st.integers(1, 3),
    attn_resolutions=st.sets(st.integers(0, 3)).map(tuple),
    temporal_downsample_factor=st.sampled_from([1, 2, 4]),
    codebook_size=st.just(16),
)


@settings(max_examples=10, deadline=None)
@given(visions, st.integers(1, 12), st.booleans(), st.booleans())
def test_there_and_back_and_no_two_alike(
    vision: VisionTokenizerConfig, layers: int, qk_norm: bool, newer: bool
) -> None:
    decoder = sized("tiny", vocab_size=10, num_hidden_layers=layers, qk_norm=qk_norm)
    parts = {"decoder": expected_shapes(decoder), "vision": vision_shapes(vision)}
    ours = [(part, name) for part, shapes in parts.items() for name in shapes]
    theirs = [names.to_transformers(part, name, newer=newer) for part, name in ours]  # type: ignore[arg-type]
    assert len(set(theirs)) == len(ours)
    assert [names.from_transformers(name) for name in theirs] == ours
    assert all(names.vision_from_transformers(names.vision_to_transformers(name)) == name for name in parts["vision"])


@pytest.mark.parametrize("newer", [False, True])
def test_they_are_the_names_of_transformers(newer: bool) -> None:
    transformers = pytest.importorskip("transformers")
    vision = VisionTokenizerConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(1, 2))
    decoder = sized("tiny", vocab_size=600, num_hidden_layers=2)
    text = {**{k: v for k, v in decoder.to_dict().items() if k != "qk_norm" and v is not None}, "pad_token_id": 0}
    vq = transformers.Emu3VQVAEConfig(
        base_channels=32, channel_multiplier=[1, 2, 2], num_res_blocks=2, attn_resolutions=[1, 2], hidden_size=64
    )
    config = transformers.Emu3Config(text_config=text, vq_config=vq.to_dict(), vocabulary_map={})
    with torch.device("meta"):
        model = transformers.Emu3ForConditionalGeneration(config)
    ours = {
        names.to_transformers("decoder", name, newer=newer): shape for name, shape in expected_shapes(decoder).items()
    }
    for name, shape in vision_shapes(vision).items():
        ours[names.to_transformers("vision", name, newer=newer)] = names.shape_in_transformers(name, shape)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if newer:
        assert ours == theirs
    else:
        assert {names.from_transformers(name) for name in ours} == {names.from_transformers(name) for name in theirs}
        assert all(name.startswith(("text_model.model.", "text_model.lm_head.", "vqmodel.")) for name in ours)


def test_unknown_names_stay_to_be_listed() -> None:
    assert names.from_transformers("model.layers.0.surprise") == ("decoder", "model.layers.0.surprise")
    assert names.vision_from_transformers("surprise.weight") == "surprise.weight"
