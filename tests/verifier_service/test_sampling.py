"""Gumbel-max sampling: exact in distribution, and a function of nothing but its keys."""

from __future__ import annotations

import math

import pytest
import torch

from cluster.contracts import SamplingParams
from verifier_service.sampling import draw as module
from verifier_service.sampling.draw import CANDIDATES, Draw
from verifier_service.sampling.logprobs import logprobs
from verifier_service.sampling.race import row_keys, uniform
from verifier_service.sampling.sampler import NO_TOKEN, best, sample

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -3.0, 1.5])
DRAWS = 20_000


def draw(row: int, count: int = 1, position: int = 0, seed: int = 7, choice: int = 0, **params) -> Draw:
    return Draw(row, count, position, seed, choice, SamplingParams(**{"temperature": 1.0, **params}))


def counts_over_positions(logits: torch.Tensor, **params) -> torch.Tensor:
    tokens = sample(logits.expand(DRAWS, -1), [draw(0, DRAWS, **params)])
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[0]).double()


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seed", [0, 1, 2**63, -5])
def test_samples_follow_the_softmax(seed: int):
    counts = counts_over_positions(LOGITS, temperature=0.8, seed=seed)
    assert chi_square(counts, (LOGITS / 0.8).softmax(-1)) < 24.3  # 7 degrees of freedom, p = 0.001


def test_top_k_renormalises_what_is_left():
    counts = counts_over_positions(LOGITS, top_k=3)
    kept = torch.tensor([0, 1, 7])
    assert counts.sum() == counts[kept].sum()
    assert chi_square(counts[kept], LOGITS[kept].softmax(-1)) < 13.8


def test_top_p_keeps_the_smallest_set_that_holds_its_mass():
    order = LOGITS.softmax(-1).sort(descending=True)
    kept = order.indices[: int((order.values.cumsum(-1) < 0.8).sum()) + 1]
    counts = counts_over_positions(LOGITS, top_p=0.8)
    assert counts.sum() == counts[kept].sum()
    assert chi_square(counts[kept], LOGITS[kept].softmax(-1)) < 18.5


def test_a_tiny_top_p_is_greedy():
    assert set(sample(LOGITS.expand(50, -1), [draw(0, 50, top_p=1e-9)])) == {0}


def test_equal_logits_are_kept_or_cut_together():
    flat = torch.zeros(6)
    assert (counts_over_positions(flat, top_k=2) > 0).all()
    assert (counts_over_positions(flat, top_p=0.1) > 0).all()


@pytest.mark.parametrize("logits", [torch.linspace(0.5, 0.0, 1200), torch.tensor([5.0] + [0.0] * 1199)])
@pytest.mark.parametrize("top_k", [100, CANDIDATES, 1000])
@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_top_k_beyond_the_candidates_or_in_a_tie_keeps_what_a_full_sort_keeps(logits, top_k: int, top_p: float):
    least_of_k = logits.sort(descending=True).values[top_k - 1]
    p = logits.double().masked_fill(logits < least_of_k, -torch.inf).softmax(-1).sort(descending=True).values
    count = int((p.cumsum(-1) - p < top_p).sum())
    kept = logits >= logits.sort(descending=True).values[count - 1]
    draws = 3000
    tokens = sample(logits.expand(draws, -1), [draw(0, draws, top_k=top_k, top_p=top_p)])
    drawn = torch.bincount(torch.tensor(tokens), minlength=len(logits)) > 0
    assert not (drawn & ~kept).any()
    assert drawn.sum() > 0.75 * kept.sum()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "params", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 300, "top_p": 0.9}, {"temperature": 1e-30, "top_p": 0.5}]
)
def test_logits_that_are_not_finite_give_no_token_and_change_no_other_row(bad: float, params: dict):
    logits = torch.randn(12, 4 * CANDIDATES, generator=torch.Generator().manual_seed(1))
    draws = [draw(row, 2, **params) for row in range(0, 8, 2)]
    clean = sample(logits, draws)
    logits[3, 17], logits[9, 5], logits[10] = bad, bad, -torch.inf
    tokens = sample(logits, draws)
    assert [row for row, token in enumerate(tokens) if token == NO_TOKEN] == [3, 9, 10]
    assert all(token == clean[row] for row, token in enumerate(tokens) if token != NO_TOKEN)


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 300, "top_p": 0.9}])
def test_a_step_of_nothing_but_nan_gives_no_token(params: dict):
    assert sample(torch.full((2, 4 * CANDIDATES), torch.nan), [draw(0, 2, **params)]) == [NO_TOKEN] * 2


