"""Elementwise functions over full vectors: the same values, and bits that do not depend on where an entry stands."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from modeling.full_vectors import PIECE, VECTORS, FullVectorGate, FullVectors
from modeling.gates import ClampedGate, silu_gate

ENTRIES = PIECE + 1000


@pytest.mark.parametrize("function", [torch.sigmoid, F.silu, F.softplus, torch.exp])
def test_an_entrys_bits_do_not_depend_on_how_many_there_are(function):
    x, steady = torch.randn(ENTRIES), FullVectors(function)
    whole = steady(x)
    assert torch.allclose(whole, function(x))
    for count in (1, 7, 24, 48, 250, 1000):
        for first in (0, 3, ENTRIES - count):
            assert torch.equal(steady(x[first : first + count]), whole[first : first + count])
    beside = torch.stack([x, x], dim=1)
    for count in (VECTORS, ENTRIES):  # one that fills vectors, and one that does not
        assert torch.equal(steady(beside[:count, 0]), whole[:count])


@pytest.mark.parametrize("function", [torch.sigmoid, F.silu, F.softplus])
def test_torchs_own_do(function):
    x = torch.randn(ENTRIES)
    beside = torch.stack([x, x], dim=1)
    assert not torch.equal(function(beside[:, 0]), function(x))


@pytest.mark.parametrize("gate", [silu_gate, ClampedGate(1.7, 0.5)])
def test_a_gates_bits_depend_on_neither_the_rows_nor_the_width(gate):
    halves = torch.randn(2, 600, 40)
    steady = FullVectorGate(gate)
    whole = steady(torch.cat([halves[0], halves[1]], dim=-1))
    assert torch.allclose(whole, gate(torch.cat([halves[0], halves[1]], dim=-1)))
    for rows, columns in ((slice(5, 6), slice(0, 40)), (slice(0, 33), slice(10, 20)), (slice(0, 600), slice(30, 40))):
        part = torch.cat([halves[0, rows, columns], halves[1, rows, columns]], dim=-1)
        assert torch.equal(steady(part), whole[rows, columns])
