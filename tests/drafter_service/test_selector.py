"""The selector as it is served with torch's operations takes the path that the kernels' reference takes."""

from __future__ import annotations

import pytest
import torch

from drafter_service.selector import CandidateSelector, FusedSelector
from kernels.candidate_selector.reference import select_path
from modeling.dflash import DFlash2

VOCABULARY, HIDDEN, K = 30, 20, 5


def a_selector() -> FusedSelector:
    torch.manual_seed(2)
    selector = CandidateSelector(HIDDEN, VOCABULARY, DFlash2(2, 4, 12, K))
    for parameter in selector.parameters():
        torch.nn.init.normal_(parameter)
    return FusedSelector(selector)


@pytest.mark.parametrize("counts", [[1], [4, 1, 7, 2]])
@torch.inference_mode()
def test_blocks_of_any_length_side_by_side_get_the_path_and_the_confidence_of_the_reference(counts: list[int]) -> None:
    selector, rows = a_selector(), sum(counts)
    hidden, logits = torch.randn(rows, HIDDEN), torch.randn(rows, VOCABULARY)
    top = logits.topk(K)
    anchors = list(range(7, 7 + len(counts)))
    starts = torch.tensor([0, *counts]).cumsum(0)
    codebooks = selector.predecessors, selector.successors
    given = selector.project(hidden), torch.tensor(anchors), starts
    right = select_path(top.indices, top.values, *given, *codebooks)
    tokens, confidence = selector.choose(hidden, top.indices, top.values, anchors, counts)
    assert tokens == right.token_ids.tolist()
    assert confidence == pytest.approx(right.confidence.tolist(), rel=1e-4)
    if rows > 1:
        assert tokens != top.indices[:, 0].tolist(), "the selector is not heard"
