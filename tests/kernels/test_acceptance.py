"""The target's own tokens and how many drafts they confirm, against the verifier's sampling and acceptance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from kernels.acceptance import kernel, reference
from kernels.acceptance.noise import rough_gumbel
from verifier_service.acceptance import accepted_drafts
from verifier_service.sampling.race import row_keys, uniform

SMALL: dict[str, Any] = {"section": 64, "tile": 32}


def a_race(rows: int = 4, vocabulary: int = 150, dtype: torch.dtype = torch.float32):
    keys = row_keys(torch.tensor([7, 7, -3, 2**62])[:rows], torch.arange(rows), torch.tensor([9, 8, 7, 6])[:rows])
    return torch.randn(rows, vocabulary).to(dtype), keys, torch.tensor([0.7, 1.0, 0.0, 2.5], dtype=torch.float64)[:rows]


def test_random_numbers_are_those_of_the_verifiers_sampling_bit_by_bit():
    keys = row_keys(torch.tensor([0, 1, -5, 2**63 - 1]), torch.arange(4), torch.arange(4) * 1000)
    ids = torch.tensor([0, 1, 151_935, 248_319])
    assert torch.equal(reference.uniform(keys[:, None], ids), uniform(keys[:, None], ids))


def test_the_kernels_hash_is_the_references_bit_by_bit():
    """With all logits equal the noise alone decides, and the winner's score is the noise itself."""
    _, keys, _ = a_race()
    even = torch.zeros(4, 150)
    got = kernel.sample(even, keys, torch.ones(4, dtype=torch.float64), **SMALL)
    noise = -torch.log(-torch.log(uniform(keys[:, None], torch.arange(150))))
    assert torch.equal(got[0], noise.argmax(-1))
    torch.testing.assert_close(got[1], noise.amax(-1), rtol=1e-14, atol=0.0)


def test_every_token_hashes_alike():
    """One column at a time, so that each token's noise is seen, not just the winner's."""
    _, keys, _ = a_race()
    one = torch.ones(4, dtype=torch.float64)
    for token in (0, 1, 151_935, 2**31 + 5):
        got = kernel.sample(torch.zeros(4, 1), keys, one, first_token=token, section=16, tile=16)[1]
        want = -torch.log(-torch.log(uniform(keys, torch.tensor(token))))
        torch.testing.assert_close(got, want, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_and_sampled_rows_agree_with_the_reference(dtype: torch.dtype):
    logits, keys, temperatures = a_race(dtype=dtype)
    got = kernel.sample(logits, keys, temperatures, **SMALL)
    want = reference.sample(logits, keys, temperatures)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=0.0)
    assert int(want[0][2]) == int(logits[2].argmax())


def test_shards_of_the_vocabulary_draw_the_same_token():
    logits, keys, temperatures = a_race()
    whole = reference.sample(logits, keys, temperatures)
    left = kernel.sample(logits[:, :70], keys, temperatures, **SMALL)
    right = kernel.sample(logits[:, 70:], keys, temperatures, first_token=70, **SMALL)
    assert torch.equal(torch.where(right[1] > left[1], right[0], left[0]), whole[0])


def test_the_lowest_of_equal_logits_is_the_greedy_token():
    logits = torch.zeros(1, 150)
    logits[0, [140, 100, 70, 71]] = 1.0
    greedy = torch.zeros(1, dtype=torch.float64)
    key = torch.zeros(1, dtype=torch.int64)
    assert kernel.sample(logits, key, greedy, **SMALL)[0].tolist() == [70]
    assert reference.sample(logits, key, greedy)[0].tolist() == [70]