@pytest.mark.parametrize("shape", [(1, 9), (33, 64), (7, 4099)])
def test_the_best_token_is_torchs_with_ties_infinities_and_nan(shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(-3, 3, shape, generator=generator).float()  # full of ties
    for value in (torch.nan, torch.inf, -torch.inf):
        logits[torch.rand(shape, generator=generator) < 0.01] = value
    assert torch.equal(best(logits), logits.argmax(dim=-1))
    assert torch.equal(best(logits.t()), logits.t().argmax(dim=-1))
    assert best(logits[:0]).shape == (0,)


@pytest.mark.parametrize(
    "params", [{"top_k": 40}, {"top_k": 1000}, {"top_k": 40, "top_p": 0.6}, {"top_k": 9, "min_p": 0.1}]
)
def test_where_few_tokens_are_left_they_are_drawn_from_without_a_full_sort(monkeypatch, params: dict):
    logits = torch.randn(64, 4 * CANDIDATES, generator=torch.Generator().manual_seed(1))
    left = torch.randperm(4 * CANDIDATES, generator=torch.Generator().manual_seed(2))[:30]
    masked = torch.full_like(logits, -torch.inf).index_copy(1, left, logits[:, left])
    sizes: list[int] = []

    def noting(logits, rows, count):
        sizes.append(count)
        return candidates(logits, rows, count)

    candidates = module._from_candidates
    monkeypatch.setattr(module, "_from_candidates", noting)
    draws = [draw(0, 64, **params)]
    tokens = sample(masked, draws)
    assert sizes == [CANDIDATES]
    assert len(set(tokens)) > 5
    assert set(tokens) <= set(left.tolist())
    monkeypatch.setattr(module, "CANDIDATES", 4 * CANDIDATES)
    assert sample(masked, draws) == tokens


def test_a_masked_token_leaves_the_others_as_they_are():
    masked = LOGITS.clone()
    masked[0] = -torch.inf
    assert set(sample(masked.expand(500, -1), [draw(0, 500)])) == set(range(1, 8))


@pytest.mark.parametrize("params", [{}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 900, "top_p": 0.95}, {"top_p": 0.999}])
def test_a_sample_depends_on_its_own_row_alone(params: dict):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(24, 4 * CANDIDATES, generator=generator) * torch.linspace(0.1, 8, 24)[:, None]
    draws = [draw(row, 4, 100 + row, seed=row, choice=row % 2, **params) for row in range(0, 24, 4)]
    together = sample(logits, draws)
    mixed = [d if i % 2 else draw(d.row, 4, 3, temperature=0.3, top_k=2) for i, d in enumerate(draws)]
    among_others = sample(logits, mixed)
    for i, d in enumerate(draws):
        for within in range(4):
            alone = draw(0, 1, d.position + within, d.seed, d.choice, **params)
            assert sample(logits[d.row + within][None], [alone]) == [together[d.row + within]]
        if i % 2:
            assert among_others[d.row : d.row + 4] == together[d.row : d.row + 4]


def test_rows_without_a_draw_stay_greedy():
    tokens = sample(LOGITS.expand(40, -1), [draw(10, 20)])
    assert tokens[:10] == [0] * 10
    assert tokens[30:] == [0] * 10
    assert len(set(tokens[10:30])) > 1


@pytest.mark.parametrize("other", [{"seed": 8}, {"choice": 1}, {"position": 1 << 20}])
def test_seed_choice_and_position_each_change_the_numbers(other: dict):
    first = sample(LOGITS.expand(200, -1), [draw(0, 200)])
    second = sample(LOGITS.expand(200, -1), [draw(0, 200, **other)])
    same = sum(a == b for a, b in zip(first, second))
    assert same < 120


def test_the_random_numbers_are_those_of_every_release():
    """Seeded text must not change between versions: splitmix64, checked against plain integers."""

    def mix(x: int) -> int:
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) % 2**64
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    for seed, choice, position, token in [(0, 0, 0, 0), (123, 2, 4567, 248_000), (-9, 1, 1 << 18, 3)]:
        key = mix((seed + golden) % 2**64)
        key = mix((key + (choice + 1) * golden) % 2**64)
        key = mix((key + (position + 1) * golden) % 2**64)
        expected = ((mix((key + token * golden) % 2**64) >> 11) + 0.5) * 2.0**-53
        keys = row_keys(torch.tensor([seed]), torch.tensor([choice]), torch.tensor([position]))
        assert uniform(keys, torch.tensor([token])).item() == expected


def test_logprobs_are_of_the_distribution_before_temperature():
    expected = LOGITS.log_softmax(-1)
    (own,) = logprobs(LOGITS[None], [0], [3], [2])
    assert math.isclose(own.logprob, expected[3].item(), abs_tol=1e-6)
    assert [token for token, _ in own.top] == [0, 7]
    assert math.isclose(own.top[1][1], expected[7].item(), abs_tol=1e-6)
