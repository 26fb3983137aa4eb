"""From requests to tokens: ids, positions, cache rows, lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.step_inputs import kernel, reference

BLOCK_TOKENS = 4
WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])


def ints(values: list[Any]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@WAYS
def test_every_token_gets_its_place_and_padding_none(way):
    tables = ints([[9, 9, 9], [5, 7, 9], [2, 9, 9]])
    got = way.step_inputs(
        *(ints([11, -2, 13, 14, 99, 99]), ints([3, 0, 0]), ints([0, 2, 4, 4]), ints([1, 2, 0]), tables),
        torch.tensor([70, 71]),
        block_tokens=BLOCK_TOKENS,
    )
    assert got.token_ids.tolist() == [11, 71, 13, 14, 0, 0]
    assert got.positions.tolist() == [3, 4, 0, 1, 0, 0]
    assert got.cache_rows.tolist() == [23, 28, 8, 9, -1, -1]
    assert got.context_lengths.tolist() == [5, 2, 0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=80), st.integers(0, 30))
def test_ragged_batches_agree_with_the_reference(requests, padding):
    counts, starts = [count for count, _ in requests], [start for _, start in requests]
    bounds = [sum(counts[:r]) for r in range(len(counts) + 1)]
    arguments = (
        torch.randint(-4, 50, (bounds[-1] + padding,), dtype=torch.int32),
        *(ints(starts), ints(bounds), ints(list(range(len(counts))))),
        *(torch.randint(0, 99, (len(counts), 16), dtype=torch.int32), torch.randint(0, 50, (4,))),
    )
    got = kernel.step_inputs(*arguments, block_tokens=BLOCK_TOKENS)
    want = reference.step_inputs(*arguments, block_tokens=BLOCK_TOKENS)
    assert all(torch.equal(own, expected) for own, expected in zip(got, want))


@WAYS
def test_requests_that_do_not_fit_are_named(way):
    with pytest.raises(ValueError, match="query_starts"):
        way.step_inputs(ints([1]), ints([0]), ints([0]), ints([0]), ints([[0]]), torch.zeros(1), block_tokens=4)
