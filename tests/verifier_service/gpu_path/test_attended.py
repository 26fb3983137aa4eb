"""Steps of many rows attend in pieces, to the bits that they would have in one launch."""

from __future__ import annotations

import pytest
import torch

from kernels.paged_attention.kernel import Tiling, paged_attention
from kernels.paged_batch import PagedBatch
from tests.kernels.batches import BLOCK_TOKENS, a_batch
from tests.kernels.products import sum_products_in_order
from verifier_service.model.device.attended import attended

SMALL = Tiling(rows=16, tokens=16, warps=4, stages=2)
ROWS = [2, 9, 0, 1]


def test_pieces_of_a_step_have_the_whole_steps_bits(monkeypatch: pytest.MonkeyPatch):
    sum_products_in_order(monkeypatch)
    batch = a_batch(ROWS, [37, 20, 5, 1])
    query = torch.randn(sum(ROWS), 2, 16)
    keys, values = torch.randn(2, int(batch.block_tables.max()) + 1, BLOCK_TOKENS, 1, 16).unbind()

    def attend(own: torch.Tensor, seen: PagedBatch) -> torch.Tensor:
        return paged_attention(own, keys, values, seen, scaling=0.25, split_tokens=16, sliding_window=18, tile=SMALL)

    whole, cut = (attended(batch, len(query), 16, most) for most in (len(query), 4))
    assert (len(whole.pieces), len(cut.pieces)) == (1, 3)
    assert torch.equal(cut.over(query, attend), whole.over(query, attend))


def test_a_step_whose_contexts_are_not_cut_is_one_piece():
    assert len(attended(a_batch(ROWS, [37, 20, 5, 1]), sum(ROWS), None, 4).pieces) == 1
