"""The gated norm behind a delta rule against what the verifier's layer does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.gated_norm import kernel, reference

WAYS = pytest.mark.parametrize("way", [reference, kernel], ids=["reference", "kernel"])


@WAYS
@pytest.mark.parametrize(("heads", "dim"), [(3, 16), (8, 24), (10, 128)])
def test_it_is_the_norm_of_each_head_times_the_gate(way: Any, heads: int, dim: int):
    x, weight, gate = torch.randn(4, heads, dim), torch.rand(dim) + 0.5, torch.randn(4, heads * dim) * 3
    want = F.rms_norm(x, (dim,), weight, 1e-6).reshape(4, -1) * F.silu(gate)
    torch.testing.assert_close(way.gated_norm(x, weight, 1e-6, gate), want, rtol=1e-5, atol=1e-6)


def test_float32_outputs_of_the_rule_become_the_gates_dtype():
    x, weight, gate = torch.randn(2, 2, 16), torch.rand(16), torch.randn(2, 32).half()
    got = kernel.gated_norm(x, weight, 1e-6, gate)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, reference.gated_norm(x, weight, 1e-6, gate), rtol=1e-3, atol=1e-4)


def test_a_head_does_not_depend_on_the_other_tokens_nor_on_the_ranks_heads():
    x, weight, gate = torch.randn(3, 20, 16), torch.rand(16), torch.randn(3, 20, 16)
    whole = kernel.gated_norm(x, weight, 1e-6, gate.flatten(1)).view(3, 20, 16)
    part = kernel.gated_norm(x[1:2, 7:10], weight, 1e-6, gate[1:2, 7:10].flatten(1))
    assert torch.equal(part.view(1, 3, 16), whole[1:2, 7:10])


def test_the_gate_may_be_a_part_of_a_projection():
    projected, x, weight = torch.randn(3, 100), torch.randn(3, 2, 16), torch.rand(16)
    got = kernel.gated_norm(x, weight, 1e-6, projected[:, 40:72])
    torch.testing.assert_close(got, reference.gated_norm(x, weight, 1e-6, projected[:, 40:72].clone()))


@WAYS
def test_a_gate_that_does_not_fit_is_named(way: Any):
    with pytest.raises(ValueError, match=r"gate \(1, 8\)"):
        way.gated_norm(torch.zeros(1, 2, 8), torch.zeros(8), 1e-6, torch.zeros(1, 8))
