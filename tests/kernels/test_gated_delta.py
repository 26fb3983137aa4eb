"""Gated delta rule over verified blocks: outputs, what is kept, and the commit of any accepted prefix."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kernels.gated_delta import kernel, reference
from verifier_service.model.delta_rule import one_block, one_token, unit

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])
STARTS = torch.tensor([0, 5, 7, 7, 10], dtype=torch.int32)
TOKENS = 10


def a_batch(value_dim: int = 32):
    """Rows of five, two, no and three tokens and two of padding, two key heads for four value heads, in six slots."""
    heads, key_heads, key_dim = 4, 2, 16
    query, key = unit(torch.randn(2, TOKENS + 2, key_heads, key_dim)).unbind()
    value = torch.randn(TOKENS + 2, heads, value_dim)
    value[TOKENS:] = float("nan")  # padding may hold anything
    log_decay, beta = -torch.rand(TOKENS + 2, heads), torch.rand(TOKENS + 2, heads)
    memory = torch.randn(6, heads, key_dim, value_dim)
    return query * key_dim**-0.5, key, value, log_decay, beta, memory, torch.randperm(6)[:4]


@WAYS
def test_outputs_and_corrected_values_are_those_of_the_verifiers_block(way):
    *inputs, memory, slots = a_batch()
    before = memory.clone()
    got = way.gated_delta_verify(*inputs, memory, slots, STARTS)
    for row, slot in enumerate(slots):
        own = slice(int(STARTS[row]), int(STARTS[row + 1]))
        if own.start < own.stop:
            query, key, value, log_decay, beta = (x[own].transpose(0, 1) for x in inputs)
            wide = (x.repeat_interleave(2, dim=0) for x in (query, key))
            output, decay, corrected = one_block(*(*wide, value, log_decay, beta, memory[slot]))
            for found, want in zip(got, (output, decay, corrected)):
                torch.testing.assert_close(found[own].transpose(0, 1), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(memory, before), "a verify must not write the committed state"


@WAYS
def test_a_commit_is_as_if_only_the_accepted_tokens_had_been_run(way):
    query, key, value, log_decay, beta, memory, slots = a_batch()
    done = way.gated_delta_verify(query, key, value, log_decay, beta, memory, slots, STARTS)
    want, kept = memory.clone(), [5, 1, 0, 0]
    for row, count in enumerate(kept):
        state = memory[slots[row]]
        for at in range(int(STARTS[row]), int(STARTS[row]) + count):
            own_query, own_key = (x[at].repeat_interleave(2, dim=0) for x in (query, key))
            state = one_token(own_query, own_key, value[at], log_decay[at], beta[at], state)[1]
        want[slots[row]] = state
    before = memory.clone()
    way.gated_delta_commit(key, done.decay, done.corrected, memory, slots, STARTS[:-1], torch.tensor(kept))
    torch.testing.assert_close(memory, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(memory[slots[3]], before[slots[3]]), "a row that keeps nothing stays exactly as it was"


@WAYS
def test_a_replay_leaves_the_same_bits_however_tokens_were_cut_into_blocks(way):
    query, key, value, log_decay, beta, memory, slots = a_batch()
    cut_states = []
    for cuts in ((0, 5), (0, 1, 4, 5)):
        state = memory.clone()
        for first, stop in pairwise(cuts):
            row = torch.tensor([first, stop], dtype=torch.int32)
            done = way.gated_delta_verify(query, key, value, log_decay, beta, state, slots[:1], row)
            way.gated_delta_replay(key, log_decay, done.corrected, state, slots[:1], row[:1], row[1:] - row[:1])
        cut_states.append(state)
    assert torch.equal(*cut_states)
    done = way.gated_delta_verify(query, key, value, log_decay, beta, memory, slots, STARTS)
    way.gated_delta_commit(key, done.decay, done.corrected, memory, slots, STARTS[:-1], torch.tensor([5, 0, 0, 0]))
    torch.testing.assert_close(cut_states[0], memory, rtol=1e-4, atol=1e-5)


def test_heads_before_tokens_may_be_viewed_as_tokens_before_heads():
    *inputs, memory, slots = a_batch()
    flipped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    got = kernel.gated_delta_verify(*(*flipped, memory, slots, STARTS))
    plain = kernel.gated_delta_verify(*(*inputs, memory, slots, STARTS))
    assert all(torch.equal(own[:TOKENS], want[:TOKENS]) for own, want in zip(got, plain))


def test_a_token_does_not_depend_on_how_many_are_verified_nor_on_other_rows():
    *inputs, memory, slots = a_batch()
    all_rows = kernel.gated_delta_verify(*(*inputs, memory, slots, STARTS))
    alone = kernel.gated_delta_verify(*(*inputs, memory, slots[:1], torch.tensor([0, 3], dtype=torch.int32)))
    assert torch.equal(all_rows.output[:3], alone.output[:3])


def test_sizes_that_the_kernel_cannot_do_are_named():
    *inputs, memory, slots = a_batch(value_dim=24)
    with pytest.raises(ValueError, match="value_dim is 24"):
        kernel.gated_delta_verify(*(*inputs, memory, slots, STARTS))
