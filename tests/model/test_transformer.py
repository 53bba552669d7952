"""The decoder's maths against the released code, transformers, and itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from emulus.errors import EmulusError
from emulus.model import Decoder, DecoderConfig, load_decoder, sized

VOCAB = 97


def small(*, qk_norm: bool = False, seed: int = 0, **changes: object) -> Decoder:
    """A random decoder whose weights are large enough for attention to matter."""
    torch.manual_seed(seed)
    config = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        initializer_range=0.2,
        qk_norm=qk_norm,
        **changes,
    )
    return Decoder(config).eval()


def random_ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def test_logits_of_released_code(official: Path) -> None:
    expected = load_file(official / "language_model" / "expected.safetensors")
    model = load_decoder(official / "language_model")
    with torch.no_grad():
        assert (model(expected["input_ids"]) - expected["logits"]).abs().max() <= 1e-5


def test_logits_of_transformers_llama() -> None:
    transformers = pytest.importorskip("transformers")
    model = small()
    config = model.config
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    ).eval()
    reference.load_state_dict(model.state_dict(), strict=True)
    ids = random_ids(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-5, rtol=1e-5)


def test_slices_are_slices() -> None:
    model, ids = small(), random_ids(2, 9)
    with torch.no_grad():
        whole = model(ids)
        torch.testing.assert_close(model(ids, vocab_range=(20, 50)), whole[..., 20:50])
        torch.testing.assert_close(model(ids, last_only=True), whole[:, -1:])
    assert whole.dtype == torch.float32


def test_new_weights() -> None:
    config = sized("tiny", vocab_size=2000, pad_token_id=7)
    model = Decoder(config)
    assert not model.model.embed_tokens.weight[7].any()
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.model.layers[3].mlp.down_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    tied = Decoder(sized("tiny", vocab_size=20, tie_word_embeddings=True))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_dropout_in_train_mode_only() -> None:
    model, ids = small(attention_dropout=0.3), random_ids(1, 12)
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))
        still = small(attention_dropout=0.0).train()
        assert torch.equal(still(ids), still.eval()(ids))


@pytest.mark.parametrize("place", ["embedding", "attention", "attention residual", "mlp residual"])
def test_each_dropout_place_is_there(place: str) -> None:
    model, ids = small(attention_dropout=0.3), random_ids(1, 12)
    block = model.model.layers[1]
    with torch.no_grad():
        before = model(ids)
        if place == "embedding":
            model.model.dropout.train()
        elif place == "attention":
            block.self_attn.training = True
        else:
            block.dropout.train()
            silent = block.mlp.down_proj if place == "attention residual" else block.self_attn.o_proj
            silent.weight.zero_()
            before = model.eval()(ids)
            block.dropout.train()
        assert not torch.equal(model(ids), before)


@settings(deadline=None, max_examples=25)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6))
def test_packed_equals_separate(lengths: list[int]) -> None:
    model, ids = small(), random_ids(1, sum(lengths))
    with torch.no_grad():
        packed = model(ids, document_lengths=lengths).split(lengths, dim=1)
        for part, document in zip(packed, ids.split(lengths, dim=1), strict=True):
            torch.testing.assert_close(part, model(document), atol=1e-5, rtol=1e-5)


def test_documents_never_leak() -> None:
    model, lengths = small(), [7, 11, 5]
    ids = random_ids(1, sum(lengths))
    changed = ids.clone()
    changed[:, 7:18] = (changed[:, 7:18] + 1) % VOCAB
    with torch.no_grad():
        before, after = model(ids, document_lengths=lengths), model(changed, document_lengths=lengths)
    assert torch.equal(before[:, :7], after[:, :7])
    assert torch.equal(before[:, 18:], after[:, 18:])
    assert not torch.equal(before[:, 7:18], after[:, 7:18])


def test_gradients_stay_in_their_document() -> None:
    model, lengths = small(), [4, 6]
    seen: list[Tensor] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, _i, output: seen.append(output.requires_grad_()))
    output = model(random_ids(1, 10), document_lengths=lengths)
    (gradient,) = torch.autograd.grad(output[:, 4:].sum(), seen[0])
    assert not gradient[:, :4].any()
    assert gradient[:, 4:].any()


def test_trains_under_autocast() -> None:
    model, ids = small(attention_dropout=0.1).train(), random_ids(1, 20)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, document_lengths=[8, 12])
    assert logits.dtype == torch.float32
    torch.nn.functional.cross_entropy(logits[0], ids[0]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_arguments_that_do_not_fit() -> None:
    model, ids = small(), random_ids(1, 5)
    with pytest.raises(EmulusError, match="sum to 4"):
        model(ids, document_lengths=[1, 3])
