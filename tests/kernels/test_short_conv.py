"""The short convolution over a verified block, and the commit of its accepted prefix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.short_conv import kernel, reference

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])


def a_block(channels: int = 300):
    """Three rows of five tokens, a convolution of width four, in three of five slots."""
    mixed, weight = torch.randn(3, 5, channels), torch.randn(channels, 4)
    return mixed, weight, torch.randn(5, 3, channels), torch.tensor([4, 0, 3])


@WAYS
def test_it_is_torchs_grouped_convolution_of_state_and_inputs(way):
    mixed, weight, state, slots = a_block()
    before = state.clone()
    got = way.short_conv_verify(mixed, weight, state, slots, torch.tensor([5, 5, 5]))
    inputs = torch.cat([state[slots], mixed], dim=1).transpose(1, 2)
    want = F.silu(F.conv1d(inputs, weight[:, None], groups=300)).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(state, before), "a verify must not write the committed state"


@WAYS
def test_padding_is_zero_whatever_it_holds(way):
    mixed, weight, state, slots = a_block()
    mixed[1, 2:] = float("nan")
    got = way.short_conv_verify(mixed, weight, state, slots, torch.tensor([5, 2, 0]))
    assert not got[1, 2:].any()
    assert not got[2].any()
    assert got.isfinite().all()


@WAYS
@pytest.mark.parametrize("kept", [[5, 2, 0], [1, 3, 4]])
def test_a_commit_leaves_the_last_inputs_that_were_kept(way, kept: list[int]):
    mixed, _, state, slots = a_block()
    want = state.clone()
    for row, count in enumerate(kept):
        want[slots[row]] = torch.cat([state[slots[row]], mixed[row, :count]])[-3:]
    way.short_conv_commit(mixed, state, slots, torch.tensor(kept))
    assert torch.equal(state, want)


def test_half_precision_agrees_with_the_reference():
    mixed, weight, state, slots = (x.half() if x.is_floating_point() else x for x in a_block(channels=20))
    lengths = torch.tensor([5, 4, 3], dtype=torch.int32)
    got = kernel.short_conv_verify(mixed, weight, state, slots, lengths)
    torch.testing.assert_close(got, reference.short_conv_verify(mixed, weight, state, slots, lengths))


@WAYS
def test_a_weight_of_another_width_is_named(way):
    mixed, weight, state, slots = a_block()
    with pytest.raises(ValueError, match="weight"):
        way.short_conv_verify(mixed, weight[:, 1:], state, slots, torch.tensor([5, 5, 5]))
