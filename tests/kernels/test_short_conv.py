"""The short convolution over a verified block, and the commit of its accepted prefix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.short_conv import kernel, reference

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])
STARTS = torch.tensor([0, 5, 7, 7, 11], dtype=torch.int32)
LENGTHS = (5, 2, 0, 4)


def a_batch(channels: int = 300):
    """Rows of five, two, no and four tokens, then two of padding; a convolution of width four, slots of five."""
    mixed, weight = torch.randn(13, channels), torch.randn(channels, 4)
    return mixed, weight, torch.randn(5, 3, channels), torch.tensor([4, 0, 3, 1])


@WAYS
def test_it_is_torchs_grouped_convolution_of_state_and_inputs(way):
    mixed, weight, state, slots = a_batch()
    before = state.clone()
    mixed[11:] = float("nan")  # padding may hold anything
    got = way.short_conv_verify(mixed, weight, state, slots, STARTS)
    for row, (own, slot) in enumerate(zip(mixed.split([*LENGTHS, 2]), slots)):
        if LENGTHS[row]:
            inputs = torch.cat([state[slot], own])[None].transpose(1, 2)
            want = F.silu(F.conv1d(inputs, weight[:, None], groups=300))[0].t()
            first = int(STARTS[row])
            torch.testing.assert_close(got[first : first + LENGTHS[row]], want, rtol=1e-4, atol=1e-5)
    assert torch.equal(state, before), "a verify must not write the committed state"


def test_rows_may_all_be_empty():
    mixed, weight, state, slots = a_batch(channels=20)
    kernel.short_conv_verify(mixed, weight, state, slots, torch.zeros(5, dtype=torch.int32))


@WAYS
@pytest.mark.parametrize("kept", [[5, 2, 0, 0], [1, 1, 0, 4]])
def test_a_commit_leaves_the_last_inputs_that_were_kept(way, kept: list[int]):
    mixed, _, state, slots = a_batch()
    want = state.clone()
    for first, slot, count in zip(STARTS, slots, kept):
        want[slot] = torch.cat([state[slot], mixed[first : first + count]])[-3:]
    way.short_conv_commit(mixed, state, slots, STARTS[:-1], torch.tensor(kept))
    assert torch.equal(state, want)


def test_half_precision_agrees_with_the_reference():
    mixed, weight, state, slots = (x.half() if x.is_floating_point() else x for x in a_batch(channels=20))
    got = kernel.short_conv_verify(mixed, weight, state, slots, STARTS)
    want = reference.short_conv_verify(mixed, weight, state, slots, STARTS)
    torch.testing.assert_close(got[:11], want[:11])


@WAYS
def test_a_weight_of_another_width_is_named(way):
    mixed, weight, state, slots = a_batch()
    with pytest.raises(ValueError, match="weight"):
        way.short_conv_verify(mixed, weight[:, 1:], state, slots, STARTS)
