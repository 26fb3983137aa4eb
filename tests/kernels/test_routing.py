"""Choosing experts, in a kernel and by the routing that models use."""

from __future__ import annotations

import pytest
import torch

from kernels.routing import kernel, reference
from modeling.routing import SigmoidTopK, SoftmaxTopK

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])


def same(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The same experts with the same weights, in any order."""
    order, other = got[1].long().sort(), want[1].long().sort()
    assert torch.equal(order.values, other.values)
    torch.testing.assert_close(got[0].gather(1, order.indices), want[0].gather(1, other.indices))


@WAYS
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(6, 2), (60, 10)])
def test_the_best_of_a_softmax_are_chosen(way, experts: int, top_k: int, normalized: bool):
    logits = torch.randn(5, experts)
    same(way.softmax_top_k(logits, top_k, normalized=normalized), SoftmaxTopK(top_k, normalized)(logits))


@WAYS
@pytest.mark.parametrize(("groups", "best_groups"), [(1, 1), (4, 2), (3, 2)])
@pytest.mark.parametrize("normalized", [True, False])
def test_the_best_of_corrected_sigmoids_in_the_best_groups_are_chosen(
    way, groups: int, best_groups: int, normalized: bool
):
    logits, correction = torch.randn(5, 24), torch.randn(24) / 4
    route = SigmoidTopK(correction, 4, groups, best_groups, normalized, scale=2.5)
    got = way.sigmoid_top_k(
        logits, correction, 4, groups=groups, best_groups=best_groups, normalized=normalized, scale=2.5
    )
    same(got, route(logits))


@WAYS
def test_of_equal_scores_the_lowest_expert_is_first(way):
    logits = torch.zeros(1, 12)
    logits[0, [3, 7, 9]] = 1.0
    weights, chosen = way.softmax_top_k(logits, 4, normalized=True)
    assert chosen.tolist() == [[3, 7, 9, 0]]
    assert weights[0, 0] == weights[0, 2]


def test_both_ways_agree_in_order_and_dtype():
    logits = torch.randn(4, 40)
    got, want = (way.softmax_top_k(logits, 8, normalized=True) for way in (kernel, reference))
    assert torch.equal(got[1], want[1])
    assert got[1].dtype == want[1].dtype == torch.int32
    torch.testing.assert_close(got[0], want[0])


@WAYS
def test_tokens_beyond_the_count_choose_nobody(way):
    logits, count = torch.randn(4, 8), torch.tensor([3], dtype=torch.int32)
    weights, chosen = way.softmax_top_k(logits, 2, normalized=True, count=count)
    assert chosen[3].tolist() == [-1, -1]
    assert weights[3].tolist() == [0.0, 0.0]
    assert torch.equal(chosen[:3], way.softmax_top_k(logits[:3], 2, normalized=True)[1])


@WAYS
def test_groups_that_do_not_fit_are_named(way):
    rule = {"groups": 5, "best_groups": 2, "normalized": True, "scale": 1.0}
    with pytest.raises(ValueError, match="2 of 5 groups of 24 experts"):
        way.sigmoid_top_k(torch.zeros(1, 24), torch.zeros(24), 2, **rule)
    with pytest.raises(ValueError, match="of which 9 can be chosen"):
        way.softmax_top_k(torch.zeros(1, 8), 9, normalized=True)
