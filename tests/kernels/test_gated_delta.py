"""Gated delta rule over verified blocks: outputs, what is kept, and how any prefix that stands reaches the states."""

from __future__ import annotations

import pytest
import torch

from kernels.gated_delta import kernel, reference
from kernels.gated_delta.reference import KeptDelta
from kernels.kept_rows import KeptRows
from verifier_service.model.delta_rule import one_block, one_token, unit

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])
STARTS = torch.tensor([0, 5, 7, 7, 8], dtype=torch.int32)
INTO = (12, 17, 0, 19)  # places where the rows' tokens are kept
TOKENS, PLACES = 8, 24
HEADS, KEY_HEADS, KEY_DIM = 4, 2, 16


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def kept_rows(first=(0, 0, 0, 0), standing=(0, 0, 0, 0), into=INTO) -> KeptRows:
    return KeptRows(ints(*first), ints(*standing), ints(*into))


def nothing_kept(value_dim: int = 32) -> KeptDelta:
    """Places that hold what nobody should read."""
    shapes = (PLACES, KEY_HEADS, KEY_DIM), (PLACES, HEADS), (PLACES, HEADS, value_dim)
    return KeptDelta(*(torch.full(shape, float("nan")) for shape in shapes))


def a_batch(value_dim: int = 32):
    """Rows of five, two, no and one token and two of padding, two key heads for four value heads, in six slots."""
    query, key = unit(torch.randn(2, TOKENS + 2, KEY_HEADS, KEY_DIM)).unbind()
    value = torch.randn(TOKENS + 2, HEADS, value_dim)
    value[TOKENS:] = float("nan")  # padding may hold anything
    log_decay, beta = -torch.rand(TOKENS + 2, HEADS), torch.rand(TOKENS + 2, HEADS)
    memory = torch.randn(6, HEADS, KEY_DIM, value_dim)
    return query * KEY_DIM**-0.5, key, value, log_decay, beta, memory, torch.randperm(6)[:4]


def behind(inputs, state: torch.Tensor, tokens: range) -> torch.Tensor:
    """The state after some of a batch's tokens, by the verifier's own rule."""
    query, key, *rest = inputs
    wide = [x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (query, key)]
    for at in tokens:
        state = one_token(*(*(x[at] for x in (*wide, *rest)), state))[1]
    return state


@WAYS
def test_outputs_and_corrected_values_are_those_of_the_verifiers_block(way):
    *inputs, memory, slots = a_batch()
    kept, before = nothing_kept(), memory.clone()
    got = way.gated_delta_verify(*(*inputs, memory, slots, STARTS, kept, kept_rows()))
    for row, slot in enumerate(slots):
        own = slice(int(STARTS[row]), int(STARTS[row + 1]))
        if own.start < own.stop:
            query, key, value, log_decay, beta = (x[own].transpose(0, 1) for x in inputs)
            wide = (x.repeat_interleave(2, dim=0) for x in (query, key))
            output, _, corrected = one_block(*(*wide, value, log_decay, beta, before[slot]))
            torch.testing.assert_close(got[own].transpose(0, 1), output, rtol=1e-4, atol=1e-5)
            if own.stop - own.start > 1:
                places = slice(INTO[row], INTO[row] + own.stop - own.start)
                torch.testing.assert_close(kept.corrected[places].transpose(0, 1), corrected, rtol=1e-4, atol=1e-5)
                assert torch.equal(kept.key[places], inputs[1][own])
                assert torch.equal(kept.log_decay[places], inputs[3][own])
    written = {place for row, count in ((0, 5), (1, 2)) for place in range(INTO[row], INTO[row] + count)}
    others = [place for place in range(PLACES) if place not in written]
    assert all(part[others].isnan().all() for part in kept), "a row writes to its own places only"


@WAYS
def test_a_token_on_its_own_is_part_of_the_state_at_once_and_of_several_none_is(way):
    *inputs, memory, slots = a_batch()
    before = memory.clone()
    way.gated_delta_verify(*(*inputs, memory, slots, STARTS, nothing_kept(), kept_rows()))
    torch.testing.assert_close(memory[slots[3]], behind(inputs, before[slots[3]], range(7, 8)), rtol=1e-4, atol=1e-5)
    before[slots[3]] = memory[slots[3]]
    assert torch.equal(memory, before)


