"""The short convolution over blocks, and how the inputs that stand reach its states."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.kept_rows import KeptRows
from kernels.short_conv import kernel, reference

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])
STARTS = torch.tensor([0, 5, 7, 7, 8], dtype=torch.int32)
LENGTHS, STANDING = (5, 2, 0, 1), (4, 2, 0, 1)
TOKENS, PLACES, INTO = 8, 40, (20, 25, 0, 27)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def a_batch(channels: int = 70):
    """Rows of five, two, no and one token, then two of padding, behind four, two, no and one token that stand; a
    convolution of width four, slots of five.
    """
    mixed, weight = torch.randn(TOKENS + 2, channels), torch.randn(channels, 4)
    mixed[TOKENS:] = float("nan")  # padding may hold anything
    kept = torch.randn(PLACES, channels)
    rows = KeptRows(ints(3, 7, 0, 9), ints(*STANDING), ints(*INTO))
    return mixed, weight, torch.randn(5, 3, channels), ints(4, 0, 3, 1), kept, rows


def histories(state: torch.Tensor, slots: torch.Tensor, kept: torch.Tensor, rows: KeptRows) -> list[torch.Tensor]:
    """What stands before each row, the state's inputs included."""
    own = zip(slots.tolist(), rows.first.tolist(), rows.standing.tolist())
    return [torch.cat([state[slot], kept[first : first + count]]) for slot, first, count in own]


def check_outputs(got, mixed, weight, before) -> None:
    for row, history in enumerate(before):
        first, stop = int(STARTS[row]), int(STARTS[row + 1])
        if stop > first:
            inputs = torch.cat([history[-3:], mixed[first:stop]])[None].transpose(1, 2)
            want = F.silu(F.conv1d(inputs, weight[:, None], groups=mixed.shape[1]))[0].t()
            torch.testing.assert_close(got[first:stop], want, rtol=1e-4, atol=1e-5)


@WAYS
@pytest.mark.parametrize("standing", [STANDING, (1, 0, 0, 0)])
def test_a_verify_is_torchs_grouped_convolution_behind_what_stands_which_reaches_the_states(way, standing):
    mixed, weight, state, slots, kept, rows = a_batch()
    rows = rows._replace(standing=ints(*standing))
    before, room = histories(state, slots, kept, rows), kept.clone()
    want = state.clone()
    for row, slot in enumerate(slots.tolist()):
        certain = torch.cat([before[row], mixed[7:8]]) if LENGTHS[row] == 1 else before[row]
        want[slot] = certain[-3:]
    check_outputs(way.short_conv_verify(mixed, weight, state, slots, STARTS, kept, rows), mixed, weight, before)
    assert torch.equal(state, want)
    for row in (0, 1):
        room[INTO[row] : INTO[row] + LENGTHS[row]] = mixed[STARTS[row] : STARTS[row + 1]]
    assert torch.equal(kept, room), "a row of several tokens is kept, each in its own places"


def test_a_row_may_be_longer_than_a_program_takes_at_a_time():
    mixed, weight, state, slots, kept, rows = a_batch()
    mixed, count = torch.randn(19, 70), 19
    one = KeptRows(*(part[:1] for part in rows))
    got, want = (
        way.short_conv_verify(mixed, weight, state.clone(), slots[:1], ints(0, count), kept.clone(), one)
        for way in (kernel, reference)
    )
    torch.testing.assert_close(got, want)


@WAYS
def test_tokens_that_are_certain_move_the_states_on(way):
    mixed, weight, state, slots, *_ = a_batch()
    before = [state[slot].clone() for slot in slots]
    want = state.clone()
    for row, slot in enumerate(slots.tolist()):
        want[slot] = torch.cat([state[slot], mixed[STARTS[row] : STARTS[row + 1]]])[-3:]
    check_outputs(way.short_conv_advance(mixed, weight, state, slots, STARTS), mixed, weight, before)
    assert torch.equal(state, want)


def test_rows_may_all_be_empty():
    mixed, weight, state, slots, kept, rows = a_batch(channels=20)
    nothing, before = torch.zeros(5, dtype=torch.int32), (state.clone(), kept.clone())
    kernel.short_conv_verify(mixed, weight, state, slots, nothing, kept, rows)
    kernel.short_conv_advance(mixed, weight, state, slots, nothing)
    assert all(torch.equal(*pair) for pair in zip((state, kept), before))


@WAYS
@pytest.mark.parametrize("count", [[5, 2, 0, 0], [1, 1, 0, 4]])
def test_a_replay_leaves_the_last_inputs_that_stand(way, count: list[int]):
    _, _, state, slots, kept, rows = a_batch()
    standing = ints(*count)
    before = histories(state, slots, kept, rows._replace(standing=standing))
    want = state.clone()
    for slot, history in zip(slots.tolist(), before):
        want[slot] = history[-3:]
    way.short_conv_replay(kept, state, slots, rows.first, standing)
    assert torch.equal(state, want)


def test_half_precision_agrees_with_the_reference():
    *batch, rows = (x.half() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in a_batch(20))
    mixed, weight, state, slots, kept = batch
    got, want = (
        way.short_conv_verify(mixed, weight, state.clone(), slots, STARTS, kept.clone(), rows)
        for way in (kernel, reference)
    )
    torch.testing.assert_close(got[:TOKENS], want[:TOKENS])


@WAYS
def test_a_weight_of_another_width_is_named(way):
    mixed, weight, state, slots, kept, rows = a_batch()
    with pytest.raises(ValueError, match="weight"):
        way.short_conv_verify(mixed, weight[:, 1:], state, slots, STARTS, kept, rows)
