"""The candidate selector of DFlash 2, against the published code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kernels.candidate_selector import kernel, reference

VOCABULARY, RANK, HIDDEN, K = 30, 12, 20, 5
WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])


@WAYS
def test_the_path_is_the_published_selectors(way):
    published = pytest.importorskip("dflash.model").CandidateSelector
    config = SimpleNamespace(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, dflash_config={"selector_rank": RANK, "selector_top_k": K}
    )
    selector, hidden, logits = published(config), torch.randn(3, 7, HIDDEN), torch.randn(3, 7, VOCABULARY)
    anchors = torch.tensor([4, 0, 29])
    with torch.inference_mode():
        want, _, _ = selector.select(hidden, logits, anchors, 0.0)
        _, _, q = selector.select(hidden[:1, :1], logits[:1, :1], anchors[:1], 1.0)
        top = logits.flatten(0, 1).topk(K)
        path = way.select_path(
            top.indices,
            top.values,
            selector.hidden_projection(hidden).flatten(0, 1),
            anchors,
            torch.tensor([0, 7, 14, 21]),
            selector.predecessor_codebook.weight,
            selector.successor_codebook.weight,
        )
    assert torch.equal(path.token_ids.view(3, 7), want)
    assert float(path.confidence[0]) == pytest.approx(float(q.max()), rel=1e-4)


def test_ragged_blocks_of_any_size_agree_with_the_reference():
    rows, k, rank = 6, 3, 9
    candidates = torch.stack([torch.randperm(VOCABULARY)[:k] for _ in range(rows)])
    given = (
        candidates,
        torch.randn(rows, k),
        torch.randn(rows, rank),
        torch.tensor([3, 9, 1]),
        torch.tensor([0, 4, 4, 5]),  # the last row is padding
        *torch.randn(2, VOCABULARY, rank),
    )
    want, got = reference.select_path(*given), kernel.select_path(*given)
    assert torch.equal(got.token_ids[:5], want.token_ids[:5])
    torch.testing.assert_close(got.confidence[:5], want.confidence[:5])


@WAYS
def test_the_first_of_equal_candidates_is_chosen(way):
    zeros = torch.zeros(VOCABULARY, 4)
    logits = torch.tensor([[1.0, 2.0, 2.0]])
    path = way.select_path(
        torch.tensor([[7, 9, 8]]), logits, torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0, 1]), zeros, zeros
    )
    assert path.token_ids.tolist() == [9]


def test_shapes_that_do_not_fit_are_named():
    ids, some = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"successors \(9, 5\) must be \[vocabulary, 4\]"):
        kernel.select_path(ids, some, torch.zeros(2, 4), ids[0], ids[0], torch.zeros(9, 4), torch.zeros(9, 5))
