"""A plan as tensors."""

from __future__ import annotations

import torch

from verifier_service.model.kv_cache import BlockTables
from verifier_service.model.step import StepBuilder
from verifier_service.plan import StepPlan, VerifyRow


def test_short_rows_are_padded_with_a_token_of_their_own():
    tables = BlockTables(slots=3, max_blocks=4, block_tokens=4, blocks=3)
    for slot in range(3):
        tables.append(slot, slot)
    builder = StepBuilder(tables, {}, {}, None, max_context=16, dtype=torch.float32, device="cpu")
    rows = tuple(VerifyRow(slot, 0, tuple(range(count))) for slot, count in enumerate((2, 3, 1)))
    window = builder.build(StepPlan(1, verify=rows)).verify
    assert window is not None
    assert window.gather is not None
    assert window.scatter is not None
    assert window.gather.tolist() == [0, 1, 0, 2, 3, 4, 5, 5, 5]
    assert window.scatter.tolist() == [0, 1, 3, 4, 5, 6]