@WAYS
def test_a_verify_goes_on_behind_what_stands_of_the_block_before_and_writes_it_to_the_state(way):
    """The second step has a row of one token, of three, one without tokens, and a slot that was not in the first."""
    *inputs, memory, slots = a_batch()
    *later, _, _ = a_batch()
    new = torch.tensor([slots[0], slots[1], slots[2], (set(range(6)) - set(slots.tolist())).pop()])
    starts, standing = ints(0, 1, 4, 4, 6), (3, 2, 0, 0)
    want = memory.clone()
    for slot, first, count in ((slots[0], 0, 3), (slots[1], 5, 2), (slots[3], 7, 1)):
        want[slot] = behind(inputs, want[slot], range(first, first + count))
    expected = reference.gated_delta_verify(*(*later, want.clone(), new, starts, nothing_kept(), kept_rows()))
    want[slots[0]] = behind(later, want[slots[0]], range(1))

    kept = nothing_kept()
    way.gated_delta_verify(*(*inputs, memory, slots, STARTS, kept, kept_rows()))
    rows = kept_rows(INTO, standing, (0, 1, 0, 4))
    got = way.gated_delta_verify(*(*later, memory, new, starts, kept, rows))
    torch.testing.assert_close(got[:6], expected[:6], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(memory, want, rtol=1e-4, atol=1e-5)


@WAYS
def test_a_replay_is_as_if_only_the_tokens_that_stand_had_been_run(way):
    *inputs, memory, slots = a_batch()
    kept, rows = nothing_kept(), kept_rows()
    way.gated_delta_verify(*(*inputs, memory, slots, STARTS, kept, rows))
    want = memory.clone()
    want[slots[0]] = behind(inputs, memory[slots[0]], range(4))
    way.gated_delta_replay(kept, memory, slots, rows.into, ints(4, 0, 0, 0))
    torch.testing.assert_close(memory, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(memory[slots[1]], want[slots[1]]), "a row of which nothing stands stays exactly as it was"


@WAYS
def test_states_and_outputs_are_the_same_bits_however_tokens_were_cut_into_blocks(way):
    """At once; in blocks whose ends are drafts that fall; in blocks whose last one is replayed by itself."""
    *inputs, memory, slots = a_batch()
    whole, slot = memory.clone(), slots[:1]
    want = way.gated_delta_advance(*(*inputs, whole, slot, ints(0, 5)))
    for blocks in (((0, 3), (1, 2), (3, 2)), ((0, 5), (4, 1)), ((0, 1), (1, 4))):
        state, kept, standing = memory.clone(), nothing_kept(), 0
        outputs: list[torch.Tensor] = []
        for index, (first, count) in enumerate(blocks):
            if index:
                standing = first - blocks[index - 1][0]
            single = index and blocks[index - 1][1] == 1  # its state has it already
            rows = KeptRows(ints(8 * (index - 1)), ints(0 if single else standing), ints(8 * index))
            own = [x[first : first + count] for x in inputs]
            outputs[first:] = way.gated_delta_verify(*(*own, state, slot, ints(0, count), kept, rows))
        if count > 1:
            way.gated_delta_replay(kept, state, slot, rows.into, ints(count))
        assert torch.equal(torch.stack(outputs), want[:5])
        assert torch.equal(state, whole)


def test_heads_before_tokens_may_be_viewed_as_tokens_before_heads():
    *inputs, memory, slots = a_batch()
    flipped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    got, plain = (
        kernel.gated_delta_advance(*(*own, memory.clone(), slots, STARTS))[:TOKENS] for own in (flipped, inputs)
    )
    assert torch.equal(got, plain)


def test_a_token_does_not_depend_on_how_many_are_verified_nor_on_other_rows():
    *inputs, memory, slots = a_batch()
    kept = nothing_kept()
    all_rows = kernel.gated_delta_verify(*(*inputs, memory, slots, STARTS, kept, kept_rows()))
    one_row = KeptRows(*(part[:1] for part in kept_rows()))
    alone = kernel.gated_delta_verify(*(*inputs, memory, slots[:1], ints(0, 3), kept, one_row))
    assert torch.equal(all_rows[:3], alone[:3])


def test_sizes_that_the_kernel_cannot_do_are_named():
    *inputs, memory, slots = a_batch(value_dim=24)
    with pytest.raises(ValueError, match="value_dim is 24"):
        kernel.gated_delta_verify(*(*inputs, memory, slots, STARTS, nothing_kept(24), kept_rows()))


@WAYS
def test_room_of_another_width_is_named(way):
    *inputs, memory, slots = a_batch()
    with pytest.raises(ValueError, match="does not fit memory"):
        way.gated_delta_verify(*(*inputs, memory, slots, STARTS, nothing_kept(16), kept_rows()))
