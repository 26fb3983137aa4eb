"""Gated delta rule over a verified block: outputs, what is kept, and the commit of any accepted prefix."""

from __future__ import annotations

import pytest
import torch

from kernels.gated_delta import kernel, reference
from verifier_service.model.delta_rule import one_block, one_token, unit

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])


def a_block(value_dim: int = 32):
    """Three rows of five tokens, two key heads for four value heads, in three of five slots."""
    rows, heads, key_heads, longest, key_dim = 3, 4, 2, 5, 16
    query, key = unit(torch.randn(2, rows, key_heads, longest, key_dim)).unbind()
    value = torch.randn(rows, heads, longest, value_dim)
    log_decay, beta = -torch.rand(rows, heads, longest), torch.rand(rows, heads, longest)
    memory = torch.randn(rows + 2, heads, key_dim, value_dim)
    slots = torch.randperm(rows + 2)[:rows]
    return query * key_dim**-0.5, key, value, log_decay, beta, memory, slots


@WAYS
def test_outputs_and_corrected_values_are_those_of_the_verifiers_block(way):
    query, key, value, log_decay, beta, memory, slots = a_block()
    before = memory.clone()
    got = way.gated_delta_verify(query, key, value, log_decay, beta, memory, slots, torch.tensor([5, 5, 5]))
    wide_query, wide_key = (x.repeat_interleave(2, dim=1) for x in (query, key))
    for own, want in zip(got, one_block(wide_query, wide_key, value, log_decay, beta, memory[slots])):
        torch.testing.assert_close(own, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(memory, before), "a verify must not write the committed state"


def test_ragged_rows_agree_with_the_reference_and_leave_zeros_behind():
    query, key, value, log_decay, beta, memory, slots = a_block()
    value[1, :, 2:] = float("nan")  # padding may hold anything
    lengths = torch.tensor([5, 2, 0], dtype=torch.int32)
    got = kernel.gated_delta_verify(query, key, value, log_decay, beta, memory, slots, lengths)
    want = reference.gated_delta_verify(query, key, value, log_decay, beta, memory, slots, lengths)
    for own, expected in zip(got, want):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    assert not got.output[2].any()


@WAYS
def test_a_commit_is_as_if_only_the_accepted_tokens_had_been_run(way):
    query, key, value, log_decay, beta, memory, slots = a_block()
    done = way.gated_delta_verify(query, key, value, log_decay, beta, memory, slots, torch.tensor([5, 5, 5]))
    want, kept = memory.clone(), [5, 2, 0]
    for row, count in enumerate(kept):
        state = memory[slots[row]]
        for at in range(count):
            own_query, own_key = (x[row, :, at].repeat_interleave(2, dim=0) for x in (query, key))
            gates = log_decay[row, :, at], beta[row, :, at]
            state = one_token(own_query, own_key, value[row, :, at], *gates, state)[1]
        want[slots[row]] = state
    before = memory.clone()
    way.gated_delta_commit(key, done.decay, done.corrected, memory, slots, torch.tensor(kept))
    torch.testing.assert_close(memory, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(memory[slots[2]], before[slots[2]]), "a row that keeps nothing stays exactly as it was"


def test_tokens_before_heads_may_be_viewed_as_heads_before_tokens():
    query, key, value, log_decay, beta, memory, slots = a_block()
    lengths = torch.tensor([5, 3, 1])
    flipped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value, log_decay, beta)]
    got = kernel.gated_delta_verify(*[*flipped, memory, slots, lengths])
    plain = kernel.gated_delta_verify(query, key, value, log_decay, beta, memory, slots, lengths)
    assert all(torch.equal(own, want) for own, want in zip(got, plain))


def test_a_token_does_not_depend_on_how_many_are_verified():
    query, key, value, log_decay, beta, memory, slots = a_block()
    long = kernel.gated_delta_verify(query, key, value, log_decay, beta, memory, slots, torch.tensor([5, 5, 5]))
    short = kernel.gated_delta_verify(query, key, value, log_decay, beta, memory, slots, torch.tensor([3, 1, 2]))
    assert torch.equal(long.output[0, :, :3], short.output[0, :, :3])


def test_sizes_that_the_kernel_cannot_do_are_named():
    query, key, value, log_decay, beta, memory, slots = a_block(value_dim=24)
    with pytest.raises(ValueError, match="value_dim is 24"):
        kernel.gated_delta_verify(query, key, value, log_decay, beta, memory, slots, torch.tensor([1, 1, 1]))
