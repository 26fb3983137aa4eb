"""Top-k, top-p and min-p, whole and from shards of the vocabulary, against the verifier's own sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.contracts import SamplingParams
from kernels.acceptance import kernel as acceptance
from kernels.truncation import kernel, reference
from modeling.ranks import RankGroup
from tests.verifier_service.gpu_path.rank_threads import in_turns
from verifier_service.sampling.draw import Draw, draw_rows
from verifier_service.sampling.race import row_keys

VOCABULARY, TILE = 100, 64
WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, VOCABULARY, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.01, 0.5, 0.9, 0.9999]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
)


def tensors(params: list[SamplingParams]) -> tuple[torch.Tensor, ...]:
    """temperatures, top_k, top_p, min_p, [rows] each."""
    return (
        torch.tensor([each.temperature for each in params], dtype=torch.float64),
        torch.tensor([each.top_k for each in params], dtype=torch.int32),
        torch.tensor([each.top_p for each in params], dtype=torch.float64),
        torch.tensor([each.min_p for each in params], dtype=torch.float64),
    )


def a_row(logits: torch.Tensor, way: Any = kernel, **params: Any) -> list[int]:
    """The tokens that stand, of one row at temperature 1."""
    wanted = tensors([SamplingParams(**{"temperature": 1.0, **params})])
    return (logits.double() >= way.truncate(logits[None], *wanted)[0]).nonzero().flatten().tolist()


def the_verifiers_own(logits: torch.Tensor, params: list[SamplingParams]) -> tuple[list[int], torch.Tensor]:
    """A token for each row, and the rows' keys."""
    draws = [Draw(row, 1, 9 + row, seed=5, choice=0, params=each) for row, each in enumerate(params)]
    rows = torch.arange(len(params))
    keys = row_keys(torch.full_like(rows, 5), torch.zeros_like(rows), rows + 9)
    return draw_rows(logits, draws)[1].tolist(), keys


def some_logits(rows: int, coarse: bool) -> torch.Tensor:
    """coarse: with many equal ones, zeros of both signs and -inf among them."""
    logits = torch.randn(rows, VOCABULARY) * 3
    if coarse:
        logits = (logits / 2).round()
        logits[:, 3::17] = float("-inf")
    return logits


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.lists(PARAMS, min_size=2, max_size=2), st.booleans(), st.integers(0, 99))
def test_the_tokens_are_those_of_the_verifiers_sampling(params: list[SamplingParams], coarse: bool, seed: int):
    torch.manual_seed(seed)
    logits = some_logits(len(params), coarse)
    want, keys = the_verifiers_own(logits, params)
    wanted = tensors(params)
    thresholds = kernel.truncate(logits, *wanted, tile=TILE)
    torch.testing.assert_close(thresholds, reference.truncate(logits, *wanted), rtol=1e-14, atol=0.0)
    assert acceptance.sample(logits, keys, wanted[0], thresholds=thresholds)[0].tolist() == want


@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.lists(PARAMS, min_size=2, max_size=2), st.booleans(), st.integers(0, 99), st.sampled_from([2, 8, 24]))
def test_shards_of_the_vocabulary_draw_the_same_tokens(
    params: list[SamplingParams], coarse: bool, seed: int, count: int
):
    """Two ranks of unequal size; what they exchange are candidates, then the best of each."""
    torch.manual_seed(seed)
    logits = some_logits(len(params), coarse)
    want, keys = the_verifiers_own(logits, params)
    wanted = tensors(params)
    parts = [(0, logits[:, :60]), (60, logits[:, 60:])]
    shards, own_shards = (
        reference.Candidates(*map(torch.stack, zip(*[way.candidates(part, wanted[0], count) for _, part in parts])))
        for way in (kernel, reference)
    )
    thresholds, settled = kernel.truncate_shards(shards, *wanted)
    own_thresholds, own_settled = reference.truncate_shards(own_shards, *wanted)
    assert torch.equal(settled, own_settled)
    torch.testing.assert_close(thresholds[settled], own_thresholds[settled], rtol=1e-14, atol=0.0)
    best = [acceptance.sample(part, keys, wanted[0], thresholds=thresholds, first_token=first) for first, part in parts]
    got = acceptance.join(*map(torch.stack, zip(*best)))[0].tolist()
    for each, token, own, known in zip(params, got, want, settled.tolist()):
        assert token == own or not known
        assert known or each.top_p < 1 or each.top_k > count, "only these may have to be gathered"


