"""Filters, guidance, noise and the draw itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emulus.errors import EmulusError
from emulus.sampling import SamplingParams, apply_guidance, gumbel, sample, top_k, top_p
from emulus.sampling.draw import Question, Ranges, choose


def random_logits(rows: int, ids: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, ids, generator=torch.Generator().manual_seed(seed)) * 3


def noise(seed: int, position: int, ids: Tensor) -> Tensor:
    return gumbel(torch.tensor([seed]), torch.tensor([position]), ids[None])[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("guidance_scale", -1),
        ("guidance_scale", "3"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", True),
        ("max_new_tokens", 0),
    ],
)
def test_bad_parameters_are_named(name: str, value: object) -> None:
    with pytest.raises(EmulusError, match=f"{name} is .* but must be"):
        SamplingParams(**{name: value})


def test_guidance_is_the_released_formula() -> None:
    cond, uncond = random_logits(3, 50), random_logits(3, 50, seed=1)
    log_cond, log_uncond = cond.log_softmax(-1), uncond.log_softmax(-1)
    released = log_uncond + 3.0 * (log_cond - log_uncond)
    torch.testing.assert_close(apply_guidance(cond, uncond, 3.0).softmax(-1), released.softmax(-1))


@settings(deadline=None)
@given(scale=st.floats(0, 10), start=st.integers(0, 30), length=st.integers(2, 20), k=st.integers(1, 25))
def test_guiding_a_slice_of_raw_logits_is_exact(scale: float, start: int, length: int, k: int) -> None:
    cond, uncond = random_logits(2, 50), random_logits(2, 50, seed=1)
    part = slice(start, start + length)
    log_cond, log_uncond = cond.log_softmax(-1), uncond.log_softmax(-1)
    whole = log_uncond + scale * (log_cond - log_uncond)
    legal = torch.full_like(whole, -math.inf)
    legal[:, part] = whole[:, part]
    sliced = apply_guidance(cond[:, part], uncond[:, part], scale)
    torch.testing.assert_close(top_k(sliced, k).softmax(-1), top_k(legal, k).softmax(-1)[:, part], atol=1e-5, rtol=1e-4)


def test_guidance_one_is_the_conditional_row() -> None:
    cond, uncond = random_logits(2, 9), random_logits(2, 9, seed=1)
    assert torch.equal(apply_guidance(cond, uncond, 1), cond)
    half = apply_guidance(cond.bfloat16(), uncond.bfloat16(), 3.0)
    assert half.dtype == torch.float32


def test_top_k_keeps_the_largest() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0, 4.0]])
    assert top_k(logits, 2).isfinite().tolist() == [[False, True, False, True]]
    assert torch.equal(top_k(logits, 0), logits)
    assert torch.equal(top_k(logits, 9), logits)


def test_top_p_keeps_the_smallest_enough_set() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    assert top_p(logits, 0.79).isfinite().tolist() == [[True, True, False, False], [False, False, True, True]]
    assert top_p(logits, 0.81).isfinite().sum(-1).tolist() == [3, 3]
    assert top_p(logits, 1e-9).isfinite().sum(-1).tolist() == [1, 1]
    assert torch.equal(top_p(logits, 1.0), logits)


def test_noise_is_gumbel() -> None:
    drawn = gumbel(torch.arange(50), torch.arange(50) * 3, torch.arange(4000).expand(50, -1)).flatten().double()
    assert drawn.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert drawn.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    # Kolmogorov-Smirnov distance to the distribution function exp(-exp(-x)).
    ordered = drawn.sort().values
    distance = (torch.exp(-torch.exp(-ordered)) - torch.arange(1, 200_001) / 200_000).abs().max().item()
    assert distance < 1.95 / math.sqrt(200_000)


def test_noise_depends_on_seed_position_and_id_alone() -> None:
    ids = torch.arange(100)
    alone = noise(5, 7, ids)
    among = gumbel(torch.tensor([1, 5, 2]), torch.tensor([7, 7, 9]), ids.expand(3, -1))[1]
    assert torch.equal(alone, among)
    assert torch.equal(noise(5, 7, ids[40:60]), alone[40:60])
    for other in (noise(6, 7, ids), noise(5, 8, ids), noise(7, 5, ids), noise(2**62, 7, ids)):
        assert not torch.isclose(other, alone).any()
    neighbours = torch.stack([noise(seed, 3, torch.arange(2000)) for seed in range(6)])
    assert (torch.corrcoef(neighbours) - torch.eye(6)).abs().max() < 0.1


@settings(deadline=None, max_examples=10)
@given(temperature=st.sampled_from([0.5, 1.0, 2.0]), k=st.sampled_from([0, 5]), p=st.sampled_from([1.0, 0.8]))
def test_draws_follow_the_filtered_softmax(temperature: float, k: int, p: float) -> None:
    draws, logits = 4000, random_logits(1, 12)
    params = SamplingParams(temperature=temperature, top_k=k, top_p=p, seed=3)
    ids = torch.arange(100, 112)
    drawn = sample(logits.expand(draws, -1), ids, [params] * draws, range(draws))
    expected = top_p(top_k(logits / temperature, k), p).softmax(-1)[0] * draws
    seen = torch.bincount(drawn - 100, minlength=12)
    assert not seen[expected == 0].any()
    live = expected > 0
    chi_square = ((seen - expected)[live] ** 2 / expected[live]).sum().item()
    assert chi_square < 45  # 11 degrees of freedom: exceeded once in 200,000


def test_greedy_takes_the_largest_and_rows_keep_their_settings() -> None:
    logits = random_logits(4, 30)
    greedy, drawn = SamplingParams(temperature=0), SamplingParams(seed=8, top_k=0)
    chosen = sample(logits, torch.arange(30), [greedy, drawn, greedy, drawn], [3, 4, 5, 6])
    largest = logits.argmax(-1).tolist()
    assert [chosen[0], chosen[2]] == [largest[0], largest[2]]
    alone = [sample(logits[row, None], torch.arange(30), [drawn], [row + 3])[0] for row in (1, 3)]
    assert [chosen[1], chosen[3]] == alone


RANGES = [((10, 22),), ((0, 5), (30, 40))]
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_k=st.sampled_from([0, 1, 4]),
    top_p=st.sampled_from([0.5, 1.0]),
    guidance_scale=st.sampled_from([0.0, 0.5, 3.0]),
    seed=st.integers(0, 3),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=8))
def test_rows_of_many_settings_are_as_each_alone(params: list[SamplingParams]) -> None:
    logits, ids = random_logits(len(params), 30), torch.arange(40, 70)
    together = sample(logits, ids, params, range(len(params)))
    alone = [sample(logits[row, None], ids, [each], [row]) for row, each in enumerate(params)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_rows_of_one_setting_have_noise_of_their_own() -> None:
    flat, ids = torch.zeros(20, 50), torch.arange(50)
    by_seed = sample(flat, ids, [SamplingParams(seed=seed) for seed in range(20)], [7] * 20)
    by_position = sample(flat, ids, [SamplingParams(seed=7)] * 20, range(20))
    for place in range(20):
        assert by_seed[place] == noise(place, 7, ids).argmax()
        assert by_position[place] == noise(7, place, ids).argmax()
    assert min(len(by_seed.unique()), len(by_position.unique())) > 10


ASKED = st.tuples(PARAMS, st.sampled_from(RANGES), st.integers(0, 3), st.booleans())


@settings(max_examples=40, deadline=None)
@given(st.lists(ASKED, min_size=1, max_size=9), st.integers(0, 100))
def test_every_question_is_answered_by_its_own_settings(
    asked: list[tuple[SamplingParams, Ranges, int, bool]], seed: int
) -> None:
    """Kinds in any order, and repeated: as each question alone, worked out step by step."""
    table = random_logits(2 * len(asked), 40, seed)
    rows = torch.randperm(2 * len(asked), generator=torch.Generator().manual_seed(seed)).tolist()
    questions = [
        Question(ranges=ranges, params=params, position=position, cond=rows.pop(), null=rows.pop() if guided else None)
        for params, ranges, position, guided in asked
    ]

    def logits(rows: list[int], ranges: Ranges) -> Tensor:
        return torch.cat([table[rows, start:stop] for start, stop in ranges], -1)

    assert choose(logits, questions).tolist() == [step_by_step(table, question) for question in questions]


def test_answers_are_handed_out_in_the_order_of_the_questions() -> None:
    """Kinds 0 1 2 0 2: put together by kind, no answer stands where its question did."""
    table = random_logits(5, 40)

    def logits(rows: list[int], ranges: Ranges) -> Tensor:
        return torch.cat([table[rows, start:stop] for start, stop in ranges], -1)

    kinds = [((0, 8),), ((8, 16),), ((16, 24),)]
    questions = [
        Question(ranges=kinds[kind], params=SamplingParams(seed=row), position=row, cond=row)
        for row, kind in enumerate([0, 1, 2, 0, 2])
    ]
    answers = choose(logits, questions).tolist()
    assert answers == [step_by_step(table, question) for question in questions]
    assert [answer // 8 for answer in answers] == [0, 1, 2, 0, 2]


def step_by_step(table: Tensor, question: Question) -> int:
    params = question.params
    ids = [id for start, stop in question.ranges for id in range(start, stop)]
    scores = {id: float(table[question.cond, id]) for id in ids}
    if question.null is not None:
        null = {id: float(table[question.null, id]) for id in ids}
        scores = {id: null[id] + params.guidance_scale * (scores[id] - null[id]) for id in ids}
    if params.temperature == 0:
        return max(ids, key=scores.__getitem__)
    scores = {id: score / params.temperature for id, score in scores.items()}
    kept = sorted(ids, key=scores.__getitem__, reverse=True)[: params.top_k or None]
    total, before = sum(math.exp(scores[id]) for id in kept), 0.0
    drawn: dict[int, float] = {}
    for id in kept:
        if before < params.top_p:
            drawn[id] = scores[id] + float(noise(params.seed, question.position, torch.tensor([id])))
        before += math.exp(scores[id]) / total
    return max(drawn, key=drawn.__getitem__)
