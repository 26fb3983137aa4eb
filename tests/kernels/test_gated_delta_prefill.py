"""The gated delta rule over chunks of prompts says what transformers' rule says, and moves the states on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from kernels.gated_delta_prefill import kernel, reference
from verifier_service.model.delta_rule import unit

KEY_HEADS, HEADS, KEY_DIM, VALUE_DIM = 1, 2, 16, 32


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def a_prompt(*lengths: int, alike: float = 0.5, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Rows of so many tokens and two of padding, in slots of one more. alike: how much the keys have in common, which
    is what makes corrections large.
    """
    tokens = sum(lengths) + 2
    query, key = unit(torch.randn(2, tokens, KEY_HEADS, KEY_DIM) + alike * torch.randn(KEY_DIM)).unbind()
    value = torch.randn(tokens, HEADS, VALUE_DIM, dtype=dtype)
    value[tokens - 2 :] = float("nan")  # padding may hold anything
    log_decay, beta = -0.2 * torch.rand(tokens, HEADS), torch.rand(tokens, HEADS)
    slots = torch.randperm(len(lengths) + 1)[: len(lengths)]
    memory = torch.randn(len(lengths) + 1, HEADS, KEY_DIM, VALUE_DIM)
    starts = ints(0, *lengths).cumsum(0).int()
    return query * KEY_DIM**-0.5, key, value, log_decay, beta, memory, slots, starts


@pytest.mark.parametrize("tile", [16, 32, 64])
def test_outputs_and_states_are_those_of_transformers_rule(tile: int):
    *inputs, memory, slots, starts = a_prompt(37, 0, 64, 5)
    before = memory.clone()
    got = kernel.gated_delta_prefill(*(*inputs, memory, slots, starts), tile=tile)
    for row, slot in enumerate(slots):
        own = slice(int(starts[row]), int(starts[row + 1]))
        if own.start == own.stop:
            continue
        query, key, value, log_decay, beta = (x[own][None] for x in inputs)
        want, state = torch_chunk_gated_delta_rule(
            *(query * KEY_DIM**0.5, key, value, log_decay, beta),
            initial_state=before[slot][None],
            output_final_state=True,
        )
        assert float((got[own] - want[0]).abs().max()) < 1e-4
        assert float((memory[slot] - state[0]).abs().max()) < 1e-4
        before[slot] = memory[slot]
    assert torch.equal(memory, before), "other slots, and those of empty rows, stay exactly as they were"


@pytest.mark.parametrize("alike", [0.0, 4.0])
def test_it_is_the_rule_token_by_token(alike: float):
    """Keys at right angles correct little; keys nearly alike are the hardest system to solve."""
    *inputs, memory, slots, starts = a_prompt(40, 3, alike=alike)
    want = memory.clone()
    expected = reference.gated_delta_prefill(*(*inputs, want, slots, starts))
    got = kernel.gated_delta_prefill(*(*inputs, memory, slots, starts), tile=32)
    torch.testing.assert_close(got[:43], expected[:43], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(memory, want, rtol=1e-4, atol=1e-5)


def test_a_row_does_not_depend_on_those_beside_it():
    *inputs, memory, slots, starts = a_prompt(9, 20)
    alone = memory.clone()
    together = kernel.gated_delta_prefill(*(*inputs, memory, slots, starts), tile=16)
    own = [x[9:29] for x in inputs]
    assert torch.equal(kernel.gated_delta_prefill(*(*own, alone, slots[1:], ints(0, 20)), tile=16), together[9:29])
    assert torch.equal(alone[slots[1]], memory[slots[1]])


def test_half_precision_agrees_with_the_reference():
    *inputs, memory, slots, starts = a_prompt(20, dtype=torch.float16)
    want = memory.clone()
    expected = reference.gated_delta_prefill(*(*inputs, want, slots, starts))
    got = kernel.gated_delta_prefill(*(*inputs, memory, slots, starts), tile=16)
    torch.testing.assert_close(got[:20], expected[:20], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(memory, want, rtol=1e-2, atol=1e-2)


def test_tokens_may_be_strided():
    *inputs, memory, slots, starts = a_prompt(20)
    flipped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    got, plain = (
        kernel.gated_delta_prefill(*(*own, memory.clone(), slots, starts), tile=16)[:20] for own in (flipped, inputs)
    )
    assert torch.equal(got, plain)


def test_sizes_that_the_kernel_cannot_do_are_named():
    *inputs, memory, slots, starts = a_prompt(3)
    with pytest.raises(ValueError, match="tile is 24"):
        kernel.gated_delta_prefill(*(*inputs, memory, slots, starts), tile=24)
    query, key, value, *gates = inputs
    with pytest.raises(ValueError, match="value_dim is 8"):
        kernel.gated_delta_prefill(*(query, key, value[..., :8], *gates, memory[..., :8], slots, starts))
