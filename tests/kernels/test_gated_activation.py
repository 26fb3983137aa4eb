"""The gate of an MLP against the gates that the models are built with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.gated_activation import kernel, reference
from modeling.gates import ClampedGate, silu_gate

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])


@WAYS
@pytest.mark.parametrize("width", [5, 64, 1500])
def test_silu_gates_are_the_models_own(way: Any, width: int):
    gate_up = torch.randn(3, 2 * width) * 4
    torch.testing.assert_close(way.gated_activation(gate_up), silu_gate(gate_up.clone()), rtol=1e-5, atol=1e-6)


@WAYS
def test_clamped_gates_are_the_models_own_on_both_sides_of_the_limit(way: Any):
    gate_up = torch.randn(3, 40) * 10
    want = ClampedGate(alpha=1.702, limit=7.0)(gate_up.clone())
    torch.testing.assert_close(way.gated_activation(gate_up, (1.702, 7.0)), want, rtol=1e-5, atol=1e-6)


def test_half_precision_is_rounded_once():
    gate_up = (torch.randn(2, 64) * 4).half()
    got = kernel.gated_activation(gate_up)
    assert torch.equal(got, silu_gate(gate_up.double()).half())


def test_a_token_does_not_depend_on_the_others_nor_on_the_ranks_share():
    gate_up = torch.randn(4, 2, 96)
    whole = kernel.gated_activation(gate_up.flatten(1))
    part = kernel.gated_activation(gate_up[2:3, :, 32:64].reshape(1, 64))
    assert torch.equal(part, whole[2:3, 32:64])


def test_the_input_may_be_a_view_and_stays_as_it_is():
    both = torch.randn(3, 50)
    before = both.clone()
    got = kernel.gated_activation(both[:, 10:])
    torch.testing.assert_close(got, reference.gated_activation(both[:, 10:].clone()))
    assert torch.equal(both, before)


@WAYS
def test_an_odd_width_is_named(way: Any):
    with pytest.raises(ValueError, match=r"gate_up \(1, 3\) must be"):
        way.gated_activation(torch.zeros(1, 3))
