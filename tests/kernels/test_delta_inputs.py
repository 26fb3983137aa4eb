"""Queries, keys and gates of the delta rule against what the verifier's layer makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.delta_inputs import kernel, reference
from kernels.gated_delta import kernel as gated_delta
from verifier_service.model.delta_rule import unit

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])
HEADS, KEY_HEADS, KEY_DIM, VALUE_DIM = 4, 2, 8, 16
SHAPE = {"key_heads": KEY_HEADS, "key_dim": KEY_DIM}


def a_step(tokens: int = 3) -> tuple[torch.Tensor, ...]:
    """convolved, a, b, negative_rate, dt_bias; a and b are parts of one projection."""
    convolved = torch.randn(tokens, 2 * KEY_HEADS * KEY_DIM + HEADS * VALUE_DIM)
    a, b = (torch.randn(tokens, 2 * HEADS) * 3).split(HEADS, dim=1)
    return convolved, a, b, -torch.rand(HEADS) * 4, torch.randn(HEADS)


@WAYS
def test_they_are_the_verifiers_own(way: Any):
    convolved, a, b, rate, dt_bias = a_step()
    got = way.delta_inputs(convolved, a, b, rate, dt_bias, **SHAPE)
    width = KEY_HEADS * KEY_DIM
    query, key, value = convolved.split([width, width, HEADS * VALUE_DIM], dim=-1)
    want = (
        unit(query.view(3, KEY_HEADS, KEY_DIM)) * KEY_DIM**-0.5,
        unit(key.view(3, KEY_HEADS, KEY_DIM)),
        value.view(3, HEADS, VALUE_DIM),
        F.softplus(a + dt_bias) * rate,
        torch.sigmoid(b),
    )
    for own, expected in zip(got, want):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)
    assert got.value.data_ptr() == convolved[:, 2 * width :].data_ptr(), "values are not copied"


def test_decays_are_exact_far_out_on_both_sides():
    convolved, _, b, _, _ = a_step(4)
    a = torch.tensor([-60.0, -18.0, 18.0, 90.0])[:, None].repeat(1, HEADS)
    got = kernel.delta_inputs(convolved, a, b, -torch.ones(HEADS), torch.zeros(HEADS), **SHAPE)
    want = -F.softplus(a.double(), threshold=1e9)
    torch.testing.assert_close(got.log_decay.double(), want, rtol=1e-6, atol=0.0)


def test_the_delta_rule_takes_them_as_they_are():
    convolved, a, b, rate, dt_bias = a_step()
    rows: Any = torch.tensor([1, 0]), torch.tensor([0, 2, 3])
    own, plain = (way.delta_inputs(convolved, a, b, rate, dt_bias, **SHAPE) for way in (kernel, reference))
    before = torch.randn(2, HEADS, KEY_DIM, VALUE_DIM)
    states = [before.clone() for _ in range(2)]
    got, want = (gated_delta.gated_delta_advance(*(*made, state, *rows)) for made, state in zip((own, plain), states))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_a_token_does_not_depend_on_the_others():
    convolved, a, b, rate, dt_bias = a_step()
    whole = kernel.delta_inputs(convolved, a, b, rate, dt_bias, **SHAPE)
    own = slice(1, 2)
    for part, every in zip(kernel.delta_inputs(convolved[own], a[own], b[own], rate, dt_bias, **SHAPE), whole):
        assert torch.equal(part, every[own])


@WAYS
def test_channels_that_do_not_fit_are_named(way: Any):
    convolved, a, b, rate, dt_bias = a_step()
    with pytest.raises(ValueError, match=r"convolved \(3, 95\) must be \[3, 2 x 2 x 8 \+ 4 x value_dim\]"):
        way.delta_inputs(convolved[:, 1:], a, b, rate, dt_bias, **SHAPE)
