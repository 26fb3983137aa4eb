"""Products with packed weights are those with the dequantized ones, and dequantize nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from modeling.experts import ExpertWeights, LoopedExperts, make_experts
from modeling.fixed_linear import fixed_linear
from modeling.gates import silu_gate
from modeling.quantized.packed import BlockPacked, StackedRows

EXPERTS, HIDDEN, WIDTH = 5, 32, 16


def stack(rows: int, columns: int) -> BlockPacked:
    codes = torch.randn(EXPERTS, rows, columns).to(torch.float8_e4m3fn)
    return BlockPacked(codes, None, torch.rand(EXPERTS, rows // 16, columns // 16), (16, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_dequantizes_in_the_dtype_of_its_input(dtype):
    weight, bias, x = stack(48, 32)[0], torch.randn(48, dtype=dtype), torch.randn(3, 32, dtype=dtype)
    got = fixed_linear(weight, bias)(x)
    assert torch.equal(got, F.linear(x, weight.dequantize(dtype), bias))


@pytest.mark.parametrize("tokens", [1, 6])
def test_of_packed_experts_only_the_chosen_are_dequantized(tokens, monkeypatch):
    torch.manual_seed(0)
    gate_up, down = StackedRows([stack(WIDTH, HIDDEN), stack(WIDTH, HIDDEN)]), stack(HIDDEN, WIDTH)
    plain = ExpertWeights(gate_up.dequantize(torch.float32), down.dequantize(torch.float32))
    x, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, 2)
    chosen = torch.tensor([[1, 3]]).repeat(tokens, 1)
    want = LoopedExperts(plain, silu_gate)(x, weights, chosen)
    seen: list[tuple[int, ...]] = []
    dequantize = BlockPacked.dequantize

    def watched(self: BlockPacked, dtype: torch.dtype) -> torch.Tensor:
        seen.append(self.shape)
        return dequantize(self, dtype)

    monkeypatch.setattr(BlockPacked, "dequantize", watched)
    torch.testing.assert_close(make_experts(ExpertWeights(gate_up, down))(x, weights, chosen), want)
    assert sorted(seen) == 4 * [(WIDTH, HIDDEN)] + 2 * [(HIDDEN, WIDTH)]  # of two experts, one matrix at a time