@WAYS
@pytest.mark.parametrize("coarse", [False, True])
def test_rows_that_candidates_leave_open_are_settled_by_all_shards_together(way: Any, coarse: bool):
    """Some by bits of whole and of half tokens' weights, with min_p, and with a top_k that ends in several equals."""
    params = [
        SamplingParams(5.0, top_p=0.9),
        SamplingParams(1.0, top_p=0.5),
        SamplingParams(2.0, top_p=0.99, min_p=0.2),
        SamplingParams(1.0, top_p=0.8, top_k=4),
        SamplingParams(0.7, top_k=3),
        SamplingParams(0.0, top_p=0.5),
    ]
    logits, wanted = some_logits(len(params), coarse), tensors(params)
    logits[3] = torch.arange(VOCABULARY) // 10  # of ten equals, four are candidates
    parts = logits.chunk(2, dim=1)
    shards = reference.Candidates(*map(torch.stack, zip(*[reference.candidates(part, wanted[0], 4) for part in parts])))
    thresholds, settled = reference.truncate_shards(shards, *wanted)
    assert settled.tolist()[-2:] == [True, True]
    assert not settled[[0, 3]].any()

    def settle(ranks: RankGroup) -> torch.Tensor:
        own = thresholds.clone()
        way.settle_shards(
            parts[ranks.rank], shards, own, settled, *wanted, lambda part: torch.stack(ranks.gather(part))
        )
        return own

    left, right = in_turns(2, settle)
    assert torch.equal(left, right)
    torch.testing.assert_close(left, reference.truncate(logits, *wanted), rtol=1e-14, atol=0.0)


@WAYS
def test_a_shard_names_its_largest_logits_and_what_they_weigh(way: Any):
    logits = some_logits(2, coarse=True)
    temperatures = torch.tensor([0.5, 2.0], dtype=torch.float64)
    found = way.candidates(logits, temperatures, 20)
    assert torch.equal(found.values.sort(descending=True).values, logits.topk(20).values)
    assert torch.equal(found.bound, logits.topk(20).values[:, -1])
    assert torch.equal(found.peak, logits.amax(-1))
    mass = ((logits.double() - logits.amax(-1, keepdim=True)) / temperatures[:, None]).exp().sum(-1)
    torch.testing.assert_close(found.mass, mass, rtol=1e-13, atol=0.0)
    assert way.candidates(logits, temperatures, VOCABULARY).bound.tolist() == [float("-inf")] * 2


@WAYS
def test_equal_logits_stand_or_fall_together(way: Any):
    logits = torch.tensor([1.0, 2.0, -0.0, 2.0, 0.0, -1.0, 1.0])
    assert a_row(logits, way, top_k=1) == [1, 3]
    assert a_row(logits, way, top_k=3) == [0, 1, 3, 6]
    assert a_row(logits, way, top_k=5) == [0, 1, 2, 3, 4, 6], "zeros of both signs are equal"
    assert a_row(logits, way, top_p=0.3) == [1, 3]
    assert a_row(logits, way, min_p=1.0) == [1, 3]


@WAYS
def test_top_p_is_of_what_top_k_left(way: Any):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert a_row(logits, way, top_p=0.79) == [0, 1]
    assert a_row(logits, way, top_p=0.81) == [0, 1, 2]
    assert a_row(logits, way, top_p=0.63, top_k=2) == [0, 1], "of these two the first weighs 0.625"
    assert a_row(logits, way, top_p=0.62, top_k=2) == [0]


@pytest.mark.parametrize("room", [1, 8, 1024])
def test_rows_of_which_too_much_would_be_gathered_are_searched_whole(room: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel, "ROOM", room)
    logits = some_logits(4, coarse=True)
    params: list[dict[str, Any]] = [
        {"top_k": 2},
        {"top_k": 30, "top_p": 0.9},
        {"top_p": 0.4},
        {"top_p": 0.999, "min_p": 0.01},
    ]
    wanted = tensors([SamplingParams(**{"temperature": 1.0, **each}) for each in params])
    got = kernel.truncate(logits, *wanted, tile=32)
    torch.testing.assert_close(got, reference.truncate(logits, *wanted), rtol=1e-14, atol=0.0)


@WAYS
def test_greedy_rows_and_rows_without_truncation_keep_everything(way: Any):
    logits = torch.randn(2, 30)
    params = [SamplingParams(temperature=0.0, top_k=3), SamplingParams(temperature=1.0)]
    assert way.truncate(logits, *tensors(params)).tolist() == [float("-inf")] * 2


def test_a_row_does_not_depend_on_the_others():
    logits = some_logits(3, coarse=False)
    first = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01)
    wanted: Any = tensors([first, SamplingParams(temperature=1.0, top_p=0.8), first])
    together = kernel.truncate(logits, *wanted, tile=TILE)
    for row in range(3):
        own = slice(row, row + 1)
        assert torch.equal(kernel.truncate(logits[own], *(each[own] for each in wanted), tile=TILE), together[own])


def test_arguments_that_do_not_fit_are_named():
    wanted = tensors([SamplingParams(temperature=1.0)])
    with pytest.raises(ValueError, match=r"temperatures \(1,\) torch.float64 must be torch.float64 \[2\]"):
        kernel.truncate(torch.zeros(2, 4), *wanted)
    with pytest.raises(ValueError, match="count is 0"):
        kernel.candidates(torch.zeros(1, 4), wanted[0], 0)