def test_drafts_stand_while_they_equal_the_targets_own_tokens():
    samples = torch.tensor([5, 6, 7, 9, 1, 3, 4])
    tokens = torch.tensor([2, 5, 6, 8, 3, 1, 2])  # three requests of 4, 2 and 1 rows
    starts = torch.tensor([0, 4, 6, 7], dtype=torch.int32)
    want = [accepted_drafts(tokens[a:b].tolist(), samples.tolist(), a) for a, b in ((0, 4), (4, 6), (6, 7))]
    for accepted, following in (
        reference.accept(samples, tokens, starts, longest=4),
        kernel.accept(samples, tokens, starts, longest=4),
    ):
        assert accepted.tolist() == want == [2, 1, 0]
        assert following.tolist() == [7, 3, 4]


def test_a_block_whose_drafts_all_stand_yields_the_sample_after_the_last():
    """Also where the next request's bonus token happens to be that very sample."""
    samples, tokens = torch.tensor([5, 6, 7, 8, 3]), torch.tensor([1, 5, 6, 7, 8])
    accepted, following = kernel.accept(samples, tokens, torch.tensor([0, 4, 5], dtype=torch.int32), longest=4)
    assert (accepted.tolist(), following.tolist()) == ([3, 0], [8, 3])


def test_keys_of_the_wrong_dtype_are_named():
    with pytest.raises(ValueError, match="must be int64"):
        kernel.sample(torch.zeros(1, 4), torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.float64))


WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])


@WAYS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_yield_no_token_and_harm_no_other_row(way: Any, temperature: float):
    logits, keys, _ = a_race(4)
    want = way.sample(logits, keys, torch.full((4,), temperature, dtype=torch.float64))[0]
    logits[0, 70], logits[1, 3], logits[2] = float("nan"), float("inf"), float("-inf")
    got = way.sample(logits, keys, torch.full((4,), temperature, dtype=torch.float64))
    assert got[0].tolist() == [-1, -1, -1, int(want[3])]


@WAYS
def test_a_broken_shard_breaks_the_row_and_an_empty_one_does_not(way: Any):
    logits, keys, temperatures = a_race(3)
    want = way.sample(logits, keys, temperatures)[0]
    logits[0, 100] = float("nan")
    logits[1:, 80:] = float("-inf")
    kept = way.sample(logits[1:, :80], keys[1:], temperatures[1:])[0]
    parts = [way.sample(logits[:, :80], keys, temperatures)]
    parts += [way.sample(logits[:, 80:], keys, temperatures, first_token=80)]
    got = way.join(torch.stack([ids for ids, _ in parts]), torch.stack([scores for _, scores in parts]))[0]
    assert got.tolist() == [-1, *kept.tolist()]
    assert int(want[0]) >= 0


@WAYS
def test_tokens_below_the_threshold_do_not_take_part(way: Any):
    logits, keys, temperatures = a_race()
    thresholds = logits.double().topk(2).values[:, 1] / temperatures
    got = way.sample(logits, keys, temperatures, thresholds=thresholds)[0]
    best = logits.topk(2).indices.tolist()
    assert all(token in own for token, own in zip(got.tolist(), best))
    assert int(got[2]) == best[2][0], "thresholds are not for greedy rows"


def test_rough_noise_is_as_near_to_the_exact_as_it_says():
    """Over random numbers and those at both ends, where 1 - u and u have few bits."""
    ends = torch.tensor([1 << power for power in range(53)])
    bits = torch.cat([torch.randint(0, 1 << 53, (8192 - 159,)), ends - 1, (1 << 53) - ends, (ends * 7) % (1 << 53)])
    got = torch.empty(8192)
    _rough[(1,)](bits, got, SIZE=8192)
    exact = -torch.log(-torch.log1p(-((((1 << 53) - 1) - bits).double() + 0.5) * 2.0**-53))
    exact = torch.where(bits < 1 << 52, -torch.log(-torch.log((bits.double() + 0.5) * 2.0**-53)), exact)
    assert float((got.double() - exact).abs().max()) < 2e-5


@InterpretedFunction
def _rough(bits, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, rough_gumbel(tl.load(bits + at)))
