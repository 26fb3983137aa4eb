"""Attention of draft blocks over their contexts in the pool."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.block_attention import kernel, reference
from kernels.block_attention.batch import BlockBatch

LONGEST, WINDOW, KV_HEADS = 4, 40, 2
STRIDE = WINDOW + LONGEST
MASKS = [
    {},
    {"causal": True},
    {"sliding_window": 9},
    {"sliding_window": 9, "causal": True},
    {"sliding_window": 3},
]


def a_batch(rows: list[int], held: list[int], stale: int = 0) -> tuple[BlockBatch, torch.Tensor]:
    """Blocks in slots of their own, last first; contexts that end at base + stale, in random order. And positions."""
    count = len(rows)
    positions = torch.full((count * STRIDE,), 1 << 40)
    first, bases = [STRIDE * (count - 1 - block) for block in range(count)], []
    for block in range(count):
        base = 3 + held[block] - stale
        order = torch.randperm(held[block])
        positions[first[block] : first[block] + held[block]] = order + 3
        bases.append(base)
    starts = torch.tensor([0, *rows]).cumsum(0)
    slots, lengths, places = (torch.tensor(values) for values in (first, held, bases))
    return BlockBatch(starts, slots, lengths, places, LONGEST, WINDOW), positions


def inputs(batch: BlockBatch, heads: int = 4, dim: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    torch.manual_seed(3)
    query = torch.randn(int(batch.starts[-1]), heads, dim).to(dtype)
    return query, torch.randn(batch.blocks * STRIDE, 2, KV_HEADS, dim).to(dtype)


def compare(
    batch: BlockBatch, positions: torch.Tensor, tolerance: float = 1e-5, heads: int = 4, dim: int = 16, **options
):
    query, pool = inputs(batch, heads, dim)
    want = reference.block_attention(query, pool, positions, batch, scaling=0.3, **options)
    for spread in (False, True):
        got = kernel.block_attention(
            query, pool, positions, batch, scaling=0.3, section_rows=64, spread=spread, **options
        )
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_the_reference_is_torchs_attention_for_a_block_without_masks():
    batch, positions = a_batch([3], [10])
    query, pool = inputs(batch)
    keys, values = pool[:13].repeat_interleave(2, dim=2).permute(1, 2, 0, 3)
    want = F.scaled_dot_product_attention(query.transpose(0, 1)[None], keys[None], values[None], scale=0.3)
    got = reference.block_attention(query, pool, positions, batch, scaling=0.3)
    torch.testing.assert_close(got, want[0].transpose(0, 1))


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_ragged_blocks_agree_with_the_reference_whatever_they_may_see(options: dict[str, Any]):
    compare(*a_batch([4, 0, 2, 1], [40, 5, 21, 1], stale=1), **options)


@pytest.mark.parametrize(("heads", "dim"), [(6, 24), (2, 64), (16, 16)])
def test_groups_and_head_sizes_that_are_no_powers_of_two_agree(heads: int, dim: int):
    compare(*a_batch([4, 3], [12, 30]), heads=heads, dim=dim)


def test_stale_rows_are_not_even_read():
    batch, positions = a_batch([4], [30], stale=12)
    query, pool = inputs(batch)
    want = kernel.block_attention(query, pool, positions, batch, scaling=0.3)
    hidden = positions[:30] >= batch.bases[0]
    assert int(hidden.sum()) == 12
    pool[:30][hidden] = float("nan")
    assert torch.equal(kernel.block_attention(query, pool, positions, batch, scaling=0.3), want)


def test_a_block_without_context_sees_itself():
    compare(*a_batch([4, 2], [0, 8]))


def long_batch(rows: list[int], held: list[int]) -> tuple[BlockBatch, torch.Tensor]:
    batch, _ = a_batch(rows, [0] * len(rows))
    size = 204
    first = torch.arange(len(rows)) * size
    positions = torch.cat([torch.randperm(size) for _ in rows])
    return (
        replace(
            batch, first_rows=first, held=torch.tensor(held), bases=torch.full_like(first, 150), longest_context=200
        ),
        positions,
    )


def test_sections_give_the_same_bits_in_one_program_or_in_many_and_agree_with_the_reference():
    batch, positions = long_batch([4, 2, 0], [200, 61, 0])
    query = torch.randn(6, 4, 16)
    pool = torch.randn(len(positions), 2, KV_HEADS, 16)
    options: dict[str, Any] = {"scaling": 0.3, "section_rows": 64, "sliding_window": 120}
    one, many = (
        kernel.block_attention(query, pool, positions, batch, spread=spread, **options) for spread in (False, True)
    )
    torch.testing.assert_close(
        one, reference.block_attention(query, pool, positions, batch, **options), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(one, many)


def test_a_blocks_result_does_not_depend_on_the_others():
    batch, positions = a_batch([4, 2], [40, 21])
    query, pool = inputs(batch)
    together = kernel.block_attention(query, pool, positions, batch, scaling=0.3)
    alone = BlockBatch(torch.tensor([0, 2]), batch.first_rows[1:], batch.held[1:], batch.bases[1:], LONGEST, WINDOW)
    own = kernel.block_attention(query[4:], pool, positions, alone, scaling=0.3, spread=False)
    assert torch.equal(own, together[4:])


def test_half_precision_agrees_with_the_reference():
    batch, positions = a_batch([4, 2], [40, 21])
    query, pool = inputs(batch, dtype=torch.float16)
    got = kernel.block_attention(query, pool, positions, batch, scaling=0.3)
    want = reference.block_attention(query, pool, positions, batch, scaling=0.3)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)


def test_shapes_that_do_not_fit_are_named():
    batch, positions = a_batch([4], [10])
    query, pool = inputs(batch)
    with pytest.raises(ValueError, match=r"positions \(3,\) must be \[44\]"):
        kernel.block_attention(query, pool, positions[:3], batch, scaling=0.3)
    with pytest.raises(ValueError, match="do not describe 1 blocks"):
        kernel.block_attention(query, pool, positions, replace(batch, held=batch.starts), scaling=0.3)
    with pytest.raises(ValueError, match="section_rows is 100: want a multiple"):
        kernel.block_attention(query, pool, positions, batch, scaling=0.3, section_rows=100)
