"""The drafter's head: best token and log-sum-exp without logits."""

from __future__ import annotations

import pytest
import torch

from kernels.draft_head import reference
from kernels.draft_head.choice import HeadShape, join_candidates
from kernels.draft_head.kernel import Tiling, draft_candidates, draft_head, tiling
from tests.kernels.products import sum_products_in_order

SMALL = Tiling(rows=16, tokens=32, section=64)


def agree(rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32, tile: Tiling = SMALL):
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    got, want = draft_head(hidden, weight, tile=tile), reference.draft_head(hidden, weight)
    assert torch.equal(got.token_ids, want.token_ids)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.log_sum_exp, want.log_sum_exp, rtol=1e-5, atol=1e-4)


def test_the_reference_is_argmax_and_softmax():
    hidden, weight = torch.randn(5, 8), torch.randn(50, 8)
    choice = reference.draft_head(hidden, weight)
    probability, token = (hidden @ weight.t()).softmax(-1).max(-1)
    assert torch.equal(choice.token_ids, token)
    torch.testing.assert_close(choice.probability(), probability)


@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 32, 64), (20, 40, 203), (3, 64, 33)])
def test_sizes_need_not_fit_the_tiles(rows: int, width: int, vocabulary: int):
    agree(rows, width, vocabulary)


def test_half_precision_weights_give_the_same_token():
    agree(4, 32, 100, torch.float16)


def test_logits_are_scaled_and_capped_as_the_checkpoint_wants():
    hidden, weight, shape = torch.randn(3, 32), torch.randn(90, 32), HeadShape(0.5, 4.0)
    logits = 4.0 * torch.tanh(0.5 * (hidden @ weight.t()) / 4.0)
    for way in (reference.draft_head(hidden, weight, shape=shape), draft_head(hidden, weight, shape=shape, tile=SMALL)):
        torch.testing.assert_close(way.probability(), logits.softmax(-1).amax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 17, 33])
def test_every_row_tile_in_use_agrees(rows: int):
    agree(rows, 16, 140, tile=tiling(rows))


def test_the_lowest_of_equal_tokens_wins_within_and_across_sections():
    hidden = torch.ones(1, 16)
    weight = torch.zeros(200, 16)
    weight[[150, 100, 70, 71]] = 1.0
    assert draft_head(hidden, weight, tile=SMALL).token_ids.tolist() == [70]
    assert reference.draft_head(hidden, weight).token_ids.tolist() == [70]


def test_shards_of_the_vocabulary_join_to_the_whole():
    hidden, weight = torch.randn(3, 32), torch.randn(100, 32)
    whole = reference.draft_head(hidden, weight)
    shards = [draft_head(hidden, weight[i : i + 50], first_token=i, tile=SMALL) for i in (0, 50)]
    best = torch.stack([shard.logits for shard in shards]).argmax(0, keepdim=True)
    assert torch.equal(torch.stack([s.token_ids for s in shards]).gather(0, best)[0], whole.token_ids)
    joined = torch.stack([s.log_sum_exp for s in shards]).logsumexp(0)
    torch.testing.assert_close(joined, whole.log_sum_exp, rtol=1e-5, atol=1e-4)


def test_rows_do_not_depend_on_each_other_nor_on_the_tile_that_suits_their_number(monkeypatch: pytest.MonkeyPatch):
    sum_products_in_order(monkeypatch)
    hidden, weight = torch.randn(34, 70), torch.randn(140, 70)
    together = draft_head(hidden, weight)
    assert tiling(34).rows > tiling(17).rows > tiling(1).rows
    for own in (slice(2, 3), slice(5, 22)):
        alone = draft_head(hidden[own], weight)
        assert all(torch.equal(whole[own], part) for whole, part in zip(together, alone))
    best, lone = draft_candidates(hidden[:17], weight, 2), draft_candidates(hidden[2:3], weight, 2)
    assert all(torch.equal(whole[2:3], part) for whole, part in zip(best, lone))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"hidden \(2, 8\) torch.float32 does not fit weight \(9, 7\)"):
        draft_head(torch.zeros(2, 8), torch.zeros(9, 7))


def agree_on_candidates(hidden: torch.Tensor, weight: torch.Tensor, k: int, **options):
    want = reference.draft_candidates(hidden, weight, k, **options)
    got = draft_candidates(hidden, weight, k, tile=SMALL, **options)
    assert torch.equal(got.token_ids, want.token_ids)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.log_sum_exp, want.log_sum_exp, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("rows", "vocabulary", "k"), [(3, 100, 16), (1, 40, 5), (17, 30, 1)])
def test_the_best_candidates_of_each_row_come_in_their_order(rows: int, vocabulary: int, k: int):
    hidden, weight = torch.randn(rows, 16), torch.randn(vocabulary, 16)
    agree_on_candidates(hidden, weight, k, shape=HeadShape(0.7, 30.0), first_token=9)


def test_of_equal_candidates_the_lowest_ids_come_first():
    weight = torch.zeros(150, 16)
    weight[[140, 90, 70, 71]] = 1.0
    weight[[3, 20]] = -0.0
    agree_on_candidates(torch.ones(1, 16), weight, 8)


def test_candidates_of_shards_join_to_those_of_the_whole():
    hidden, weight = torch.randn(3, 16), torch.randn(100, 16)
    hidden[2] = 0.0  # all tokens are equal
    shards = [draft_candidates(hidden, weight[i : i + 50], 4, first_token=i, tile=SMALL) for i in (0, 50)]
    joined, whole = join_candidates(shards), reference.draft_candidates(hidden, weight, 4)
    assert torch.equal(joined.token_ids, whole.token_ids)
    torch.testing.assert_close(joined.log_sum_exp, whole.log_sum_exp, rtol=1e-5, atol=1e-4)


def test_more_candidates_than_tokens_are_refused():
    with pytest.raises(ValueError, match="k is 10: want 1 to 9"):
        draft_candidates(torch.zeros(2, 8), torch.zeros(9, 8), 10)
